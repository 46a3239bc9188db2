"""Write ``requirements.lock`` from ``pyproject.toml``, and ``environment.yml`` from the lock.

Both name the same packages in the same versions: ``make`` installs from the first, conda from the
second. Run as ``make lock``; ``python tools/lock.py --environment`` writes the second alone.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHON = "3.11"
EXTRAS = ("train", "notebooks", "app", "dev")

_HEAD = """\
# The same packages in the same versions as requirements.lock, for conda: written by `make lock`.
#   conda env create -f environment.yml && conda activate hematovision
name: hematovision
channels:
  - conda-forge
dependencies:
  - python={python}
  - pip
  - pip:
"""


def read_pins(lock: str) -> list[str]:
    """Return the pins of a lock, each ``name==version`` with its marker if it has one."""
    return re.findall(r"^([A-Za-z0-9][^\\\n]*?) *\\?$", lock, flags=re.MULTILINE)


def environment_text(lock: str) -> str:
    """Return ``environment.yml`` for a lock."""
    lines = [f'      - "{pin}"' if ";" in pin else f"      - {pin}" for pin in read_pins(lock)]
    return _HEAD.format(python=PYTHON) + "\n".join([*lines, "      - -e ."]) + "\n"


def compile_lock() -> None:
    """Let uv resolve ``pyproject.toml`` for every platform and write ``requirements.lock``."""
    command = ["uv", "pip", "compile", "pyproject.toml", "--output-file", "requirements.lock"]
    command += [word for extra in EXTRAS for word in ("--extra", extra)]
    command += ["--universal", "--python-version", PYTHON, "--generate-hashes", "--quiet"]
    command += ["--no-emit-index-url", "--no-header", "--no-annotate", *sys.argv[1:]]
    subprocess.run(command, cwd=ROOT, check=True)


if __name__ == "__main__":
    if "--environment" not in sys.argv:
        compile_lock()
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    (ROOT / "environment.yml").write_text(environment_text(text), encoding="utf-8")
