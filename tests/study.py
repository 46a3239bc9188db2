"""A study of tiny notebooks, for tests of the runner, the pages and the command line."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import yaml

ROOT = Path(__file__).resolve().parents[1]
# the project's own profile gives the keys; these values make it tiny
PROFILE = yaml.safe_load((ROOT / "profiles" / "quick.yaml").read_text(encoding="utf-8")) | {
    "title": "A tiny study",
    "dataset": "synthetic",
    "classes": ["eosinophil", "lymphocyte", "monocyte", "neutrophil"],
    "seed": 7,
    "synthetic_photographs": 16,
    "synthetic_copies": 1,
    "cell_size": 32,
    "crop_margin": 0.2,
    "validation_fraction": 0.2,
    "copies_per_photograph": 0,
    "backbones": ["vgg16", "mobilenetv2"],
    "weights": "none",
    "extra_training": [],
    "input_size": 32,
    "precision": "float32",
    "batch_size": 8,
    "dropout": 0.2,
    "label_smoothing": 0.0,
    "augmentation": 1.0,
    "head_epochs": 1,
    "head_learning_rate": 0.001,
    "fine_tune_epochs": 1,
    "fine_tune_layers": 1,
    "fine_tune_learning_rate": 0.0001,
    "random_split_epochs": 1,
    "transfer_epochs": 1,
    "tuning_trials": 0,
    "extra_notebooks": [],
    "patience": 1,
    "bootstrap_samples": 100,
    "time_limit_minutes": 5,
}

START = """\
import json, os
from pathlib import Path
from hematovision.config import artifacts
from hematovision.files import atomic_path, write_json
out = artifacts(profile)
seen = Path(os.environ["HEMATOVISION_HOME"]) / "seen"
"""
CELLS = {
    "01_eda": (
        "seed = 7\nprofile = 'quick'\ndata_dir = ''",
        ["write_json(out / 'eda.json', {'seed': seed})"],
    ),
    "02_preprocessing": (
        "profile = 'quick'\ncell_size = 32",
        [
            "eda = json.loads((out / 'eda.json').read_text())",
            "write_json(out / 'cells.json', [cell_size, eda])",
        ],
    ),
    "03_transfer_learning": (
        "profile = 'quick'\nbackbone = 'mobilenetv2'\nhead_epochs = 1\nweights = 'none'",
        [
            "import sys; print('a log line', file=sys.stderr)",
            "cells = json.loads((out / 'cells.json').read_text())",
            "write_json(out / 'models' / backbone / 'model.json', [cells, head_epochs, weights])",
            "write_json(out / 'predictions' / f'{backbone}.json', [0.5])",
        ],
    ),
    "05_comparison": (
        "profile = 'quick'\nbackbones = ['vgg16', 'mobilenetv2']",
        [
            "(out / 'figures').mkdir(exist_ok=True)",
            "import base64; _ = (out / 'figures' / 'dot.png').write_bytes(base64.b64decode(DOT))",
            "value = {'value': 0.9, 'low': 0.85, 'high': 0.95}",
            "models = [{'backbone': b, 'weights': 'none', 'split': s, 'test_set': 'TEST', 'n_images': 1200,"
            " 'n_photographs': 71, 'metrics': {'accuracy': value}, 'per_class': {}}"
            " for b in backbones for s in ('official', 'random')]",
            "write_json(out / 'metrics.json', {'profile': profile, 'dataset': 'synthetic', 'models': models,"
            " 'final': {'backbone': backbones[0], 'rule': 'best on validation'},"
            " 'published': [{'backbone': 'vgg16', 'accuracy': 90.3}],"
            " 'figures': [{'file': 'dot.png', 'caption': 'A dot', 'alt': 'One dot'}]})",
        ],
    ),
    "06_generalisation": ("profile = 'quick'", ["print((out / 'metrics.json').exists())"]),
}
DOT = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="


def seconds_of_children() -> float:
    """Return the processor time of all processes that were started and have ended.

    A bound on it holds on a busy machine too, where one on the time of the clock would not.
    """
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class Study:
    """A folder with profiles and notebooks, and everything a run writes."""

    def __init__(self, root: Path, like: Study | None = None) -> None:
        self.root = root
        self.artifacts = root / "cache" / "runs" / "quick"
        self.seen = root / "seen"
        self.report = root / "reports" / "quick"
        if like is not None:
            shutil.copytree(like.root, root)
            return
        # a copy, so that work on the library while a test runs changes no key between two runs
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "hematovision", root / "library" / "hematovision", ignore=ignored)
        for name in ("profiles", "notebooks"):
            (root / name).mkdir(parents=True)
        self.write_profile()
        for name, (parameters, cells) in CELLS.items():
            self.write_notebook(name, parameters, [f"DOT = {DOT!r}", START, *cells])

    def write_profile(self, name: str = "quick", **changes: object) -> None:
        path = self.root / "profiles" / f"{name}.yaml"
        path.write_text(yaml.safe_dump(PROFILE | changes), encoding="utf-8")

    def write_notebook(self, name: str, parameters: str | None, cells: list[str]) -> None:
        notebook = nbformat.v4.new_notebook()
        notebook.metadata["kernelspec"] = {
            "name": "python3",
            "display_name": "Python 3",
            "language": "python",
        }
        notebook.cells.append(nbformat.v4.new_markdown_cell(f"# {name}\n\nWhat is asked here?", id="title"))
        if parameters is not None:
            cell = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}, id="parameters")
            notebook.cells.append(cell)
        for number, source in enumerate(cells):
            notebook.cells.append(nbformat.v4.new_code_cell(source, id=f"c{number}"))
        nbformat.write(notebook, self.root / "notebooks" / f"{name}.ipynb")

    def add_cells(self, name: str, *cells: str) -> None:
        """Write a notebook anew, with cells at its end."""
        parameters, body = CELLS[name]
        self.write_notebook(name, parameters, [f"DOT = {DOT!r}", START, *body, *cells])

    def environment(self, **extra: str) -> dict[str, str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith("HEMATOVISION_")}
        return clean | {
            "HEMATOVISION_HOME": str(self.root),
            "HEMATOVISION_CACHE": str(self.root / "cache"),
            "PYTHONPATH": str(self.root / "library"),
            **extra,
        }

    def start(self, *arguments: str, program: str | None = None, **extra: str) -> subprocess.Popen[str]:
        """Start ``hematovision report`` (or a program that calls it) in a process of its own."""
        code = program or "import sys; from hematovision.cli import main; sys.exit(main())"
        return subprocess.Popen(
            [sys.executable, "-c", code, *(arguments if program else ("report", *arguments))],
            env=self.environment(**extra),
            cwd=self.root,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # a suite that a shell runs in the background inherits "ignore" for Ctrl-C, and hands it on
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def run(
        self, *arguments: str, program: str | None = None, **extra: str
    ) -> subprocess.CompletedProcess[str]:
        """Run it to its end."""
        process = self.start(*arguments, program=program, **extra)
        try:
            out, err = process.communicate(timeout=600)
        finally:
            process.kill()
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def results(self) -> dict[str, bytes]:
        """Return what must be the same however the run came about: numbers and models."""
        models = self.root / "models" / "quick"
        files = {
            p.relative_to(self.root).as_posix(): p.read_bytes() for p in models.rglob("*") if p.is_file()
        }
        return files | {"metrics.json": (self.report / "metrics.json").read_bytes()}

    def manifest(self) -> dict[str, object]:
        return json.loads((self.report / "manifest.json").read_text(encoding="utf-8"))
