"""Where a model looks: class activation maps, and a check that they tell of the model.

A network that ends in global average pooling and one dense layer says in each place of its last
feature map how much that place speaks for each class (Zhou et al. 2016). No gradient is needed, so the
maps can be a second output of the model that is released.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from hematovision.errors import DataError
from hematovision.vision.field import RGB

if TYPE_CHECKING:
    import keras

_BATCH = 32
_STRENGTH = 0.55  # how opaque the colour is where a map is at its highest


def build_cam_model(classifier: keras.Model) -> keras.Model:
    """Return a classifier that also says what each place of the picture speaks for.

    Parameters
    ----------
    classifier : keras.Model
        From `backbones.build_classifier`, trained, with the head of `backbones.build_head`: global
        average pooling, dropout and one dense layer.

    Returns
    -------
    keras.Model
        Maps float32 images (B, S, S, 3), RGB 0 to 255, to probabilities (B, C) and class activation
        maps float32 (B, h, w, C). The mean of a map over its places, plus the bias of the class, is the
        logit of the class. The maps hold a copy of the head's weights as they are now; the rest is
        shared with the classifier. It can be exported: LiteRT's signature calls the two ``output_0``
        (probabilities) and ``output_1`` (maps). Go by these names: ``get_output_details`` lists them in
        another order.

    Raises
    ------
    DataError
        If the classifier ends in another way, as with attention pooling: its logits are then no sum
        over places.
    """
    import keras

    dense = _dense_of_average(classifier)
    feature_map = classifier.get_layer("features").input
    kernel = dense.get_weights()[0]
    layer = keras.layers.Conv2D(kernel.shape[1], 1, use_bias=False, dtype="float32", name="maps")
    maps = layer(feature_map)
    layer.set_weights([kernel[None, None]])
    return keras.Model(classifier.input, [classifier.output, maps], name=f"{classifier.name}_cam")


def _dense_of_average(classifier: keras.Model) -> keras.layers.Dense:
    import keras

    layers = keras.layers
    last = classifier.layers[-1]
    steps = [s for s in getattr(last, "layers", []) if not isinstance(s, (layers.InputLayer, layers.Dropout))]
    average = next((s for s in classifier.layers if s.name == "features"), None)
    if (
        not isinstance(average, layers.GlobalAveragePooling2D)
        or len(steps) != 1
        or not isinstance(steps[0], layers.Dense)
    ):
        raise DataError(
            f"{classifier.name} has no class activation maps",
            "use a model whose head is global average pooling and one dense layer",
        )
    return steps[0]


def explain_images(
    cam_model: keras.Model, images: NDArray[Any], positions: NDArray[np.integer] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return what a model says of images and where it sees it.

    Parameters
    ----------
    cam_model : keras.Model
        From `build_cam_model`.
    images : array of shape (N, S, S, 3), RGB 0 to 255
        May be memory-mapped; it is read in batches.
    positions : int array of shape (N,), optional
        The class to map for each image; the most probable one unless given.

    Returns
    -------
    probabilities : float32 array of shape (N, C)
    maps : float32 array of shape (N, h, w)
        Above 0 where a place speaks for the class, below 0 where it speaks against it.
    """
    probabilities, maps = [], []
    for start in range(0, len(images), _BATCH):
        batch = np.asarray(images[start : start + _BATCH], np.float32)
        said, every = cam_model.predict_on_batch(batch)
        chosen = said.argmax(axis=1) if positions is None else positions[start : start + _BATCH]
        probabilities.append(said)
        maps.append(every[np.arange(len(batch)), :, :, chosen])
    return np.concatenate(probabilities), np.concatenate(maps)


def cam_overlay(rgb: RGB, cam: NDArray[np.float32]) -> RGB:
    """Return a picture with the places that speak for a class coloured, the more the stronger.

    Parameters
    ----------
    rgb : uint8 array of shape (height, width, 3)
    cam : float array of shape (h, w)
        Enlarged to the picture with bilinear interpolation. Its positive part is shown, relative to
        its highest place; where it is not positive the picture stays as it is.

    Returns
    -------
    uint8 array of shape (height, width, 3)
    """
    positive = _positive(cam, rgb.shape[:2])
    positive /= max(float(positive.max()), 1e-12)
    levels = np.round(255 * positive).astype(np.uint8)
    colours = cv2.cvtColor(cv2.applyColorMap(levels, cv2.COLORMAP_TURBO), cv2.COLOR_BGR2RGB)
    opacity = _STRENGTH * positive[..., None]
    return np.round((1 - opacity) * rgb + opacity * colours).astype(np.uint8)


def attention_inside(cam: NDArray[np.float32], inside: NDArray[np.bool_]) -> float:
    """Return the share of a map's positive mass that lies inside a region, 0 to 1.

    Parameters
    ----------
    cam : float array of shape (h, w)
    inside : bool array of shape (height, width)
        The region in the picture, for example a cell's mask or `central_box`. A map that looks
        everywhere alike gives the region's share of the picture: compare with ``inside.mean()``.

    Returns
    -------
    float
        NaN where the map is nowhere positive.
    """
    positive = _positive(cam, inside.shape)
    total = float(positive.sum())
    return float(positive[inside].sum()) / total if total > 0 else float("nan")


def central_box(side: int, margin: float) -> NDArray[np.bool_]:
    """Return where the cell's own box lies in a crop, for `attention_inside`.

    Parameters
    ----------
    side : int
        Of the crop in pixels.
    margin : float
        Share of the cell's longer side that was kept on each side, as in `vision.crop.crop_cell`.

    Returns
    -------
    bool array of shape (side, side)
        The square of the cell's longer side.
    """
    first = round(side * margin / (1 + 2 * margin))
    inside = np.zeros((side, side), np.bool_)
    inside[first : side - first, first : side - first] = True
    return inside


def _positive(cam: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.float32]:
    size = (shape[1], shape[0])
    enlarged = cv2.resize(np.asarray(cam, np.float32), size, interpolation=cv2.INTER_LINEAR)
    return np.maximum(np.asarray(enlarged, np.float32), 0)


def randomise_weights(model: keras.Model, seed: int | tuple[int, ...] = 0) -> keras.Model:
    """Return a copy of a model in which nothing is left of what was learned.

    The values of every kernel are shuffled, which keeps their spread: with fresh weights the
    activations of a deep network may die out, and its maps be flat for that reason alone.
    """
    import keras

    rng = np.random.default_rng(seed)
    copy = keras.models.clone_model(model)
    copy.set_weights([rng.permuted(w) if w.ndim > 1 else w for w in model.get_weights()])
    return copy


def randomisation_check(
    cam_model: keras.Model, images: NDArray[Any], *, shuffles: int = 5, seed: int = 0
) -> pd.DataFrame:
    """Compare maps with those of models that know nothing (Adebayo et al. 2018).

    Maps that stay as they are when the weights are shuffled show the picture and not the model.
    What likeness could be had is measured beside it: the maps of the mirrored pictures, mirrored
    back, by the trained model.

    Parameters
    ----------
    cam_model : keras.Model
        From `build_cam_model`.
    images : array of shape (N, S, S, 3), RGB 0 to 255
    shuffles : int
        Shuffled models to average over: one alone may by chance prefer cells to their background, or the
        other way round, in every picture.
    seed : int
        Of the shuffling.

    Returns
    -------
    DataFrame
        One row an image: ``randomised`` and ``mirrored``, Spearman's rank correlation over the places
        of the map of the class that the trained model names, -1 to 1; 0 where a map is flat. Expected
        near 0 and near 1.
    """
    said, maps = explain_images(cam_model, images)
    named = said.argmax(axis=1)
    mirrored = explain_images(cam_model, images[:, :, ::-1], named)[1][:, :, ::-1]
    likeness = np.zeros(len(images))
    for i in range(shuffles):
        shuffled = explain_images(randomise_weights(cam_model, (seed, i)), images, named)[1]
        likeness += np.array(_likenesses(maps, shuffled)) / shuffles
    return pd.DataFrame({"randomised": likeness, "mirrored": _likenesses(maps, mirrored)})


def _likenesses(first: NDArray[np.float32], second: NDArray[np.float32]) -> list[float]:
    pairs = zip(first, second, strict=True)
    return [0.0 if np.ptp(a) == 0 or np.ptp(b) == 0 else _rank_correlation(a, b) for a, b in pairs]


def _rank_correlation(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    return float(stats.spearmanr(a.ravel(), b.ravel()).statistic)
