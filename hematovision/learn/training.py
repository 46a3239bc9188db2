"""Training that a killed run resumes from, with the same result as if it had never been killed.

Everything random in an epoch follows from (seed, epoch) alone: the order of the images, which copies
of a photograph are drawn, the augmentation and the dropout. A checkpoint after every epoch holds
weights, optimizer, history and the memory of early stopping and of the rate's reduction.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hematovision.data.cells import CellStore
from hematovision.errors import DataError, HematoVisionError
from hematovision.files import atomic_path, read_json, write_json
from hematovision.learn import runtime

if TYPE_CHECKING:
    import keras
    import tensorflow as tf


def one_hot(labels: Sequence[str], classes: Sequence[str]) -> NDArray[np.float32]:
    """Return labels as rows with a single 1, float32 array of shape (N, C).

    Raises
    ------
    DataError
        If a label is not one of the classes.
    """
    index = pd.Index(classes).get_indexer(pd.Index(labels))
    if (index < 0).any():
        raise DataError(
            f"'{list(labels)[int(np.argmax(index < 0))]}' is not one of the classes {', '.join(classes)}"
        )
    return np.eye(len(classes), dtype=np.float32)[index]


def draw_copies(
    sources: Sequence[str] | NDArray[np.str_], copies: int, seed: int | Sequence[int]
) -> NDArray[np.int64]:
    """Return positions of at most ``copies`` images of each photograph, drawn without replacement.

    Parameters
    ----------
    sources : sequence of str
        The photograph behind each image.
    copies : int
        0 for all of them.
    seed : int or sequence of int

    Returns
    -------
    int64 array, ascending
    """
    if copies == 0:
        return np.arange(len(sources), dtype=np.int64)
    shuffled = np.random.default_rng(seed).permutation(len(sources))
    rank = pd.Series(np.asarray(sources)[shuffled]).groupby(np.asarray(sources)[shuffled]).cumcount()
    return np.sort(shuffled[rank.to_numpy() < copies]).astype(np.int64)


def class_weights(
    labels: NDArray[np.float32], sources: Sequence[str] | NDArray[np.str_], copies: int
) -> dict[int, float]:
    """Return weights that make every class count alike in an epoch of `training_batches`.

    ``N / (C n_c)`` with ``n_c`` the images of class c drawn in an epoch.
    """
    drawn = labels[draw_copies(sources, copies, 0)].sum(axis=0)
    if (drawn == 0).any():
        raise DataError("a class has no training image", "give at least one photograph of every class")
    return {i: float(drawn.sum() / (len(drawn) * n)) for i, n in enumerate(drawn)}


_HISTORY = ("loss", "accuracy", "val_loss", "val_accuracy", "learning_rate")

Reader = Callable[[NDArray[np.int64]], NDArray[np.float32]]
"""Row numbers in, float32 array of shape (len(rows), ...) out: crops or frozen features from disk."""


def image_reader(cells: CellStore, input_size: int) -> Reader:
    """Return a reader of crops: float32 arrays of shape (B, input_size, input_size, 3), 0 to 255."""
    return lambda rows: cells.read(rows, input_size).astype(np.float32)


def feature_reader(features: NDArray[np.float32]) -> Reader:
    """Return a reader of frozen features: float32 arrays of shape (B, D)."""
    return lambda rows: np.asarray(features[rows], np.float32)


def training_batches(
    read: Reader,
    rows: NDArray[np.int64],
    labels: NDArray[np.float32],
    sources: NDArray[np.str_],
    *,
    batch_size: int,
    copies_per_photograph: int,
    seed: int,
    epochs: int,
    initial_epoch: int = 0,
) -> tuple[tf.data.Dataset, int]:
    """Return shuffled batches of the epochs from ``initial_epoch`` on, and how many make an epoch.

    Every epoch draws ``copies_per_photograph`` images of each photograph anew (0: all of them), so
    that an epoch costs what the photographs are worth and not what their copies number.

    Parameters
    ----------
    read : Reader
    rows : int64 array of shape (N,)
    labels : float32 array of shape (N, C), one-hot, in the order of ``rows``
    sources : array of str, shape (N,), in the order of ``rows``
        The photograph behind each image.

    Returns
    -------
    dataset of (float32 (B, ...), float32 (B, C))
    steps_per_epoch : int
        Whole batches only, at least one.

    Raises
    ------
    DataError
        If there is no image.
    """
    drawn = len(draw_copies(sources, copies_per_photograph, 0))
    if not drawn:
        raise DataError("there is no image to train on", "check the split")
    batch_size = min(batch_size, drawn)
    steps = drawn // batch_size

    def epoch_positions(epoch: int) -> NDArray[np.int64]:
        positions = draw_copies(sources, copies_per_photograph, [seed, epoch])
        order = np.random.default_rng([seed, epoch, 1]).permutation(len(positions))
        return positions[order[: steps * batch_size]].reshape(steps, batch_size)

    epochs_left = range(initial_epoch, max(epochs, initial_epoch + 1))
    positions = np.concatenate([epoch_positions(e) for e in epochs_left])
    return _batches(read, rows, labels, list(positions)), steps


def ordered_batches(
    read: Reader, rows: NDArray[np.int64], labels: NDArray[np.float32], *, batch_size: int = 64
) -> tf.data.Dataset:
    """Return batches in the order of ``rows``, the last one shorter, for validation and prediction."""
    positions = [np.arange(s, min(s + batch_size, len(rows))) for s in range(0, len(rows), batch_size)]
    return _batches(read, rows, labels, positions)


def _batches(
    read: Reader,
    rows: NDArray[np.int64],
    labels: NDArray[np.float32],
    positions: list[NDArray[np.int64]],
) -> tf.data.Dataset:
    import tensorflow as tf

    shape = read(rows[:1]).shape[1:]

    def take(number: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        where = positions[int(number)]
        return read(rows[where]), labels[where]

    def load(number: Any) -> tuple[Any, Any]:
        inputs, targets = tf.numpy_function(take, [number], (tf.float32, tf.float32))
        inputs.set_shape((None, *shape))
        targets.set_shape((None, labels.shape[1]))
        return inputs, targets

    # two batches read ahead and no more: memory is bounded whatever the number of images
    return tf.data.Dataset.range(len(positions)).map(load).prefetch(2)


class TrainingDiverged(HematoVisionError):
    """A loss that is no longer a finite number."""


def fit_arguments(
    read: Reader,
    train: NDArray[np.int64],
    validation: NDArray[np.int64],
    labels: NDArray[np.float32],
    sources: NDArray[np.str_],
    run: Resumable,
    *,
    batch_size: int,
    copies_per_photograph: int,
    seed: int,
) -> dict[str, Any]:
    """Return what ``model.fit`` is called with: batches, the epochs that are left, weights, callbacks.

    Parameters
    ----------
    read : Reader
    train, validation : int64 arrays
        Rows.
    labels : float32 array of shape (rows, C), one-hot
    sources : array of str, shape (rows,)
        The photograph behind each row.
    run : Resumable
    batch_size, copies_per_photograph, seed : int
        As for `training_batches`.
    """
    batches, steps = training_batches(
        read,
        train,
        labels[train],
        sources[train],
        batch_size=batch_size,
        copies_per_photograph=copies_per_photograph,
        seed=seed,
        epochs=run.epochs,
        initial_epoch=run.initial_epoch,
    )
    return {
        "x": batches,
        "steps_per_epoch": steps,
        "epochs": run.epochs,
        "initial_epoch": run.initial_epoch,
        "validation_data": ordered_batches(read, validation, labels[validation]),
        "class_weight": class_weights(labels[train], sources[train], copies_per_photograph),
        "callbacks": run.callbacks,
        "shuffle": False,  # the batches are shuffled already
        "verbose": 0,
    }


class Resumable:
    """The memory of one training: checkpoints, early stopping, rate reduction, history.

    Parameters
    ----------
    model : keras.Model
        Compiled.
    folder : Path
        Where the checkpoints go; name it by everything the training depends on.
    epochs : int
        At most.
    patience : int
        Epochs without a better validation loss before training stops; the learning rate is halved
        after half as many.
    seed : int
    watchers : sequence of keras.callbacks.Callback, optional
        Told of an epoch before its checkpoint is written, so that a stop they ask for is kept too.
    quiet : bool
        Print no line an epoch.

    Attributes
    ----------
    initial_epoch : int
        Where ``model.fit`` goes on; equal to ``epochs`` when there is nothing left to do.
    callbacks : list of keras.callbacks.Callback
    seconds : float
        Spent in training so far, over all runs.

    Examples
    --------
    >>> run = Resumable(model, folder, epochs=10, patience=3, seed=1)           # doctest: +SKIP
    >>> model.fit(data, initial_epoch=run.initial_epoch, epochs=10, callbacks=run.callbacks)
    ... # doctest: +SKIP
    >>> history = run.finish()                                                  # doctest: +SKIP
    """

    def __init__(
        self,
        model: keras.Model,
        folder: Path,
        *,
        epochs: int,
        patience: int,
        seed: int,
        watchers: Sequence[keras.callbacks.Callback] = (),
        quiet: bool = False,
    ) -> None:
        import keras

        self.model, self.folder, self.epochs, self.seed = model, Path(folder), epochs, seed
        self.stopping = keras.callbacks.EarlyStopping("val_loss", patience=patience)
        self.reducing = keras.callbacks.ReduceLROnPlateau(
            "val_loss", factor=0.5, patience=max(1, patience // 2), min_lr=1e-6
        )
        self.state: dict[str, Any] = {"history": [], "best": None, "stopped": False, "seconds": 0.0}
        self._restore()
        self.callbacks = [
            _epoch_seeds(self),
            self.stopping,
            self.reducing,
            *watchers,
            _checkpoint(self),
            *([] if quiet else [_progress_line(self)]),
        ]

    @property
    def initial_epoch(self) -> int:
        """The epoch to go on with, from 0."""
        return self.epochs if self.state["stopped"] else min(len(self.state["history"]), self.epochs)

    @property
    def seconds(self) -> float:
        """Seconds of training so far, over all runs."""
        return float(self.state["seconds"])

    def finish(self) -> pd.DataFrame:
        """Load the weights of the best epoch and return the history, one row an epoch.

        The history's columns are ``epoch`` (from 1), ``loss``, ``accuracy``, ``val_loss``,
        ``val_accuracy`` and ``learning_rate``. With no epoch trained the weights stay as they are.
        """
        if self.state["best"] is not None:
            self._load_weights(self._best_file())
        rows = self.state["history"]
        frame = pd.DataFrame(rows, columns=None if rows else list(_HISTORY))
        frame.insert(0, "epoch", np.arange(1, len(frame) + 1))
        return frame

    def discard(self) -> None:
        """Remove the checkpoints."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _best_file(self) -> Path:
        return self.folder / f"best-{self.state['best']['epoch']:04d}.weights.h5"

    def _last_file(self, epoch: int) -> Path:
        return self.folder / f"last-{epoch:04d}.weights.h5"

    def _restore(self) -> None:
        file = self.folder / "state.json"
        if not file.exists():
            return
        state = read_json(file)
        epoch = len(state["history"]) - 1
        optimizer = self.model.optimizer
        optimizer.build(self.model.trainable_variables)
        self._load_weights(self._last_file(epoch))
        self.state = state

    def _load_weights(self, file: Path) -> None:
        try:
            runtime.load_weights(self.model, file)
        except (OSError, ValueError, KeyError) as error:
            first = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
            raise HematoVisionError(
                f"the checkpoint {file} is damaged ({first})",
                f"remove the folder {self.folder} and run again",
            ) from error

    def save(self, epoch: int, logs: dict[str, Any], seconds: float) -> None:
        """Write the checkpoint of a finished epoch; called by the callback.

        Raises
        ------
        TrainingDiverged
            If a loss is no longer a finite number.
        """
        state = self.state
        row = {k: float(v) for k, v in logs.items()}
        if not np.isfinite(list(row.values())).all():
            raise TrainingDiverged(
                f"training diverged in epoch {epoch + 1}: the loss is no longer a number",
                "set a smaller learning rate",
            )
        state["history"].append(row)
        state["seconds"] += seconds
        stale: list[Path] = []
        if state["best"] is None or row["val_loss"] < state["best"]["val_loss"]:
            if state["best"] is not None:
                stale.append(self._best_file())
            state["best"] = {"epoch": epoch, "val_loss": row["val_loss"]}
            self._save_weights(self._best_file())
        self._save_weights(self._last_file(epoch))
        state["stopped"] = bool(self.model.stop_training)
        state["stopping"] = {"wait": self.stopping.wait, "best": _number(self.stopping.best)}
        state["reducing"] = {"wait": self.reducing.wait, "best": _number(self.reducing.best)}
        # the state names the files: written last, it makes the epoch count
        write_json(self.folder / "state.json", state)
        for file in [*stale, self._last_file(epoch - 1)]:
            file.unlink(missing_ok=True)

    def _save_weights(self, file: Path) -> None:
        with atomic_path(file) as temporary:
            self.model.save_weights(temporary)


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _epoch_seeds(run: Resumable) -> keras.callbacks.Callback:
    """Set every random generator of the model from (seed, epoch), so that a resumed epoch repeats."""
    import keras

    class EpochSeeds(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
            generators = [v for v in self.model.variables if "seed_generator_state" in v.path]
            for i, state in enumerate(generators):
                value = np.random.default_rng([run.seed, epoch, i]).integers(0, 2**31, size=2)
                state.assign(value.astype(state.dtype))

    return EpochSeeds()


def _checkpoint(run: Resumable) -> keras.callbacks.Callback:
    import time

    import keras

    class Checkpoint(keras.callbacks.Callback):
        def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
            # the callbacks before this one have just forgotten what they knew
            for callback, key in ((run.stopping, "stopping"), (run.reducing, "reducing")):
                for name, value in run.state.get(key, {}).items():
                    setattr(callback, name, value)

        def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
            self.began = time.perf_counter()

        def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
            run.save(epoch, logs or {}, time.perf_counter() - self.began)

    return Checkpoint()


def _progress_line(run: Resumable) -> keras.callbacks.Callback:
    """One line of plain text an epoch: widgets and bars do not survive in a report."""
    import keras

    class ProgressLine(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:  # noqa: ARG002
            row = run.state["history"][-1]
            print(
                f"epoch {epoch + 1:3d}/{run.epochs}  loss {row['loss']:.3f}  accuracy {row['accuracy']:.3f}  "
                f"validation loss {row['val_loss']:.3f}  accuracy {row['val_accuracy']:.3f}"
            )
            sys.stdout.flush()

    return ProgressLine()
