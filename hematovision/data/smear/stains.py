"""Stains, and what one laboratory makes of them.

A May-Grunwald-Giemsa stain is a mixture: azure B binds to chromatin and, with eosin, gives it its
purple; methylene blue and its kin colour ribonucleic acid blue; eosin colours basic proteins
orange-red, most of all the granules of eosinophils; haemoglobin takes up eosin and absorbs by
itself. Light obeys Beer and Lambert: densities add up, intensities multiply (Horobin and Walter,
Histochemistry 86 (1987) 331, on the Romanowsky-Giemsa effect; Ruifrok and Johnston, Anal. Quant.
Cytol. Histol. 23 (2001) 291, on colour by optical density).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

AZURE, BLUE, EOSIN, HAEMOGLOBIN = range(4)
STAINS = 4

# Optical density in (R, G, B) of unit concentration, as read from published smear photographs: the
# medians of nuclei, lymphocyte rims, eosinophil granules and red cells against their background.
VECTORS: NDArray[np.float32] = np.array(
    [[0.53, 1.00, 0.06], [1.00, 0.66, 0.02], [0.41, 1.00, 0.36], [0.52, 1.00, 0.84]], np.float32
)


@dataclass(frozen=True)
class Laboratory:
    """How one laboratory stains and photographs.

    Attributes
    ----------
    vectors : float32 array of shape (4, 3)
        Optical density in (R, G, B) of unit concentration of each stain.
    nucleus : float
        Optical density in green of an ordinary nucleus.
    cytoplasm : float
        Strength of the stain of cytoplasm and granules; 1 is pale.
    red : float
        Optical density in green of the thick part of a red cell.
    background : float32 array of shape (3,)
        Colour of empty glass, 0 to 255: exposure and white balance.
    vignette : float
        Loss of light from the middle to the corners, 0 to 1.
    blur : float
        Standard deviation in pixels of the optics' spread.
    chromatic : float32 array of shape (2, 2)
        Shift (x, y) in pixels of red and of blue against green.
    glare : float
        Share of stray light, which lifts the dark parts.
    saturation : float
        Factor on colour differences, by the camera.
    noise : float
        Standard deviation of the sensor noise, in grey levels.
    sharpening : float
        Strength of the camera's edge enhancement.
    crowding : float
        Red cells a field, relative to an even monolayer.
    quality : int
        Of the JPEG file.
    """

    vectors: NDArray[np.float32]
    nucleus: float
    cytoplasm: float
    red: float
    background: NDArray[np.float32]
    vignette: float
    blur: float
    chromatic: NDArray[np.float32]
    glare: float
    saturation: float
    noise: float
    sharpening: float
    crowding: float
    quality: int


def laboratory(seed: int) -> Laboratory:
    """Return the laboratory of a number; the same number gives the same laboratory.

    The ranges span the published sets: from pale violet nuclei on grey-green glass (webcam on a
    teaching microscope) to dense dark ones on cream (automatic analyser).
    """
    rng = np.random.default_rng([seed, 0x1AB])
    vectors = VECTORS.copy()
    vectors[AZURE, 0] = rng.uniform(0.42, 0.68)
    # the less a camera's blue channel sees of chromatin, the less it sees of eosin too
    blue = rng.uniform(-0.05, 0.17)
    vectors[AZURE, 2] = blue
    vectors[EOSIN, 0] = rng.uniform(0.32, 0.50)
    vectors[EOSIN, 2] = 0.30 + blue + rng.normal(0.0, 0.05)
    vectors[HAEMOGLOBIN, 0] = rng.uniform(0.42, 0.64)
    vectors[HAEMOGLOBIN, 2] = rng.uniform(0.56, 0.96)
    vectors *= rng.uniform(0.95, 1.05, vectors.shape).astype(np.float32)
    depth_of_stain = rng.uniform()
    light = rng.uniform(182, 246)
    warmth, tint = rng.normal(0.015, 0.04), rng.normal(0.006, 0.012)
    background = light * np.array([1 + warmth, 1 + tint, 1 - warmth])
    return Laboratory(
        vectors=vectors,
        nucleus=float(0.225 * 2.8 ** (depth_of_stain**2.2)),
        cytoplasm=float(0.85 + 0.6 * depth_of_stain * rng.uniform(0.6, 1.2)),
        red=float(rng.uniform(0.09, 0.19)),
        background=np.clip(background, 150, 254).astype(np.float32),
        vignette=float(rng.uniform(0.02, 0.14)),
        blur=float(rng.uniform(0.8, 1.8)),
        chromatic=rng.normal(0, 0.9, (2, 2)).astype(np.float32),
        glare=float(rng.uniform(0.0, 0.25)),
        saturation=float(rng.uniform(0.95, 1.6)),
        noise=float(rng.uniform(0.7, 2.0)),
        sharpening=float(rng.uniform(0.0, 1.0)),
        crowding=float(rng.uniform(0.6, 1.5)),
        quality=int(rng.integers(75, 95)),
    )
