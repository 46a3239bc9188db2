"""Bundles: whole and true, or refused in one line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_bundle

from hematovision.errors import HematoVisionError
from hematovision.files import read_json, write_json
from hematovision.release.bundle import (
    BundleError,
    Thresholds,
    export_bundle,
    find_bundle,
    load_bundle,
    open_model,
    run_model,
)


def test_a_bundle_says_what_it_holds(tmp_path: Path) -> None:
    bundle = load_bundle(tiny_bundle.write_bundle(tmp_path / "b", temperature=2, weights="imagenet"))
    assert bundle.classes == tiny_bundle.CLASSES
    assert (bundle.input_size, bundle.cell_size, bundle.crop_margin) == (32, 32, 0.15)
    assert bundle.temperature == 2.0
    assert bundle.thresholds == Thresholds(0.6, 0.0025)
    assert bundle.title == f"mobilenetv2, profile tiny, {bundle.sha256[:12]}"
    assert "weights='imagenet'" in repr(bundle)
    assert len(repr(bundle)) < 1000  # not the model itself


WRONG: list[tuple[str, Any, str]] = [
    ("format", 2, "format 2"),
    ("format", None, "'format' is not a whole number"),
    ("classes", [], "at least two classes"),
    ("classes", ["eosinophil"], "at least two classes"),
    ("classes", ["eosinophil", "lymphocyte", "monocyte", "monocyte"], "each once"),
    ("classes", ["eosinophil", "lymphocyte", "monocyte", "cat"], "'cat' is not a cell class"),
    ("classes", ["eosinophil", "lymphocyte", "monocyte", 4], "4 is not a cell class"),
    ("classes", ["eosinophil", "lymphocyte", "monocyte"], "output, for 3 classes,"),
    ("classes", "eosinophil", "'classes' is not a list"),
    ("input", {"size": 64, "cell_size": 64, "crop_margin": 0.15}, "input of"),
    ("input", {"size": 10**9, "cell_size": 64, "crop_margin": 0.15}, "'input.size' is 1000000000"),
    ("input", {"size": True, "cell_size": 64, "crop_margin": 0.15}, "'input.size' is not a whole number"),
    ("input", {"size": 32, "crop_margin": 0.15}, "'input.cell_size' is missing"),
    ("input", [], "'input.size' is missing"),
    ("temperature", 0, "'temperature' is 0"),
    ("temperature", "warm", "'temperature' is not a number"),
    ("thresholds", {"confidence": 1.5, "sharpness": 0}, "'thresholds.confidence' is 1.5"),
    ("backbone", "alexnet", "'alexnet' is no backbone"),
    ("model", {"sha256": "0" * 64}, "damaged"),
    ("model", {}, "'model.sha256' is missing"),
    ("metrics", None, "'metrics' is not a table"),
]


@pytest.mark.parametrize(("key", "value", "message"), WRONG, ids=[f"{k}-{m[:24]}" for k, _, m in WRONG])
def test_a_wrong_card_is_refused_in_one_line(tmp_path: Path, key: str, value: Any, message: str) -> None:
    folder = tiny_bundle.write_bundle(tmp_path / "b")
    write_json(folder / "model.json", read_json(folder / "model.json") | {key: value})
    with pytest.raises(BundleError) as refused:
        load_bundle(folder)
    assert message in str(refused.value)
    assert str(folder) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1, 2]", b"[" * 100_000, b"null"])
def test_a_card_that_is_no_json_or_no_table_is_refused(tmp_path: Path, content: bytes) -> None:
    folder = tiny_bundle.write_bundle(tmp_path / "b")
    (folder / "model.json").write_bytes(content)
    with pytest.raises(BundleError, match=r"model\.json"):
        load_bundle(folder)


def test_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    folder = tiny_bundle.write_bundle(tmp_path / "b", temperature=1.25)
    text = (folder / "model.json").read_text().replace("1.25", "NaN")
    (folder / "model.json").write_text(text)
    with pytest.raises(BundleError, match="'temperature' is nan"):
        load_bundle(folder)


@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_damaged_model_is_refused(tmp_path: Path, harm: str) -> None:
    folder = tiny_bundle.write_bundle(tmp_path / "b")
    file = folder / "model.tflite"
    content = bytearray(file.read_bytes())
    if harm == "flip":
        content[len(content) // 2] ^= 1
    file.write_bytes(content[:100] if harm == "cut" else content)
    if harm == "remove":
        file.unlink()
    with pytest.raises(BundleError, match=r"model\.tflite"):
        load_bundle(folder)


@pytest.mark.parametrize("content", [b"", b"text", b"\0" * 5000, tiny_bundle.build_model()[:200]])
def test_what_is_no_model_is_refused_though_its_hash_is_right(tmp_path: Path, content: bytes) -> None:
    folder = tiny_bundle.write_bundle(tmp_path / "b", content)
    with pytest.raises(BundleError, match=r"model\.tflite is not a model that LiteRT can run"):
        load_bundle(folder)


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere", Path(__file__)):
        with pytest.raises(BundleError, match=r"model\.json is missing"):
            load_bundle(folder)


def test_the_released_model_comes_first_then_that_of_the_full_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEMATOVISION_HOME", str(tmp_path))
    with pytest.raises(BundleError, match="run `make report` first"):
        load_bundle()
    quick = tiny_bundle.write_bundle(tmp_path / "models" / "quick" / "final")
    assert find_bundle() == quick
    full = tiny_bundle.write_bundle(tmp_path / "models" / "full" / "final")
    os.utime(full / "model.json", (1_000_000, 1_000_000))  # older than the quick run's
    assert find_bundle() == full
    (tmp_path / "models" / "released").mkdir()
    assert find_bundle() == full  # an empty folder is no bundle
    released = tiny_bundle.write_bundle(tmp_path / "models" / "released")
    assert find_bundle() == released == load_bundle().folder


# -- exporting, which takes TensorFlow -----------------------------------------------------------

SIZE = 64


def _pictures() -> np.ndarray:
    """Return float32 pictures (16, SIZE, SIZE, 3), 0 to 255, from dark to bright."""
    images = np.random.default_rng(5).integers(0, 256, (16, SIZE, SIZE, 3)).astype(np.float32)
    return images * np.linspace(0.1, 1, 16, dtype=np.float32)[:, None, None, None]


@pytest.fixture(scope="module")
def keras_model() -> Any:
    """Return a MobileNetV2 with random weights whose answers differ from picture to picture."""
    pytest.importorskip("tensorflow")
    from hematovision.learn import backbones, runtime

    keras = runtime.start(0)
    keras.config.set_dtype_policy("float32")
    base = backbones.build_base("mobilenetv2", "none", 1)
    head = backbones.build_head(1280, len(tiny_bundle.CLASSES), 0.2, 1)
    model = backbones.build_classifier("mobilenetv2", base, head, SIZE, frozen_batch_norm=True)
    # a fresh batch norm squeezes every picture to the same answer; one pass teaches it these pictures
    norms = [layer for layer in base.layers if isinstance(layer, keras.layers.BatchNormalization)]
    for norm in norms:
        norm.momentum = 0.0
    base(_pictures() / 127.5 - 1, training=True)
    kernel, bias = head.get_weights()
    head.set_weights([kernel * 3, bias])
    return model


def _export(model: Any, folder: Path, **changes: Any) -> Path:
    values: dict[str, Any] = {
        "classes": tiny_bundle.CLASSES,
        "input_size": SIZE,
        "crop_margin": 0.15,
        "backbone": "mobilenetv2",
        "weights": "none",
        "provenance": {"profile": "quick", "data_key": "0123"},
        "metrics": {"accuracy": {"value": 0.5, "low": 0.4, "high": 0.6}},
    }
    return export_bundle(model, folder, **(values | changes))


@pytest.mark.slow
def test_the_exported_model_answers_as_keras_does_and_silently(
    keras_model: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = _export(keras_model, tmp_path / "final", cell_size=80, temperature=1.5)
    assert capfd.readouterr() == ("", "")
    bundle = load_bundle(folder)
    assert (bundle.input_size, bundle.cell_size, bundle.temperature) == (SIZE, 80, 1.5)
    assert bundle.provenance["data_key"] == "0123"
    assert bundle.provenance["version"]
    assert bundle.metrics["accuracy"]["high"] == 0.6
    card = read_json(folder / "model.json")
    assert card["purpose"] == "for research and teaching, not for clinical use"
    assert bundle.thresholds == Thresholds() == Thresholds(0.7, 0.0025)
    assert "more than 30 %" in card["thresholds"]["reasons"]["confidence"]
    assert {p.name for p in folder.iterdir()} == {"model.json", "model.tflite"}

    images = _pictures()
    interpreter = open_model(bundle.model, folder)
    lite = np.stack([run_model(interpreter, image) for image in images])
    said = keras_model.predict(images, verbose=0)
    assert np.ptp(said, axis=0).max() > 0.05, "the pictures must be told apart, else anything agrees"
    # both compute in float32, in another order
    np.testing.assert_allclose(lite, said, atol=1e-4)


@pytest.mark.slow
def test_an_export_that_fails_leaves_the_last_bundle(
    keras_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_bundle.write_bundle(tmp_path / "final")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(BundleError, match="32 pixels"):
        _export(keras_model, folder, input_size=32)
    with pytest.raises(BundleError, match="3 classes"):
        _export(keras_model, folder, classes=tiny_bundle.CLASSES[:3])

    # what TensorFlow writes is stood in for by another model: it must not pass for this one
    def write_other(path: str, **_options: Any) -> None:
        Path(path).write_bytes(tiny_bundle.build_model(SIZE))

    monkeypatch.setattr(keras_model, "export", write_other)
    with pytest.raises(BundleError, match="differs from Keras"):
        _export(keras_model, folder)
    with pytest.raises(BundleError, match="'cat' is not a cell class"):
        _export(keras_model, folder, classes=(*tiny_bundle.CLASSES[:3], "cat"))
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["final"]


def test_an_export_to_where_nothing_can_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    class Model:
        input_shape, output_shape = (None, SIZE, SIZE, 3), (None, 4)

    with pytest.raises(HematoVisionError, match="cannot use"):
        _export(Model(), tmp_path / "file" / "final")
