"""The eight cell classes, in one table.

Order is fixed: it is the order of the columns of every probability matrix. The first four are the
classes of the Kaggle set; all eight are those of the Barcelona (PBC) set.
"""

from __future__ import annotations

from dataclasses import dataclass

from hematovision.errors import DataError


@dataclass(frozen=True)
class CellClass:
    """One kind of cell.

    Attributes
    ----------
    name : str
        Lower-case standard name, as written in every table.
    code : str
        Short code for narrow columns.
    colour : str
        ``#rrggbb`` used for this class in every figure (readable on white, distinct for the
        common colour-vision deficiencies: Okabe and Ito 2008).
    is_white : bool
        Whether it counts in the denominator of a differential.
    reference : tuple of float or None
        Adult reference range in percent of white cells, as in common textbook tables (Dacie and
        Lewis, Practical Haematology); a laboratory sets its own. None where no range applies.
    loinc : str or None
        LOINC code of the quantity reported for it: cells per 100 leukocytes, manual count where
        the code system has one.
    aliases : tuple of str
        Folder names that other sets use for it.
    """

    name: str
    code: str
    colour: str
    is_white: bool
    reference: tuple[float, float] | None
    loinc: str | None
    aliases: tuple[str, ...] = ()


CLASSES: tuple[CellClass, ...] = (
    CellClass("eosinophil", "EO", "#D55E00", True, (1.0, 6.0), "714-6", ("eosinophils",)),
    CellClass("lymphocyte", "LY", "#0072B2", True, (20.0, 45.0), "737-7", ("lymphocytes",)),
    CellClass("monocyte", "MO", "#009E73", True, (2.0, 10.0), "744-3", ("monocytes",)),
    CellClass("neutrophil", "NE", "#CC79A7", True, (40.0, 75.0), "23761-0", ("neutrophils", "sne", "bne")),
    CellClass("basophil", "BA", "#5B4FA8", True, (0.0, 2.0), "707-0", ("basophils",)),
    CellClass("erythroblast", "NRBC", "#A6761D", False, None, "19048-8", ("erythroblasts",)),
    CellClass(
        "ig",
        "IG",
        "#8C2D04",
        True,
        (0.0, 1.0),
        "38518-7",
        ("immature granulocyte", "immature_granulocyte", "immature granulocytes"),
    ),
    CellClass("platelet", "PLT", "#666666", False, None, None, ("platelets", "thrombocyte")),
)

EIGHT: tuple[str, ...] = tuple(c.name for c in CLASSES)
FOUR: tuple[str, ...] = EIGHT[:4]
COLOURS: dict[str, str] = {c.name: c.colour for c in CLASSES}
BY_NAME: dict[str, CellClass] = {c.name: c for c in CLASSES}

_LOOKUP = {key: c.name for c in CLASSES for key in (c.name, c.code.lower(), *c.aliases)}


def parse_label(text: str) -> str:
    """Return the standard class name for a folder name or label.

    Parameters
    ----------
    text : str
        For example ``"EOSINOPHIL"``, ``"Eosinophils"`` or ``"IG"``.

    Raises
    ------
    DataError
        If no class is called so.
    """
    name = _LOOKUP.get(text.strip().lower())
    if name is None:
        raise DataError(f"'{text}' is not a cell class", f"known classes are {', '.join(EIGHT)}")
    return name
