"""White blood cells by transfer learning: a study to rerun, and the model that comes out of it.

For research and teaching, not for clinical use.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

__all__ = ["Classifier", "__version__"]


def __getattr__(name: str) -> Any:
    # on demand: most of the library needs neither the released model nor what runs it
    if name == "Classifier":
        return importlib.import_module("hematovision.release.predict").Classifier
    if name == "__version__":
        return importlib.metadata.version("hematovision")
    raise AttributeError(f"module 'hematovision' has no attribute '{name}'")
