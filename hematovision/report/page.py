"""The pages of a report: every executed notebook and an index, each a file that needs no network."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from hematovision.config import data_folder, project_root, report_folder
from hematovision.errors import HematoVisionError
from hematovision.files import read_json, write_json, write_text
from hematovision.report.records import executed_path
from hematovision.report.steps import BACKBONE_TITLES, STEPS, Job

TEMPLATES = Path(__file__).resolve().parent / "templates"
_MIME = {".png": "image/png", ".svg": "image/svg+xml", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}
_NONE = "\N{EN DASH}"
_METRICS = {
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "precision_macro": "Precision",
    "recall_macro": "Recall",
    "f1_macro": "F1",
}


def build_report(
    folder: Path,
    jobs: Sequence[Job],
    artifacts: Path,
    manifest: Mapping[str, Any],
    data: str | Path | None = None,
) -> None:
    """Write a report: its pages, ``metrics.json`` and ``manifest.json``.

    Parameters
    ----------
    folder : Path
        Where to write; created if missing.
    jobs : sequence of Job
        In the order of the pages.
    artifacts : Path
        Folder of the run: executed notebooks, ``metrics.json`` and ``figures/``.
    manifest : mapping
        What `run` knows of the run.
    data : path, optional
        The data folder of the run: its place on this machine is left out of the pages.

    Raises
    ------
    HematoVisionError
        If a notebook left no ``metrics.json``, or it names a figure that does not exist.
    """
    folder.mkdir(parents=True, exist_ok=True)
    metrics = _metrics(artifacts)
    pages = [{"file": "index.html", "title": "Overview"}]
    pages += [{"file": f"{job.name}.html", "title": _short(job)} for job in jobs]
    environment = _environment(pages, manifest)
    exporter = _exporter()
    scrubbed = _scrubbed(artifacts, data)
    for number, job in enumerate(jobs, start=1):
        body = _body(exporter, executed_path(artifacts, job.name), scrubbed, jobs)
        html = environment.get_template("notebook.html.j2").render(
            title=job.title,
            current=pages[number]["file"],
            body=body,
            before=pages[number - 1],
            after=pages[number + 1] if number + 1 < len(pages) else None,
        )
        write_text(folder / f"{job.name}.html", html)
    context = _index_context(metrics, jobs, artifacts, manifest)
    index = environment.get_template("index.html.j2").render(
        title=manifest["profile"]["title"], current="index.html", **context
    )
    for figure in metrics.get("figures", []):
        source = _figure_path(artifacts, figure["file"])
        target = folder / "figures" / source.name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(source.read_bytes())
    write_json(folder / "metrics.json", metrics)
    write_json(folder / "manifest.json", manifest)
    write_text(folder / "index.html", index)


def _metrics(artifacts: Path) -> dict[str, Any]:
    """Return what the comparison measured, followed by what the notebooks after it added."""
    metrics = read_json(artifacts / "metrics.json")
    for name in ("generalisation", "final", "release", "curves"):
        file = artifacts / f"{name}.json"
        if not file.is_file():
            continue
        for key, added in read_json(file).items():
            metrics[key] = [*metrics.get(key, []), *added] if isinstance(added, list) else added
    return dict(metrics)


def _short(job: Job) -> str:
    return BACKBONE_TITLES[job.backbone] if job.backbone else job.step.title


def _environment(pages: list[dict[str, str]], manifest: Mapping[str, Any]) -> jinja2.Environment:
    from pygments.formatters import HtmlFormatter

    light = HtmlFormatter(style="default").get_style_defs(".highlight")
    dark = HtmlFormatter(style="github-dark").get_style_defs(".highlight")
    plain = ".highlight, .highlight pre { background: none; }"
    style = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    style += f"\n{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n{plain}\n"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.globals |= {"pages": pages, "manifest": manifest, "style": _Safe(style)}
    return environment


class _Safe(str):
    """HTML of our own making, which the templates must not escape."""

    def __html__(self) -> str:
        return self


# -- pages of notebooks --------------------------------------------------------------------------


def _exporter() -> Any:
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(template_name="notebook", extra_template_basedirs=[str(TEMPLATES)])
    exporter.exclude_anchor_links = True
    for name in ("require_js_url", "mathjax_url", "jquery_url", "widget_renderer_url"):
        if exporter.has_trait(name):
            exporter.set_trait(name, "")
    return exporter


def _body(exporter: Any, path: Path, scrubbed: Mapping[str, str], jobs: Sequence[Job]) -> _Safe:
    import nbformat

    try:
        notebook = nbformat.read(path, as_version=4)
    except OSError as error:
        raise HematoVisionError(f"cannot read {path} ({error.strerror})", "run again") from error
    notebook.cells = _shown_cells(notebook.cells)
    text = json.dumps(notebook)
    for secret, name in scrubbed.items():
        text = text.replace(json.dumps(secret)[1:-1], name)
    html, _ = exporter.from_notebook_node(nbformat.from_dict(json.loads(text)))
    return _Safe(_link_pages(html, jobs))


def _shown_cells(cells: Sequence[Any]) -> list[Any]:
    """Leave out warnings and logs, and the default parameters where a run has put its own."""
    injected = any("injected-parameters" in c.metadata.get("tags", []) for c in cells)
    shown = []
    for cell in cells:
        tags = cell.metadata.get("tags", [])
        if injected and "parameters" in tags:
            continue
        if "injected-parameters" in tags:
            cell.metadata["tags"] = ["parameters"]
            cell.source = re.sub(r"^# Parameters\n", "", cell.source)
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
        shown.append(cell)
    return shown


def _scrubbed(artifacts: Path, data: str | Path | None = None) -> dict[str, str]:
    """Return folders of this machine and what a page calls them, longest first."""
    folders = {
        str(artifacts): "artifacts",
        str(data_folder(data)): "data",
        str(project_root()): ".",
        str(Path.home()): "~",
    }
    return {k: folders[k] for k in sorted(folders, key=len, reverse=True) if len(k) > 1}


def _link_pages(html: str, jobs: Sequence[Job]) -> str:
    """Let links between notebooks lead to their pages; a template's leads to its first."""
    first = {job.step.notebook: f"{job.name}.html" for job in reversed(jobs)}
    return re.sub(
        r'href="(?:\./)?([^"/]+\.ipynb)', lambda m: f'href="{first.get(m.group(1), m.group(1))}', html
    )


# -- the index -----------------------------------------------------------------------------------


def _index_context(
    metrics: Mapping[str, Any], jobs: Sequence[Job], artifacts: Path, manifest: Mapping[str, Any]
) -> dict[str, Any]:
    times = manifest["times"]["steps"]
    models = metrics.get("models", [])
    names = [n for n in _METRICS if any(n in m["metrics"] for m in models)]
    names += sorted({n for m in models for n in m["metrics"]} - set(names))
    final = metrics.get("final")
    return {
        "warnings": report_warnings(metrics, manifest["profile"]),
        "final": {"title": _title(final["backbone"]), "rule": final.get("rule", "")} if final else None,
        "metric_names": [{"title": _METRICS.get(n, n.replace("_", " ").capitalize())} for n in names],
        "models": sorted((_model_row(m, names) for m in models), key=lambda row: row["leaky"]),
        "published": [
            {"title": _title(p["backbone"]), "accuracy": f"{_percent(p['accuracy']):.1f}"}
            for p in metrics.get("published", [])
        ],
        "figures": [
            {
                "source": _data_url(_figure_path(artifacts, f["file"])),
                "alt": f.get("alt", f["caption"]),
                "caption": f["caption"],
            }
            for f in metrics.get("figures", [])
        ],
        "steps": [
            {
                "file": f"{job.name}.html",
                "title": job.title,
                "question": job.step.question,
                "minutes": _minutes(times.get(job.name, {}).get("seconds")),
            }
            for job in jobs
        ],
        "provenance": _provenance(manifest),
        "values": [(k, _spoken(v)) for k, v in sorted(manifest["profile"].items())],
    }


def report_warnings(metrics: Mapping[str, Any], profile: Mapping[str, Any]) -> list[str]:
    """Return what a reader of the table must know before believing it."""
    models = metrics.get("models", [])
    warnings = []
    if profile["dataset"] == "synthetic":
        warnings.append(
            "The images of this run are drawn, not photographed: it shows how the study works, "
            "and its numbers say nothing about real smears."
        )
    if any(m.get("split") == "random" for m in models):
        warnings.append(
            "Rows of the random split demonstrate a leak and are there to be mistrusted: copies of one "
            "photograph stand on both sides of it, so they measure memory as much as skill."
        )
    if others := profile.get("extra_training"):
        warnings.append(
            f"Training saw the cells of {' and '.join(others)} as well, from another laboratory; they were "
            "never validated or tested on."
        )
    blank = sorted({_title(m["backbone"]) for m in models if m.get("weights") == "none"})
    if blank:
        warnings.append(
            f"{' and '.join(blank)} started from no learned weights and had a short training: "
            "not a fair picture of what the architecture can do."
        )
    return warnings


def _model_row(model: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    counts = [(model.get("n_images"), "images"), (model.get("n_photographs"), "photographs")]
    return {
        "title": _title(model["backbone"]),
        "weights": _weights(model["weights"]),
        "split": model["split"],
        "leaky": model["split"] == "random",
        "test_set": model["test_set"],
        "sizes": [f"{count:,} {unit}" for count, unit in counts if count],
        "metrics": [_value(model["metrics"].get(name)) for name in names],
    }


def _weights(source: str) -> str:
    from hematovision.learn.backbones import initial_weights_title

    return "none, short training" if source == "none" else initial_weights_title(source)


def _value(metric: Any) -> dict[str, str]:
    if metric is None:
        return {"value": _NONE, "interval": ""}
    if not isinstance(metric, Mapping):
        return {"value": f"{_percent(metric):.1f}", "interval": ""}
    interval = ""
    if metric.get("low") is not None and metric.get("high") is not None:
        interval = f"{_percent(metric['low']):.1f} to {_percent(metric['high']):.1f}"
    return {"value": f"{_percent(metric['value']):.1f}", "interval": interval}


def _percent(share: float) -> float:
    """Return a share as percent; published tables may already be in percent."""
    return 100 * share if share <= 1 else share


def _title(backbone: str) -> str:
    return BACKBONE_TITLES.get(backbone, backbone)


def _minutes(seconds: float | None) -> str:
    return _NONE if seconds is None else "under 1" if seconds < 60 else f"{seconds / 60:.0f}"


def _spoken(value: Any) -> str:
    if isinstance(value, Mapping):
        if len(set(map(str, value.values()))) == 1:
            return str(next(iter(value.values())))
        return ", ".join(f"{_title(k)} {v}" for k, v in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _provenance(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    code, machine, times = manifest["code"], manifest["hardware"], manifest["times"]
    commit = f", commit {code['commit'][:12]}" if code["commit"] else ""
    changed = " with local changes" if code["dirty"] else ""
    seconds = sum(s["seconds"] for s in times["steps"].values())
    peak = max((s["peak_memory_mb"] for s in times["steps"].values()), default=0)
    packages = manifest["packages"]
    shown = ("tensorflow-cpu", "tensorflow", "keras", "numpy", "scikit-learn")
    return [
        ("Made", times["published"].replace("T", " ").replace("+00:00", " UTC")),
        ("Images", f"{manifest['data']['dataset']}, key {manifest['data']['key']}"),
        ("Code", f"version {code['version']}{commit}{changed}; library {code['library']}"),
        (
            "Packages",
            f"Python {manifest['python']}, "
            + ", ".join(f"{name} {packages[name]}" for name in shown if name in packages),
        ),
        ("Seed", str(manifest["seed"])),
        (
            "Machine",
            f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_mb'] / 1024:.0f} GB, "
            f"{machine['system']}",
        ),
        ("Computed in", f"{_minutes(seconds)} minutes, {peak:,} MB at the most"),
        ("Changed by hand", ", ".join(f"{k}={v}" for k, v in manifest["overrides"].items()) or "nothing"),
    ]


def _figure_path(artifacts: Path, file: str) -> Path:
    for path in (artifacts / "figures" / file, artifacts / file):
        if path.is_file() and path.suffix.lower() in _MIME:
            return path
    raise HematoVisionError(
        f"metrics.json names the figure '{file}', which is not in the artifacts", "run again with --force"
    )


def _data_url(path: Path) -> str:
    text = base64.b64encode(path.read_bytes()).decode("ascii")
    return f"data:{_MIME[path.suffix.lower()]};base64,{text}"


# -- the README ----------------------------------------------------------------------------------


def readme_sections(profile: str = "full") -> dict[str, str]:
    """Return the generated parts of the README, by the name in their markers.

    Numbers come from the published report of a profile, so that none is ever typed in.
    """
    folder = report_folder(profile)
    manifest = read_json(folder / "manifest.json") if (folder / "manifest.json").is_file() else None
    metrics = read_json(folder / "metrics.json") if (folder / "metrics.json").is_file() else None
    return {"results": _readme_results(metrics, manifest), "notebooks": _readme_notebooks(manifest)}


def _readme_results(metrics: Mapping[str, Any] | None, manifest: Mapping[str, Any] | None = None) -> str:
    if not metrics:
        return "The numbers appear here once the full study has been run and its report published."
    lines = ["| model | weights at the start | split | tested on | accuracy | balanced accuracy |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    for model in metrics["models"]:
        row = _model_row(model, ("accuracy", "balanced_accuracy"))
        cells = [f"{v['value']} % ({v['interval']})" if v["interval"] else v["value"] for v in row["metrics"]]
        where = ", ".join([row["test_set"], *row["sizes"]])
        split = f"{row['split']} (shows the leak)" if row["leaky"] else row["split"]
        lines.append(f"| {' | '.join([row['title'], row['weights'], split, where, *cells])} |")
    notes = report_warnings(metrics, manifest["profile"]) if manifest else []
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]) if notes else "\n".join(lines)


def _readme_notebooks(manifest: Mapping[str, Any] | None) -> str:
    times = manifest["times"]["steps"] if manifest else {}
    lines = ["| Notebook | Question | Minutes | Writes |", "| --- | --- | --- | --- |"]
    for step in STEPS:
        seconds = [v["seconds"] for k, v in times.items() if k == step.name or k.startswith(f"{step.name}-")]
        minutes = _minutes(sum(seconds) if seconds else None)
        link = f"[{step.name}](notebooks/{step.notebook})"
        lines.append(f"| {link} | {step.question} | {minutes} | {step.writes} |")
    return "\n".join(lines)


def fill_readme(text: str, sections: Mapping[str, str]) -> str:
    """Return a text with the parts between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->`` replaced.

    Raises
    ------
    HematoVisionError
        If a marker is missing.
    """
    for name, body in sections.items():
        pattern = re.compile(rf"(<!-- {name}:begin[^>]*-->\n).*?(<!-- {name}:end -->)", re.DOTALL)
        match = pattern.search(text)
        if match is None:
            raise HematoVisionError(f"README.md has no markers for '{name}'", f"add <!-- {name}:begin -->")
        text = f"{text[: match.end(1)]}{body}\n{text[match.start(2) :]}"
    return text


def update_readme() -> None:
    """Write the generated parts of the project's README again."""
    path = project_root() / "README.md"
    write_text(path, fill_readme(path.read_text(encoding="utf-8"), readme_sections()))


if __name__ == "__main__":
    update_readme()
