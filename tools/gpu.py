"""Put TensorFlow's CUDA build in the place of ``tensorflow-cpu``: ``make GPU=1 ...``.

Everything else keeps the versions of the lock; the CUDA libraries come in those that this build
of TensorFlow asks for.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile

from lock import ROOT, read_pins


def main() -> None:
    """Replace the package."""
    pins = read_pins((ROOT / "requirements.lock").read_text(encoding="utf-8"))
    version = next(m[1] for pin in pins if (m := re.match(r"tensorflow-cpu==(\S+)", pin)))
    kept = [pin for pin in pins if not pin.startswith("tensorflow")]
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write("\n".join(kept))
        constraints.flush()
        subprocess.run([*pip, "uninstall", "--yes", "tensorflow-cpu"], check=True)
        wanted = f"tensorflow[and-cuda]=={version}"
        subprocess.run([*pip, "install", "--constraint", constraints.name, wanted], check=True)


if __name__ == "__main__":
    main()
