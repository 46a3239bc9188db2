"""Initial weights are checked before any work; each network has its own preprocessing inside."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hematovision.config import load_profile
from hematovision.errors import HematoVisionError, WeightsError
from hematovision.learn import backbones, runtime
from hematovision.learn.backbones import (
    BACKBONES,
    Backbone,
    build_base,
    build_classifier,
    build_feature_extractor,
    build_head,
    build_preprocessing,
    check_weights,
    get_backbone,
    imagenet_file,
    initial_weights_title,
    set_trainable,
)
from hematovision.learn.recipe import load_model, save_model

keras = runtime.start(0)
SIZE = 32
ROOT = Path(__file__).resolve().parents[1]
each = pytest.mark.parametrize("name", list(BACKBONES))


@pytest.fixture(autouse=True)
def float32() -> None:
    keras.config.set_dtype_policy("float32")


@pytest.fixture(scope="module")
def bases() -> dict[str, Any]:
    """Return a network of each kind; a test that changes its weights or layers builds its own."""
    keras.config.set_dtype_policy("float32")
    return {name: build_base(name, "none", seed=1) for name in BACKBONES}


@pytest.fixture
def images() -> NDArray[np.float32]:
    return np.random.default_rng(0).uniform(0, 255, (4, SIZE, SIZE, 3)).astype(np.float32)


class TestTable:
    @each
    def test_a_row_says_what_the_network_is(self, bases: dict[str, Any], name: str) -> None:
        base, row = bases[name], get_backbone(name)
        assert base.output_shape == (None, None, None, row.features)
        norms = [x for x in base.layers if isinstance(x, keras.layers.BatchNormalization)]
        assert bool(norms) == row.has_batch_norm
        assert row.name == name
        assert 0 < row.published_accuracy < 1

    @each
    def test_names_the_file_that_keras_asks_for(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        asked: list[str] = []

        def refuse(file: str, *_: Any, **__: Any) -> None:
            asked.append(file)
            raise OSError("no network\nand more")

        monkeypatch.setattr("keras.src.utils.file_utils.get_file", refuse)
        with pytest.raises(WeightsError, match=r"could not be loaded \(no network\): .*weights=none"):
            build_base(name, "imagenet")
        assert asked == [get_backbone(name).imagenet_file]

    def test_an_unknown_one_is_refused_with_the_known(self) -> None:
        with pytest.raises(
            WeightsError, match="there is no backbone 'vgg19': choose one of vgg16, mobilenetv2"
        ):
            get_backbone("vgg19")

    def test_one_more_row_is_one_more_backbone(
        self, monkeypatch: pytest.MonkeyPatch, images: NDArray[np.float32]
    ) -> None:
        row = Backbone(
            "mobilenet", "MobileNet", "MobileNet", "tf", "file.h5", 1024, True, 0.9, "ref", "story"
        )
        monkeypatch.setitem(BACKBONES, "mobilenet", row)
        base = build_base("mobilenet", "none")
        model = build_classifier(
            "mobilenet", base, build_head(1024, 3, 0.1, 0), SIZE, frozen_batch_norm=False
        )
        assert model(images).shape == (4, 3)
        assert imagenet_file("mobilenet").name == "file.h5"


class TestCheckWeights:
    @pytest.fixture(autouse=True)
    def home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("HEMATOVISION_HOME", str(ROOT))
        monkeypatch.setenv("KERAS_HOME", str(tmp_path))
        return tmp_path

    @pytest.fixture
    def processes(self, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
        """Let every process fail, and return the list of what was started."""
        started: list[list[str]] = []

        def fail(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
            started.append(command)
            return subprocess.CompletedProcess(command, 1, b"", b"no network")

        monkeypatch.setattr(backbones.subprocess, "run", fail)
        return started

    def test_none_needs_nothing(self, processes: list[list[str]]) -> None:
        check_weights(load_profile("quick"))
        assert not processes

    def test_a_file_that_is_there_is_not_downloaded(self, home: Path, processes: list[list[str]]) -> None:
        assert imagenet_file("vgg16") == home / "models" / get_backbone("vgg16").imagenet_file
        imagenet_file("vgg16").parent.mkdir()
        imagenet_file("vgg16").touch()
        check_weights(load_profile("quick", {"weights.vgg16": "imagenet"}))
        assert not processes

    def test_only_the_backbones_that_are_used(self, processes: list[list[str]]) -> None:
        check_weights(load_profile("quick", {"weights.vgg16": "imagenet", "backbones": "mobilenetv2"}))
        assert not processes

    def test_no_network_is_one_line_with_the_ways_out(self, processes: list[list[str]], home: Path) -> None:
        with pytest.raises(WeightsError) as caught:
            check_weights(load_profile("quick", {"weights": "imagenet"}))
        for word in (
            *("vgg16_weights_tf_dim_ordering_tf_kernels_notop.h5", str(home / "models")),
            *("network", "KERAS_HOME", "--set weights=none"),
        ):
            assert word in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(processes) == 1

    def test_a_download_must_leave_the_file(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ended_well = subprocess.CompletedProcess([], 0)
        monkeypatch.setattr(backbones.subprocess, "run", lambda *_, **__: ended_well)
        with pytest.raises(WeightsError, match="could not be downloaded"):
            check_weights(load_profile("quick", {"weights": "imagenet"}))

    def test_a_file_of_one_s_own(self, home: Path, processes: list[list[str]]) -> None:
        file = home / "mine.weights.h5"
        profile = load_profile("quick", {"weights.resnet50": str(file)})
        with pytest.raises(
            WeightsError, match=r"mine\.weights\.h5 for resnet50 are not there: .*resnet50=imagenet"
        ):
            check_weights(profile)
        file.touch()
        check_weights(profile)
        assert not processes

    @pytest.mark.slow
    def test_in_a_process_of_its_own_without_a_network(self, home: Path) -> None:
        """Keras really tries; the caller has not imported TensorFlow; a broken file is told as one."""
        code = """
import sys
from hematovision.config import load_profile
from hematovision.errors import WeightsError
from hematovision.learn.backbones import build_base, check_weights, imagenet_file
try:
    check_weights(load_profile("quick", {"weights": "imagenet", "backbones": "mobilenetv2"}))
except WeightsError as error:
    print(error)
print({"tensorflow", "keras"} & set(sys.modules))
imagenet_file("mobilenetv2").parent.mkdir(exist_ok=True)
imagenet_file("mobilenetv2").write_bytes(b"broken")
from hematovision.learn import runtime
runtime.start(0)
try:
    build_base("mobilenetv2", "imagenet")
except WeightsError as error:
    print(error)
"""
        closed = {f"{p}_proxy": "http://127.0.0.1:9" for p in ("http", "https", "HTTP", "HTTPS")}
        environment = {k: v for k, v in os.environ.items() if k.lower() != "no_proxy"} | closed
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        )
        first, modules, second = done.stdout.strip().splitlines()
        name = get_backbone("mobilenetv2").imagenet_file
        assert first.startswith(f"the ImageNet weights {name} are not in {home / 'models'} and could not be")
        assert modules == "set()"
        assert second.startswith(f"the ImageNet weights {home / 'models' / name} could not be loaded (")

    def test_how_weights_are_written_in_tables(self) -> None:
        titles = [initial_weights_title(w) for w in ("imagenet", "none", "/somewhere/mine.h5")]
        assert titles == ["ImageNet", "from scratch", "mine.h5"]


class TestPreprocessing:
    @each
    def test_is_that_of_keras_applications(self, name: str, images: NDArray[np.float32]) -> None:
        module = {
            "vgg16": keras.applications.vgg16,
            "mobilenetv2": keras.applications.mobilenet_v2,
            "resnet50": keras.applications.resnet,
        }[name]
        inputs = keras.Input((SIZE, SIZE, 3))
        ours = keras.Model(inputs, build_preprocessing(name, inputs))(images).numpy()
        theirs = module.preprocess_input(images.copy())
        # float32 carries seven digits of a number up to 255
        assert np.abs(ours - theirs).max() < 5e-5

    @each
    def test_is_inside_the_classifier(
        self, bases: dict[str, Any], name: str, images: NDArray[np.float32]
    ) -> None:
        """Turning the channels round changes what the network says: none of them sees grey."""
        extractor = build_feature_extractor(name, bases[name], SIZE)
        inputs = keras.Input((SIZE, SIZE, 3))
        scaled = keras.Model(inputs, build_preprocessing(name, inputs))(images)
        by_hand = bases[name](scaled, training=False).numpy().mean(axis=(1, 2))
        # a network from nothing whose batch norm has seen no image gives very small numbers
        unit = by_hand.std()
        assert extractor(images).numpy() / unit == pytest.approx(by_hand / unit, abs=1e-3)
        assert np.abs(extractor(images[..., ::-1]).numpy() - by_hand).max() / unit > 0.05


class TestBase:
    @pytest.mark.parametrize("name", ["vgg16", "mobilenetv2"])
    def test_random_weights_follow_from_the_seed(self, bases: dict[str, Any], name: str) -> None:
        same, other = build_base(name, "none", seed=1), build_base(name, "none", seed=2)
        pairs = list(zip(bases[name].get_weights(), same.get_weights(), strict=True))
        assert all(np.array_equal(a, b) for a, b in pairs)
        assert not np.array_equal(bases[name].get_weights()[0], other.get_weights()[0])

    def test_a_plain_network_neither_fades_nor_explodes(
        self, bases: dict[str, Any], images: NDArray[np.float32]
    ) -> None:
        """Thirteen convolutions from nothing: Keras's own start shrinks the signal to a hundredth."""
        out = build_feature_extractor("vgg16", bases["vgg16"], SIZE)(images).numpy()
        assert 0.1 < out.std() < 10

    def test_batch_norm_from_nothing_remembers_ten_steps(self, bases: dict[str, Any]) -> None:
        norms = [x for x in bases["resnet50"].layers if isinstance(x, keras.layers.BatchNormalization)]
        assert {norm.momentum for norm in norms} == {0.9}

    def test_weights_from_a_file(self, bases: dict[str, Any], tmp_path: Path) -> None:
        file = tmp_path / "mine.weights.h5"
        bases["mobilenetv2"].save_weights(file)
        loaded = build_base("mobilenetv2", str(file), seed=9)
        pairs = zip(bases["mobilenetv2"].get_weights(), loaded.get_weights(), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs)

    @pytest.mark.parametrize("what", ["of another network", "of a part of it", "garbage", "missing"])
    def test_a_wrong_file_is_one_line(self, bases: dict[str, Any], tmp_path: Path, what: str) -> None:
        file = tmp_path / "mine.weights.h5"
        if what == "of another network":
            keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)]).save_weights(file)
        elif what == "of a part of it":
            whole = bases["mobilenetv2"]
            keras.Model(whole.input, whole.layers[60].output).save_weights(file)
        elif what == "garbage":
            file.write_bytes(b"no weights")
        message = r"mine\.weights\.h5 does not fit MobileNetV2 \(.*\): name a weight file"
        with pytest.raises(WeightsError, match=message) as caught:
            build_base("mobilenetv2", str(file))
        assert "\n" not in str(caught.value)


class TestSetTrainable:
    def norms(self, base: Any) -> list[Any]:
        return [x for x in base.layers if isinstance(x, keras.layers.BatchNormalization)]

    def test_the_last_layers(self) -> None:
        base = build_base("mobilenetv2", "none")
        freed = set_trainable(base, 12, frozen_batch_norm=False)
        trained = [x.trainable for x in base.layers]
        assert trained == [False] * (len(trained) - 12) + [True] * 12
        assert freed == sum(int(np.prod(w.shape)) for w in base.trainable_weights)
        everything = set_trainable(base, 0, frozen_batch_norm=False)
        assert freed < everything == sum(int(np.prod(w.shape)) for w in base.trainable_weights)
        assert set_trainable(base, 10_000, frozen_batch_norm=False) == everything

    def test_batch_norm_stays_frozen_inside_what_is_freed(self) -> None:
        base = build_base("mobilenetv2", "none")
        with_norms = set_trainable(base, 0, frozen_batch_norm=False)
        without = set_trainable(base, 0, frozen_batch_norm=True)
        assert not any(norm.trainable for norm in self.norms(base))
        assert with_norms - without == sum(2 * int(norm.gamma.shape[0]) for norm in self.norms(base))

    @pytest.mark.parametrize("frozen", [True, False])
    def test_a_training_step_leaves_frozen_batch_norm_alone(
        self, monkeypatch: pytest.MonkeyPatch, images: NDArray[np.float32], frozen: bool
    ) -> None:
        """A small network of the same kinds of layer: what is asked is how the two functions freeze."""
        monkeypatch.setitem(BACKBONES, "small", BACKBONES["mobilenetv2"])
        layers = keras.layers
        inputs = keras.Input((None, None, 3))
        x = layers.BatchNormalization()(layers.Conv2D(8, 3)(inputs))
        base = keras.Model(inputs, layers.ReLU()(x))
        head = build_head(8, 2, 0.0, 0)
        model = build_classifier("small", base, head, SIZE, frozen_batch_norm=frozen)
        set_trainable(base, 0, frozen_batch_norm=frozen)
        model.compile("sgd", "categorical_crossentropy")
        norm, conv = self.norms(base)[0], base.layers[1]
        before = [w.numpy() for w in norm.weights], conv.kernel.numpy()
        model.train_on_batch(images, np.eye(2, dtype=np.float32)[[0, 1, 0, 1]])
        moved = [not np.array_equal(a, w.numpy()) for a, w in zip(before[0], norm.weights, strict=True)]
        assert moved == [not frozen] * 4
        assert not np.array_equal(before[1], conv.kernel.numpy())


class TestModels:
    def test_a_head_gives_probabilities_in_float32(self) -> None:
        keras.config.set_dtype_policy("mixed_bfloat16")
        said = build_head(6, 4, 0.5, 3)(np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32))
        assert said.dtype == "float32"
        assert said.numpy().sum(axis=1) == pytest.approx(1, abs=1e-6)  # float32 sums of four

    def test_a_head_follows_from_its_seed(self) -> None:
        a, b, other = (build_head(6, 4, 0.5, seed).get_weights()[0] for seed in (3, 3, 4))
        assert np.array_equal(a, b)
        assert not np.array_equal(a, other)

    def test_the_classifier_is_head_on_features(
        self, bases: dict[str, Any], images: NDArray[np.float32]
    ) -> None:
        head = build_head(1280, 4, 0.5, 3)
        model = build_classifier("mobilenetv2", bases["mobilenetv2"], head, SIZE, frozen_batch_norm=True)
        features = build_feature_extractor("mobilenetv2", bases["mobilenetv2"], SIZE)(images)
        assert model(images).numpy() == pytest.approx(head(features).numpy(), abs=1e-6)

    @each
    def test_a_saved_model_says_the_same(
        self, bases: dict[str, Any], name: str, images: NDArray[np.float32], tmp_path: Path
    ) -> None:
        head = build_head(get_backbone(name).features, 4, 0.5, 3)
        model = build_classifier(name, bases[name], head, SIZE, frozen_batch_norm=True)
        save_model(model, tmp_path / "m.keras")
        again = load_model(tmp_path / "m.keras")
        assert again.input_shape == (None, SIZE, SIZE, 3)
        assert np.array_equal(again(images).numpy(), model(images).numpy())
        assert [p.name for p in tmp_path.iterdir()] == ["m.keras"]

    @pytest.mark.parametrize("content", [None, b"", b"no model"])
    def test_what_is_no_model_is_one_line(self, tmp_path: Path, content: bytes | None) -> None:
        if content is not None:
            (tmp_path / "m.keras").write_bytes(content)
        with pytest.raises(
            HematoVisionError, match=r"m\.keras is not a readable model \(.*: train it again"
        ) as caught:
            load_model(tmp_path / "m.keras")
        assert "\n" not in str(caught.value)


def test_every_source_of_weights_is_known_before_any_work() -> None:
    asked = {
        "backbone": "vgg16",
        "weights": "none",
        "final_backbone": "mobilenetv2",
        "final_weights": "hematovision",
        "audit_weights": "imagenet",
        "curve_sources": ["resnet50:none"],
    }
    assert backbones.sources_of(asked) == [
        ("vgg16", "none"),
        ("mobilenetv2", "hematovision"),
        ("mobilenetv2", "imagenet"),
        ("resnet50", "none"),
    ]
    assert backbones.sources_of({}) == []
    for wrong in ("resnet50", "resnet50:", "alexnet:none"):
        with pytest.raises(WeightsError, match="write backbone:weights"):
            backbones.parse_source(wrong)
