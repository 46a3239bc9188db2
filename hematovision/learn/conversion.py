"""Keras models turned into LiteRT models; nothing else in the library calls TensorFlow's converter.

Both kinds take and give float32, so that whoever runs them need not know which one it is:

- ``float32`` computes as Keras does, in another order of additions.
- ``int8`` holds weights as int8, each output channel with its own scale, and activations as int8 with
  scales measured on real crops (Jacob et al. 2018, arXiv 1712.05877). Softmax stays in float32: as int8
  it would give probabilities in steps of 1/256, none above 0.996, which no calibration can mend.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hematovision.errors import DataError
from hematovision.quiet import silence

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

CALIBRATION_LIMIT = 512
"""Crops that are looked at for the ranges of activations: TensorFlow's guide asks for 100 to 500."""

_IN_FLOAT32 = ("SOFTMAX",)


def convert_float32(model: keras.Model) -> bytes:
    """Convert a model to LiteRT in float32.

    Parameters
    ----------
    model : keras.Model
        float32 images (B, size, size, 3) to one output or several; computing in float32.

    Returns
    -------
    bytes
        A LiteRT model for one image at a time.
    """
    with _converter(model) as converter:
        return bytes(converter.convert())


def convert_int8(model: keras.Model, crops: Iterable[NDArray[Any]]) -> bytes:
    """Convert a model to LiteRT in int8, softmax aside.

    Parameters
    ----------
    model : keras.Model
        As for `convert_float32`.
    crops : iterable of arrays of shape (size, size, 3)
        Training crops, RGB 0 to 255, of the model's size, in an order that mixes the classes; the first
        `CALIBRATION_LIMIT` are used.

    Returns
    -------
    bytes
        A LiteRT model for one image at a time, float32 at its borders.

    Raises
    ------
    DataError
        If there is no crop, or one is of another shape.
    """
    import tensorflow as tf

    # the converter reads them more than once; as bytes, 512 crops of 224 pixels take 77 MB
    seen = [np.asarray(crop, np.uint8) for crop in itertools.islice(crops, CALIBRATION_LIMIT)]
    shape = tuple(model.input_shape[1:])
    if not seen:
        raise DataError("there is no crop to calibrate int8 on", "give training crops")
    if any(crop.shape != shape for crop in seen):
        raise DataError(
            f"int8 is calibrated on crops of shape {shape}", "scale the crops to the model's size"
        )

    def examples() -> Iterator[list[NDArray[np.float32]]]:
        for crop in seen:
            yield [crop[None].astype(np.float32)]

    with _converter(model) as converter:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = examples
        options = tf.lite.experimental.QuantizationDebugOptions(denylisted_ops=list(_IN_FLOAT32))
        # the one public way to leave an operation out of quantisation
        debugger = tf.lite.experimental.QuantizationDebugger(
            converter=converter, debug_dataset=examples, debug_options=options
        )
        return bytes(debugger.get_nondebug_quantized_model())


@contextlib.contextmanager
def _converter(model: keras.Model) -> Iterator[tf.lite.TFLiteConverter]:
    import tensorflow as tf

    # a batch of one from the start: LiteRT then plans its memory once
    image = tf.TensorSpec((1, *model.input_shape[1:]), tf.float32, name="image")
    with silence(), warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")  # TensorFlow's own use of its deprecated interpreter
        model.export(folder, format="tf_saved_model", input_signature=[image], verbose=False)
        yield tf.lite.TFLiteConverter.from_saved_model(folder)
