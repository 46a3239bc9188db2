"""A recipe: everything that decides how a classifier is trained, and the training itself in one call.

Notebook 03 shows these steps one by one; whatever trains a second model in the same way calls
`train_classifier`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

import hematovision
from hematovision.config import cache_folder
from hematovision.data.cells import CellStore
from hematovision.errors import HematoVisionError
from hematovision.files import atomic_path, content_key, sha256_file
from hematovision.learn import backbones
from hematovision.learn.evaluation import Predictions, predict_images
from hematovision.learn.features import frozen_features
from hematovision.learn.training import (
    Reader,
    Resumable,
    class_weights,
    draw_copies,
    feature_reader,
    fit_arguments,
    image_reader,
    one_hot,
    ordered_batches,
)
from hematovision.vision.augment import build_augmentation

if TYPE_CHECKING:
    import keras

OPTIMIZERS = ("adam", "sgd")


@dataclass(frozen=True)
class Recipe:
    """Every choice behind one trained classifier; equal recipes on equal data give equal models.

    The meaning of each value is that of the profile's key of the same name.
    """

    backbone: str
    weights: str
    classes: tuple[str, ...]
    input_size: int
    precision: str
    batch_size: int
    dropout: float
    label_smoothing: float
    augmentation: float
    head_epochs: int
    head_learning_rate: float
    fine_tune_epochs: int
    fine_tune_layers: int
    fine_tune_learning_rate: float
    copies_per_photograph: int
    patience: int
    seed: int
    optimizer: str = "adam"
    head: str = "average"

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> Recipe:
        """Pick a recipe's values out of a larger set, such as a notebook's ``globals()``."""
        picked = {f.name: values[f.name] for f in dataclasses.fields(cls)}
        return cls(**{**picked, "classes": tuple(picked["classes"])})

    @property
    def pretrained(self) -> bool:
        """Whether the network starts from weights that were trained before."""
        return self.weights != "none"

    @property
    def frozen_epochs(self) -> int:
        """Epochs of the stage that trains a new head on frozen features.

        None for a network that starts from nothing, whose features are worth nothing yet, and none for
        attention: what is kept on disk are averages, and a map of every image would take 4 to 16 times
        the space. Attention is trained with the network from its first step.
        """
        return self.head_epochs if self.pretrained and self.head == "average" else 0

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return dataclasses.asdict(self)

    def replace(self, **changes: Any) -> Recipe:
        """Return a copy with some values changed."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class TrainingData:
    """The two sides that training may see.

    Attributes
    ----------
    cells : CellStore
    train, validation : int64 arrays
        Rows of the store. Validation holds at most ``copies_per_photograph`` images of each
        photograph, always the same ones.
    labels : float32 array of shape (rows of the store, C), one-hot; zeros where a row has no class
    sources : array of str, shape (rows of the store,)
    """

    cells: CellStore
    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    labels: NDArray[np.float32]
    sources: NDArray[np.str_]

    def fit_arguments(self, read: Reader, recipe: Recipe, run: Resumable) -> dict[str, Any]:
        """Return what ``model.fit`` is called with; see `training.fit_arguments`."""
        return fit_arguments(
            read,
            self.train,
            self.validation,
            self.labels,
            self.sources,
            run,
            batch_size=recipe.batch_size,
            copies_per_photograph=recipe.copies_per_photograph,
            seed=recipe.seed,
        )

    def class_weights(self, recipe: Recipe) -> dict[int, float]:
        """Return weights that make every class count alike in an epoch."""
        copies = recipe.copies_per_photograph
        return class_weights(self.labels[self.train], self.sources[self.train], copies)


def training_data(
    recipe: Recipe,
    cells: CellStore,
    train: NDArray[np.int64],
    validation: NDArray[np.int64],
    groups: Sequence[str] | None = None,
) -> TrainingData:
    """Put together what a training sees.

    Parameters
    ----------
    recipe : Recipe
    cells : CellStore
    train, validation : int64 arrays
        Rows of the store.
    groups : sequence of str, optional
        The photograph behind every row of the store; the table's ``source`` unless given.
    """
    labels = cells.table["label"].to_numpy(str)
    known = np.isin(labels, recipe.classes)
    hot = np.zeros((len(labels), len(recipe.classes)), np.float32)
    hot[known] = one_hot(labels[known].tolist(), recipe.classes)
    sources = cells.table["source"].to_numpy(str) if groups is None else np.asarray(groups, str)
    kept = draw_copies(sources[validation], recipe.copies_per_photograph, recipe.seed)
    return TrainingData(cells, train, validation[kept], hot, sources)


def checkpoint_folder(recipe: Recipe, data: TrainingData, stage: str) -> Path:
    """Return where a training's checkpoints go, named by all that its result depends on.

    The code of `learn` and of the augmentation counts too: a checkpoint never outlives the code that
    made it.
    """
    package = Path(hematovision.__file__).parent
    code = [
        sha256_file(f) for f in [*sorted((package / "learn").glob("*.py")), package / "vision/augment.py"]
    ]
    # a weight file may be written anew under its old name
    weights = backbones.weights_file(recipe.backbone, recipe.weights)
    initial = sha256_file(weights) if weights else recipe.weights
    rows = [data.train.tolist(), data.validation.tolist()]
    seen = [data.sources[data.train].tolist(), data.labels[[*rows[0], *rows[1]]].argmax(axis=1).tolist()]
    key = content_key(dataclasses.asdict(recipe), initial, data.cells.key, rows, seen, code)
    return cache_folder() / "checkpoints" / f"{recipe.backbone}-{stage}-{key}"


def build_training_model(recipe: Recipe, classifier: keras.Model) -> keras.Model:
    """Return augmentation followed by the classifier; it shares the classifier's weights."""
    import keras

    images = keras.Input((recipe.input_size, recipe.input_size, 3))
    augmentation = build_augmentation(recipe.augmentation, recipe.seed)
    return keras.Model(images, classifier(augmentation(images)), name="training")


@dataclass(frozen=True)
class Trained:
    """A trained classifier and how it came to be.

    Attributes
    ----------
    model : keras.Model
        In float32, without augmentation: images from 0 to 255 to probabilities.
    histories : dict of str to DataFrame
        ``head`` and ``fine_tune``, where they were trained.
    seconds : float
        Spent in training, over all runs.
    """

    model: keras.Model
    histories: dict[str, pd.DataFrame]
    seconds: float


def train_classifier(
    recipe: Recipe,
    data: TrainingData,
    *,
    folder: Path | None = None,
    watchers: Sequence[keras.callbacks.Callback] = (),
    quiet: bool = False,
) -> Trained:
    """Train as notebook 03 does: head on frozen features, then fine-tuning. Resumes a killed run.

    Parameters
    ----------
    recipe : Recipe
    data : TrainingData
    folder : Path, optional
        Where the checkpoints go, a folder a stage; `checkpoint_folder` unless given.
    watchers : sequence of keras.callbacks.Callback, optional
        Told of every epoch of fine-tuning, before its checkpoint; they may stop it.
    quiet : bool
        Print no line an epoch.
    """
    import keras

    keras.config.set_dtype_policy(recipe.precision)
    base = backbones.build_base(recipe.backbone, recipe.weights, recipe.seed)
    head = build_head(recipe)
    histories, seconds = {}, 0.0
    if recipe.frozen_epochs:
        extractor = backbones.build_feature_extractor(recipe.backbone, base, recipe.input_size)
        read = feature_reader(frozen_features(extractor, data.cells, cache_folder()))
        run = _resumable(head, recipe, data, "head", folder, quiet=quiet)
        histories["head"] = _fit(head, read, recipe, data, run)
        seconds += run.seconds
    classifier = backbones.build_classifier(
        recipe.backbone, base, head, recipe.input_size, frozen_batch_norm=recipe.pretrained
    )
    backbones.set_trainable(base, recipe.fine_tune_layers, frozen_batch_norm=recipe.pretrained)
    if recipe.fine_tune_epochs:
        model = build_training_model(recipe, classifier)
        read = image_reader(data.cells, recipe.input_size)
        run = _resumable(model, recipe, data, "fine_tune", folder, watchers, quiet=quiet)
        histories["fine_tune"] = _fit(model, read, recipe, data, run)
        seconds += run.seconds
    return Trained(in_float32(recipe, classifier), histories, seconds)


def _resumable(
    model: keras.Model,
    recipe: Recipe,
    data: TrainingData,
    stage: str,
    folder: Path | None,
    watchers: Sequence[keras.callbacks.Callback] = (),
    *,
    quiet: bool,
) -> Resumable:
    epochs, rate = {
        "head": (recipe.frozen_epochs, recipe.head_learning_rate),
        "fine_tune": (recipe.fine_tune_epochs, recipe.fine_tune_learning_rate),
    }[stage]
    compile_for_training(model, recipe, rate)
    return Resumable(
        model,
        folder / stage if folder else checkpoint_folder(recipe, data, stage),
        epochs=epochs,
        patience=recipe.patience,
        seed=recipe.seed,
        watchers=watchers,
        quiet=quiet,
    )


def _fit(
    model: keras.Model, read: Reader, recipe: Recipe, data: TrainingData, run: Resumable
) -> pd.DataFrame:
    model.fit(**data.fit_arguments(read, recipe, run))
    return run.finish()


def build_head(recipe: Recipe) -> keras.Model:
    """Return a new head of the recipe's kind, for its backbone and classes."""
    features = backbones.get_backbone(recipe.backbone).features
    return backbones.build_head(features, len(recipe.classes), recipe.dropout, recipe.seed, recipe.head)


def compile_for_training(model: keras.Model, recipe: Recipe, rate: float) -> None:
    """Compile with the recipe's optimizer and categorical cross-entropy.

    ``"adam"``, or ``"sgd"``: stochastic gradient descent with Nesterov's momentum of 0.9 (Sutskever et
    al. 2013, ICML), whose rates are about 100 times as large for steps of the same length.

    Gradients are clipped to norm 1: networks that start from nothing meet a few huge ones in their
    first steps. Compiled without XLA, whose compilation costs more than these short runs would gain.

    Raises
    ------
    ValueError
        If there is no such optimizer.
    """
    import keras

    if recipe.optimizer not in OPTIMIZERS:
        raise ValueError(f"there is no optimizer '{recipe.optimizer}'; choose one of {', '.join(OPTIMIZERS)}")
    optimizer = (
        keras.optimizers.Adam(rate, global_clipnorm=1.0)
        if recipe.optimizer == "adam"
        else keras.optimizers.SGD(rate, momentum=0.9, nesterov=True, global_clipnorm=1.0)
    )
    model.compile(
        optimizer=optimizer,
        loss=keras.losses.CategoricalCrossentropy(label_smoothing=recipe.label_smoothing),
        metrics=["accuracy"],
        jit_compile=False,
    )


def in_float32(recipe: Recipe, classifier: keras.Model) -> keras.Model:
    """Return the same classifier built in float32, whatever precision it was trained in."""
    return backbones.rebuild_in_float32(
        classifier, recipe.backbone, build_head(recipe), recipe.input_size, recipe.seed
    )


def predict_rows(
    model: keras.Model, data: TrainingData, rows: NDArray[np.int64], recipe: Recipe
) -> Predictions:
    """Run a classifier over rows of the store, in order."""
    read = image_reader(data.cells, recipe.input_size)
    paths = data.cells.table["path"].to_numpy(str)[rows]
    batches = ordered_batches(read, rows, data.labels[rows])
    return predict_images(model, batches, data.sources[rows], paths, recipe.classes)


def load_model(path: Path) -> keras.Model:
    """Load a saved model.

    Raises
    ------
    HematoVisionError
        If the file is missing or is no model of ours.
    """
    import keras

    try:
        return keras.models.load_model(path, compile=False, safe_mode=True)
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise HematoVisionError(f"{path} is not a readable model ({first})", "train it again") from error


def save_model(model: keras.Model, path: Path) -> None:
    """Save a model in Keras's format, atomically."""
    with atomic_path(path) as temporary:
        model.save(temporary)
