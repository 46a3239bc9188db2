"""Drawing a stained blood smear: shapes, stains, cells, and the microscope's camera."""
