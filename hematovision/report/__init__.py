"""From notebooks to a report: the runner, the figures and the pages."""
