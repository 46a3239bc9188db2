"""From concentrations of stain to a photograph: light, lens, sensor, JPEG."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from hematovision.data.smear.shapes import Map, texture
from hematovision.data.smear.stains import Laboratory
from hematovision.vision.field import RGB


def transmit(stains: NDArray[np.float32], lab: Laboratory) -> NDArray[np.float32]:
    """Return the share of light that passes: ``10 ** -OD``, with OD the sum over the stains.

    Parameters
    ----------
    stains : float32 array of shape (4, height, width)
        Concentrations of azure, methylene blue, eosin and haemoglobin.
    lab : Laboratory

    Returns
    -------
    float32 array of shape (height, width, 3), 1 where there is nothing
    """
    density = np.tensordot(stains, lab.vectors, axes=(0, 0))
    return np.asarray(cv2.exp(density * np.float32(-np.log(10.0))), np.float32).reshape(density.shape)


def illuminate(rng: np.random.Generator, shape: tuple[int, int], lab: Laboratory) -> NDArray[np.float32]:
    """Return empty glass, float32 (height, width, 3) in grey levels: vignette, gradient, cast."""
    height, width = shape
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    x = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    cx, cy = rng.normal(0, 0.2, 2)
    falloff = 1 - lab.vignette * ((x - cx) ** 2 + (y - cy) ** 2) / 2
    gx, gy = rng.normal(0, 0.02, 2)
    uneven = falloff + gx * x + gy * y + 0.008 * texture(rng, shape, (width / 3,))
    exposure = rng.normal(1.0, 0.025)
    cast = rng.normal(1.0, 0.01, 3)
    colour = (lab.background * exposure * cast).astype(np.float32)
    drift = np.stack([1 + s * x + t * y for s, t in rng.normal(0, 0.006, (3, 2))], axis=-1)
    return np.asarray(uneven[..., None] * drift * colour, np.float32)


def focus(light: NDArray[np.float32], lab: Laboratory, defocus: float) -> NDArray[np.float32]:
    """Blur as the lens does, each colour a little differently and a little elsewhere."""
    sigma = float(np.hypot(lab.blur, defocus))
    size = (light.shape[1], light.shape[0])
    channels = []
    for channel, (sharpness, shift) in enumerate(
        ((1.08, lab.chromatic[0]), (1.0, (0.0, 0.0)), (1.15, lab.chromatic[1]))
    ):
        plane = cv2.GaussianBlur(np.ascontiguousarray(light[..., channel]), (0, 0), sigma * sharpness)
        if any(shift):
            move = np.array([[1, 0, shift[0]], [0, 1, shift[1]]], np.float32)
            plane = cv2.warpAffine(plane, move, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        channels.append(plane)
    return np.stack(channels, axis=-1)


def expose(rng: np.random.Generator, light: NDArray[np.float32], lab: Laboratory) -> RGB:
    """Record light as the camera does: stray light, colour, noise, sharpening, eight bits."""
    light = light * (1 - lab.glare) + lab.glare * lab.background
    grey = light.mean(axis=-1, keepdims=True)
    # saturation works on colour relative to glass, which stays as the white balance left it
    glass = grey * (lab.background / lab.background.mean())
    light = glass + lab.saturation * (light - glass)
    light = light + _noise(rng, (light.shape[0], light.shape[1]), lab)
    if lab.sharpening > 0:
        light = light + lab.sharpening * (light - cv2.GaussianBlur(light, (0, 0), 2.2))
    return np.clip(light + 0.5, 0, 255).astype(np.uint8)


def _noise(rng: np.random.Generator, shape: tuple[int, int], lab: Laboratory) -> NDArray[np.float32]:
    """Return sensor noise: fine grain, blotches of colour, and columns that differ a little."""
    grain = cv2.GaussianBlur(rng.standard_normal((*shape, 3), dtype=np.float32), (0, 0), 0.6)
    # one blue-sensitive photosite in four, and the least light: the blue channel is the noisiest
    grain *= np.array([1.5, 1.4, 2.2], np.float32)
    blotches = np.stack([texture(rng, shape, (5.0,)) for _ in range(3)], axis=-1)
    columns = rng.standard_normal((1, shape[1], 3), dtype=np.float32)
    return np.asarray(lab.noise * (grain + 0.35 * blotches + 0.25 * columns), np.float32)


def encode_jpeg(rgb: RGB, quality: int) -> bytes:
    """Return the bytes of a JPEG file."""
    _, data = cv2.imencode(".jpg", rgb[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    return bytes(data)


def decode_jpeg(data: bytes) -> RGB:
    """Return the picture in the bytes of a JPEG file that `encode_jpeg` wrote."""
    decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    return np.ascontiguousarray(np.asarray(decoded, np.uint8)[..., ::-1])


def dust(rng: np.random.Generator, shape: tuple[int, int]) -> Map:
    """Return the shadows of out-of-focus dust, float32 (height, width), near 1."""
    shadow = np.ones(shape, np.float32)
    for _ in range(rng.poisson(2.0)):
        x, y = int(rng.uniform(0, shape[1])), int(rng.uniform(0, shape[0]))
        spot = np.zeros(shape, np.uint8)
        cv2.circle(spot, (x, y), int(rng.uniform(2, 9)), 1, -1)
        reach = 40
        top, left = max(y - reach, 0), max(x - reach, 0)
        part = spot[top : y + reach, left : x + reach].astype(np.float32)
        shadow[top : y + reach, left : x + reach] -= rng.uniform(0.05, 0.25) * cv2.GaussianBlur(
            part, (0, 0), float(rng.uniform(1.5, 5))
        )
    return shadow
