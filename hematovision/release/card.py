"""The model card and the data sheet of a bundle, written from the facts of a run and from nothing else.

Facts are plain values, as the run's JSON files hold them:

==================  ======================================================================================
``bundle``          ``model.json``; `hematovision.release.export` puts it in (required)
``profile``         every value of the profile (required)
``splits``          split to side to ``{"images": n, "photographs": n}`` (required)
``manifest``        ``manifest.json`` of the report: code, packages, hardware, data
``metrics``         ``metrics.json``: the rule of selection
``audit``           ``audit.json``: findings with counts
``proofs``          what was checked of each split, one table row each
``calibration``     set to measure (``ece``, ``brier``, ...) to value or interval
``generalisation``  ``generalisation.json``: scores on other laboratories
``failure_modes``   sentences; also ``training``, ``limits``, ``robustness``, ``explanation``, ``ensemble``
==================  ======================================================================================

A required fact that is missing raises an error; any other is written "not measured". No number comes from
this file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hematovision.classes import BY_NAME
from hematovision.data.catalog import CATALOG, DataSet
from hematovision.errors import DataError
from hematovision.release.checklists import CLAIM, TRIPOD_AI, Item

NOT_MEASURED = "not measured"

_REQUIRED = ("bundle", "profile", "splits")
_HYPERPARAMETERS = (
    "batch_size",
    "dropout",
    "label_smoothing",
    "augmentation",
    "head_epochs",
    "head_learning_rate",
    "fine_tune_epochs",
    "fine_tune_layers",
    "fine_tune_learning_rate",
    "copies_per_photograph",
    "patience",
    "validation_fraction",
    "precision",
)
_SCORES = ("accuracy", "balanced_accuracy", "f1_macro")


def render_model_card(facts: Mapping[str, Any]) -> str:
    """Return the text of ``MODEL_CARD.md``.

    Parameters
    ----------
    facts : mapping
        As described above.

    Raises
    ------
    DataError
        Naming a required fact that is missing.
    """
    check_facts(facts)
    sections = (
        ("Model", _model(facts)),
        ("Intended use", _INTENDED_USE),
        ("Input and output", _input_and_output(facts)),
        ("Thresholds", _thresholds(facts)),
        ("Training", _training(facts)),
        ("Performance", _performance(facts)),
        ("Calibration", _calibration(facts)),
        ("Other laboratories", _score_table(_elsewhere(facts))),
        ("Limits", _limits(facts)),
        ("Failure modes", _failures(facts)),
        ("Appendix: CLAIM (2020)", _checklist(CLAIM, facts)),
        ("Appendix: TRIPOD+AI (2024)", _checklist(TRIPOD_AI, facts)),
    )
    return _document("Model card", sections)


def render_data_sheet(facts: Mapping[str, Any]) -> str:
    """Return the text of ``DATA_SHEET.md``; see `render_model_card`."""
    check_facts(facts)
    drawn = set(_set_names(facts)) == {"synthetic"}
    sections = (
        ("Sets", _sets(facts)),
        ("Collection", _DRAWN if drawn else _COLLECTION),
        ("People", _DRAWN if drawn else _PEOPLE),
        ("Labels", _DRAWN if drawn else _LABELS),
        ("Exclusions", _counts(find(facts, "audit", "findings"), ("finding", "images or pairs"))),
        ("Partitions", _partitions(facts)),
    )
    return _document("Data sheet", sections)


def check_facts(facts: Mapping[str, Any]) -> None:
    """Make sure that the required facts are there.

    Raises
    ------
    DataError
        Naming the first that is missing.
    """
    for name in _REQUIRED:
        if not facts.get(name):
            raise DataError(f"the facts lack '{name}'", "hand in what the run left, see release/card.py")


def find(facts: Mapping[str, Any], *keys: str) -> Any:
    """Return the fact under a path of keys, None if it was not handed in."""
    value: Any = facts
    for key in keys:
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    return value


def _need(facts: Mapping[str, Any], *keys: str) -> Any:
    value = find(facts, *keys)
    if value is None:
        raise DataError(
            f"the facts lack '{'.'.join(keys)}'", "hand in what the run left, see release/card.py"
        )
    return value


# -- text that holds for every run ---------------------------------------------------------------

_INTENDED_USE = """\
For research and teaching: to study transfer learning on white blood cells, to show what a split by
photograph is worth, and to pre-sort cells for a person who then looks at each. **Not for clinical use**: it
has no approval of any kind, and no patient's care may depend on it. Users are students, teachers and
researchers. A laboratory that wants to try it must test it first on photographs of its own."""

_COLLECTION = """\
Retrospective: published images that others took for other purposes. The sets' papers say when and where;
this study collected none."""

_PEOPLE = """\
The images show cells alone. The sets carry no names, ages, sexes or diagnoses, and no identity of a patient:
whether two photographs show the same person cannot be known."""

_LABELS = """\
The labels are those of the sets' authors, one an image, and are taken as the reference because there is no
other. Suspected errors are shown in the report; test labels are never changed."""

_DRAWN = "The images are drawn by this library, labels included; no person was involved."

_LIMITS = (
    "Photographs, not images, are the observations: augmented copies add no evidence.",
    "Patients are unknown, so that cells of one person may lie on both sides of a split.",
    "Stains, cameras and magnifications other than those of the training sets are not represented.",
    "Classes outside the list are named as one of the list.",
    "Performance by age, sex or origin cannot be measured.",
)


# -- sections of the model card ------------------------------------------------------------------


def _model(facts: Mapping[str, Any]) -> str:
    agreement = find(facts, "bundle", "agreement")
    files = _need(facts, "bundle", "files")
    rows = [(name, stamp["bytes"], f"`{stamp['sha256']}`") for name, stamp in sorted(files.items())]
    lines = [
        f"A classifier of single white blood cells: {_need(facts, 'bundle', 'backbone')}, initial "
        f"weights: {_need(facts, 'bundle', 'weights')}.",
        _table(("file", "bytes", "sha256"), rows),
        _pairs(_need(facts, "bundle", "provenance")),
    ]
    if agreement:
        lines.append(_agreement(agreement))
    return "\n\n".join(lines)


def _agreement(agreement: Mapping[str, Any]) -> str:
    rows = [
        (kind, _percent(agreement[kind]["labels"]), agreement[kind]["largest_difference"])
        for kind in ("float32", "int8")
        if kind in agreement
    ]
    told = f"LiteRT compared with Keras on {agreement['crops']} {agreement['of']}:"
    return told + "\n\n" + _table(("LiteRT", "labels alike", "largest difference of a probability"), rows)


def _input_and_output(facts: Mapping[str, Any]) -> str:
    given = _need(facts, "bundle", "input")
    classes = _need(facts, "bundle", "classes")
    outputs = [output["name"] for output in find(facts, "bundle", "outputs") or ()]
    return "\n".join(
        (
            f"- Input: one cell, cut out with a margin of {given['crop_margin']} of its longer side at "
            f"{given['cell_size']} pixels, scaled to {given['size']}; {given.get('pixels', 'RGB')}.",
            f"- Output: {' and '.join(outputs) or 'probabilities'}, classes in this order: "
            + ", ".join(f"{name} ({BY_NAME[name].code})" for name in classes)
            + ".",
        )
    )


def _thresholds(facts: Mapping[str, Any]) -> str:
    thresholds = _need(facts, "bundle", "thresholds")
    reasons = thresholds.get("reasons", {})
    rows = [(name, value, reasons.get(name, "")) for name, value in thresholds.items() if name != "reasons"]
    return "A cell below one of these is left to a person.\n\n" + _table(("threshold", "value", "why"), rows)


def _training(facts: Mapping[str, Any]) -> str:
    profile, backbone = facts["profile"], _need(facts, "bundle", "backbone")
    rows = []
    for name in _HYPERPARAMETERS:
        value = profile.get(name, NOT_MEASURED)
        rows.append((name, value.get(backbone, NOT_MEASURED) if isinstance(value, Mapping) else value))
    seeds = ", ".join(map(str, find(facts, "bundle", "seeds") or ())) or "not handed in"
    lines = (
        f"- Initial weights: {_need(facts, 'bundle', 'weights')}.",
        f"- Seeds: {seeds}.",
        f"- Selection: {find(facts, 'metrics', 'final', 'rule') or 'not handed in'}.",
        *(f"- {line}" for line in find(facts, "training") or ()),
    )
    return "\n".join(lines) + "\n\n" + _table(("hyperparameter", "value"), rows)


def _performance(facts: Mapping[str, Any]) -> str:
    scores = _scores(find(facts, "bundle", "metrics"))
    parts = ["Values in percent with 95 % intervals that count photographs.", _score_table(scores)]
    for name, score in scores:
        per_class = score.get("per_class")
        if per_class:
            measures = sorted({m for values in per_class.values() for m in values})
            rows = [
                (label, *(_interval(values.get(m)) for m in measures)) for label, values in per_class.items()
            ]
            parts.append(f"By class, on {name}:\n\n" + _table(("class", *measures), rows))
    return "\n\n".join(parts)


def _scores(metrics: Any) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the sets whose scores were handed in, by name."""
    if not isinstance(metrics, Mapping):
        return []
    return [(name, s) for name, s in metrics.items() if isinstance(s, Mapping) and "metrics" in s]


def _elsewhere(facts: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    models = find(facts, "generalisation", "models") or ()
    return [(f"{m.get('split', '')}, tested on {m.get('test_set', '')}", m) for m in models if "metrics" in m]


def _score_table(scores: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    if not scores:
        return NOT_MEASURED.capitalize() + "."
    rows = [
        (
            name,
            score.get("n_images", NOT_MEASURED),
            score.get("n_photographs", NOT_MEASURED),
            *(_interval(score["metrics"].get(measure)) for measure in _SCORES),
        )
        for name, score in scores
    ]
    titles = (measure.replace("_", " ") for measure in _SCORES)
    return _table(("set", "images", "photographs (effective n)", *titles), rows)


def _calibration(facts: Mapping[str, Any]) -> str:
    given = _need(facts, "bundle", "calibration")
    text = f"Temperature {given['temperature']}, fitted on: {given.get('fitted_on') or 'nothing'}."
    measured = find(facts, "calibration")
    if not measured:
        return f"{text} Calibration error: {NOT_MEASURED}."
    rows = [
        (name, measure, _number(value))
        for name, values in measured.items()
        for measure, value in values.items()
    ]
    return text + "\n\n" + _table(("set", "measure", "value"), rows)


def _limits(facts: Mapping[str, Any]) -> str:
    return _bullets((*_LIMITS, *(find(facts, "limits") or ())))


def _failures(facts: Mapping[str, Any]) -> str:
    parts = []
    for name, title in (
        ("failure_modes", "Seen"),
        ("robustness", "Robustness"),
        ("explanation", "Where the model looks"),
        ("ensemble", "Ensemble"),
    ):
        told = find(facts, name)
        parts.append(f"{title}:\n\n{_bullets(told)}" if told else f"{title}: {NOT_MEASURED}.")
    return "\n\n".join(parts)


def _checklist(items: Iterable[Item], facts: Mapping[str, Any]) -> str:
    rows = [(item.number, item.asks, _answered(item, facts)) for item in items]
    return _table(("item", "asks for", "answered in"), rows)


def _answered(item: Item, facts: Mapping[str, Any]) -> str:
    missing = [".".join(path) for path in item.needs if not find(facts, *path)]
    if item.where and not missing:
        return item.where
    return f"not answered: {item.reason or 'not handed in: ' + ', '.join(missing)}"


# -- sections of the data sheet ------------------------------------------------------------------


def _sets(facts: Mapping[str, Any]) -> str:
    data_key = find(facts, "manifest", "data", "key") or find(facts, "bundle", "provenance", "data_key")
    key = f"Key of the data's content: {f'`{data_key}`' if data_key else 'not handed in'}."
    return "\n\n".join([*(_set(_row(name)) for name in _set_names(facts)), key])


def _set_names(facts: Mapping[str, Any]) -> list[str]:
    extra = find(facts, "profile", "extra_training") or ()
    return list(dict.fromkeys((_need(facts, "profile", "dataset"), *extra)))


def _row(name: str) -> DataSet:
    if name not in CATALOG:
        raise DataError(f"'{name}' is not a set of the catalogue", f"known are {', '.join(CATALOG)}")
    return CATALOG[name]


def _set(row: DataSet) -> str:
    lines = [f"### {row.title}", "", f"- {row.description}", f"- Licence: {row.licence or 'not stated'}"]
    lines += [f"- {word}: {value}" for word, value in (("Cite", row.citation), ("From", row.url)) if value]
    return "\n".join(lines)


def _partitions(facts: Mapping[str, Any]) -> str:
    rows = [
        (split, side, counts.get("images", NOT_MEASURED), counts.get("photographs", NOT_MEASURED))
        for split, sides in facts["splits"].items()
        for side, counts in sides.items()
    ]
    table = _table(("split", "side", "images", "photographs (effective n)"), rows)
    proofs = find(facts, "proofs")
    proof = f"Proof that sides share nothing: {NOT_MEASURED}."
    if proofs:
        columns = list(dict.fromkeys(key for row in proofs for key in row))
        proof = "What was checked of each split:\n\n" + _table(
            columns, [[row.get(c, NOT_MEASURED) for c in columns] for row in proofs]
        )
    return f"The unit of partition is the photograph.\n\n{table}\n\n{proof}"


# -- Markdown ------------------------------------------------------------------------------------


def _document(title: str, sections: Iterable[tuple[str, str]]) -> str:
    parts = [
        f"# {title}",
        "> For research and teaching, not for clinical use. Written from the facts of the run.",
    ]
    parts += [f"## {name}\n\n{text}" for name, text in sections]
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    text = f"{value:,}" if type(value) is int else str(value)
    return " ".join(text.split()).replace("|", "\\|")


def _counts(counts: Any, head: tuple[str, str]) -> str:
    return _table(head, sorted(counts.items())) if counts else NOT_MEASURED.capitalize() + "."


def _pairs(values: Mapping[str, Any]) -> str:
    return _bullets(f"{name}: {values[name] if values[name] != '' else 'not handed in'}" for name in values)


def _bullets(lines: Iterable[Any] | str) -> str:
    lines = [lines] if isinstance(lines, str) else lines
    return "\n".join(f"- {line}" for line in lines)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _interval(score: Any) -> str:
    """Write a share with its interval in percent."""
    if not isinstance(score, Mapping) or "value" not in score:
        return NOT_MEASURED
    value = f"{100 * score['value']:.1f}"
    if score.get("low") is None or score.get("high") is None:
        return f"{value} (no interval)"
    return f"{value} ({100 * score['low']:.1f} to {100 * score['high']:.1f})"


def _number(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{value['value']:.4g} ({value['low']:.4g} to {value['high']:.4g})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
