"""Writing a bundle, and taking its Keras model out of it again: the two things that need TensorFlow."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import re
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hematovision.errors import HematoVisionError
from hematovision.files import atomic_path, sha256_file, write_json, write_text
from hematovision.learn import conversion, recipe
from hematovision.release.bundle import (
    CARD_FILE,
    DATA_SHEET_FILE,
    FORMAT,
    INT8_FILE,
    KERAS_FILE,
    MODEL_CARD_FILE,
    MODEL_FILE,
    PURPOSE,
    BundleError,
    Thresholds,
    open_model,
    read_keras_file,
    verify_bundle,
)
from hematovision.release.litert import answer
from hematovision.vision.crop import scale_crop

_TOLERANCE = 1e-4
"""Largest difference of a probability between Keras and LiteRT: both compute in float32 but add in another
order, which gives differences near 1e-6; one wrong operation gives far more than this. For an activation
map, whose unit is arbitrary, the same share of its largest value."""

INT8_AGREEMENT = 0.99
"""Least share of held-out crops that int8 must name as Keras does."""

_BATCH = 32
_OWN_FILES = (MODEL_FILE, INT8_FILE, KERAS_FILE, CARD_FILE, MODEL_CARD_FILE, DATA_SHEET_FILE)
_ZIP_DATE = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip file can hold

# what a model of this library is made of; functions, and layers that carry code, are not
_KNOWN_MODULES = re.compile(
    r"keras|keras\.(layers|initializers|regularizers|constraints|models|dtype_policies|optimizers|losses|metrics)"
    r"|keras\.src\.(models|ops)\.\w+|hematovision\.learn\.\w+"
)
_UNSAFE = ("Lambda", "__lambda__", "function", "TorchModuleWrapper", "TFSMLayer", "JaxLayer", "FlaxLayer")

Crops = Iterable[NDArray[np.uint8]]


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
    temperature_fitted_on: str = "",
    thresholds: Thresholds | None = None,
    cell_size: int | None = None,
    seeds: Sequence[int] = (),
    held_out: Crops | None = None,
    int8_crops: Crops | None = None,
    int8_agreement: float = INT8_AGREEMENT,
    keep_keras: bool = False,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Convert a trained model to LiteRT and write its bundle, as a whole or not at all.

    Parameters
    ----------
    model : keras.Model
        float32 images (B, input_size, input_size, 3), RGB 0 to 255, to probabilities (B, C), or to
        those and an activation map (B, h, w, C); computing in float32.
    folder : Path
        A bundle that stood there is replaced; whatever else lies there stays.
    classes : sequence of str
        In the order of the model's output.
    input_size : int
        In pixels.
    crop_margin : float
        As the cells of the training were cut.
    backbone, weights : str
        A name of `hematovision.config.BACKBONE_NAMES`, and what the training started from.
    provenance : mapping
        JSON-like: ``profile``, ``dataset``, ``data_key``, ``library_key``, ... The code's version is
        added.
    metrics : mapping
        JSON-like: scores with their intervals, by test set.
    temperature : float
        Fitted on validation cells.
    temperature_fitted_on : str
        Those cells, in words; empty where none was fitted.
    thresholds : Thresholds, optional
    cell_size : int, optional
        Side of the training's crops before they were scaled; ``input_size`` unless given.
    seeds : sequence of int
        Of every training behind the metrics, the exported model's first.
    held_out : iterable of uint8 arrays (side, side, 3), optional
        Cells that took no part in training, on which LiteRT is compared with Keras; read once, a batch
        at a time. Random pixels take their place unless given.
    int8_crops : iterable of uint8 arrays (side, side, 3), optional
        Training cells, classes mixed: the int8 model is calibrated on them, and written only if they
        are given.
    int8_agreement : float
        Least share of ``held_out`` that int8 must name as Keras does, 0 to 1.
    keep_keras : bool
        Write ``model.keras`` too.
    facts : mapping, optional
        Of the run, as `hematovision.release.card` wants them: the model card and the data sheet are
        written from them and from ``model.json``, which they meet under ``bundle``.

    Returns
    -------
    Path
        ``folder``.

    Raises
    ------
    BundleError
        If the model's shapes do not fit the classes or the size, a value is out of range, int8 is asked
        for without held-out cells, or a converted model does not agree with Keras.
    HematoVisionError
        If the folder can't be written, or a fact is missing.
    """
    folder, thresholds = Path(folder), thresholds or Thresholds()
    outputs = _check_model(model, input_size, classes)
    if int8_crops is not None and held_out is None:
        raise BundleError("int8 cannot be measured without held-out cells", "give held_out too")
    card: dict[str, Any] = {
        "format": FORMAT,
        "purpose": PURPOSE,
        "classes": list(classes),
        "input": {
            "size": input_size,
            "cell_size": cell_size or input_size,
            "crop_margin": float(crop_margin),
            "pixels": "RGB from 0 to 255 as float32; the backbone's scaling is part of the model",
        },
        "outputs": outputs,
        "calibration": {
            "method": "temperature",
            "temperature": float(temperature),
            "fitted_on": temperature_fitted_on,
        },
        "thresholds": {**asdict(thresholds), "reasons": thresholds.reasons},
        "backbone": backbone,
        "weights": weights,
        "seeds": [int(seed) for seed in seeds],
        "provenance": {"version": importlib.metadata.version("hematovision"), **provenance},
        "metrics": dict(metrics),
    }
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        _write_models(model, temporary, int8_crops, keep_keras=keep_keras)
        card["agreement"] = _measure_agreement(model, temporary, held_out, int8_agreement)
        card["files"] = _stamp_files(temporary)
        if facts is not None:
            _write_documents(temporary, {**facts, "bundle": card})
            card["files"] = _stamp_files(temporary)
        write_json(temporary / CARD_FILE, card)
        verify_bundle(temporary)
        _keep_others(folder, temporary)
    return folder


def load_keras(folder: Path | str) -> Any:
    """Load the Keras model of a bundle, for who trains on.

    Nothing in the file is run: Keras's safe mode refuses Lambda layers and whatever else would bring
    code of its own.

    Returns
    -------
    keras.Model

    Raises
    ------
    BundleError
        If there is none, it is damaged, holds unsafe content, or does not fit the bundle's classes.
    """
    path, bundle = read_keras_file(folder)
    _refuse_code(path)
    try:
        model = recipe.load_model(path)
    except HematoVisionError as error:
        raise BundleError(f"refused: {error.what}", "use a bundle that you trust") from error
    try:
        _check_model(model, bundle.input_size, bundle.classes)
    except BundleError as error:
        raise BundleError(f"{path}: {error.what}", error.remedy) from error
    return model


def _refuse_code(file: Path) -> None:
    """Refuse a model that names anything but layers of Keras or of this library.

    Keras's safe mode gives way where a program has called ``enable_unsafe_deserialization``; this does not.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            parts = list(_serialised(json.loads(archive.read("config.json"))))
    except (OSError, ValueError, KeyError, RecursionError, zipfile.BadZipFile) as error:
        raise BundleError(f"refused: {file} is not a Keras model", "copy the folder again") from error
    for module, name in parts:
        if name in _UNSAFE or not (module is None or _KNOWN_MODULES.fullmatch(str(module))):
            called = name if module is None else f"{module}.{name}"
            raise BundleError(
                f"refused: {file} holds {called}, which could run code", "use a bundle that you trust"
            )


def _serialised(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield module and name of every object in a Keras configuration."""
    if isinstance(value, dict):
        if "class_name" in value:
            yield value.get("module"), value["class_name"]
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from _serialised(part)


def _check_model(model: Any, input_size: int, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Return what a card says of a model's outputs, once they fit."""
    shapes = _output_shapes(model)
    said = tuple(model.input_shape[1:]), shapes[0][1:]
    expected = (input_size, input_size, 3), (len(classes),)
    if said != expected:
        raise BundleError(
            f"the model maps {said[0]} to {said[1]}",
            f"pictures of {input_size} pixels and {len(classes)} classes need {expected[0]} to {expected[1]}",
        )
    outputs: list[dict[str, Any]] = [{"name": "probabilities", "shape": [len(classes)]}]
    if len(shapes) == 1:
        return outputs
    height_width = shapes[1][1:3]
    if len(shapes) > 2 or shapes[1][1:] != (*height_width, len(classes)) or None in height_width:
        raise BundleError(
            f"the model has outputs of {[shape[1:] for shape in shapes]}",
            "give probabilities, and an activation map (height, width, classes) or nothing else",
        )
    return [*outputs, {"name": "activation_map", "shape": [*height_width, len(classes)]}]


def _output_shapes(model: Any) -> list[tuple[Any, ...]]:
    shape = model.output_shape
    return list(shape) if isinstance(shape, list) or isinstance(shape[0], tuple) else [shape]


def _write_models(model: Any, folder: Path, int8_crops: Crops | None, *, keep_keras: bool) -> None:
    (folder / MODEL_FILE).write_bytes(conversion.convert_float32(model))
    if int8_crops is not None:
        size = model.input_shape[1]
        scaled = (scale_crop(crop, size) for crop in int8_crops)
        (folder / INT8_FILE).write_bytes(conversion.convert_int8(model, scaled))
    if keep_keras:
        recipe.save_model(model, folder / KERAS_FILE)
        _forget_dates(folder / KERAS_FILE)


def _forget_dates(file: Path) -> None:
    """Write a Keras file again without the dates in it: equal models, equal bytes."""
    with (
        atomic_path(file) as temporary,
        zipfile.ZipFile(file) as old,
        zipfile.ZipFile(temporary, "w") as new,
    ):
        for name in sorted(old.namelist()):
            content = old.read(name)
            if name == "metadata.json":
                metadata = json.loads(content)
                metadata.pop("date_saved", None)
                content = json.dumps(metadata, sort_keys=True).encode()
            new.writestr(zipfile.ZipInfo(name, _ZIP_DATE), content)


def _stamp_files(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        file.name: {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
        for file in sorted(folder.iterdir())
    }


def _write_documents(folder: Path, facts: Mapping[str, Any]) -> None:
    from hematovision.release.card import render_data_sheet, render_model_card

    write_text(folder / MODEL_CARD_FILE, render_model_card(facts))
    write_text(folder / DATA_SHEET_FILE, render_data_sheet(facts))


def _keep_others(folder: Path, temporary: Path) -> None:
    """Copy what lies in the old folder and is not of a bundle, such as pretrained weights."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir():
            shutil.copytree(path, temporary / path.name, symlinks=True)
        elif path.name not in _OWN_FILES:
            shutil.copy2(path, temporary / path.name, follow_symlinks=False)


# -- agreement with Keras ------------------------------------------------------------------------


class _Tally:
    """How well one LiteRT model has agreed with Keras so far."""

    def __init__(self, content: bytes, path: Path) -> None:
        self.interpreter = open_model(content, path)
        self.crops = self.alike = 0
        self.largest = self.largest_map = 0.0

    def add(self, image: NDArray[np.float32], said: Sequence[NDArray[np.float32]]) -> None:
        lite = answer(self.interpreter, image)
        self.crops += 1
        self.alike += int(lite.probabilities.argmax() == said[0].argmax())
        # fmax would pass over what is no number
        self.largest = float(np.maximum(self.largest, np.abs(lite.probabilities - said[0]).max()))
        if lite.activation_map is not None and len(said) > 1:
            scale = max(1.0, float(np.abs(said[1]).max()))
            difference = np.abs(lite.activation_map - said[1]).max() / scale
            self.largest_map = float(np.maximum(self.largest_map, difference))

    @property
    def labels(self) -> float:
        return self.alike / max(self.crops, 1)

    def to_dict(self) -> dict[str, float]:
        # two digits: the rest is the order of additions, which differs between machines
        return {"labels": self.labels, "largest_difference": float(f"{self.largest:.1e}")}


def _measure_agreement(
    model: Any, folder: Path, held_out: Crops | None, int8_agreement: float
) -> dict[str, Any]:
    size = model.input_shape[1]
    tallies = {
        kind: _Tally((folder / name).read_bytes(), folder / name)
        for kind, name in (("float32", MODEL_FILE), ("int8", INT8_FILE))
        if (folder / name).is_file()
    }
    for images, said in _keras_says(model, _random_pixels(size) if held_out is None else held_out, size):
        for row, image in enumerate(images):
            for tally in tallies.values():
                tally.add(image, [output[row] for output in said])
    if not tallies["float32"].crops:
        raise BundleError("there are no held-out cells to compare LiteRT with Keras on", "give some")
    _refuse_disagreement(tallies, int8_agreement)
    return {
        "crops": tallies["float32"].crops,
        "of": "random pixels" if held_out is None else "held-out cells",
        **{kind: tally.to_dict() for kind, tally in tallies.items()},
    }


def _refuse_disagreement(tallies: Mapping[str, _Tally], int8_agreement: float) -> None:
    exact = tallies["float32"]
    worst = float(np.maximum(exact.largest, exact.largest_map))
    if exact.alike < exact.crops or not worst <= _TOLERANCE:  # also if it is not a number
        raise BundleError(
            f"the converted model differs from Keras by {worst:.2g} "
            f"and in {exact.crops - exact.alike} of {exact.crops} labels",
            "convert the model in float32",
        )
    if "int8" in tallies and tallies["int8"].labels < int8_agreement:
        raise BundleError(
            f"the int8 model names {tallies['int8'].labels:.1%} of {exact.crops} held-out cells as Keras "
            f"does, it must name {int8_agreement:.1%}",
            "calibrate it on more training cells, or export without int8_crops",
        )


def _keras_says(
    model: Any, crops: Crops, size: int
) -> Iterator[tuple[NDArray[np.float32], list[NDArray[np.float32]]]]:
    """Yield batches of scaled crops with Keras's outputs, probabilities first."""
    remaining = iter(crops)
    while batch := list(itertools.islice(remaining, _BATCH)):
        images = np.stack([scale_crop(crop, size) for crop in batch]).astype(np.float32)
        said = model.predict_on_batch(images)
        yield images, list(said) if isinstance(said, (list, tuple)) else [said]


def _random_pixels(size: int) -> Crops:
    return np.random.default_rng(0).integers(0, 256, (4, size, size, 3), np.uint8)
