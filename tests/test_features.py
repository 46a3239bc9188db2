"""Frozen features: computed once, kept by content, resumed, never all in memory."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from disks import small_disk
from numpy.typing import NDArray

from hematovision.data.cells import CellStore
from hematovision.errors import HematoVisionError
from hematovision.learn import features as features_module
from hematovision.learn import runtime
from hematovision.learn.features import frozen_features, weights_key

keras = runtime.start(0)
N, SIZE = 10, 8


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_module, "_CHUNK", 4)
    keras.config.set_dtype_policy("float32")


@pytest.fixture
def store() -> CellStore:
    pictures = np.random.default_rng(0).integers(0, 256, (N, 12, 12, 3), np.uint8)
    return CellStore(
        (pictures[:7], pictures[7:]), pd.DataFrame({"path": [f"{i}" for i in range(N)]}), "cells"
    )


def build_extractor(seed: int = 1) -> Any:
    images = keras.Input((SIZE, SIZE, 3))
    x = keras.layers.Rescaling(1 / 255)(images)
    x = keras.layers.Conv2D(5, 3, kernel_initializer=keras.initializers.GlorotUniform(seed))(x)
    return keras.Model(images, keras.layers.GlobalAveragePooling2D(dtype="float32")(x), name="tiny")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the sizes of all batches that go through a network."""
    sizes: list[int] = []
    predict = keras.Model.predict_on_batch

    def counted(model: Any, batch: NDArray[np.float32]) -> Any:
        sizes.append(len(batch))
        return predict(model, batch)

    monkeypatch.setattr(keras.Model, "predict_on_batch", counted)
    return sizes


def expected(extractor: Any, store: CellStore) -> NDArray[np.float32]:
    return extractor(store.read(np.arange(N), SIZE).astype(np.float32)).numpy()


def test_are_the_network_s_in_the_store_s_order(store: CellStore, tmp_path: Path, calls: list[int]) -> None:
    seen: list[tuple[int, int]] = []
    extractor = build_extractor()
    found = frozen_features(extractor, store, tmp_path, lambda *c: seen.append(c))
    assert found.shape == (N, 5)
    assert found.dtype == np.float32
    # batches of other sizes may sum in another order
    assert np.abs(found - expected(extractor, store)).max() < 1e-6
    assert calls == [4, 4, 2]
    assert seen == [(4, N), (8, N), (N, N)]


def test_are_mapped_and_cannot_be_written_to(store: CellStore, tmp_path: Path) -> None:
    found = frozen_features(build_extractor(), store, tmp_path)
    assert isinstance(found, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 0


def test_are_computed_once(store: CellStore, tmp_path: Path, calls: list[int]) -> None:
    first = np.array(frozen_features(build_extractor(), store, tmp_path))
    calls.clear()
    assert np.array_equal(frozen_features(build_extractor(), store, tmp_path), first)
    assert not calls


def test_an_interrupted_run_goes_on(store: CellStore, tmp_path: Path, calls: list[int]) -> None:
    whole = np.array(frozen_features(build_extractor(), store, tmp_path / "whole"))

    def interrupt(done: int, _: int) -> None:
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        frozen_features(build_extractor(), store, tmp_path / "cut", interrupt)
    calls.clear()
    assert np.array_equal(frozen_features(build_extractor(), store, tmp_path / "cut"), whole)
    assert calls == [2]


def test_a_damaged_file_is_computed_again(store: CellStore, tmp_path: Path, calls: list[int]) -> None:
    whole = np.array(frozen_features(build_extractor(), store, tmp_path))
    file = next(tmp_path.rglob("features.npy"))
    os.truncate(file, file.stat().st_size // 2)
    calls.clear()
    assert np.array_equal(frozen_features(build_extractor(), store, tmp_path), whole)
    assert sum(calls) == N


def test_other_weights_crops_precision_or_code_are_other_features(
    store: CellStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen_features(build_extractor(), store, tmp_path)
    frozen_features(build_extractor(seed=2), store, tmp_path)
    frozen_features(build_extractor(), dataclasses.replace(store, key="others"), tmp_path)
    keras.config.set_dtype_policy("mixed_bfloat16")
    rough = frozen_features(build_extractor(), store, tmp_path)
    keras.config.set_dtype_policy("float32")
    assert rough.dtype == np.float32
    monkeypatch.setattr(features_module, "sha256_file", lambda _: "other code")
    frozen_features(build_extractor(), store, tmp_path)
    assert len(list(tmp_path.rglob("features.npy"))) == 5


def test_a_full_disk_is_one_line(store: CellStore, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 4) as disk:
        (disk / "filler").write_bytes(bytes(4096))
        with pytest.raises(HematoVisionError, match=r"the disk is full; free some space"):
            frozen_features(build_extractor(), store, disk)


def test_weights_have_a_key() -> None:
    assert weights_key(build_extractor()) == weights_key(build_extractor()) != weights_key(build_extractor(2))
