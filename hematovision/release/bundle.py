"""A bundle: the folder in which a trained model is handed out.

It holds two files. ``model.tflite`` maps pixels to probabilities, the backbone's scaling included.
``model.json`` says everything else: the classes in order, how a cell is cut out of a picture, how
probabilities are calibrated, when a cell is left to a person, where the model comes from and how well
it does.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter
from numpy.typing import NDArray

from hematovision.classes import BY_NAME, EIGHT
from hematovision.config import BACKBONE_NAMES, model_folder, project_root
from hematovision.errors import HematoVisionError
from hematovision.files import atomic_path, explain_os_error, write_json
from hematovision.quiet import silence

MODEL_FILE = "model.tflite"
CARD_FILE = "model.json"
PURPOSE = "for research and teaching, not for clinical use"

_FORMAT = 1
"""Of the folder; a change that older code would misread asks for a new number."""

_TOLERANCE = 1e-4
"""Largest difference of a probability between Keras and LiteRT: both compute in float32 but add in another
order, which gives differences near 1e-6; one wrong operation gives far more than this."""

_THREADS = 2
_DRAWN_FROM = ("full", "quick")  # profiles whose final model may be used where none is released


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
    model : bytes
        The LiteRT model: float32 (1, input_size, input_size, 3), RGB 0 to 255, to float32 (1, C).
    sha256 : str
        Of ``model``.
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
    model: bytes = field(repr=False)
    sha256: str
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
        return f"{self.backbone}{f', profile {profile}' if profile else ''}, {self.sha256[:12]}"


# -- writing -------------------------------------------------------------------------------------


def export_bundle(
    model: Any,
    folder: Path | str,
    *,
    classes: Sequence[str],
    input_size: int,
    crop_margin: float,
    backbone: str,
    weights: str,
    provenance: Mapping[str, Any],
    metrics: Mapping[str, Any],
    temperature: float = 1.0,
    thresholds: Thresholds | None = None,
    cell_size: int | None = None,
) -> Path:
    """Convert a trained model to LiteRT and write its bundle, as a whole or not at all.

    Parameters
    ----------
    model : keras.Model
        float32 images (B, input_size, input_size, 3), RGB 0 to 255, to probabilities (B, C);
        computing in float32.
    folder : Path
        A bundle that stood there is replaced.
    classes : sequence of str
        In the order of the model's output.
    input_size : int
        In pixels.
    crop_margin : float
        As the cells of the training were cut.
    backbone, weights : str
        A name of `hematovision.config.BACKBONE_NAMES`, and what the training started from.
    provenance : mapping
        JSON-like: ``profile``, ``dataset``, ``data_key``, ... The code's version is added.
    metrics : mapping
        JSON-like scores with their intervals.
    temperature : float
        Fitted on validation cells.
    thresholds : Thresholds, optional
    cell_size : int, optional
        Side of the training's crops before they were scaled; ``input_size`` unless given.

    Returns
    -------
    Path
        ``folder``.

    Raises
    ------
    BundleError
        If the model's shapes do not fit the classes or the size, a value is out of range, or the
        converted model does not give the same probabilities.
    HematoVisionError
        If the folder can't be written.
    """
    folder, thresholds = Path(folder), thresholds or Thresholds()
    expected = (input_size, input_size, 3), (len(classes),)
    shapes = tuple(model.input_shape[1:]), tuple(model.output_shape[1:])
    if shapes != expected:
        raise BundleError(
            f"the model maps {shapes[0]} to {shapes[1]}",
            f"pictures of {input_size} pixels and {len(classes)} classes need {expected[0]} to {expected[1]}",
        )
    card = {
        "format": _FORMAT,
        "purpose": PURPOSE,
        "classes": list(classes),
        "input": {
            "size": input_size,
            "cell_size": cell_size or input_size,
            "crop_margin": float(crop_margin),
            "pixels": "RGB from 0 to 255 as float32; the backbone's scaling is part of the model",
        },
        "output": "probabilities in the order of classes",
        "temperature": float(temperature),
        "thresholds": {**asdict(thresholds), "reasons": thresholds.reasons},
        "backbone": backbone,
        "weights": weights,
        "provenance": {"version": importlib.metadata.version("hematovision"), **provenance},
        "metrics": dict(metrics),
    }
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        with silence():
            model.export(str(temporary / MODEL_FILE), format="litert", verbose=False)
        content = (temporary / MODEL_FILE).read_bytes()
        card["model"] = {"file": MODEL_FILE, "bytes": len(content), "sha256": _sha256(content)}
        write_json(temporary / CARD_FILE, card)
        _check_conversion(model, load_bundle(temporary))
    return folder


def _check_conversion(model: Any, bundle: Bundle) -> None:
    size = bundle.input_size
    shape = (4, size, size, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8).astype(np.float32)
    interpreter = open_model(bundle.model, bundle.folder)
    said = np.stack([run_model(interpreter, image) for image in images])
    difference = float(np.abs(said - model.predict_on_batch(images)).max())
    if not difference <= _TOLERANCE:  # also if it is not a number
        raise BundleError(
            f"the converted {bundle.backbone} differs from Keras by {difference:.2g}",
            "convert the model in float32",
        )


# -- reading -------------------------------------------------------------------------------------


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


def load_bundle(folder: Path | str | None = None) -> Bundle:
    """Read a bundle and check all that is known of it.

    Parameters
    ----------
    folder : Path, optional
        `find_bundle` chooses unless given.

    Raises
    ------
    BundleError
        Naming the file and what is wrong: missing, not JSON, of another format, a class that is
        unknown or named twice, a value of the wrong type or out of range, a model that is not the
        one the card names, or whose shapes do not fit.
    """
    folder = Path(folder) if folder is not None else find_bundle()
    path = folder / CARD_FILE
    if not path.is_file():
        raise BundleError(f"{folder} holds no model ({CARD_FILE} is missing)", "name the folder of a bundle")
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        content = (folder / MODEL_FILE).read_bytes()
    except OSError as error:
        raise BundleError(str(explain_os_error(error, error.filename or path))) from error
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not JSON", "export the model again") from error
    bundle = _read_card(_Card(card, path), folder, content)
    _check_shapes(bundle)
    return bundle


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


def _read_card(card: _Card, folder: Path, content: bytes) -> Bundle:
    if card.get(int, "format") != _FORMAT:
        raise BundleError(
            f"{card.path} is of format {card.values['format']}, this version reads format {_FORMAT}",
            "install the version of hematovision that wrote it",
        )
    if _sha256(content) != card.get(str, "model", "sha256"):
        raise BundleError(
            f"{folder / MODEL_FILE} is damaged or not the model that {CARD_FILE} names",
            "copy the folder again",
        )
    backbone = card.get(str, "backbone")
    if backbone not in BACKBONE_NAMES:
        raise card.wrong(f"'{backbone}' is no backbone, those are {', '.join(BACKBONE_NAMES)}")
    return Bundle(
        folder,
        content,
        _sha256(content),
        _read_classes(card),
        card.number(int, 16, 1024, "input", "size"),
        card.number(int, 16, 1024, "input", "cell_size"),
        card.number(float, 0, 2, "input", "crop_margin"),
        card.number(float, 0.01, 100, "temperature"),
        Thresholds(
            card.number(float, 0, 1, "thresholds", "confidence"),
            card.number(float, 0, 1000, "thresholds", "sharpness"),
        ),
        backbone,
        card.get(str, "weights"),
        card.get(dict, "provenance"),
        card.get(dict, "metrics"),
    )


def _read_classes(card: _Card) -> tuple[str, ...]:
    classes = card.get(list, "classes")
    unknown = [name for name in classes if not isinstance(name, str) or name not in BY_NAME]
    if unknown:
        raise card.wrong(f"{unknown[0]!r} is not a cell class, those are {', '.join(EIGHT)}")
    if len(classes) < 2 or len(set(classes)) != len(classes):
        raise card.wrong("'classes' must name at least two classes, each once")
    return tuple(classes)


def _check_shapes(bundle: Bundle) -> None:
    path = bundle.folder / MODEL_FILE
    interpreter = open_model(bundle.model, bundle.folder)
    size, count = bundle.input_size, len(bundle.classes)
    for said, wanted, what in (
        (interpreter.get_input_details(), [1, size, size, 3], "input"),
        (interpreter.get_output_details(), [1, count], f"output, for {count} classes,"),
    ):
        shape = said[0]["shape"].tolist() if len(said) == 1 else []
        if shape != wanted or said[0]["dtype"] is not np.float32:
            raise BundleError(
                f"the {what} of {path} should be float32 {wanted}, it is {shape}", "export the model again"
            )


# -- running -------------------------------------------------------------------------------------


def open_model(content: bytes, folder: Path) -> Interpreter:
    """Make a LiteRT model ready to run.

    Raises
    ------
    BundleError
        If it is no LiteRT model, or needs operations that LiteRT alone does not have.
    """
    try:
        with silence():
            interpreter = Interpreter(model_content=content, num_threads=_THREADS)
            interpreter.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        raise BundleError(
            f"{folder / MODEL_FILE} is not a model that LiteRT can run", "export the model again"
        ) from error
    return interpreter


def run_model(interpreter: Interpreter, image: NDArray[Any]) -> NDArray[np.float32]:
    """Run a model on one picture: (size, size, 3), RGB 0 to 255, to float32 (C,)."""
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], image[None].astype(np.float32))
    interpreter.invoke()
    return np.asarray(interpreter.get_tensor(interpreter.get_output_details()[0]["index"])[0], np.float32)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
