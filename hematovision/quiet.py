"""Silence for native code: TensorFlow, its converter and LiteRT write to standard error unasked."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Discard what native code writes to standard error inside the block.

    No setting of those libraries switches all of it off, and a reader of a notebook or of a terminal
    should not meet it. Python exceptions are not affected.
    """
    kept = os.dup(2)
    void = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(void, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(void)
