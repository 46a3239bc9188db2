"""Starting TensorFlow: quietly, seeded, and the same every time."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from hematovision.quiet import silence

if TYPE_CHECKING:
    import keras


def start(seed: int) -> ModuleType:
    """Import TensorFlow and Keras quietly, make every later operation repeatable, return Keras.

    Seeds Python, NumPy and TensorFlow, and asks TensorFlow for deterministic kernels, so that two
    runs on the same machine give the same numbers.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    with silence():
        import keras
        import tensorflow as tf

        tf.zeros(1)  # the first operation prints too
    tf.get_logger().setLevel("ERROR")
    keras.config.disable_interactive_logging()
    keras.utils.set_random_seed(seed)
    tf.config.experimental.enable_op_determinism()
    return keras


def load_weights(model: keras.Model, file: Path | str) -> None:
    """Load weights into a model, all of them or none.

    Where a file holds only a part of what a model has, Keras 3 warns and leaves the rest as it was:
    a training would go on with a fresh optimizer, or a network start half from nothing, unnoticed.

    Raises
    ------
    ValueError
        If something of the model is not in the file.
    OSError, KeyError
        If the file is missing or is no weight file.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Skipping", category=UserWarning)
        try:
            model.load_weights(file)
        except UserWarning as warning:
            raise ValueError(str(warning)) from warning
