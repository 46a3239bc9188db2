"""A network's weights in a quarter of their size, or in half of it.

The released weights are stored so and loaded into float32. A kernel keeps, for each output channel,
the scale that maps its largest weight to 127 (symmetric per-channel quantisation, Krishnamoorthi
2018, arXiv 1806.08342); the few values of biases and of batch normalisation stay in float32. A small
network has few weights to spare and loses by it: it is kept in 16 bits a weight. The file
is a NumPy ``.npz``: one entry a weight under the weight's path, ``<path>:scale`` beside a kernel, and
``facts``, a JSON text. It is read without pickle, so that it can hold numbers and nothing else.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hematovision.errors import WeightsError
from hematovision.files import atomic_path

if TYPE_CHECKING:
    import keras

FORMAT = 1
SMALL = 5_000_000
"""Weights below which a network is kept in float16. MobileNetV2 (2.3 million) names 1.2 % of the
validation cells otherwise in eight bits, by its narrow projections, and none in sixteen."""

_LEVELS = 127  # -128 stays unused: the scale is symmetric
_BROKEN = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)


def _channel_axis(path: str, values: NDArray[Any]) -> int:
    # depthwise kernels are (h, w, channels, 1); all others end in their output channels
    return values.ndim - (2 if "depthwise" in path and values.shape[-1] == 1 else 1)


def quantise(values: NDArray[Any], axis: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Return weights as integers and the scale of each channel.

    Parameters
    ----------
    values : float array
    axis : int
        Of the channels.

    Returns
    -------
    int8 array of the same shape, -127 to 127
    float32 array that broadcasts against it
        ``integers * scale`` is within half a scale of the weight.
    """
    others = tuple(i for i in range(values.ndim) if i != axis)
    largest = np.abs(values).max(axis=others, keepdims=True)
    scale = np.where(largest > 0, largest / _LEVELS, 1.0).astype(np.float32)
    return np.rint(values / scale).astype(np.int8), scale


def write_compact(
    model: keras.Model, file: Path | str, facts: dict[str, Any], bits: int | None = None
) -> None:
    """Write the weights of a model and what there is to know about them, atomically.

    Parameters
    ----------
    model : keras.Model
    file : path
        A ``.npz``.
    facts : dict
        JSON-like.
    bits : {8, 16}, optional
        Of a kernel's weight; by the size of the network unless given, see `SMALL`.
    """
    bits = bits or (16 if model.count_params() < SMALL else 8)
    content: dict[str, Any] = {}
    for variable in model.variables:
        values = np.asarray(variable, np.float32)
        if values.ndim < 2:
            content[variable.path] = values
            continue
        if bits == 16:
            content[variable.path] = values.astype(np.float16)
            continue
        integers, scale = quantise(values, _channel_axis(variable.path, values))
        content[variable.path], content[f"{variable.path}:scale"] = integers, scale
    text = json.dumps({"format": FORMAT, "model": model.name, "bits": bits, **facts}, sort_keys=True)
    with atomic_path(file) as temporary, open(temporary, "wb") as handle:
        np.savez_compressed(handle, facts=np.array(text), **content)


def read_facts(file: Path | str) -> dict[str, Any]:
    """Return what a file of compact weights says of itself.

    Raises
    ------
    WeightsError
        If it is missing, damaged, or no such file.
    """
    return _facts(_open(file), file)


def load_compact(model: keras.Model, file: Path | str) -> dict[str, Any]:
    """Load compact weights into a model of the same architecture; return the facts.

    All of the model's weights are set, or none.

    Raises
    ------
    WeightsError
        If the file is missing or damaged, or belongs to another architecture.
    """
    content = _open(file)
    facts = _facts(content, file)
    weights = []
    for variable in model.variables:
        stored = _get(content, variable.path, file)
        if stored is None or stored.shape != tuple(variable.shape):
            raise WeightsError(
                f"{file} does not fit {model.name} ({variable.path} is not in it, or of another shape)",
                "name a weight file of this backbone",
            )
        scale = _get(content, f"{variable.path}:scale", file)
        weights.append(stored.astype(np.float32) * (1.0 if scale is None else scale))
    for variable, values in zip(model.variables, weights, strict=True):
        variable.assign(values)
    return facts


def _damaged(file: Path | str, error: Exception) -> WeightsError:
    first = (str(error).splitlines() or [type(error).__name__])[0][:120]
    return WeightsError(f"the weights {file} are damaged ({first})", "get the file again")


def _open(file: Path | str) -> Any:
    try:
        content = np.load(file, allow_pickle=False)
    except FileNotFoundError as error:
        raise WeightsError(f"the weights {file} are not there", "get the file again") from error
    except _BROKEN as error:
        raise _damaged(file, error) from error
    if not isinstance(content, np.lib.npyio.NpzFile):
        raise WeightsError(f"{file} is no file of compact weights", "name a .npz that `pretrain` wrote")
    return content


def _get(content: Any, name: str, file: Path | str) -> NDArray[Any] | None:
    if name not in content.files:
        return None
    try:
        return np.asarray(content[name])
    except _BROKEN as error:
        raise _damaged(file, error) from error


def _facts(content: Any, file: Path | str) -> dict[str, Any]:
    stored = _get(content, "facts", file)
    try:
        facts = json.loads(str(stored)) if stored is not None else {}
    except ValueError as error:
        raise _damaged(file, error) from error
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise WeightsError(
            f"{file} is no file of compact weights, or of another version",
            "get the file again, or update hematovision",
        )
    return facts
