"""Profiles: every value typed, in its range and told by name when it is not."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from hematovision import config
from hematovision.config import BACKBONE_NAMES, build_profile, load_profile
from hematovision.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
PROFILES = sorted(p.stem for p in (ROOT / "profiles").glob("*.yaml"))
QUICK: dict[str, Any] = {
    "name": "quick",
    **yaml.safe_load((ROOT / "profiles" / "quick.yaml").read_text(encoding="utf-8")),
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a project folder with a copy of the quick profile."""
    for name in ("HEMATOVISION_DATA", "HEMATOVISION_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HEMATOVISION_HOME", str(tmp_path))
    (tmp_path / "profiles").mkdir()
    (tmp_path / "notebooks").mkdir()
    write(tmp_path, "quick", QUICK)
    return tmp_path


def write(home: Path, name: str, values: object) -> None:
    text = values if isinstance(values, str) else yaml.safe_dump(values)
    (home / "profiles" / f"{name}.yaml").write_text(text, encoding="utf-8")


class TestThoseThatExist:
    def test_both_are_there(self) -> None:
        assert {"quick", "full"} <= set(PROFILES)

    @pytest.mark.parametrize("name", PROFILES)
    def test_loads(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HEMATOVISION_HOME", str(ROOT))
        profile = load_profile(name)
        assert profile.name == name
        for field in dataclasses.fields(profile):
            value = getattr(profile, field.name)
            if str(field.type).startswith("dict"):
                assert tuple(value) == BACKBONE_NAMES
        assert build_profile(profile.to_dict()) == profile
        assert yaml.safe_load(yaml.safe_dump(profile.to_dict())) == profile.to_dict()

    def test_quick_needs_no_data_and_no_weights(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HEMATOVISION_HOME", str(ROOT))
        profile = load_profile("quick")
        assert profile.dataset == "synthetic"
        assert set(profile.weights.values()) == {"none"}
        assert profile.extra_training == ()

    def test_is_frozen(self) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            load_profile("quick").seed = 1  # type: ignore[misc]

    def test_the_backbones_of_the_table(self) -> None:
        from hematovision.learn.backbones import BACKBONES

        assert tuple(BACKBONES) == BACKBONE_NAMES


class TestTypes:
    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("seed", True, "'seed' is True: it must be a whole number"),
            ("seed", 1.5, "'seed' is 1.5: it must be a whole number"),
            ("seed", "1", "'seed' is '1': it must be a whole number"),
            ("seed", None, "'seed' is None: it must be a whole number"),
            ("seed", [1], r"'seed' is \[1\]: it must be a whole number"),
            ("dropout", "much", "'dropout' is 'much': it must be a number"),
            ("dropout", False, "'dropout' is False: it must be a number"),
            ("dropout", "0.5", "'dropout' is '0.5': it must be a number"),
            ("title", 5, "'title' is 5: it must be a text"),
            ("weights", 5, "'weights.vgg16' is 5: it must be a text"),
            ("weights", False, "'weights.vgg16' is False: it must be a text"),
            ("classes", [1, 2], "'classes' is 1: it must be a text"),
            ("input_size", {"vgg16": 48, "mobilenetv2": "big", "resnet50": 48}, "mobilenetv2' is 'big'"),
        ],
    )
    def test_the_wrong_one(self, key: str, value: object, message: str) -> None:
        with pytest.raises(ConfigError, match=message) as caught:
            build_profile({**QUICK, key: value})
        assert "\n" not in str(caught.value)

    def test_a_whole_number_is_a_number(self) -> None:
        dropout = build_profile({**QUICK, "dropout": 0}).dropout
        assert isinstance(dropout, float)
        assert dropout == 0.0

    @pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("5E-03", 5e-3), ("1.5e-2", 1.5e-2)])
    def test_exponents_as_people_write_them(self, home: Path, text: str, value: float) -> None:
        """YAML 1.1 reads 1e-4, without a point, as a text."""
        assert load_profile("quick", {"head_learning_rate": text}).head_learning_rate == value
        write(home, "rates", yaml.safe_dump(QUICK | {"name": "rates"}) + f"\nhead_learning_rate: {text}\n")
        assert load_profile("rates").head_learning_rate == value

    def test_one_value_may_stand_for_a_list(self) -> None:
        assert build_profile({**QUICK, "backbones": "mobilenetv2"}).backbones == ("mobilenetv2",)


class TestBackboneEntries:
    def test_one_value_stands_for_all(self) -> None:
        profile = build_profile({**QUICK, "input_size": 64})
        assert profile.input_size == {"vgg16": 64, "mobilenetv2": 64, "resnet50": 64}

    def test_one_entry_each(self) -> None:
        sizes = {"resnet50": 40, "vgg16": 32, "mobilenetv2": 64}
        profile = build_profile({**QUICK, "input_size": sizes})
        assert profile.input_size == sizes
        assert profile.for_backbone("resnet50")["input_size"] == 40
        assert profile.for_backbone("resnet50")["batch_size"] == QUICK["batch_size"]

    @pytest.mark.parametrize(
        ("entries", "message"),
        [
            ({"vgg16": 32}, r"missing \['mobilenetv2', 'resnet50'\]"),
            (dict.fromkeys((*BACKBONE_NAMES, "vgg19"), 32), r"unknown \['vgg19'\]"),
            (dict.fromkeys((*BACKBONE_NAMES, 16, "vgg19"), 32), r"unknown \[16, 'vgg19'\]"),
        ],
    )
    def test_one_is_missing_or_unknown(self, entries: dict[Any, int], message: str) -> None:
        with pytest.raises(ConfigError, match=rf"'input_size' must hold one entry a backbone .*{message}"):
            build_profile({**QUICK, "input_size": entries})


class TestRanges:
    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("seed", -1, "'seed' is -1: it must lie from 0 to"),
            ("dropout", 0.95, "'dropout' is 0.95: it must lie from 0 to 0.9"),
            ("dropout", float("nan"), "'dropout' is nan"),
            ("dropout", float("inf"), "'dropout' is inf"),
            ("input_size", {"vgg16": 48, "mobilenetv2": 8, "resnet50": 48}, "'input_size' is 8"),
            ("validation_fraction", 0, "'validation_fraction' is 0"),
            ("bootstrap_samples", 10, "'bootstrap_samples' is 10"),
            ("dataset", "cats", "'dataset' is 'cats': it must be one of synthetic, photographs, blood-cells"),
            ("classes", ["neutrophil", "cat"], "'classes' is 'cat'"),
            ("classes", ["neutrophil"], "'classes' names one class"),
            ("classes", ["neutrophil", "neutrophil"], "'classes' is empty or names one twice"),
            ("backbones", [], "'backbones' is empty"),
            ("backbones", ["vgg19"], "'backbones' is 'vgg19'"),
            ("precision", "float16", "'precision' is 'float16'"),
        ],
    )
    def test_out_of_it(self, key: str, value: object, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            build_profile({**QUICK, key: value})

    def test_every_number_has_one(self) -> None:
        numbers = {f.name for f in dataclasses.fields(config.Profile) if {"int", "float"} & words(f.type)}
        assert numbers == set(config._RANGES)


def words(kind: object) -> set[str]:
    return set(str(kind).replace("[", " ").replace("]", " ").replace(",", " ").split())


class TestLoading:
    def test_unknown_profile(self) -> None:
        with pytest.raises(ConfigError, match=r"^there is no profile 'huge': choose one of: quick$"):
            load_profile("huge")

    @pytest.mark.parametrize("name", ["../profiles/quick", "", "quick.yaml"])
    def test_a_name_is_no_path(self, name: str) -> None:
        with pytest.raises(ConfigError, match="there is no profile"):
            load_profile(name)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("seed: [1", "profiles/bad.yaml cannot be read"),
            ("seed: 2026-13-45", "profiles/bad.yaml cannot be read"),
            ("", "profiles/bad.yaml holds no keys"),
            ("- seed", "profiles/bad.yaml holds no keys"),
            ("seed: 1", "profile 'bad': key 'audit_weights' is missing"),
            (
                yaml.safe_dump(QUICK | {"sead": 1}),
                "profile 'quick|bad': unknown key 'sead': keys are: .*seed",
            ),
            (yaml.safe_dump(QUICK) + "\n1: x\nz: y\n", "profile 'bad': unknown key '1'"),
        ],
    )
    def test_a_file_that_is_wrong(self, home: Path, text: str, message: str) -> None:
        write(home, "bad", text)
        with pytest.raises(ConfigError, match=message) as caught:
            load_profile("bad")
        assert "\n" not in str(caught.value)

    def test_a_file_that_is_no_text(self, home: Path) -> None:
        (home / "profiles" / "bad.yaml").write_bytes(b"\xff\xfe\x00\x81")
        with pytest.raises(ConfigError, match=r"profiles/bad\.yaml cannot be read"):
            load_profile("bad")

    def test_the_name_is_the_file_s(self, home: Path) -> None:
        values = {k: v for k, v in QUICK.items() if k != "name"}
        write(home, "mine", values)
        assert load_profile("mine").name == "mine"
        assert config.profile_names() == ["mine", "quick"]


class TestOverrides:
    def test_are_read_as_yaml(self) -> None:
        profile = load_profile(
            "quick",
            {"seed": "7", "dropout": "0.5", "classes": "[monocyte, neutrophil]", "backbones": "vgg16"},
        )
        assert (profile.seed, profile.dropout) == (7, 0.5)
        assert profile.classes == ("monocyte", "neutrophil")
        assert profile.backbones == ("vgg16",)

    def test_may_be_values(self) -> None:
        assert load_profile("quick", {"seed": 7}).seed == 7

    @pytest.mark.parametrize("text", ["none", "null", "~", ""])
    def test_weights_none(self, text: str) -> None:
        profile = load_profile("quick", {"weights": "imagenet", "weights.vgg16": text})
        assert profile.weights == {"vgg16": "none", "mobilenetv2": "imagenet", "resnet50": "imagenet"}
        assert load_profile("quick", {"weights": text}).weights == dict.fromkeys(BACKBONE_NAMES, "none")

    def test_one_backbone_s_entry(self) -> None:
        before, after = load_profile("quick"), load_profile("quick", {"input_size.vgg16": "96"})
        assert after.input_size == {**before.input_size, "vgg16": 96}
        assert before.input_size["vgg16"] != 96
        assert after.key != before.key

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("sead", "1", "unknown key 'sead': keys are: .*seed"),
            ("name", "x", "unknown key 'name'"),
            ("seed.vgg16", "1", "unknown key 'seed.vgg16'"),
            ("input_size.vgg19", "64", "unknown key 'input_size.vgg19': backbones are: vgg16, "),
            ("seed", "[1", "the value of 'seed' is not valid YAML"),
            ("seed", "2026-13-45", "the value of 'seed' is not valid YAML"),
            ("seed", "yes", "'seed' is True: it must be a whole number"),
            ("seed", "many", "'seed' is 'many': it must be a whole number"),
            ("input_size.vgg16", "4", "'input_size' is 4"),
        ],
    )
    def test_that_are_wrong(self, key: str, value: str, message: str) -> None:
        with pytest.raises(ConfigError, match=message) as caught:
            load_profile("quick", {key: value})
        assert "\n" not in str(caught.value)

    def test_keys_that_cannot_be_set_are_not_offered(self) -> None:
        with pytest.raises(ConfigError) as caught:
            load_profile("quick", {"sead": "1"})
        assert not {"name", "title"} & set(caught.value.remedy.replace(",", "").split())


class TestProfile:
    def test_replace_checks(self) -> None:
        profile = load_profile("quick")
        assert profile.replace(seed=5).seed == 5
        with pytest.raises(ConfigError, match="'dropout' is 2"):
            profile.replace(dropout=2)
        with pytest.raises(ConfigError, match="unknown key 'sead'"):
            profile.replace(sead=2)

    def test_key_follows_the_values(self) -> None:
        profile = load_profile("quick")
        assert profile.key == load_profile("quick").key
        assert len({profile.replace(seed=s).key for s in range(4)}) == 4


class TestPaths:
    def test_everything_lies_under_the_home(self, home: Path) -> None:
        assert config.project_root() == home
        assert config.data_folder() == home / "data" / "raw"
        assert config.cache_folder() == home / "data" / "cache"
        assert config.artifacts("quick") == home / "data" / "cache" / "runs" / "quick"
        assert config.report_folder("quick") == home / "reports" / "quick"
        assert config.model_folder("quick") == home / "models" / "quick"

    def test_the_argument_comes_before_the_environment(
        self, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HEMATOVISION_DATA", str(home / "environment"))
        assert config.data_folder() == home / "environment"
        assert config.data_folder(home / "argument") == home / "argument"
        monkeypatch.setenv("HEMATOVISION_CACHE", str(home / "elsewhere"))
        assert config.artifacts("quick") == home / "elsewhere" / "runs" / "quick"

    def test_the_home_is_found_from_below(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("HEMATOVISION_HOME")
        monkeypatch.chdir(home / "notebooks")
        assert config.project_root() == home
