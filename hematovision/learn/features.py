"""Frozen features, computed once, kept on disk by content and read through memory mapping."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hematovision.data.cells import CellStore
from hematovision.files import content_key, create_array, is_array, sha256_file, write_text
from hematovision.learn import backbones

if TYPE_CHECKING:
    import keras

_CHUNK = 256


def weights_key(model: keras.Model) -> str:
    """Return 16 hexadecimal digits that name a model's weights."""
    import hashlib

    digest = hashlib.sha256()
    for value in model.get_weights():
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()[:16]


def frozen_features(
    extractor: keras.Model,
    cells: CellStore,
    cache: Path,
    progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.float32]:
    """Return the features of every crop of a store, computing only what is not on disk yet.

    Parameters
    ----------
    extractor : keras.Model
        From `backbones.build_feature_extractor`.
    cells : CellStore
    cache : Path
        The features go to ``cache/features/<key>/``; the key names weights, precision,
        preprocessing, size and crops.
    progress : callable, optional
        Called with (done, total) crops.

    Returns
    -------
    float32 array of shape (N, D), memory-mapped, read-only
    """
    size, width = int(extractor.input_shape[1]), int(extractor.output_shape[1])
    # the same weights give other features in another precision, or after other preprocessing
    precision = [layer.compute_dtype for layer in extractor.layers]
    code = sha256_file(backbones.__file__)
    key = content_key(weights_key(extractor), extractor.name, precision, code, size, cells.key)
    folder = cache / "features" / key
    file, mark = folder / "features.npy", folder / "done.txt"
    shape = (len(cells.table), width)
    if not is_array(file, shape, np.float32):
        mark.unlink(missing_ok=True)
        create_array(file, shape, np.float32)
    done = int(mark.read_text()) if mark.exists() else 0
    if done < shape[0]:
        out = np.load(file, mmap_mode="r+")
        for start in range(done, shape[0], _CHUNK):
            rows = np.arange(start, min(start + _CHUNK, shape[0]))
            batch = cells.read(rows, size).astype(np.float32)
            out[rows] = extractor.predict_on_batch(batch)
            out.flush()
            write_text(mark, str(rows[-1] + 1))
            if progress:
                progress(int(rows[-1]) + 1, shape[0])
    return np.load(file, mmap_mode="r")
