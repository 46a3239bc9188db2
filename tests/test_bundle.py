"""Bundles: whole and true, or refused in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_bundle

from hematovision.errors import ConfigError, HematoVisionError
from hematovision.files import read_json, write_json
from hematovision.release.bundle import (
    BundleError,
    Thresholds,
    export_bundle,
    find_bundle,
    load_bundle,
    open_model,
    verify_bundle,
)
from hematovision.release.litert import answer, run_model
from hematovision.release.predict import Classifier


def test_a_bundle_says_what_it_holds(tmp_path: Path) -> None:
    bundle = load_bundle(
        tiny_bundle.write_bundle(tmp_path / "b", calibration={"temperature": 2}, weights="imagenet")
    )
    assert bundle.classes == tiny_bundle.CLASSES
    assert (bundle.input_size, bundle.cell_size, bundle.crop_margin) == (32, 32, 0.15)
    assert bundle.temperature == 2.0
    assert (bundle.precision, bundle.precisions, bundle.has_map) == ("float32", ("float32",), False)
    assert bundle.thresholds == Thresholds(0.6, 0.0025)
    assert bundle.title == f"mobilenetv2, profile tiny, {bundle.sha256[:12]}"
    assert "weights='imagenet'" in repr(bundle)
    assert len(repr(bundle)) < 1000  # not the model itself


WRONG: list[tuple[str, Any, str]] = [
    ("format", 3, "format 3, this version reads formats 1 and 2"),
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
    ("calibration", {"temperature": 0}, "'calibration.temperature' is 0"),
    ("calibration", {"temperature": "warm"}, "'calibration.temperature' is not a number"),
    ("calibration", {}, "'calibration.temperature' is missing"),
    ("outputs", [], "'outputs' must be probabilities"),
    ("outputs", ["probabilities"], "'outputs' must be probabilities"),
    ("outputs", [{"name": "activation_map"}, {"name": "probabilities"}], "'outputs' must be probabilities"),
    ("outputs", [{"name": "probabilities"}, {"name": "activation_map"}], "[1, any, any, 4]"),
    ("thresholds", {"confidence": 1.5, "sharpness": 0}, "'thresholds.confidence' is 1.5"),
    ("backbone", "alexnet", "'alexnet' is no backbone"),
    (
        "files",
        {"model.tflite": tiny_bundle.stamp(tiny_bundle.build_model()) | {"sha256": "0" * 64}},
        "damaged",
    ),
    ("files", {"model.tflite": tiny_bundle.stamp(b"")}, "should have 0"),
    ("files", {"model.tflite": {"bytes": 1}}, "'files.model.tflite.sha256' is missing"),
    ("files", {"../model.tflite": tiny_bundle.stamp(b"")}, "not a file of this folder"),
    ("files", {}, "holds no float32 model"),
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
    folder = tiny_bundle.write_bundle(tmp_path / "b", calibration={"temperature": 1.25})
    text = (folder / "model.json").read_text().replace("1.25", "NaN")
    (folder / "model.json").write_text(text)
    with pytest.raises(BundleError, match=r"'calibration\.temperature' is nan"):
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


def test_a_bundle_of_the_first_format_is_still_read(tmp_path: Path) -> None:
    folder = tiny_bundle.write_old_bundle(tmp_path / "b")
    bundle = load_bundle(folder)
    assert (bundle.temperature, bundle.has_map, bundle.precisions) == (1.5, False, ("float32",))
    verify_bundle(folder)
    assert Classifier.load(folder).predict(np.full((40, 40, 3), 90, np.uint8), "whole")
    with pytest.raises(BundleError, match="holds no int8 model: use float32"):
        load_bundle(folder, "int8")
    (folder / "model.tflite").write_bytes(b"other")
    with pytest.raises(BundleError, match="damaged"):
        load_bundle(folder)


def test_each_precision_has_its_own_model(tmp_path: Path) -> None:
    others = {"model-int8.tflite": tiny_bundle.build_model(map_first=None) + b"\0" * 8}
    folder = tiny_bundle.write_bundle(tmp_path / "b", others=others)
    exact, small = load_bundle(folder), load_bundle(folder, "int8")
    assert exact.precisions == small.precisions == ("float32", "int8")
    assert small.sha256 == tiny_bundle.stamp(others["model-int8.tflite"])["sha256"] != exact.sha256
    assert ", int8, " in small.title
    assert Classifier.load(folder, precision="int8").bundle.precision == "int8"
    with pytest.raises(ConfigError, match="no precision 'int4': use float32 or int8"):
        load_bundle(folder, "int4")  # type: ignore[arg-type]
    # a damaged one is found when it is asked for, or when all is verified
    (folder / "model-int8.tflite").write_bytes(others["model-int8.tflite"][:100])
    assert load_bundle(folder).sha256 == exact.sha256
    for read in (lambda: load_bundle(folder, "int8"), lambda: verify_bundle(folder)):
        with pytest.raises(BundleError, match=r"model-int8\.tflite is damaged: it has 100 bytes"):
            read()


@pytest.mark.parametrize("map_first", [True, False])
def test_outputs_are_told_apart_in_any_order(tmp_path: Path, map_first: bool) -> None:
    names = [{"name": "probabilities"}, {"name": "activation_map"}]
    content = tiny_bundle.build_model(map_first=map_first)
    folder = tiny_bundle.write_bundle(tmp_path / "b", content, outputs=names)
    bundle = load_bundle(folder)
    assert bundle.has_map
    picture = np.full((32, 32, 3), (120, 60, 30), np.uint8)
    said = answer(open_model(content, folder), picture)
    # float32 over a thousand pixels
    np.testing.assert_allclose(said.probabilities, tiny_bundle.expected(picture), atol=1e-4)
    assert said.activation_map is not None
    assert said.activation_map.shape == (4, 4, 4)
    found = Classifier.load(folder).activation_map(picture)
    assert found is not None
    assert found.shape == (4, 4, 4)
    # a card that is silent about the map does not fit
    with pytest.raises(BundleError, match="output, for 4 classes,"):
        load_bundle(tiny_bundle.write_bundle(tmp_path / "silent", content))


def test_what_lies_beside_a_bundle_is_ignored(tmp_path: Path) -> None:
    folder = tiny_bundle.write_bundle(tmp_path / "b")
    (folder / "pretrained").mkdir()
    (folder / "pretrained" / "mobilenetv2.npz").write_bytes(b"no archive")
    load_bundle(folder)
    verify_bundle(folder)


def test_the_command_takes_a_precision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    from hematovision import cli

    Image.fromarray(np.full((40, 40, 3), 90, np.uint8)).save(tmp_path / "cell.png")
    folder = tiny_bundle.write_bundle(tmp_path / "b", others={"model-int8.tflite": tiny_bundle.build_model()})
    words = ["predict", str(tmp_path / "cell.png"), "--model", str(folder), "--cells", "whole", "--precision"]
    assert cli.main([*words, "int8"]) == 0
    assert ", int8, " in capsys.readouterr().err
    assert cli.main([*words[:3], str(tiny_bundle.write_bundle(tmp_path / "c")), *words[4:], "int8"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == f"hematovision: {tmp_path / 'c'} holds no int8 model: use float32\n"


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
CLASSES = tiny_bundle.CLASSES


def _crops(count: int = 24, seed: int = 5, side: int = SIZE) -> np.ndarray:
    """Return uint8 crops (count, side, side, 3): noise on grounds of different colours."""
    random = np.random.default_rng(seed)
    grounds = random.integers(0, 200, (count, 1, 1, 3))
    return (grounds + random.integers(0, 56, (count, side, side, 3))).astype(np.uint8)


def _build(seed: int, *, with_map: bool = False) -> Any:
    pytest.importorskip("tensorflow")
    from hematovision.learn import runtime

    keras = runtime.start(seed)
    keras.config.set_dtype_policy("float32")
    images = keras.Input((SIZE, SIZE, 3), name="image")
    x = keras.layers.Rescaling(1 / 127.5, offset=-1.0)(images)
    x = keras.layers.Conv2D(16, 3, strides=4, activation="relu")(x)
    maps = keras.layers.Conv2D(4, 1, kernel_initializer=keras.initializers.RandomNormal(0, 1.0, seed))(x)
    said = keras.layers.Softmax()(keras.layers.GlobalAveragePooling2D()(maps))
    model = keras.Model(images, [said, maps] if with_map else said)
    model.compile("adam", "mse")  # as after a training: its file names an optimizer too
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    return _build(1)


@pytest.fixture(scope="module")
def map_model() -> Any:
    return _build(1, with_map=True)


def _export(model: Any, folder: Path, **changes: Any) -> Path:
    values: dict[str, Any] = {
        "classes": CLASSES,
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
    model: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = _export(model, tmp_path / "final", cell_size=80, temperature=1.5, seeds=(3, 4))
    assert capfd.readouterr() == ("", "")
    bundle = load_bundle(folder)
    assert (bundle.input_size, bundle.cell_size, bundle.temperature) == (SIZE, 80, 1.5)
    assert bundle.provenance["data_key"] == "0123"
    assert bundle.provenance["version"]
    assert bundle.metrics["accuracy"]["high"] == 0.6
    card = read_json(folder / "model.json")
    assert card["purpose"] == "for research and teaching, not for clinical use"
    assert card["seeds"] == [3, 4]
    assert card["agreement"]["of"] == "random pixels"
    assert bundle.thresholds == Thresholds() == Thresholds(0.7, 0.0025)
    assert "more than 30 %" in card["thresholds"]["reasons"]["confidence"]
    assert {p.name for p in folder.iterdir()} == {"model.json", "model.tflite"}

    images = _crops().astype(np.float32)
    interpreter = open_model(bundle.model, folder)
    lite = np.stack([run_model(interpreter, image) for image in images])
    said = model.predict(images, verbose=0)
    assert np.ptp(said, axis=0).max() > 0.05, "the pictures must be told apart, else anything agrees"
    # both compute in float32, in another order
    np.testing.assert_allclose(lite, said, atol=1e-4)


@pytest.mark.slow
def test_a_release_holds_every_kind_and_what_agrees(map_model: Any, tmp_path: Path) -> None:
    from hematovision.release.export import load_keras

    # larger than the model's pictures, and from an iterator: scaled as the classifier scales them
    given = {"held_out": iter(_crops(40, 6, 80)), "int8_crops": iter(_crops(40, 7, 80))}
    folder = _export(map_model, tmp_path / "a", keep_keras=True, int8_agreement=0.9, **given)
    card = read_json(folder / "model.json")
    assert set(card["files"]) == {"model.keras", "model.tflite", "model-int8.tflite"}
    assert [output["name"] for output in card["outputs"]] == ["probabilities", "activation_map"]
    agreement = card["agreement"]
    assert (agreement["crops"], agreement["of"]) == (40, "held-out cells")
    assert agreement["float32"]["labels"] == 1.0
    assert agreement["float32"]["largest_difference"] <= 1e-4
    assert 0.9 <= agreement["int8"]["labels"] <= 1.0
    assert agreement["int8"]["largest_difference"] > agreement["float32"]["largest_difference"]

    said = map_model.predict_on_batch(_crops()[:1].astype(np.float32))
    for precision, tolerance in (("float32", 1e-4), ("int8", 0.1)):  # int8 has steps of 1/256 of a range
        classifier = Classifier.load(folder, precision=precision)  # type: ignore[arg-type]
        np.testing.assert_allclose(classifier.probabilities(_crops()[0]), said[0][0], atol=tolerance)
        found = classifier.activation_map(_crops()[0])
        np.testing.assert_allclose(found, said[1][0], atol=tolerance * np.abs(said[1]).max())
    again = load_keras(folder)
    np.testing.assert_array_equal(
        again.predict_on_batch(_crops().astype(np.float32))[0],
        map_model.predict_on_batch(_crops().astype(np.float32))[0],
    )

    given = {"held_out": _crops(40, 6, 80), "int8_crops": _crops(40, 7, 80)}
    second = _export(map_model, tmp_path / "b", keep_keras=True, int8_agreement=0.9, **given)
    for file in folder.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes(), f"{file.name}: equal bytes"


@pytest.mark.slow
def test_a_release_tells_its_facts(model: Any, tmp_path: Path) -> None:
    facts = {
        "profile": {"dataset": "synthetic"},
        "splits": {"official": {"train": {"images": 4321, "photographs": 123}}},
    }
    folder = _export(model, tmp_path / "b", facts=facts)
    files = read_json(folder / "model.json")["files"]
    assert set(files) == {"model.tflite", "MODEL_CARD.md", "DATA_SHEET.md"}
    assert files["model.tflite"]["sha256"] in (folder / "MODEL_CARD.md").read_text()
    assert "4,321" in (folder / "DATA_SHEET.md").read_text()
    (folder / "MODEL_CARD.md").write_text("other")
    with pytest.raises(BundleError, match=r"MODEL_CARD\.md is damaged"):
        verify_bundle(folder)
    with pytest.raises(HematoVisionError, match="the facts lack 'splits'"):
        _export(model, tmp_path / "none", facts={"profile": {"dataset": "synthetic"}})
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_a_new_export_leaves_what_is_not_of_the_bundle(model: Any, tmp_path: Path) -> None:
    old = tiny_bundle.write_bundle(tmp_path / "b", others={"model-int8.tflite": b"old", "NOTES.txt": b"keep"})
    (old / "pretrained").mkdir()
    (old / "pretrained" / "w.npz").write_bytes(b"weights")
    _export(model, old)
    assert {p.name for p in old.iterdir()} == {"model.json", "model.tflite", "NOTES.txt", "pretrained"}
    assert (old / "pretrained" / "w.npz").read_bytes() == b"weights"


@pytest.mark.slow
def test_an_export_that_fails_leaves_the_last_bundle(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hematovision.learn import conversion

    folder = tiny_bundle.write_bundle(tmp_path / "final")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(BundleError, match="32 pixels"):
        _export(model, folder, input_size=32)
    with pytest.raises(BundleError, match="3 classes"):
        _export(model, folder, classes=CLASSES[:3])
    with pytest.raises(BundleError, match="without held-out cells"):
        _export(model, folder, int8_crops=_crops())
    with pytest.raises(BundleError, match="no held-out cells to compare"):
        _export(model, folder, held_out=[])
    with pytest.raises(BundleError, match="'cat' is not a cell class"):
        _export(model, folder, classes=(*CLASSES[:3], "cat"))

    # what TensorFlow writes is stood in for by another model: it must not pass for this one
    other = tiny_bundle.build_model(SIZE)
    monkeypatch.setattr(conversion, "convert_int8", lambda *_: other)
    with pytest.raises(BundleError, match=r"the int8 model names \d+\.\d% of 24 held-out cells as Keras"):
        _export(model, folder, held_out=_crops(), int8_crops=_crops())
    monkeypatch.setattr(conversion, "convert_float32", lambda *_: other)
    with pytest.raises(BundleError, match="differs from Keras"):
        _export(model, folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["final"]


def test_a_model_whose_outputs_are_neither_is_refused(tmp_path: Path) -> None:
    for second in ((None, 8, 8, 3), (None, 4), (None, None, None, 4)):

        class Model:
            input_shape, output_shape = (None, SIZE, SIZE, 3), [(None, 4), second]

        with pytest.raises(BundleError, match="give probabilities, and an activation map"):
            _export(Model(), tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_an_export_to_where_nothing_can_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    class Model:
        input_shape, output_shape = (None, SIZE, SIZE, 3), (None, 4)

    with pytest.raises(HematoVisionError, match="cannot use"):
        _export(Model(), tmp_path / "file" / "final")


def test_reading_a_bundle_loads_no_tensorflow(tmp_path: Path) -> None:
    folder = tiny_bundle.write_bundle(tmp_path / "b")
    code = (
        f"import sys; from hematovision.release import bundle; bundle.verify_bundle({str(folder)!r}); "
        "print([m for m in sys.modules if m in ('tensorflow', 'keras', 'hematovision.learn')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


# -- the Keras model in a bundle -----------------------------------------------------------------


def _keras_bundle(folder: Path, file: Path) -> Path:
    """Write a bundle that vouches for a Keras file, hash and all."""
    return tiny_bundle.write_bundle(folder, others={"model.keras": file.read_bytes()})


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a file that exists once code out of a model has run."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "executed"


def _lambda_model(marker: Path, file: Path) -> None:
    import keras

    source = f"lambda x: (__import__('pathlib').Path({str(marker)!r}).write_text('run'), x)[1]"
    images = keras.Input((32, 32, 3))
    x = keras.layers.Lambda(eval(source))(images)
    x = keras.layers.Dense(4, "softmax")(keras.layers.GlobalAveragePooling2D()(x))
    keras.Model(images, x).save(file)
    marker.unlink(missing_ok=True)  # building it ran the code


@pytest.mark.slow
def test_a_keras_file_with_code_of_its_own_is_refused_unrun(tmp_path: Path, marker: Path) -> None:
    keras = pytest.importorskip("keras")
    from keras.src.backend.common import global_state

    from hematovision.release.export import load_keras

    file = tmp_path / "evil.keras"
    _lambda_model(marker, file)
    keras.models.load_model(file, compile=False, safe_mode=False)
    assert marker.exists(), "the file must be dangerous, else this test shows nothing"
    marker.unlink()
    folder = _keras_bundle(tmp_path / "b", file)
    with pytest.raises(BundleError, match="refused") as refused:
        load_keras(folder)
    assert not marker.exists()
    assert "\n" not in str(refused.value)
    assert "model.keras" in str(refused.value)
    # even where a program has switched Keras's own guard off
    keras.config.enable_unsafe_deserialization()
    try:
        with pytest.raises(BundleError, match="refused"):
            load_keras(folder)
    finally:
        global_state.set_global_attribute("safe_mode_saving", None)
    assert not marker.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "name"), [("os", "system"), ("builtins", "eval"), ("keras.utils", "get_file")]
)
def test_a_keras_file_that_names_a_function_to_call_is_refused_unrun(
    tmp_path: Path, marker: Path, module: str, name: str
) -> None:
    pytest.importorskip("keras")
    from hematovision.release.export import load_keras

    file = tmp_path / "evil.keras"
    _lambda_model(marker, file)
    words = {"system": f"touch {marker}", "eval": f"open({str(marker)!r}, 'w')"}
    argument = words.get(name, marker.as_uri())
    with zipfile.ZipFile(file) as archive:
        parts = {part: archive.read(part) for part in archive.namelist()}
    layers = json.loads(parts["config.json"])
    evil = {"module": module, "class_name": name, "config": argument, "registered_name": name}
    for layer in layers["config"]["layers"]:
        if layer["class_name"] == "Lambda":
            layer.update(evil)
    parts["config.json"] = json.dumps(layers).encode()
    with zipfile.ZipFile(file, "w") as archive:
        for part, content in parts.items():
            archive.writestr(part, content)
    with pytest.raises(BundleError, match="refused"):
        load_keras(_keras_bundle(tmp_path / "b", file))
    assert not marker.exists()


@pytest.mark.slow
def test_a_keras_file_that_does_not_belong_is_refused(model: Any, tmp_path: Path) -> None:
    from hematovision.release.export import load_keras

    with pytest.raises(BundleError, match=r"holds no model\.keras"):
        load_keras(tiny_bundle.write_bundle(tmp_path / "none"))
    (tmp_path / "text.keras").write_text("no archive")
    with pytest.raises(BundleError, match="refused") as refused:
        load_keras(_keras_bundle(tmp_path / "text", tmp_path / "text.keras"))
    assert "\n" not in str(refused.value)
    # a sound file, of another picture size than the bundle's
    model.save(tmp_path / "other.keras")
    folder = _keras_bundle(tmp_path / "other", tmp_path / "other.keras")
    with pytest.raises(BundleError, match=r"model\.keras: the model maps"):
        load_keras(folder)
    content = (folder / "model.keras").read_bytes()
    (folder / "model.keras").write_bytes(content[:-1])
    with pytest.raises(BundleError, match=r"model\.keras is damaged: it has"):
        load_keras(folder)
