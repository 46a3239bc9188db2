"""The card and the data sheet: every number from the facts, every gap told as a gap."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_bundle

from hematovision.data.catalog import CATALOG
from hematovision.errors import DataError
from hematovision.release.card import NOT_MEASURED, render_data_sheet, render_model_card
from hematovision.release.checklists import CLAIM, TRIPOD_AI

ROOT = Path(__file__).resolve().parents[1]


def _score(value: float) -> dict[str, Any]:
    interval = {"value": value, "low": value - 0.0213, "high": value + 0.0107}
    return {
        "n_images": 2487,
        "n_photographs": 68,
        "metrics": dict.fromkeys(("accuracy", "balanced_accuracy", "f1_macro"), interval),
        "per_class": {"eosinophil": {"recall": interval}},
    }


@pytest.fixture
def facts() -> dict[str, Any]:
    card = tiny_bundle.card({"model.tflite": b"model"}, metrics={"TEST": _score(0.9137)})
    card["thresholds"]["reasons"] = {"confidence": "a | convention"}
    card["agreement"] = {
        "crops": 321,
        "of": "held-out cells",
        "float32": {"labels": 1.0, "largest_difference": 7.9e-06},
        "int8": {"labels": 0.9938, "largest_difference": 0.31},
    }
    return {
        "bundle": card,
        "profile": {
            "dataset": "blood-cells",
            "extra_training": ["pbc"],
            "batch_size": 48,
            "fine_tune_epochs": {"mobilenetv2": 17, "vgg16": 4},
        },
        "splits": {"official": {"train": {"images": 9957, "photographs": 277}}},
    }


FULL: dict[str, Any] = {
    "manifest": {"packages": {"keras": "3"}, "data": {"key": "5c4d56d63702e13f"}},
    "metrics": {"final": {"rule": "highest on validation"}},
    "audit": {"findings": {"two labels": 3}},
    "proofs": [{"split": "official", "shared photographs": "0"}],
    "calibration": {"TEST": {"ece": 0.0123, "brier": {"value": 0.1, "low": 0.05, "high": 0.2}}},
    "generalisation": {"models": [{"split": "trained on drawn", "test_set": "TEST_SIMPLE", **_score(0.511)}]},
    "failure_modes": ["bands | taken for metamyelocytes"],
    "training": ["classes are weighted"],
    "robustness": ["blur of 4 % halves it"],
    "explanation": ["the nucleus"],
    "ensemble": ["three networks"],
}


def test_numbers_come_from_the_facts(facts: dict[str, Any]) -> None:
    text = render_model_card(facts | FULL)
    assert "| TEST | 2,487 | 68 | 91.4 (89.2 to 92.4) |" in text
    assert "| trained on drawn, tested on TEST_SIMPLE | 2,487 | 68 | 51.1 (49.0 to 52.2) |" in text
    assert "| batch_size | 48 |" in text
    assert "| fine_tune_epochs | 17 |" in text
    assert "| int8 | 99.4 % | 0.31 |" in text
    assert "321 held-out cells" in text
    assert "0.1 (0.05 to 0.2)" in text
    assert "- Selection: highest on validation." in text
    assert "Not for clinical use" in text
    sheet = render_data_sheet(facts | FULL)
    assert "| official | train | 9,957 | 277 |" in sheet
    assert "`5c4d56d63702e13f`" in sheet
    assert "| two labels | 3 |" in sheet
    for name in ("blood-cells", "pbc"):
        assert f"Licence: {CATALOG[name].licence}" in sheet
    assert NOT_MEASURED not in sheet


def test_a_changed_fact_changes_the_text(facts: dict[str, Any]) -> None:
    other = copy.deepcopy(facts)
    other["bundle"]["metrics"]["TEST"]["metrics"]["accuracy"]["value"] = 0.5
    assert "50.0 (" in render_model_card(other)
    assert "50.0 (" not in render_model_card(facts)


def test_no_number_without_facts(facts: dict[str, Any]) -> None:
    facts["bundle"] |= {"metrics": {}, "agreement": None}
    text = render_model_card(facts)
    performance = text.split("## Performance")[1].split("## Limits")[0]
    assert performance.count("Not measured") == 2
    assert f"Calibration error: {NOT_MEASURED}" in performance
    # the 95 of the intervals' level, and the temperature, which the bundle holds
    assert re.findall(r"\d+\.?\d*", performance) == ["95", "1.0"]
    assert "| dropout | not measured |" in text


@pytest.mark.parametrize("missing", ["bundle", "profile", "splits"])
def test_a_required_fact_that_is_missing_is_named(facts: dict[str, Any], missing: str) -> None:
    del facts[missing]
    for render in (render_model_card, render_data_sheet):
        with pytest.raises(DataError, match=f"the facts lack '{missing}'"):
            render(facts)


def test_a_set_without_a_licence_in_the_catalogue_is_refused(facts: dict[str, Any]) -> None:
    facts["profile"]["dataset"] = "found on the road"
    with pytest.raises(DataError, match="is not a set of the catalogue"):
        render_data_sheet(facts)


def test_drawn_cells_are_said_to_be_drawn(facts: dict[str, Any]) -> None:
    facts["profile"] = {"dataset": "synthetic"}
    sheet = render_data_sheet(facts)
    assert sheet.count("drawn by this library") >= 3
    assert "Retrospective" not in sheet


def test_equal_facts_give_equal_text_without_a_date(facts: dict[str, Any]) -> None:
    first = render_model_card(facts | FULL) + render_data_sheet(facts | FULL)
    assert first == render_model_card(facts | FULL) + render_data_sheet(facts | FULL)
    assert not re.search(r"20\d\d-\d\d-\d\d", first)


def test_every_line_of_a_table_has_as_many_columns_as_its_head(facts: dict[str, Any]) -> None:
    for text in (render_model_card(facts | FULL), render_data_sheet(facts | FULL)):
        for block in text.split("\n\n"):
            lines = [re.sub(r"\\\|", "", line) for line in block.split("\n") if line.startswith("|")]
            assert len({line.count("|") for line in lines}) <= 1, block


# -- checklists ----------------------------------------------------------------------------------


def test_the_checklists_are_whole() -> None:
    assert [item.number for item in CLAIM] == [str(n) for n in range(1, 43)]
    assert [item.number for item in TRIPOD_AI] == [str(n) for n in range(1, 28)]
    for item in (*CLAIM, *TRIPOD_AI):
        assert item.where or item.reason, f"{item.number} is neither answered nor explained"


def test_every_place_that_is_named_exists(facts: dict[str, Any]) -> None:
    heads = {
        "MODEL_CARD": re.findall(r"^## (.+)$", render_model_card(facts), re.MULTILINE),
        "DATA_SHEET": re.findall(r"^## (.+)$", render_data_sheet(facts), re.MULTILINE),
    }
    for item in (*CLAIM, *TRIPOD_AI):
        for part in item.where.split("; "):
            document, comma, sections = part.partition(", ")
            if comma and document in heads:
                known = "|".join(map(re.escape, heads[document]))
                assert re.fullmatch(rf"({known})((, | and )({known}))*", sections), f"{item.number}: {part}"
            if part.startswith("hematovision/"):
                assert (ROOT / part).is_file(), part
            if part.startswith("notebook "):
                assert (ROOT / "notebooks" / f"{part.split()[1]}.ipynb").is_file(), part


def test_an_item_whose_facts_are_missing_is_not_answered(facts: dict[str, Any]) -> None:
    def row(text: str, head: str, number: str) -> str:
        part = text.split(head)[1]
        return next(line for line in part.split("\n") if line.startswith(f"| {number} |"))

    without, with_all = render_model_card(facts), render_model_card(facts | FULL)
    assert "not answered: not handed in: generalisation" in row(without, "CLAIM", "32")
    assert row(with_all, "CLAIM", "32").endswith("| MODEL_CARD, Other laboratories |")
    assert "not answered: no ensemble" in row(without, "CLAIM", "27")
    assert row(with_all, "CLAIM", "27").endswith("| MODEL_CARD, Training |")
    assert "not answered: cannot be measured" in row(with_all, "TRIPOD", "14")
