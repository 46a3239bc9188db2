"""Pretraining on eight classes, and the compact weights that it leaves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from small_network import small_base

from hematovision.classes import EIGHT
from hematovision.config import pretrained_file
from hematovision.data.cells import CellStore
from hematovision.data.sides import Sides
from hematovision.data.splits import Split
from hematovision.errors import WeightsError
from hematovision.learn import backbones, compact, pretraining, runtime
from hematovision.learn.pretraining import Plan, Stage


def coloured_cells(each: int = 12, size: int = 32) -> Sides:
    """Eight classes that differ in colour, noisy: a network learns them in a few epochs."""
    rng = np.random.default_rng(0)
    labels = np.tile(np.arange(8), each)
    colours = rng.integers(30, 226, (8, 3))
    images = np.clip(colours[labels][:, None, None] + rng.normal(0, 20, (len(labels), size, size, 3)), 0, 255)
    paths = [f"c{i:03d}.png" for i in range(len(labels))]
    table = pd.DataFrame(
        {"dataset": "pbc", "path": paths, "label": np.asarray(EIGHT)[labels], "source": paths, "split": ""}
    )
    part = np.arange(len(labels)) // 8 % 3
    sides = [tuple(np.asarray(paths)[part == k]) for k in range(3)]
    store = CellStore((images.astype(np.uint8),), table, "coloured")
    return Sides(
        store, Split("grouped", *sides), EIGHT, np.eye(8, dtype=np.float32)[labels], np.asarray(paths)
    )


@pytest.fixture(scope="module")
def cells() -> Sides:
    return coloured_cells()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of one's own, and a network that trains in no time."""
    runtime.start(1)
    small_base(monkeypatch)
    monkeypatch.setenv("HEMATOVISION_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


PLAN = Plan((Stage(32, 2, 1e-3),), precision="float32", batch_size=8)


@pytest.fixture(scope="module")
def network() -> object:
    runtime.start(1)
    return backbones.build_base("mobilenetv2", "none", 1)


# -- compact weights -----------------------------------------------------------------------------


def test_quantised_weights_are_within_half_a_step() -> None:
    values = np.random.default_rng(0).normal(0, [0.1, 5.0, 0.0], (3, 3, 4, 3)).astype(np.float32)
    integers, scale = compact.quantise(values, 3)
    assert integers.dtype == np.int8
    assert scale.shape == (1, 1, 1, 3)
    # rounding moves a value by at most half a step; the rest is float32's own rounding
    assert (np.abs(integers * scale - values) <= scale * 0.5 + 1e-6).all()
    assert np.abs(integers).max() == 127


def test_each_channel_of_a_depthwise_kernel_has_its_own_scale(network: object, tmp_path: Path) -> None:
    compact.write_compact(network, tmp_path / "w.npz", {}, bits=8)
    with np.load(tmp_path / "w.npz") as content:
        assert content["expanded_conv_depthwise/kernel:scale"].shape == (1, 1, 32, 1)
        assert content["Conv1/kernel:scale"].shape == (1, 1, 1, 32)
        assert content["bn_Conv1/gamma"].dtype == np.float32


@pytest.mark.parametrize(("bits", "share", "error"), [(8, 1 / 3, 1 / 254), (16, 0.55, 2**-11)])
def test_compact_weights_are_small_and_come_back(
    network: object, tmp_path: Path, bits: int, share: float, error: float
) -> None:
    file = tmp_path / "w.npz"
    compact.write_compact(network, file, {"backbone": "mobilenetv2"}, bits=bits)
    assert file.stat().st_size < network.count_params() * 4 * share
    other = backbones.build_base("mobilenetv2", "none", 2)
    facts = compact.load_compact(other, file)
    assert facts["backbone"] == "mobilenetv2"
    for mine, theirs in zip(network.variables, other.variables, strict=True):
        a, b = np.asarray(mine), np.asarray(theirs)
        # half a step of eight bits, or the eleven significant bits of float16
        assert np.abs(a - b).max() <= np.abs(a).max() * error + 1e-7, mine.path


def test_a_small_network_is_kept_in_sixteen_bits_and_a_large_one_in_eight(
    network: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compact.write_compact(network, tmp_path / "small.npz", {})
    monkeypatch.setattr(compact, "SMALL", 1000)
    compact.write_compact(network, tmp_path / "large.npz", {})
    assert [compact.read_facts(tmp_path / f"{n}.npz")["bits"] for n in ("small", "large")] == [16, 8]


def test_damaged_or_foreign_weights_are_refused_in_one_line(network: object, tmp_path: Path) -> None:
    good = tmp_path / "good.npz"
    compact.write_compact(network, good, {})
    content = good.read_bytes()
    half, bent, text, array = (tmp_path / n for n in ("half.npz", "bent.npz", "text.npz", "array.npz"))
    half.write_bytes(content[: len(content) // 2])
    bent.write_bytes(content[:20_000] + b"\xff" * 2_000 + content[22_000:])
    text.write_text("no archive")
    with open(array, "wb") as handle:
        np.savez(handle, facts=np.array(json.dumps({"format": 99})))
    before = [np.asarray(v).copy() for v in network.variables]
    for file in (half, bent, text, array, tmp_path / "absent.npz"):
        with pytest.raises(WeightsError) as caught:
            compact.load_compact(network, file)
        assert file.name in str(caught.value)
        assert "\n" not in str(caught.value)
    # refused as a whole: nothing of it was loaded
    assert all(np.array_equal(a, np.asarray(v)) for a, v in zip(before, network.variables, strict=True))
    runtime.start(1)
    with pytest.raises(WeightsError, match="does not fit"):
        compact.load_compact(backbones.build_base("resnet50", "none"), good)


def test_a_pickle_is_never_opened(network: object, tmp_path: Path) -> None:
    file = tmp_path / "evil.npz"
    with open(file, "wb") as handle:
        np.savez(handle, facts=np.array([{"format": 1}], dtype=object))
    with pytest.raises(WeightsError, match=r"evil\.npz"):
        compact.load_compact(network, file)


# -- pretraining ---------------------------------------------------------------------------------


def test_pretraining_says_what_it_did_and_how_well(cells: Sides, cache: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    plan = Plan((Stage(32, 1, 2e-3), Stage(40, 1, 1e-3)), precision="float32", batch_size=8)
    file = pretraining.pretrain("mobilenetv2", cells, plan=plan, out=tmp_path / "m.npz", say=lines.append)
    facts = compact.read_facts(file)
    # hardly trained: near chance, and compression changes nothing that was said
    assert 0 < facts["validation"]["balanced_accuracy"] <= 1
    assert facts["validation"]["changed_by_compression"] <= pretraining.MOST_CHANGED
    assert facts["classes"] == list(EIGHT)
    assert facts["input_size"] == 40
    assert facts["held_out"] == len(cells.split.test)
    assert len(list(cache.glob("checkpoints/pretraining-*"))) == 2
    assert "1 epochs at 32 pixels" in lines[0]
    assert [p.name for p in tmp_path.glob("*.npz")] == ["m.npz"]


@pytest.mark.usefixtures("cache")
def test_a_finished_stage_is_not_trained_again(
    cells: Sides, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = pretraining.pretrain("mobilenetv2", cells, plan=PLAN, out=tmp_path / "a.npz", say=lambda _: None)
    assert capsys.readouterr().out.count("epoch") == 2
    again = pretraining.pretrain("mobilenetv2", cells, plan=PLAN, out=tmp_path / "b.npz", say=lambda _: None)
    assert capsys.readouterr().out.count("epoch") == 0
    with np.load(first) as a, np.load(again) as b:
        assert all(np.array_equal(a[name], b[name]) for name in a.files)


@pytest.mark.usefixtures("cache")
def test_the_held_out_side_is_never_read(
    cells: Sides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[int] = set()
    read = CellStore.read

    def spy(store: CellStore, rows: np.ndarray, size: int | None = None) -> np.ndarray:
        seen.update(np.asarray(rows).tolist())
        return read(store, rows, size)

    monkeypatch.setattr(CellStore, "read", spy)
    pretraining.pretrain("mobilenetv2", cells, plan=PLAN, out=tmp_path / "a.npz", say=lambda _: None)
    assert seen
    assert not seen & set(cells.cells.rows_of(cells.split.test).tolist())


@pytest.mark.usefixtures("cache")
def test_the_weights_are_a_source_of_initial_weights(
    cells: Sides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEMATOVISION_HOME", str(tmp_path))
    with pytest.raises(WeightsError, match="pretrain --backbone mobilenetv2"):
        backbones.check_source("mobilenetv2", "hematovision")
    file = pretraining.pretrain("mobilenetv2", cells, plan=PLAN, say=lambda _: None)
    assert file == pretrained_file("mobilenetv2")
    backbones.check_source("mobilenetv2", "hematovision")
    loaded = backbones.build_base("mobilenetv2", "hematovision")
    shutil.copy(file, tmp_path / "mine.npz")
    by_name = backbones.build_base("mobilenetv2", str(tmp_path / "mine.npz"))
    assert all(
        np.array_equal(np.asarray(a), np.asarray(b))
        for a, b in zip(loaded.variables, by_name.variables, strict=True)
    )


def test_a_plan_is_checked_before_any_work() -> None:
    with pytest.raises(WeightsError, match=r"absent\.h5"):
        pretraining.plan_for("vgg16", "absent.h5")
    assert {s.epochs for s in pretraining.plan_for("vgg16", epochs=3).stages} == {3}


# -- the released files --------------------------------------------------------------------------

RELEASED = Path(__file__).resolve().parents[1] / "models" / "released" / "pretrained"


@pytest.mark.parametrize("name", [file.stem for file in sorted(RELEASED.glob("*.npz"))])
def test_the_released_weights_fit_and_lost_nothing_by_compression(name: str) -> None:
    runtime.start(0)
    base = backbones.build_base(name, "none")
    facts = compact.load_compact(base, RELEASED / f"{name}.npz")
    assert facts["backbone"] == name
    assert facts["validation"]["changed_by_compression"] < 0.005
    # what the README promises of all three
    assert facts["validation"]["balanced_accuracy"] > 0.85


def test_the_released_weights_are_small() -> None:
    assert sum(f.stat().st_size for f in RELEASED.glob("*.npz")) < 45e6
