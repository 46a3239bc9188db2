"""The facts of a run, gathered from its files for the model card and the data sheet."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from hematovision.data.sides import Sides
from hematovision.errors import HematoVisionError
from hematovision.files import read_json


def collect_facts(
    folder: Path,
    sides: Mapping[str, Sides],
    results: Mapping[str, Any],
    suspects: pd.DataFrame,
    check: pd.DataFrame,
) -> dict[str, Any]:
    """Return what `release.card` writes the card and the sheet from.

    Parameters
    ----------
    folder : Path
        The run's artifacts.
    sides : mapping of str to Sides
        By set, the study's own last.
    results : mapping
        What notebook 7 left in ``final.json``.
    suspects, check : DataFrame
        From `learn.label_audit.find_suspects` and `learn.explanation.randomisation_check`.
    """
    released = results["released"]
    plan = released["plan"]
    stage = plan["stages"][-1]
    means = check.mean()
    return {
        "profile": {
            **_values(sides, plan, stage),
            "copies_per_photograph": max(s.copies for s in sides.values()),
        },
        "splits": {name: _counts(s) for name, s in sides.items()},
        "metrics": {"final": {"rule": "lowest mean loss on the validation sides of the sets"}},
        "audit": _read(folder / "audit.json"),
        "proofs": _read(folder / "proofs.json"),
        "calibration": {
            name: {k: measured[k] for k in ("ece", "brier", "nll")}
            for name, measured in released["calibration"].items()
        },
        "generalisation": _read(folder / "generalisation.json"),
        "failure_modes": (
            f"{len(suspects)} photographs of the study have a label that a linear probe disputes; they are "
            "shown in notebook 8, and none was relabelled.",
        ),
        "explanation": (
            f"Class activation maps correlate by {means['randomised']:.2f} (Spearman) with those of shuffled "
            f"weights and by {means['mirrored']:.2f} with those of the mirrored picture.",
        ),
        "ensemble": (f"Released is: {released['chosen']}, of {len(released['seeds trained'])} trainings.",),
    }


def _values(sides: Mapping[str, Sides], plan: Mapping[str, Any], stage: Mapping[str, Any]) -> dict[str, Any]:
    *extra, own = sides
    return {
        "dataset": own,
        "extra_training": extra,
        "batch_size": plan["batch_size"],
        "dropout": plan["dropout"],
        "label_smoothing": plan["label_smoothing"],
        "augmentation": stage["augmentation"],
        "head_epochs": "none: all layers are trained from the first step",
        "head_learning_rate": "none",
        "fine_tune_epochs": stage["epochs"],
        "fine_tune_layers": "all, batch normalisation frozen",
        "fine_tune_learning_rate": f"{stage['rate']}, warmed up for an epoch, then along a cosine",
        "patience": "none: the epoch of the lowest validation loss is kept",
        "precision": plan["precision"],
    }


def _counts(sides: Sides) -> dict[str, dict[str, int]]:
    return {
        side: {"images": len(paths), "photographs": len(set(sides.groups[sides.cells.rows_of(paths)]))}
        for side, paths in sides.split.sides().items()
        if paths
    }


def _read(file: Path) -> Any:
    try:
        return read_json(file)
    except HematoVisionError:
        return None  # the card says "not measured"
