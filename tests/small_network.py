"""A network of two layers in the place of a backbone: what is tested is what happens around it."""

from __future__ import annotations

from typing import Any

import keras
import pytest

from hematovision.learn import backbones


def small_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `build_base` make a network of two layers, with batch norm; its weights follow from the seed."""

    def build(backbone: str, weights: str = "none", seed: int = 0) -> Any:  # noqa: ARG001 - its interface
        keras.utils.set_random_seed(seed)
        images = keras.Input((None, None, 3))
        features = backbones.BACKBONES[backbone].features
        # named, so that weights are found by their path in whichever network is built next
        x = keras.layers.Conv2D(features, 3, strides=4, name="conv")(images)
        x = keras.layers.BatchNormalization(momentum=0.5, name="norm")(x)
        return keras.Model(images, keras.layers.ReLU(name="relu")(x), name=backbone)

    monkeypatch.setattr(backbones, "build_base", build)
