"""Naming the white cells of pictures with a released model, by LiteRT and without TensorFlow.

Whatever is doubtful is left to a person, by rules that are simple enough to be told in words. In this
order, and a cell may have more than one reason:

========  =========================  ==========================================================
decision  reason                     when
========  =========================  ==========================================================
reject    (what is wrong with it)    the file can't be read
reject    no white cell found        nothing in the picture is stained like a nucleus
review    cut by the edge            the cell reaches the edge of the picture
review    too blurred                `sharpness` is below the model's threshold
review    the model is unsure: ...   the named class has less than the model's least confidence
accept                               otherwise
========  =========================  ==========================================================
"""

from __future__ import annotations

import csv
import io
import json
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from hematovision.data.scan import is_image, walk_files
from hematovision.errors import ConfigError, HematoVisionError, ImageError
from hematovision.files import atomic_path
from hematovision.probabilities import calibrate
from hematovision.release.bundle import MODEL_FILES, Bundle, Precision, load_bundle, open_model
from hematovision.release.litert import Answer, answer
from hematovision.vision.crop import crop_cell, scale_crop
from hematovision.vision.field import RGB, Box
from hematovision.vision.image import MIN_SIDE, read_image
from hematovision.vision.locate import locate_cells

Cells = Literal["find", "whole"]
"""How a picture is read: as a field in which white cells are found, or as one cell as a whole."""

Decision = Literal["accept", "review", "reject"]

TABLE_FORMATS = (".csv", ".jsonl")

_SHARPNESS_SIDE = 96
"""Side in pixels at which sharpness is measured, so that it does not depend on the magnification: the
smallest cells of the Kaggle set's copies are about as large."""


@dataclass(frozen=True)
class CellPrediction:
    """What is said of one white cell, or of a picture that has none.

    Attributes
    ----------
    image : str
        Where it was found.
    cell : int
        Its number in the picture from 1, from left to right; 0 where there is no cell.
    x, y, width, height : int or None
        Its box in the picture's pixels.
    label : str
        The most probable class, ``""`` where there is no cell.
    confidence : float or None
        Its calibrated probability.
    decision : {"accept", "review", "reject"}
    reason : str
        In words; ``""`` for accepted cells.
    probabilities : dict of str to float
        Calibrated, of every class in the model's order; they sum to 1. Empty where there is no cell.
    unreadable : bool
        Whether the file could not be read at all.
    """

    image: str
    cell: int
    x: int | None
    y: int | None
    width: int | None
    height: int | None
    label: str
    confidence: float | None
    decision: Decision
    reason: str
    probabilities: dict[str, float] = field(default_factory=dict)
    unreadable: bool = False

    @classmethod
    def rejected(cls, image: str, reason: str, *, unreadable: bool = False) -> CellPrediction:
        """Return what is said of a picture in which there is no cell to name."""
        reason = _printable(reason)
        return cls(image, 0, None, None, None, None, "", None, "reject", reason, unreadable=unreadable)

    def to_row(self, classes: Iterable[str]) -> dict[str, Any]:
        """Return the row of the table of predictions, without a cell's values as None."""
        names = ("image", "cell", "x", "y", "width", "height", "label", "confidence", "decision", "reason")
        row = {name: getattr(self, name) for name in names}
        row |= {f"p_{name}": self.probabilities.get(name) for name in classes}
        return {k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}


class Classifier:
    """A released model, ready to name cells.

    Safe to use from several threads, which then take turns.

    Examples
    --------
    >>> from hematovision import Classifier
    >>> for cell in Classifier.load().predict("field.jpg"):
    ...     print(cell.label, cell.confidence, cell.decision, cell.reason)
    """

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self._interpreter = open_model(bundle.model, bundle.folder / MODEL_FILES[bundle.precision])
        self._turn = threading.Lock()

    @classmethod
    def load(cls, folder: Path | str | None = None, precision: Precision = "float32") -> Classifier:
        """Load a bundle; without a folder the one that `bundle.find_bundle` chooses.

        Parameters
        ----------
        folder : Path, optional
        precision : {"float32", "int8"}
            ``"int8"`` is smaller and faster, and names nearly every cell alike: ``model.json`` says how
            nearly.

        Raises
        ------
        BundleError
            If there is none, it is damaged, or it has no model of this precision.
        """
        return cls(load_bundle(folder, precision))

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of every probability."""
        return self.bundle.classes

    def predict(
        self, image: Path | str | bytes | RGB, cells: Cells = "find", *, name: str = ""
    ) -> list[CellPrediction]:
        """Name the white cells of one picture.

        Parameters
        ----------
        image : path, bytes of an image file, or uint8 array of shape (height, width, 3)
        cells : {"find", "whole"}
            ``"find"`` locates the white cells of a field; ``"whole"`` takes the picture for one cell
            that was cut out before.
        name : str, optional
            What the results call it; the path unless given.

        Returns
        -------
        list of CellPrediction
            One a cell, from left to right; one with decision ``"reject"`` where none is found.

        Raises
        ------
        ImageError
            If the picture can't be decoded.
        """
        rgb = image if isinstance(image, np.ndarray) else read_image(image, name=name)
        _check_pixels(rgb, name or "the image")
        called = name or ("" if isinstance(image, (bytes, np.ndarray)) else _printable(str(image)))
        boxes = [Box(0, 0, rgb.shape[1], rgb.shape[0])] if cells == "whole" else locate_cells(rgb)
        if not boxes:
            return [CellPrediction.rejected(called, "no white cell found")]
        margin = self.bundle.crop_margin if cells == "find" else 0.0
        return [self._judge(rgb, box, margin, called, number) for number, box in enumerate(boxes, 1)]

    def probabilities(self, crop: RGB) -> NDArray[np.float64]:
        """Return the calibrated probabilities of one cell that is cut out already.

        Parameters
        ----------
        crop : uint8 array of shape (side, side, 3)
            Of any size; scaled to the model's.

        Returns
        -------
        float64 array of shape (C,)
            Sums to 1.
        """
        return calibrate(self._answer(crop).probabilities, self.bundle.temperature)

    def activation_map(self, crop: RGB) -> NDArray[np.float32] | None:
        """Return where the model looks in one cell that is cut out already, for every class.

        Parameters
        ----------
        crop : uint8 array of shape (side, side, 3)

        Returns
        -------
        float32 array of shape (h, w, C) or None
            Coarser than the crop; the larger a value, the more its place spoke for the class. None
            where the bundle's model does not tell.
        """
        return self._answer(crop).activation_map

    def _answer(self, crop: RGB) -> Answer:
        scaled = scale_crop(crop, self.bundle.input_size)
        with self._turn:
            return answer(self._interpreter, scaled)

    def _judge(self, rgb: RGB, box: Box, margin: float, image: str, number: int) -> CellPrediction:
        said = self.probabilities(crop_cell(rgb, box, self.bundle.cell_size, margin))
        first, second = np.argsort(-said, kind="stable")[:2]
        reasons = []
        if box.cut:
            reasons.append("cut by the edge")
        if sharpness(rgb, box) < self.bundle.thresholds.sharpness:
            reasons.append("too blurred")
        if said[first] < self.bundle.thresholds.confidence:
            reasons.append(f"the model is unsure: {self.classes[second]} is close")
        return CellPrediction(
            image,
            number,
            box.x,
            box.y,
            box.width,
            box.height,
            self.classes[first],
            float(said[first]),
            "review" if reasons else "accept",
            "; ".join(reasons),
            dict(zip(self.classes, said.tolist(), strict=True)),
        )


def sharpness(rgb: RGB, box: Box) -> float:
    """Return how sharp a cell is: the variance of the Laplacian over the variance of the grey values.

    Measured at 96 pixels a side (Pech-Pacheco et al. 2000); the division makes it independent of the
    strength of the stain and of the exposure.

    Parameters
    ----------
    rgb : uint8 array of shape (height, width, 3)
    box : Box
        Inside the picture.

    Returns
    -------
    float
        At least 0; about 0.002 for cells that are grossly out of focus, 0.02 to 0.3 for others.
    """
    part = np.ascontiguousarray(rgb[box.y : box.y + box.height, box.x : box.x + box.width])
    how = cv2.INTER_AREA if min(part.shape[:2]) > _SHARPNESS_SIDE else cv2.INTER_LINEAR
    grey = cv2.resize(
        cv2.cvtColor(part, cv2.COLOR_RGB2GRAY), (_SHARPNESS_SIDE, _SHARPNESS_SIDE), interpolation=how
    ).astype(np.float32)
    edges = cv2.Laplacian(grey, cv2.CV_32F)
    return float(edges.var() / max(float(grey.var()), 1.0))  # a flat picture has no edges either


# -- many files ----------------------------------------------------------------------------------


def predict_files(
    classifier: Classifier, paths: Iterable[Path | str], cells: Cells = "find"
) -> Iterator[CellPrediction]:
    """Name the white cells of many files, one file in memory at a time.

    Parameters
    ----------
    classifier : Classifier
    paths : iterable of paths
        Files, whatever they are called, and folders, of which all images are taken.
    cells : {"find", "whole"}

    Yields
    ------
    CellPrediction
        In the order of the paths. What can't be read gives one with decision ``"reject"``, the reason
        and ``unreadable`` set, and the others are still done.
    """
    for path in paths:
        try:
            for file in _files(Path(path)):
                yield from _predict_file(classifier, file, cells)
        except HematoVisionError as error:  # a folder without images, or that may not be read
            yield CellPrediction.rejected(_printable(str(path)), str(error), unreadable=True)


def _files(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        yield path
        return
    images = [path / relative for relative, _ in walk_files(path) if is_image(relative)]
    if not images:
        raise ImageError(f"{path} holds no images", "name a folder with images in it")
    yield from images


def _predict_file(classifier: Classifier, file: Path, cells: Cells) -> Iterator[CellPrediction]:
    name = _printable(str(file))
    try:
        found = classifier.predict(file, cells, name=name)
    except ImageError as error:
        found = [CellPrediction.rejected(name, str(error), unreadable=True)]
    yield from found


def write_table(
    predictions: Iterable[CellPrediction], classes: Iterable[str], file: Path | None = None
) -> None:
    """Write the table of predictions row by row, as they come.

    Parameters
    ----------
    predictions : iterable of CellPrediction
    classes : iterable of str
        The model's, in order: they give the columns ``p_<class>``.
    file : Path, optional
        Ends in ``.csv`` or ``.jsonl``; appears once all is written. CSV to standard output unless
        given.

    Raises
    ------
    ConfigError
        Before anything is predicted, if the file has another ending or is a folder.
    HematoVisionError
        If the file can't be written.
    """
    classes = tuple(classes)
    if file is None:
        for line in _csv_lines(predictions, classes):
            print(line, end="", flush=True)
        return
    kind = file.suffix.lower()
    if kind not in TABLE_FORMATS:
        raise ConfigError(f"a table is not written as {file.name}", f"use {' or '.join(TABLE_FORMATS)}")
    if file.is_dir():
        raise ConfigError(f"{file} is a folder", "name a file")
    lines = (_csv_lines if kind == ".csv" else _json_lines)(predictions, classes)
    with atomic_path(file) as temporary, open(temporary, "w", encoding="utf-8", newline="") as handle:
        handle.writelines(lines)


def _json_lines(predictions: Iterable[CellPrediction], classes: tuple[str, ...]) -> Iterator[str]:
    for prediction in predictions:
        yield json.dumps(prediction.to_row(classes), ensure_ascii=False) + "\n"


def _csv_lines(predictions: Iterable[CellPrediction], classes: tuple[str, ...]) -> Iterator[str]:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    for number, prediction in enumerate(predictions):
        row = prediction.to_row(classes)
        if number == 0:
            writer.writerow(row)
        writer.writerow(f"{v:.6f}" if isinstance(v, float) else v for v in row.values())
        yield buffer.getvalue()
        buffer.seek(0)
        buffer.truncate()


def _printable(text: str) -> str:
    # a name on disk may be no text at all, and must not end a table half way
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _check_pixels(rgb: RGB, called: str) -> None:
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3:
        raise ImageError(
            f"{called} is an array of {rgb.dtype} {rgb.shape}", "give uint8 of shape (height, width, 3), RGB"
        )
    if min(rgb.shape[:2]) < MIN_SIDE:
        raise ImageError(
            f"{called} is only {rgb.shape[1]} x {rgb.shape[0]} pixels",
            f"a cell needs at least {MIN_SIDE} a side",
        )
