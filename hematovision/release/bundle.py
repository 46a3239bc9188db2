"""A bundle: the folder in which a trained model is handed out.

=======================  ==================================================================================
``model.tflite``         pixels to probabilities in float32, the backbone's scaling included
``model-int8.tflite``    the same in int8, where it was exported: smaller and faster, nearly as good
``model.keras``          the same for who trains on, where it was exported
``model.json``           all else: the classes in order, how a cell is cut out of a picture, how
                         probabilities are calibrated, when a cell is left to a person, where the model
                         comes from and how well it does, and the hash of every file
``MODEL_CARD.md``        what the model is for and what it is not for, written from the run's facts
``DATA_SHEET.md``        what it was trained and tested on
=======================  ==================================================================================

Whatever else lies in the folder is none of its business and stays when a bundle is written anew.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from ai_edge_litert.interpreter import Interpreter

from hematovision.classes import BY_NAME, EIGHT
from hematovision.config import BACKBONE_NAMES, model_folder, project_root
from hematovision.errors import ConfigError, HematoVisionError
from hematovision.files import explain_os_error
from hematovision.release.litert import start_interpreter

Precision = Literal["float32", "int8"]

MODEL_FILE = "model.tflite"
INT8_FILE = "model-int8.tflite"
KERAS_FILE = "model.keras"
CARD_FILE = "model.json"
MODEL_CARD_FILE = "MODEL_CARD.md"
DATA_SHEET_FILE = "DATA_SHEET.md"
MODEL_FILES: dict[Precision, str] = {"float32": MODEL_FILE, "int8": INT8_FILE}
PURPOSE = "for research and teaching, not for clinical use"

FORMAT = 2
"""Of the folder; a change that older code would misread asks for a new number. Format 1 held one model."""

_DRAWN_FROM = ("full", "quick")  # profiles whose final model may be used where none is released


def __getattr__(name: str) -> Any:
    # on demand: writing a bundle takes TensorFlow, reading one must not
    if name == "export_bundle":
        return importlib.import_module("hematovision.release.export").export_bundle
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


class BundleError(HematoVisionError):
    """A released model that is missing, damaged, or not what it says it is."""


@dataclass(frozen=True)
class Thresholds:
    """When a cell is left to a person.

    Attributes
    ----------
    confidence : float
        Least probability of the named class, 0 to 1. The default is a convention, not a measurement:
        below 0.7 the other classes together hold more than 30 %.
    sharpness : float
        Least `hematovision.release.predict.sharpness`, at least 0. The default is met by 99.8 % of
        the cells of the Kaggle set's training images and by every cell of the Barcelona set that was
        looked at, and missed by half of the latter once blurred by 4 % of the cell's width: it
        stops what is grossly out of focus, and nothing else.
    """

    confidence: float = 0.7
    sharpness: float = 0.0025

    @property
    def reasons(self) -> dict[str, str]:
        """Say in words what each value means, for who reads the card."""
        others = f"{100 * (1 - self.confidence):.0f} %"
        return {
            "confidence": f"below it the other classes together hold more than {others}: a convention, "
            "not a measurement",
            "sharpness": "variance of the Laplacian over that of the grey values; below it a cell is "
            "grossly out of focus",
        }


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle, checked.

    Attributes
    ----------
    folder : Path
    precision : {"float32", "int8"}
        What ``model`` computes in.
    model : bytes
        The LiteRT model: float32 (1, input_size, input_size, 3), RGB 0 to 255, to float32 (1, C), and
        to an activation map (1, h, w, C) where it has one.
    sha256 : str
        Of ``model``.
    precisions : tuple of str
        Those that the folder holds.
    has_map : bool
        Whether the model tells where it looked.
    classes : tuple of str
        Names of `hematovision.classes`, in the order of the model's output.
    input_size : int
        In pixels.
    cell_size : int
        Side in pixels at which cells are cut before they are scaled to ``input_size``, as in training.
    crop_margin : float
        Share of the cell's longer side kept around it.
    temperature : float
        Logarithms of probabilities are divided by it (Guo et al. 2017); 1 leaves them as they are.
    thresholds : Thresholds
    backbone, weights : str
        Name of the network, and what its training started from.
    provenance : dict
        Profile, data set, key of the data, code version, and what else the run tells of itself.
    metrics : dict
        Scores with their intervals.
    """

    folder: Path
    precision: Precision
    model: bytes = field(repr=False)
    sha256: str
    precisions: tuple[Precision, ...]
    has_map: bool
    classes: tuple[str, ...]
    input_size: int
    cell_size: int
    crop_margin: float
    temperature: float
    thresholds: Thresholds
    backbone: str
    weights: str
    provenance: dict[str, Any]
    metrics: dict[str, Any]

    @property
    def title(self) -> str:
        """One line that tells this model from others: backbone, profile and the start of the hash."""
        profile = self.provenance.get("profile")
        kind = "" if self.precision == "float32" else f", {self.precision}"
        return f"{self.backbone}{f', profile {profile}' if profile else ''}{kind}, {self.sha256[:12]}"


def find_bundle() -> Path:
    """Return the folder of the model that is used where none is named.

    The first of the project's ``models/released``, ``models/full/final`` and ``models/quick/final`` that
    holds a bundle: a quick run, which is a demonstration, never takes the place of the real study.

    Raises
    ------
    BundleError
        If there is none.
    """
    models = project_root() / "models"
    for folder in (models / "released", *(model_folder(profile) / "final" for profile in _DRAWN_FROM)):
        if (folder / CARD_FILE).is_file():
            return folder
    raise BundleError(
        f"there is no trained model in {models}", "run `make report` first, or name one with --model DIR"
    )


def load_bundle(folder: Path | str | None = None, precision: Precision = "float32") -> Bundle:
    """Read a bundle and check all that is known of it and of the one model that is asked for.

    Parameters
    ----------
    folder : Path, optional
        `find_bundle` chooses unless given.
    precision : {"float32", "int8"}

    Raises
    ------
    BundleError
        Naming the file and what is wrong: missing, not JSON, of another format, a class that is
        unknown or named twice, a value of the wrong type or out of range, a model that is not the
        one the card names, or whose shapes do not fit.
    ConfigError
        If there is no such precision.
    """
    if precision not in get_args(Precision):
        raise ConfigError(f"there is no precision '{precision}'", f"use {' or '.join(get_args(Precision))}")
    folder = Path(folder) if folder is not None else find_bundle()
    card = _open_card(folder)
    files = _read_files(card)
    precisions = tuple(p for p in get_args(Precision) if MODEL_FILES[p] in files)
    if precision not in precisions:
        raise BundleError(
            f"{folder} holds no {precision} model", f"use {' or '.join(precisions) or 'another'}"
        )
    name = MODEL_FILES[precision]
    content = _read_file(folder / name, files[name])
    bundle = _read_card(card, folder, precision, precisions, content)
    _check_shapes(bundle)
    return bundle


def verify_bundle(folder: Path | str) -> None:
    """Check every file that a bundle's ``model.json`` names, and that each LiteRT model loads.

    Raises
    ------
    BundleError
        At the first that is missing, truncated or not what the card says.
    """
    folder = Path(folder)
    files = _read_files(_open_card(folder))
    for name, stamp in files.items():
        _read_file(folder / name, stamp)
    for precision, name in MODEL_FILES.items():
        if name in files:
            load_bundle(folder, precision)


def read_keras_file(folder: Path | str) -> tuple[Path, Bundle]:
    """Return where a bundle's Keras model lies, its hash checked, and the bundle.

    Raises
    ------
    BundleError
        If the bundle has none, or it is not the one the card names.
    """
    folder = Path(folder)
    files = _read_files(_open_card(folder))
    if KERAS_FILE not in files:
        raise BundleError(f"{folder} holds no {KERAS_FILE}", "export the model with it")
    _read_file(folder / KERAS_FILE, files[KERAS_FILE])
    return folder / KERAS_FILE, load_bundle(folder)


def _open_card(folder: Path) -> _Card:
    path = folder / CARD_FILE
    if not path.is_file():
        raise BundleError(f"{folder} holds no model ({CARD_FILE} is missing)", "name the folder of a bundle")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BundleError(str(explain_os_error(error, path))) from error
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not JSON", "export the model again") from error
    card = _Card(values, path)
    if card.get(int, "format") not in (1, FORMAT):
        raise BundleError(
            f"{path} is of format {values['format']}, this version reads formats 1 and {FORMAT}",
            "install the version of hematovision that wrote it",
        )
    return card


@dataclass(frozen=True)
class _Stamp:
    """What a card says of a file; the number of bytes is None where it says nothing."""

    sha256: str
    size: int | None = None


def _read_files(card: _Card) -> dict[str, _Stamp]:
    if card.values["format"] == 1:
        return {MODEL_FILE: _Stamp(card.get(str, "model", "sha256"))}
    files = card.get(dict, "files")
    for name in files:
        if Path(name).name != name:  # a card must not make us read elsewhere
            raise card.wrong(f"'files' names {name!r}, which is not a file of this folder")
    return {
        name: _Stamp(card.get(str, "files", name, "sha256"), card.get(int, "files", name, "bytes"))
        for name in files
    }


def _read_file(path: Path, stamp: _Stamp) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BundleError(str(explain_os_error(error, path))) from error
    if stamp.size is not None and len(content) != stamp.size:
        raise BundleError(
            f"{path} is damaged: it has {len(content)} bytes and should have {stamp.size}",
            "copy the folder again",
        )
    if sha256_of(content) != stamp.sha256:
        raise BundleError(
            f"{path} is damaged or not the file that {CARD_FILE} names", "copy the folder again"
        )
    return content


class _Card:
    """Typed access to a card whose every value may be missing or something else."""

    def __init__(self, values: Any, path: Path) -> None:
        self.values, self.path = values, path

    def wrong(self, what: str) -> BundleError:
        return BundleError(f"{self.path}: {what}", "export the model again")

    def get(self, kind: type, *keys: str) -> Any:
        """Return a value that stands under some keys, of one type."""
        value = self.values
        for key in keys:
            if not isinstance(value, dict) or key not in value:
                raise self.wrong(f"'{'.'.join(keys)}' is missing")
            value = value[key]
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise self.wrong(f"'{'.'.join(keys)}' is not a {_SPOKEN[kind]}")
        return value

    def number(self, kind: type, low: float, high: float, *keys: str) -> Any:
        """Return a number in a range, both ends included."""
        value = self.get(kind, *keys)
        if not (math.isfinite(value) and low <= value <= high):
            raise self.wrong(f"'{'.'.join(keys)}' is {value}, it must lie from {low:g} to {high:g}")
        return value


_SPOKEN: dict[type, str] = {
    int: "whole number",
    float: "number",
    str: "text",
    list: "list",
    dict: "table of values",
}


def _read_card(
    card: _Card, folder: Path, precision: Precision, precisions: tuple[Precision, ...], content: bytes
) -> Bundle:
    backbone = card.get(str, "backbone")
    if backbone not in BACKBONE_NAMES:
        raise card.wrong(f"'{backbone}' is no backbone, those are {', '.join(BACKBONE_NAMES)}")
    return Bundle(
        folder,
        precision,
        content,
        sha256_of(content),
        precisions,
        _read_has_map(card),
        _read_classes(card),
        card.number(int, 16, 1024, "input", "size"),
        card.number(int, 16, 1024, "input", "cell_size"),
        card.number(float, 0, 2, "input", "crop_margin"),
        card.number(float, 0.01, 100, *_TEMPERATURE[card.values["format"]]),
        Thresholds(
            card.number(float, 0, 1, "thresholds", "confidence"),
            card.number(float, 0, 1000, "thresholds", "sharpness"),
        ),
        backbone,
        card.get(str, "weights"),
        card.get(dict, "provenance"),
        card.get(dict, "metrics"),
    )


_TEMPERATURE = {1: ("temperature",), FORMAT: ("calibration", "temperature")}


def _read_has_map(card: _Card) -> bool:
    if card.values["format"] == 1:
        return False
    outputs = card.get(list, "outputs")
    names = [output.get("name") if isinstance(output, dict) else None for output in outputs]
    if names not in (["probabilities"], ["probabilities", "activation_map"]):
        raise card.wrong("'outputs' must be probabilities, and an activation_map or nothing else")
    return len(names) == 2


def _read_classes(card: _Card) -> tuple[str, ...]:
    classes = card.get(list, "classes")
    unknown = [name for name in classes if not isinstance(name, str) or name not in BY_NAME]
    if unknown:
        raise card.wrong(f"{unknown[0]!r} is not a cell class, those are {', '.join(EIGHT)}")
    if len(classes) < 2 or len(set(classes)) != len(classes):
        raise card.wrong("'classes' must name at least two classes, each once")
    return tuple(classes)


def _check_shapes(bundle: Bundle) -> None:
    path = bundle.folder / MODEL_FILES[bundle.precision]
    interpreter = open_model(bundle.model, path)
    size, count = bundle.input_size, len(bundle.classes)
    outputs = sorted(interpreter.get_output_details(), key=lambda output: len(output["shape"]))
    wrong = _wrong_shape(interpreter.get_input_details(), [[1, size, size, 3]])
    if wrong:
        raise BundleError(f"the input of {path} {wrong}", "export the model again")
    wanted: list[list[int | None]] = [[1, count], [1, None, None, count]]
    wrong = _wrong_shape(outputs, wanted[: 1 + bundle.has_map])
    if wrong:
        raise BundleError(f"the output, for {count} classes, of {path} {wrong}", "export the model again")


def _wrong_shape(details: list[dict[str, Any]], wanted: list[list[int | None]]) -> str:
    """Say what is wrong with a model's inputs or outputs, "" if nothing; None stands for any size."""
    shapes = [detail["shape"].tolist() for detail in details]
    fits = len(shapes) == len(wanted) and all(
        len(shape) == len(want) and all(w in (None, s) for s, w in zip(shape, want, strict=True))
        for shape, want in zip(shapes, wanted, strict=True)
    )
    if fits and all(detail["dtype"] is np.float32 for detail in details):
        return ""

    def told(all_shapes: list[Any]) -> str:
        return " and ".join(str(shape).replace("None", "any") for shape in all_shapes)

    return f"should be float32 {told(wanted)}, it is {told(shapes)}"


def open_model(content: bytes, path: Path) -> Interpreter:
    """Make a model ready to run.

    Parameters
    ----------
    content : bytes
    path : Path
        Where it was read, for the message.

    Raises
    ------
    BundleError
        If it is no LiteRT model, or needs operations that LiteRT alone does not have.
    """
    try:
        return start_interpreter(content)
    except (ValueError, RuntimeError) as error:
        raise BundleError(f"{path} is not a model that LiteRT can run", "export the model again") from error


def sha256_of(content: bytes) -> str:
    """Return the SHA-256 of bytes as 64 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()
