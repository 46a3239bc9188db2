"""Augmentation as Keras layers, part of the training model alone.

Keras is imported when a layer is built, so that `vision` stays usable without it.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import keras

# Rotation by the full circle: a smear has no upright. Shift and zoom cover the spread that locating
# leaves (a margin of 0.15 a side). Colour: Tellez et al. 2019 (doi 10.1016/j.media.2019.101544) find
# strong hue and saturation jitter the best help between laboratories.
ROTATION_TURNS = 0.5
SHIFT = 0.08
ZOOM = 0.15
# Contrast and focus: laboratories differ in how dark they stain and how sharply they see by far more
# than in hue. The spread of grey values is 28 in the Kaggle photographs and 61 in the Barcelona set.
GAIN = 0.12
CONTRAST = 0.4
SOFTEN, SHARPEN = 1.0, 0.4
BLUR = 0.012
"""Standard deviation of the blur that softens a picture, as a share of its side."""
SATURATION = 0.35
HUE_TURNS = 0.06
BRIGHTNESS = 0.12


def build_augmentation(strength: float, seed: int) -> keras.Sequential:
    """Return the augmentation of a training batch.

    Parameters
    ----------
    strength : float
        0 for flips alone, 1 for the standard amounts above, 2 for twice as much.
    seed : int
        Of the layers' random generators.

    Returns
    -------
    keras.Sequential
        Maps float32 images of shape (B, H, W, 3) from 0 to 255 to the same shape and range; does
        nothing when called with ``training=False``.
    """
    import keras

    # two layers: Keras's own "horizontal_and_vertical" flips both ways or neither (3.15), which is
    # half a turn, so that no picture would ever be mirrored
    layers: list[Any] = [
        keras.layers.RandomFlip("horizontal", seed=seed),
        keras.layers.RandomFlip("vertical", seed=seed + 5),
    ]
    if strength > 0:
        layers += [
            keras.layers.RandomRotation(ROTATION_TURNS, fill_mode="reflect", seed=seed + 1),
            keras.layers.RandomTranslation(
                SHIFT * strength, SHIFT * strength, fill_mode="reflect", seed=seed + 2
            ),
            keras.layers.RandomZoom(ZOOM * min(strength, 3.0), fill_mode="reflect", seed=seed + 3),
            build_colour_jitter(strength, seed + 4),
            build_focus_jitter(strength, seed + 6),
        ]
    return keras.Sequential(layers, name="augmentation")


def build_colour_jitter(strength: float, seed: int) -> keras.layers.Layer:
    """Return a layer that changes contrast, brightness, channel gain, saturation and hue, image by image.

    All are linear in the pixel: contrast scales the distance from white (how dark the stain is), then
    one 3x3 matrix an image turns saturation and hue about the grey axis and sets the gain of each
    channel (camera and lamp) and of all (exposure).
    """
    return _layers().ColourJitter(strength, seed=seed, name="colour_jitter")


def build_focus_jitter(strength: float, seed: int) -> keras.layers.Layer:
    """Return a layer that makes each image softer or sharper: a mixture of it and its blurred copy."""
    return _layers().FocusJitter(strength, seed=seed, name="focus_jitter")


@functools.cache
def _layers() -> SimpleNamespace:
    """Return the classes of the layers; defined on the first call, so that Keras is imported late."""
    import keras
    from keras import ops

    # RGB <-> YIQ (NTSC): a plane in which saturation is a radius and hue an angle
    to_yiq = [[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]]
    to_rgb = [[1.0, 0.956, 0.621], [1.0, -0.272, -0.647], [1.0, -1.106, 1.703]]

    class Jitter(keras.layers.Layer):
        """What the layers share: a strength, random numbers of their own, and nothing outside training."""

        def __init__(self, strength: float, seed: int = 0, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.strength = strength
            self.seed = seed
            self.generator = keras.random.SeedGenerator(seed)

        def call(self, images: Any, training: bool = False) -> Any:
            if not training:
                return images
            changed = ops.clip(self.change(ops.cast(images, "float32")), 0.0, 255.0)
            return ops.cast(changed, self.compute_dtype)

        def change(self, images: Any) -> Any:
            raise NotImplementedError

        def compute_output_shape(self, input_shape: Any) -> Any:
            return input_shape

        def get_config(self) -> dict[str, Any]:
            return {**super().get_config(), "strength": self.strength, "seed": self.seed}

    @keras.saving.register_keras_serializable("hematovision")
    class ColourJitter(Jitter):
        """Random contrast, gain, saturation, hue and brightness; see `build_colour_jitter`."""

        def change(self, images: Any) -> Any:
            n = ops.shape(images)[0]
            s = self.strength

            def draw(shape: tuple[Any, ...], amount: float) -> Any:
                return keras.random.uniform(shape, -amount, amount, dtype="float32", seed=self.generator)

            gain = ops.exp(draw((n, 1, 3), GAIN * s) + draw((n, 1, 1), BRIGHTNESS * s))
            chroma = ops.exp(draw((n,), SATURATION * s))
            angle = 2 * 3.141592653589793 * draw((n,), HUE_TURNS * s)
            cos, sin = chroma * ops.cos(angle), chroma * ops.sin(angle)
            one, zero = ops.ones_like(cos), ops.zeros_like(cos)
            turn = ops.stack(
                [
                    ops.stack([one, zero, zero], -1),
                    ops.stack([zero, cos, -sin], -1),
                    ops.stack([zero, sin, cos], -1),
                ],
                1,
            )
            matrix = ops.matmul(
                ops.matmul(ops.convert_to_tensor(to_rgb), turn), ops.convert_to_tensor(to_yiq)
            )
            matrix = ops.transpose(matrix, (0, 2, 1)) * gain
            pixels = ops.reshape(images, (n, -1, 3))
            pixels = 255.0 - (255.0 - pixels) * ops.exp(draw((n, 1, 1), CONTRAST * s))
            return ops.reshape(ops.matmul(pixels, matrix), ops.shape(images))

    @keras.saving.register_keras_serializable("hematovision")
    class FocusJitter(Jitter):
        """Random focus; see `build_focus_jitter`."""

        def build(self, input_shape: Any) -> None:
            sigma = max(BLUR * int(input_shape[1] or 128), 0.5)
            reach = np.arange(-2, 3)
            line = np.exp(-(reach**2) / (2 * sigma**2))
            kernel = np.outer(line, line) / line.sum() ** 2
            self.kernel = np.repeat(kernel[:, :, None, None], 3, axis=2).astype(np.float32)

        def change(self, images: Any) -> Any:
            share = keras.random.uniform(
                (ops.shape(images)[0], 1, 1, 1),
                -SHARPEN * self.strength,
                SOFTEN * min(self.strength, 1.0),
                dtype="float32",
                seed=self.generator,
            )
            around = ops.pad(images, [[0, 0], [2, 2], [2, 2], [0, 0]], mode="reflect")
            blurred = ops.depthwise_conv(around, self.kernel, padding="valid")
            return images + share * (blurred - images)

    return SimpleNamespace(ColourJitter=ColourJitter, FocusJitter=FocusJitter)
