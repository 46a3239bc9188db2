"""Where a report comes from: code, packages, machine and time, for ``manifest.json``."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import psutil

from hematovision.config import project_root


def code_state() -> dict[str, Any]:
    """Return the package's version, and git's commit and whether files differ from it (else None)."""
    root = project_root()
    commit = _git(root, "rev-parse", "HEAD")
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    return {
        "version": importlib.metadata.version("hematovision"),
        "commit": commit or None,
        "dirty": bool(changes) if commit else None,
    }


def _git(root: Path, *command: str) -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            ["git", "-C", str(root), *command], capture_output=True, text=True, timeout=20, check=True
        )
        return done.stdout.strip()
    return ""


def package_versions() -> dict[str, str]:
    """Return name and version of every installed package."""
    pairs = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    # names as the package index writes them: some distributions call themselves tensorflow_cpu
    return dict(sorted((re.sub(r"[-_.]+", "-", n).lower(), v) for n, v in pairs.items() if n))


def hardware() -> dict[str, Any]:
    """Return the processor's model, its cores, the memory in megabytes and the system."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(
            (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model
        )
    return {
        "cpu": model,
        "cores": psutil.cpu_count(),
        "memory_mb": psutil.virtual_memory().total // 1024**2,
        "system": f"{platform.system()} {platform.machine()}",
    }
