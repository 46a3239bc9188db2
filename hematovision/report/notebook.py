"""What the runner knows of a notebook without running it: its source and its parameters."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hematovision.config import Profile
from hematovision.errors import ConfigError, HematoVisionError
from hematovision.files import content_key, explain_os_error

TAG = "parameters"
SPECIAL = ("profile", "data_dir", "backbone")
"""Parameters that are not values of a profile: its name, the data folder, the backbone's name."""


def read_cells(path: Path | str) -> list[dict[str, Any]]:
    """Return a notebook's cells, the source of each joined into one text.

    Raises
    ------
    HematoVisionError
        If the file can't be read or is no notebook.
    """
    path = Path(path)
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        return [{**cell, "source": "".join(cell["source"])} for cell in cells]
    except OSError as error:
        raise explain_os_error(error, path) from error
    except (ValueError, KeyError, TypeError) as error:
        raise HematoVisionError(f"{path.name} is not a notebook ({error})", "restore the file") from error


def source_key(path: Path | str) -> str:
    """Return a key of what a notebook does: kinds, sources and tags of its cells, but no outputs."""
    return content_key([(c["cell_type"], c["source"], sorted(_tags(c))) for c in read_cells(path)])


def read_parameters(path: Path | str) -> dict[str, Any]:
    """Return the names and default values of a notebook's ``parameters`` cell.

    Parameters
    ----------
    path : Path or str

    Returns
    -------
    dict
        In the order in which they stand in the cell.

    Raises
    ------
    ConfigError
        If not exactly one code cell is tagged ``parameters``, or it holds anything but
        ``name = literal`` lines. papermill would only warn, and run with the defaults.
    """
    path = Path(path)
    cells = [c for c in read_cells(path) if c["cell_type"] == "code" and TAG in _tags(c)]
    if len(cells) != 1:
        raise ConfigError(
            f"{path.name} has {len(cells) or 'no'} cell{'s' if len(cells) > 1 else ''} tagged '{TAG}'",
            f"tag exactly one code cell '{TAG}'",
        )
    try:
        statements = ast.parse(cells[0]["source"]).body
        return dict(_assignment(statement) for statement in statements)
    except (SyntaxError, ValueError) as error:
        raise ConfigError(
            f"the parameters cell of {path.name} can't be read ({error})", "write 'name = literal' lines only"
        ) from error


def _tags(cell: Mapping[str, Any]) -> list[str]:
    return list(cell.get("metadata", {}).get("tags", []))


def _assignment(statement: ast.stmt) -> tuple[str, Any]:
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target, value = statement.targets[0], statement.value
    elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
        target, value = statement.target, statement.value
    else:
        raise ValueError(f"line {statement.lineno} is no assignment")
    if not isinstance(target, ast.Name):
        raise ValueError(f"line {statement.lineno} assigns to no plain name")
    try:
        return target.id, ast.literal_eval(value)
    except ValueError:
        raise ValueError(f"the value of {target.id} is no literal") from None


def bind_parameters(path: Path | str, profile: Profile, backbone: str = "") -> dict[str, Any]:
    """Return the value that a run passes for each parameter of a notebook.

    ``data_dir`` stays ``""``: the folder travels in ``HEMATOVISION_DATA``, so that no machine's
    path is printed in a page and moving the images changes nothing.

    Parameters
    ----------
    path : Path or str
        The notebook.
    profile : Profile
    backbone : str, optional
        If given, per-backbone entries of the profile become this backbone's.

    Raises
    ------
    ConfigError
        If a parameter is neither a value of the profile nor one of `SPECIAL`.
    """
    values = profile.for_backbone(backbone) if backbone else profile.to_dict()
    values |= {"profile": profile.name, "data_dir": ""} | ({"backbone": backbone} if backbone else {})
    names = list(read_parameters(path))
    unknown = [name for name in names if name not in values]
    if unknown:
        raise ConfigError(
            f"{Path(path).name} has a parameter '{unknown[0]}' that no profile knows",
            "name it as in profiles/*.yaml, or move it out of the parameters cell",
        )
    return {name: values[name] for name in names}
