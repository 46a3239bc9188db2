"""Fixtures that more than one test file needs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the folder that holds ``blood-cells/`` and ``pbc/``; skip where there is none."""
    named = os.environ.get("HEMATOVISION_DATA")
    for folder in ([Path(named)] if named else []) + [ROOT / "data" / "raw", ROOT.parent / "shared" / "data"]:
        if (folder / "blood-cells").is_dir():
            return folder
    pytest.skip("the public image sets are not here: set HEMATOVISION_DATA to run this test")
