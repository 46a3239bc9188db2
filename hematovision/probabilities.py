"""Probabilities made honest: the one formula that fitting and prediction share."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

LEAST_PROBABILITY = 1e-12
"""Below it a probability counts as this: float32 rounds many to 0, whose logarithm is no number."""


def calibrate(probabilities: NDArray[Any], temperature: float) -> NDArray[np.float64]:
    """Divide the logarithms of probabilities by a temperature (Guo et al. 2017).

    Parameters
    ----------
    probabilities : array of shape (..., C), rows sum to 1
    temperature : float
        Above 0; above 1 makes a model less sure.

    Returns
    -------
    float64 array of the same shape, rows sum to 1
    """
    floored = np.maximum(probabilities.astype(np.float64), LEAST_PROBABILITY)
    logarithms = np.log(floored) / temperature
    powers = np.exp(logarithms - logarithms.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))
