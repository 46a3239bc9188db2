"""pyproject.toml, the lock and the conda environment name the same packages in the same versions."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from study import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import lock

LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
PINS = [Requirement(pin) for pin in lock.read_pins(LOCK)]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

LINUX = {
    "sys_platform": "linux",
    "platform_machine": "x86_64",
    "os_name": "posix",
    "platform_system": "Linux",
}


def _environment(python: str) -> dict[str, str]:
    here = {key: str(value) for key, value in default_environment().items()}
    return here | LINUX | {"python_version": python, "python_full_version": f"{python}.9", "extra": ""}


def _pinned(python: str) -> dict[str, str]:
    chosen = [pin for pin in PINS if pin.marker is None or pin.marker.evaluate(_environment(python))]
    names = [canonicalize_name(pin.name) for pin in chosen]
    assert len(names) == len(set(names)), "a package is pinned twice"
    return {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in chosen}


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_the_lock_holds_what_the_project_asks_for(python: str) -> None:
    pinned = _pinned(python)
    asked = list(PROJECT["dependencies"])
    for extra in lock.EXTRAS:
        asked += PROJECT["optional-dependencies"][extra]
    for requirement in map(Requirement, asked):
        if requirement.marker and not requirement.marker.evaluate(_environment(python)):
            continue
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not in the lock: run `make lock`"
        assert requirement.specifier.contains(version), f"{requirement} but {version}: run `make lock`"


def test_every_pin_has_hashes_and_no_host() -> None:
    blocks = re.split(r"\n(?=[A-Za-z0-9])", LOCK.strip())
    assert len(blocks) == len(PINS)
    assert all("--hash=sha256:" in block for block in blocks)
    assert "://" not in LOCK
    assert "--index-url" not in LOCK


def test_no_tracked_file_names_a_registry() -> None:
    """A host of one network's mirror would fail everywhere else; pip, uv and conda know the public ones."""
    host = re.compile(
        r"(?:--?(?:extra-)?index(?:-url)?|index-url *=|registry *=) *=? *[\"']?https?://|/simple/?\b"
    )
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    read = [ROOT / name for name in listed if name and not name.startswith("tests/")]
    assert ROOT / "requirements.lock" in read
    for path in read:
        if path.is_file() and b"\0" not in (content := path.read_bytes()):
            found = host.search(content.decode("utf-8", errors="replace"))
            assert found is None, f"{path.relative_to(ROOT)}: {found[0] if found else ''}"


def test_the_conda_environment_is_the_lock() -> None:
    text = (ROOT / "environment.yml").read_text(encoding="utf-8")
    assert text == lock.environment_text(LOCK), "run `make lock`"
    environment = yaml.safe_load(text)
    python, pip, listed = environment["dependencies"]
    assert python == "python=3.11"
    assert pip == "pip"
    assert {*listed["pip"]} == {*lock.read_pins(LOCK), "-e ."}


def test_every_dependency_has_a_reason() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    project = text[text.index("dependencies = [") : text.index("[project.scripts]")].splitlines()
    for before, line in zip(["", *project], project, strict=False):
        if line.strip().startswith('"'):
            said = "#" in line or before.strip().startswith(("#", '"tensorflow'))
            assert said, f"no reason beside {line.strip()}"


def test_the_installed_packages_are_those_of_the_lock() -> None:
    """What the tests run on is what a user gets; a package installed by hand would hide a missing one."""
    import importlib.metadata

    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    for name, version in _pinned(python).items():
        if name.startswith("tensorflow"):
            continue  # one of two builds: `make GPU=1` installs the other
        try:
            assert importlib.metadata.version(name) == version, name
        except importlib.metadata.PackageNotFoundError:
            pytest.fail(f"{name} is not installed: run `make test`")


def test_make_lists_its_targets_and_needs_no_terminal() -> None:
    done = subprocess.run(
        ["make"], cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=True
    )
    for target in ("report", "test", "lab", "lint", "demo", "lock", "clean"):
        assert f"make {target} " in done.stdout


def test_make_says_so_where_there_is_no_python(tmp_path) -> None:
    command = ["make", "report", "PYTHON=", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode
    assert "there is no Python 3.11 or 3.12 here" in done.stderr
