"""A training of seconds with everything random that a real one has, to be killed and resumed.

``python tests/tiny_training.py FOLDER WHEN EPOCH`` runs it and kills itself (``kill -9``) in the
given epoch (from 1) at the given moment.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hematovision.learn import runtime, training
from hematovision.vision.augment import build_augmentation

EPOCHS, PATIENCE, SEED, N = 12, 4, 3, 48
MOMENTS = ("before the last weights", "between weights and state", "after the state")


def build_model(rate: float = 0.05) -> Any:
    """Return a compiled model with augmentation, batch norm and dropout."""
    keras = runtime.start(SEED)
    keras.config.set_dtype_policy("float32")
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            build_augmentation(1.0, SEED),
            keras.layers.Rescaling(1 / 127.5, -1),
            keras.layers.Conv2D(4, 3, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dropout(0.3, seed=SEED),
            keras.layers.Dense(2, "softmax"),
        ]
    )
    model.compile(keras.optimizers.Adam(rate), "categorical_crossentropy", metrics=["accuracy"])
    return model


def train(folder: Path, model: Any = None, epochs: int = EPOCHS) -> tuple[Any, pd.DataFrame, Any]:
    """Train on noise (the validation loss soon stops falling); return model, history and run."""
    model = model or build_model()
    run = training.Resumable(model, folder, epochs=epochs, patience=PATIENCE, seed=SEED)
    rng = np.random.default_rng(0)
    images = rng.uniform(0, 255, (2 * N, 8, 8, 3)).astype(np.float32)
    labels = np.eye(2, dtype=np.float32)[rng.integers(0, 2, 2 * N)]
    sources = np.array([f"photo-{i // 4}" for i in range(N)])

    def read(rows: Any) -> Any:
        return images[rows]

    batches, steps = training.training_batches(
        read,
        np.arange(N),
        labels[:N],
        sources,
        batch_size=8,
        copies_per_photograph=3,
        seed=SEED,
        epochs=epochs,
        initial_epoch=run.initial_epoch,
    )
    model.fit(
        batches,
        steps_per_epoch=steps,
        epochs=epochs,
        initial_epoch=run.initial_epoch,
        validation_data=training.ordered_batches(read, np.arange(N, 2 * N), labels[N:], batch_size=20),
        class_weight={0: 0.9, 1: 1.1},
        callbacks=run.callbacks,
        shuffle=False,
        verbose=0,
    )
    return model, run.finish(), run


def kill_at(when: str, epoch: int) -> None:
    """Arrange for this process to be killed."""
    save_weights, write_json = training.Resumable._save_weights, training.write_json

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def save_or_die(run: training.Resumable, file: Path) -> None:
        if when == "before the last weights" and file.name == f"last-{epoch - 1:04d}.weights.h5":
            die()
        save_weights(run, file)

    def write_or_die(path: Path, state: Any) -> None:
        now = len(state["history"]) == epoch
        if now and when == "between weights and state":
            die()
        write_json(path, state)
        if now and when == "after the state":
            die()

    training.Resumable._save_weights = save_or_die  # type: ignore[method-assign]
    training.write_json = write_or_die


if __name__ == "__main__":
    kill_at(sys.argv[2], int(sys.argv[3]))
    train(Path(sys.argv[1]))
