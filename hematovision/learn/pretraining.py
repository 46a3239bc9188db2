"""Backbones that have seen blood: each is trained on the eight classes of the Barcelona set (PBC).

Their weights are the third source of initial weights, ``hematovision``, beside ``imagenet`` and
``none``: transfer learning with all three backbones and no network. A fifth of the set is held out
and takes no part, neither in training nor in choosing, so that whatever is built on these weights
can still be tested on PBC.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import hematovision
from hematovision.config import cache_folder, pretrained_file
from hematovision.data.sides import PBC_SEED, Sides
from hematovision.errors import HematoVisionError
from hematovision.files import content_key, sha256_file
from hematovision.learn import backbones, runtime
from hematovision.learn.compact import load_compact, write_compact
from hematovision.learn.recipe import Trained
from hematovision.learn.training import (
    Resumable,
    draw_copies,
    fit_arguments,
    image_reader,
    ordered_batches,
)
from hematovision.vision.augment import build_augmentation

if TYPE_CHECKING:
    import keras

HEAD_SEED = 2026
"""Of the head's first weights. Trainings of other seeds share them, so that their weights can be averaged."""
MOST_CHANGED = 0.005
"""Largest share of validation cells that may be named otherwise once the weights are compact."""


@dataclass(frozen=True)
class Stage:
    """A part of a pretraining at one size of pictures.

    Attributes
    ----------
    size : int
        Pixels a side.
    epochs : int
    rate : float
        Highest learning rate: reached in a warm-up of one epoch, then lowered along a cosine.
    augmentation : float
        Its strength. What starts from nothing learns faster from cells that are changed less.
    """

    size: int
    epochs: int
    rate: float
    augmentation: float = 1.0


@dataclass(frozen=True)
class Plan:
    """How one backbone is pretrained.

    Attributes
    ----------
    stages : tuple of Stage
        One after the other. What starts from nothing learns coarse shapes on small pictures first,
        where an epoch costs a fraction.
    weights : str
        Where it starts, if nothing else is asked for.
    precision : str
    """

    stages: tuple[Stage, ...]
    weights: str = "none"
    precision: str = "mixed_bfloat16"
    batch_size: int = 32
    dropout: float = 0.3
    label_smoothing: float = 0.05
    seed: int = 2026

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return dataclasses.asdict(self)


# found on two cores: mixed_bfloat16 is twice as fast for plain convolutions and slower for depthwise
# ones. VGG16 has no batch normalisation to forgive a large step and is unstable at 3e-4.
PLANS: dict[str, Plan] = {
    "vgg16": Plan((Stage(64, 14, 2e-4, 0.5), Stage(96, 4, 1e-4))),
    "mobilenetv2": Plan((Stage(128, 15, 3e-4),), weights="imagenet", precision="float32"),
    "resnet50": Plan((Stage(64, 18, 1e-3, 0.5), Stage(96, 5, 5e-4))),
}


def plan_for(backbone: str, weights: str | None = None, epochs: int | None = None) -> Plan:
    """Return the plan of a backbone, with other initial weights or another number of epochs if given.

    Checked before any work.

    Raises
    ------
    WeightsError
        If the initial weights can't be had.
    """
    plan = PLANS[backbone]
    if weights:
        plan = dataclasses.replace(plan, weights=weights)
    if epochs:
        plan = dataclasses.replace(
            plan, stages=tuple(dataclasses.replace(s, epochs=epochs) for s in plan.stages)
        )
    backbones.check_source(backbone, plan.weights)
    return plan


def pretrain(
    backbone: str,
    cells: Sides,
    *,
    plan: Plan | None = None,
    out: Path | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Train a backbone on eight classes and write its weights, compact.

    A killed training goes on from its last whole epoch.

    Parameters
    ----------
    backbone : str
    cells : Sides
    plan : Plan, optional
        `PLANS` of this backbone unless given.
    out : path, optional
        `config.pretrained_file` unless given.
    say : callable
        Takes a line of progress.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    WeightsError
        If the weights to start from can't be had.
    HematoVisionError
        If compression changes more than 0.5 % of what is said of the validation cells.
    """
    plan = plan or PLANS[backbone]
    trained = train_plan(backbone, cells, plan, say)
    return _release(backbone, trained, cells, plan, out or pretrained_file(backbone), say)


def _key(backbone: str, cells: Sides, plan: Plan, number: int) -> str:
    """Name a stage by all that its result depends on, the code included."""
    package = Path(hematovision.__file__).parent
    names = ("learn/backbones.py", "learn/pretraining.py", "learn/training.py", "vision/augment.py")
    file = backbones.weights_file(backbone, plan.weights)
    return content_key(
        backbone,
        dataclasses.asdict(plan),
        number,
        sha256_file(file) if file else plan.weights,
        cells.cells.key,
        cells.split.train,
        cells.split.validation,
        [sha256_file(package / name) for name in names],
    )


def train_plan(backbone: str, cells: Sides, plan: Plan, say: Callable[[str], None] = print) -> Trained:
    """Train a network as a plan says; a killed training goes on where it was.

    Returns
    -------
    Trained
        Its ``model`` maps images of the last stage's size to probabilities, in float32.

    Raises
    ------
    WeightsError
        If the weights to start from can't be had.
    """
    keras = runtime.start(plan.seed)
    keras.config.set_dtype_policy(plan.precision)
    base = backbones.build_base(backbone, plan.weights, plan.seed)
    features = backbones.get_backbone(backbone).features
    head = backbones.build_head(features, len(cells.classes), plan.dropout, HEAD_SEED)
    from_nothing = plan.weights == "none"
    backbones.set_trainable(base, 0, frozen_batch_norm=not from_nothing)
    histories, seconds = {}, 0.0
    for number, stage in enumerate(plan.stages):
        say(f"{backbone}: {stage.epochs} epochs at {stage.size} pixels")
        classifier = backbones.build_classifier(
            backbone, base, head, stage.size, frozen_batch_norm=not from_nothing
        )
        run = _train_stage(classifier, cells, plan, number, _key(backbone, cells, plan, number))
        histories[f"{stage.size} pixels"] = run.finish()
        seconds += run.seconds
    top = backbones.build_head(features, len(cells.classes), plan.dropout, HEAD_SEED)
    size = plan.stages[-1].size
    model = backbones.rebuild_in_float32(classifier, backbone, top, size, plan.seed)
    return Trained(model, histories, seconds)


def _train_stage(classifier: keras.Model, cells: Sides, plan: Plan, number: int, key: str) -> Resumable:
    import keras

    stage = plan.stages[number]
    images = keras.Input((stage.size, stage.size, 3))
    augmented = build_augmentation(stage.augmentation, plan.seed)(images)
    model = keras.Model(images, classifier(augmented), name="pretraining")
    train, validation = cells.rows("train"), cells.rows("validation")
    validation = validation[draw_copies(cells.groups[validation], cells.copies, PBC_SEED)]
    drawn = len(draw_copies(cells.groups[train], cells.copies, 0))
    steps = drawn // min(plan.batch_size, drawn)
    model.compile(
        keras.optimizers.AdamW(_warm_cosine(stage, steps), weight_decay=1e-4, global_clipnorm=1.0),
        keras.losses.CategoricalCrossentropy(label_smoothing=plan.label_smoothing),
        metrics=["accuracy"],
        jit_compile=False,
    )
    # the schedule lowers the rate, so that neither a plateau nor patience has a say
    run = Resumable(
        model,
        cache_folder() / "checkpoints" / f"pretraining-{key}",
        epochs=stage.epochs,
        patience=10 * stage.epochs,
        seed=plan.seed + number,
    )
    read = image_reader(cells.cells, stage.size)
    arguments = fit_arguments(
        read,
        train,
        validation,
        cells.labels,
        cells.groups,
        run,
        batch_size=plan.batch_size,
        copies_per_photograph=cells.copies,
        seed=plan.seed + number,
    )
    model.fit(**arguments)
    return run


def _warm_cosine(stage: Stage, steps: int) -> keras.optimizers.schedules.LearningRateSchedule:
    import keras

    return keras.optimizers.schedules.CosineDecay(
        stage.rate / 100,
        decay_steps=max(1, (stage.epochs - 1) * steps),
        alpha=0.02,
        warmup_target=stage.rate,
        warmup_steps=steps,
    )


def _release(
    backbone: str, trained: Trained, cells: Sides, plan: Plan, out: Path, say: Callable[[str], None]
) -> Path:
    """Write the compact weights, once they are known to say the same as the full ones."""
    model, size, rows = trained.model, plan.stages[-1].size, cells.rows("validation")
    base = model.get_layer(backbone)
    full_weights = base.get_weights()
    facts: dict[str, Any] = {
        "backbone": backbone,
        "classes": list(cells.classes),
        "data": "pbc",
        "images": {"training": len(cells.split.train), "validation": len(rows)},
        "held_out": len(cells.split.test),
        "cells": cells.cells.key,
        "plan": dataclasses.asdict(plan),
        "input_size": size,
        "minutes": round(trained.seconds / 60, 1),
    }
    full = _predict(model, cells, rows, size)
    draft = out.with_name(f".{out.stem}.draft.npz")
    try:
        write_compact(base, draft, facts)
        load_compact(base, draft)
        compact = _predict(model, cells, rows, size)
    finally:
        draft.unlink(missing_ok=True)
    changed = float((compact != full).mean())
    if changed > MOST_CHANGED:
        raise HematoVisionError(
            f"compact weights of {backbone} change {changed:.2%} of the predictions", "train it for longer"
        )
    truth = cells.labels[rows].argmax(axis=1)
    recalls = [float((compact[truth == i] == i).mean()) for i in np.unique(truth)]
    facts["validation"] = {
        "accuracy": float((compact == truth).mean()),
        "balanced_accuracy": float(np.mean(recalls)),
        "changed_by_compression": changed,
    }
    base.set_weights(full_weights)
    write_compact(base, out, facts)
    say(
        f"{out}: balanced accuracy {facts['validation']['balanced_accuracy']:.1%} on {len(rows)} validation "
        f"cells, {changed:.2%} named otherwise than before compression"
    )
    return out


def _predict(model: keras.Model, cells: Sides, rows: NDArray[np.int64], size: int) -> NDArray[Any]:
    batches = ordered_batches(image_reader(cells.cells, size), rows, cells.labels[rows])
    return np.concatenate([model.predict_on_batch(images).argmax(axis=1) for images, _ in batches])
