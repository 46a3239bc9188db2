"""Profiles (every number a run depends on) and the project's paths."""

from __future__ import annotations

import dataclasses
import os
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from hematovision.classes import EIGHT
from hematovision.errors import ConfigError
from hematovision.files import content_key

BACKBONE_NAMES = ("vgg16", "mobilenetv2", "resnet50")


def project_root() -> Path:
    """Return the folder that holds ``profiles/`` and ``notebooks/``.

    ``HEMATOVISION_HOME`` if set, else the nearest such folder at or above the working directory,
    else the folder beside the library (an editable install).
    """
    if home := os.environ.get("HEMATOVISION_HOME"):
        return Path(home).resolve()
    here = Path.cwd().resolve()
    for folder in (here, *here.parents, Path(__file__).resolve().parents[1]):
        if (folder / "profiles").is_dir() and (folder / "notebooks").is_dir():
            return folder
    return here


def data_folder(data: str | Path | None = None) -> Path:
    """Return the folder that holds ``blood-cells/`` and ``pbc/``.

    The argument if given, else ``HEMATOVISION_DATA``, else ``data/raw`` of the project.
    """
    chosen = data or os.environ.get("HEMATOVISION_DATA") or project_root() / "data" / "raw"
    return Path(chosen).expanduser().resolve()


def cache_folder() -> Path:
    """Return the folder for what can be computed again (``data/cache``)."""
    chosen = os.environ.get("HEMATOVISION_CACHE")
    return Path(chosen).resolve() if chosen else project_root() / "data" / "cache"


def artifacts(profile: str) -> Path:
    """Return the folder through which the notebooks of one profile exchange files."""
    return cache_folder() / "runs" / profile


def report_folder(profile: str) -> Path:
    """Return where the finished report of a profile stands."""
    return project_root() / "reports" / profile


def model_folder(profile: str) -> Path:
    """Return where the finished models of a profile stand."""
    return project_root() / "models" / profile


def pretrained_file(backbone: str) -> Path:
    """Return where the released weights of a backbone that was trained on blood stand."""
    return project_root() / "models" / "released" / "pretrained" / f"{backbone}.npz"


@dataclass(frozen=True)
class Profile:
    """Every number a run depends on, typed, checked and frozen.

    A value typed ``dict[str, ...]`` holds one entry a backbone; in YAML and in ``--set`` a single
    value stands for all three.
    """

    # what is studied
    name: str
    title: str
    dataset: str
    classes: tuple[str, ...]
    seed: int
    # drawn data (used by dataset "synthetic" and by the transfer test of notebook 06)
    synthetic_photographs: int
    synthetic_copies: int
    # cells
    cell_size: int
    crop_margin: float
    # splits
    extra_training: tuple[str, ...]
    validation_fraction: float
    copies_per_photograph: int
    # models, one entry a backbone
    backbones: tuple[str, ...]
    weights: dict[str, str]
    input_size: dict[str, int]
    precision: dict[str, str]
    # training
    batch_size: int
    dropout: float
    label_smoothing: float
    augmentation: float
    optimizer: str
    head: str
    head_epochs: int
    head_learning_rate: float
    fine_tune_epochs: dict[str, int]
    fine_tune_layers: dict[str, int]
    fine_tune_learning_rate: dict[str, float]
    random_split_epochs: dict[str, int]
    transfer_epochs: int
    # what is done beyond the comparison
    extra_notebooks: tuple[str, ...]
    # the final model
    final_seeds: int
    final_backbone: str
    final_weights: str
    final_epochs: int
    final_learning_rate: float
    audit_weights: str
    patience: int
    # tuning, of one backbone
    tuning_backbone: str
    tuning_trials: int
    tuning_epochs: int
    tuning_photographs: int
    tuning_copies: int
    # evaluation
    bootstrap_samples: int
    # learning curves
    curve_sources: tuple[str, ...]
    curve_photographs: tuple[int, ...]
    curve_copies: int
    curve_steps: int
    curve_input_size: int
    curve_learning_rate: float
    # the run
    time_limit_minutes: float

    def replace(self, **changes: Any) -> Profile:
        """Return a copy with some values changed, checked again."""
        return build_profile({**self.to_dict(), **changes})

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as they stand in YAML."""
        return {f.name: list(v) if isinstance(v := getattr(self, f.name), tuple) else v for f in fields(self)}

    @property
    def key(self) -> str:
        """A key of all values, 16 hexadecimal digits."""
        return content_key(self.to_dict())

    def for_backbone(self, backbone: str) -> dict[str, Any]:
        """Return the values as one backbone sees them: per-backbone entries become single values."""
        return {k: v[backbone] if isinstance(v, dict) else v for k, v in self.to_dict().items()}


def profile_names() -> list[str]:
    """Return the names of the profiles that exist."""
    return sorted(p.stem for p in (project_root() / "profiles").glob("*.yaml"))


def load_profile(name: str, overrides: Mapping[str, Any] | None = None) -> Profile:
    """Read ``profiles/<name>.yaml`` and apply overrides.

    Parameters
    ----------
    name : str
    overrides : mapping, optional
        From ``--set key=value``; ``key.backbone=value`` changes one backbone's entry. Strings are
        read as YAML.

    Raises
    ------
    ConfigError
        For an unknown profile or key, or a value of the wrong type or out of range.
    """
    path = project_root() / "profiles" / f"{name}.yaml"
    if name not in profile_names():
        known = ", ".join(profile_names()) or "none"
        raise ConfigError(f"there is no profile '{name}'", f"choose one of: {known}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    # a ValueError: bytes that are no UTF-8, and dates that no calendar has
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"profiles/{name}.yaml cannot be read ({error})", "mend the file") from error
    if not isinstance(values, dict):
        raise ConfigError(f"profiles/{name}.yaml holds no keys", "write one 'key: value' a line")
    values = {"name": name, **values}
    for key, value in (overrides or {}).items():
        _override(values, key, value)
    return build_profile(values, f"profile '{name}'")


def _override(values: dict[str, Any], key: str, value: Any) -> None:
    known = {f.name: f.type for f in fields(Profile)}
    base, _, backbone = key.partition(".")
    settable = sorted(set(known) - {"name", "title"})
    if base not in settable:
        raise ConfigError(f"unknown key '{key}'", f"keys are: {', '.join(settable)}")
    if isinstance(value, str):
        try:
            value = yaml.safe_load(value)
        except (ValueError, yaml.YAMLError) as error:
            raise ConfigError(f"the value of '{key}' is not valid YAML ({error})", "mend it") from error
        value = "none" if value is None else value
    if not backbone:
        values[base] = value
        return
    if not str(known[base]).startswith("dict") or backbone not in BACKBONE_NAMES:
        raise ConfigError(f"unknown key '{key}'", f"backbones are: {', '.join(BACKBONE_NAMES)}")
    entries = values.get(base)
    values[base] = dict(entries) if isinstance(entries, dict) else dict.fromkeys(BACKBONE_NAMES, entries)
    values[base][backbone] = value


def build_profile(values: Mapping[str, Any], where: str = "the profile") -> Profile:
    """Check plain values and return them as a `Profile`.

    Raises
    ------
    ConfigError
        Naming the key, the value and what it must be.
    """
    hints = typing.get_type_hints(Profile)
    unknown = sorted(set(values) - set(hints), key=str)
    if unknown:
        raise ConfigError(f"{where}: unknown key '{unknown[0]}'", f"keys are: {', '.join(sorted(hints))}")
    missing = sorted(set(hints) - set(values))
    if missing:
        raise ConfigError(f"{where}: key '{missing[0]}' is missing", "add it")
    typed = {k: _coerce(values[k], hint, f"{where}: '{k}'") for k, hint in hints.items()}
    profile = Profile(**typed)
    _check_ranges(profile, where)
    return profile


# a number to everybody but YAML 1.1, which asks for a point and a sign: 1.0e-4
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def _coerce(value: Any, hint: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_coerce(item, typing.get_args(hint)[0], where) for item in items)
    if origin is dict:
        inner = typing.get_args(hint)[1]
        entries = value if isinstance(value, dict) else dict.fromkeys(BACKBONE_NAMES, value)
        unknown = sorted(set(entries) - set(BACKBONE_NAMES), key=str)
        missing = sorted(set(BACKBONE_NAMES) - set(entries))
        if unknown or missing:
            raise ConfigError(
                f"{where} must hold one entry a backbone (unknown {unknown}, missing {missing})",
                f"backbones are: {', '.join(BACKBONE_NAMES)}",
            )
        return {k: _coerce(entries[k], inner, f"{where[:-1]}.{k}'") for k in BACKBONE_NAMES}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str) and _EXPONENT.fullmatch(value):
        return float(value)
    if hint is str and value is None:
        return "none"  # YAML reads a bare `null` or `~` so
    if not isinstance(value, hint) or isinstance(value, bool):
        raise ConfigError(f"{where} is {value!r}", f"it must be {_spoken(hint)}")
    return value


def _spoken(hint: Any) -> str:
    return {int: "a whole number", float: "a number", str: "a text"}.get(hint, str(hint))


_RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**31 - 1),
    "synthetic_photographs": (16, 100_000),
    "synthetic_copies": (1, 100),
    "cell_size": (16, 1024),
    "crop_margin": (0.0, 2.0),
    "validation_fraction": (0.05, 0.5),
    "copies_per_photograph": (0, 1000),
    "input_size": (32, 512),
    "batch_size": (1, 1024),
    "dropout": (0.0, 0.9),
    "label_smoothing": (0.0, 0.5),
    "augmentation": (0.0, 3.0),
    "head_epochs": (0, 1000),
    "head_learning_rate": (0.0, 1.0),
    "fine_tune_epochs": (0, 1000),
    "fine_tune_layers": (0, 10_000),
    "fine_tune_learning_rate": (0.0, 1.0),
    "random_split_epochs": (0, 1000),
    "transfer_epochs": (1, 1000),
    "curve_photographs": (0, 100_000),
    "curve_copies": (1, 1000),
    "curve_steps": (1, 100_000),
    "curve_input_size": (32, 512),
    "curve_learning_rate": (0.0, 1.0),
    "final_seeds": (1, 20),
    "final_epochs": (1, 1000),
    "final_learning_rate": (0.0, 1.0),
    "patience": (1, 1000),
    "tuning_trials": (0, 1000),
    "tuning_epochs": (1, 1000),
    "tuning_photographs": (0, 1_000_000),
    "tuning_copies": (0, 1000),
    "bootstrap_samples": (100, 1_000_000),
    "time_limit_minutes": (0.1, 100_000),
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "dataset": ("synthetic", "photographs", "blood-cells"),  # the study needs official sides and photographs
    "classes": EIGHT,
    "extra_training": ("pbc",),
    "backbones": BACKBONE_NAMES,
    "final_backbone": BACKBONE_NAMES,
    "extra_notebooks": ("final_model", "learning_curves"),
    "precision": ("float32", "mixed_bfloat16"),
    "optimizer": ("adam", "sgd"),
    "head": ("average", "attention"),
    "tuning_backbone": BACKBONE_NAMES,
}


def _check_ranges(profile: Profile, where: str) -> None:
    for field in dataclasses.fields(profile):
        value = getattr(profile, field.name)
        items = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else [value]
        for item in items:
            if field.name in _RANGES:
                low, high = _RANGES[field.name]
                if not low <= item <= high:
                    raise ConfigError(
                        f"{where}: '{field.name}' is {item}", f"it must lie from {low:g} to {high:g}"
                    )
            if field.name in _CHOICES and item not in _CHOICES[field.name]:
                raise ConfigError(
                    f"{where}: '{field.name}' is '{item}'",
                    f"it must be one of {', '.join(_CHOICES[field.name])}",
                )
    for name in ("classes", "backbones"):
        value = getattr(profile, name)
        if not value or len(set(value)) != len(value):
            raise ConfigError(f"{where}: '{name}' is empty or names one twice", "list each once")
    if len(profile.classes) < 2:
        raise ConfigError(f"{where}: 'classes' names one class", "a classifier needs at least two")
