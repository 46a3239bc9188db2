"""A network of two layers in the place of a backbone: what is tested is what happens around it."""

from __future__ import annotations

from typing import Any

import keras
import pytest

from hematovision.learn import backbones


def build_small(backbone: str, weights: str = "none", seed: int = 0) -> Any:  # noqa: ARG001 - its interface
    """Return two layers, with batch norm and the channels of the backbone; weights follow from the seed."""
    keras.utils.set_random_seed(seed)
    images = keras.Input((None, None, 3))
    features = backbones.BACKBONES[backbone].features
    # named, so that weights are found by their path in whichever network is built next
    x = keras.layers.Conv2D(features, 4, strides=4, name="conv")(images)
    x = keras.layers.BatchNormalization(momentum=0.5, name="norm")(x)
    return keras.Model(images, keras.layers.ReLU(name="relu")(x), name=backbone)


def small_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `build_base` make it."""
    monkeypatch.setattr(backbones, "build_base", build_small)
