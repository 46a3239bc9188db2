"""Batches that follow from (seed, epoch) alone, and trainings that a kill does not change."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny_training
from numpy.typing import NDArray

from hematovision.data.cells import CellStore
from hematovision.errors import DataError, HematoVisionError
from hematovision.files import read_json
from hematovision.learn import runtime, training
from hematovision.learn.training import (
    class_weights,
    draw_copies,
    feature_reader,
    image_reader,
    one_hot,
    ordered_batches,
    training_batches,
)

keras = runtime.start(0)
SOURCES = np.array(["a"] * 5 + ["b"] * 2 + ["c"] * 8)


class TestOneHot:
    def test_follows_the_classes(self) -> None:
        hot = one_hot(["b", "a", "b"], ("a", "b", "c"))
        assert hot.tolist() == [[0, 1, 0], [1, 0, 0], [0, 1, 0]]
        assert hot.dtype == np.float32

    def test_names_what_is_no_class(self) -> None:
        with pytest.raises(DataError, match="'d' is not one of the classes a, b"):
            one_hot(["a", "d"], ("a", "b"))


class TestDrawCopies:
    @pytest.mark.parametrize("copies", [1, 3, 6])
    def test_at_most_so_many_of_each_photograph(self, copies: int) -> None:
        drawn = draw_copies(SOURCES, copies, 1)
        counts = pd.Series(SOURCES[drawn]).value_counts().to_dict()
        assert counts == {"a": min(5, copies), "b": min(2, copies), "c": min(8, copies)}
        assert drawn.tolist() == sorted(set(drawn.tolist()))
        assert drawn.dtype == np.int64

    def test_zero_is_all(self) -> None:
        assert draw_copies(SOURCES, 0, 1).tolist() == list(range(15))

    def test_follows_from_the_seed(self) -> None:
        assert draw_copies(SOURCES, 2, [1, 2]).tolist() == draw_copies(list(SOURCES), 2, [1, 2]).tolist()
        assert len({tuple(draw_copies(SOURCES, 2, [1, e]).tolist()) for e in range(10)}) > 5

    def test_every_copy_has_its_turn_and_none_is_preferred(self) -> None:
        counts = np.bincount(np.concatenate([draw_copies(SOURCES, 1, s) for s in range(2000)]), minlength=15)
        for name, size in (("a", 5), ("b", 2), ("c", 8)):
            expected = 2000 / size
            # five standard deviations of a binomial count
            assert np.abs(counts[name == SOURCES] - expected).max() < 5 * expected**0.5


class TestClassWeights:
    def test_every_class_counts_alike_in_an_epoch(self) -> None:
        labels = one_hot(["x"] * 7 + ["y"] * 8, ("x", "y"))
        weights = class_weights(labels, SOURCES, 3)
        drawn = {0: 3 + 2, 1: 3}  # of photographs a and b, and of c
        assert {c: weights[c] * n for c, n in drawn.items()} == pytest.approx({0: 4.0, 1: 4.0})
        assert sum(weights[c] * n for c, n in drawn.items()) == pytest.approx(8)

    def test_balanced_classes_weigh_one(self) -> None:
        assert class_weights(np.eye(4, dtype=np.float32), ["a", "b", "c", "d"], 0) == dict.fromkeys(
            range(4), 1.0
        )

    def test_a_class_without_an_image_is_refused(self) -> None:
        with pytest.raises(DataError, match="a class has no training image: give at least one photograph"):
            class_weights(one_hot(["x"] * 15, ("x", "y")), SOURCES, 0)


def same(rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Read the row numbers themselves."""
    return np.asarray(rows, np.float32)[:, None]


class TestTrainingBatches:
    rows = np.arange(100, 115)
    labels = one_hot(["x"] * 7 + ["y"] * 8, ("x", "y"))

    def epochs(self, first: int, last: int, **changes: int) -> list[list[list[int]]]:
        """Return the row numbers of every batch of every epoch."""
        options: dict[str, Any] = {"batch_size": 4, "copies_per_photograph": 3, "seed": 5, **changes}
        data, steps = training_batches(
            same, self.rows, self.labels, SOURCES, epochs=last, initial_epoch=first, **options
        )
        batches = [x.numpy()[:, 0].astype(int).tolist() for x, _ in data]
        return [batches[i : i + steps] for i in range(0, len(batches), steps)]

    def test_an_epoch_follows_from_seed_and_number(self) -> None:
        whole = self.epochs(0, 4)
        assert len(whole) == 4
        assert self.epochs(0, 4) == whole
        assert self.epochs(2, 4) == whole[2:]
        assert self.epochs(3, 4) == whole[3:]
        assert self.epochs(0, 4, seed=6) != whole

    def test_epochs_differ(self) -> None:
        assert len({str(e) for e in self.epochs(0, 4)}) == 4
        all_of_them = self.epochs(0, 4, copies_per_photograph=0, batch_size=15)
        assert len({str(e) for e in all_of_them}) == 4  # the same images, in another order
        assert len({str(sorted(e[0])) for e in all_of_them}) == 1

    def test_whole_batches_of_drawn_copies(self) -> None:
        for epoch in self.epochs(0, 4):
            assert [len(batch) for batch in epoch] == [4, 4]  # 3 + 2 + 3 copies
            used = [SOURCES[row - 100] for batch in epoch for row in batch]
            assert max(used.count(s) for s in "abc") <= 3
            assert len({row for batch in epoch for row in batch}) == 8

    def test_labels_go_with_their_images(self) -> None:
        data, _ = training_batches(
            same, self.rows, self.labels, SOURCES, batch_size=4, copies_per_photograph=0, seed=1, epochs=2
        )
        for inputs, targets in data:
            assert np.array_equal(targets.numpy(), self.labels[inputs.numpy()[:, 0].astype(int) - 100])

    def test_fewer_images_than_a_batch_make_one(self) -> None:
        assert [len(b) for b in self.epochs(0, 1, batch_size=64)[0]] == [8]

    def test_nothing_left_to_train_is_no_error(self) -> None:
        assert len(self.epochs(4, 4)) == 1

    def test_no_image_at_all(self) -> None:
        with pytest.raises(DataError, match="there is no image to train on: check the split"):
            training_batches(
                same,
                self.rows[:0],
                self.labels[:0],
                SOURCES[:0],
                batch_size=4,
                copies_per_photograph=0,
                seed=1,
                epochs=1,
            )

    def test_few_batches_are_read_ahead(self) -> None:
        reads: list[int] = []

        def counted(rows: NDArray[np.int64]) -> NDArray[np.float32]:
            reads.append(len(rows))
            return same(rows)

        data, _ = training_batches(
            counted, self.rows, self.labels, SOURCES, batch_size=1, copies_per_photograph=0, seed=1, epochs=50
        )
        iterator = iter(data)
        next(iterator)
        # one for the shape, one taken, two in store, one in hand; all 750 would be read if unbounded
        assert len(reads) <= 5


class TestReaders:
    store = CellStore(
        (np.arange(4 * 6 * 6 * 3, dtype=np.uint8).reshape(4, 6, 6, 3),),
        pd.DataFrame({"path": list("abcd")}),
        "k",
    )

    def test_ordered_batches_keep_the_order(self) -> None:
        rows = np.array([3, 1, 2])
        batches = list(ordered_batches(same, rows, one_hot(list("yxy"), ("x", "y")), batch_size=2))
        assert [x.numpy()[:, 0].tolist() for x, _ in batches] == [[3, 1], [2]]
        assert np.concatenate([y.numpy() for _, y in batches]).tolist() == [[0, 1], [1, 0], [0, 1]]

    def test_shapes_are_known_to_keras(self) -> None:
        data = ordered_batches(image_reader(self.store, 6), np.arange(4), np.eye(4, dtype=np.float32))
        assert [tuple(spec.shape) for spec in data.element_spec] == [(None, 6, 6, 3), (None, 4)]

    def test_images(self) -> None:
        images = image_reader(self.store, 3)(np.array([2, 0]))
        assert images.shape == (2, 3, 3, 3)
        assert images.dtype == np.float32
        assert np.array_equal(images, self.store.read(np.array([2, 0]), 3))

    def test_features(self) -> None:
        features = np.arange(12, dtype=np.float32).reshape(4, 3)
        assert feature_reader(features)(np.array([2, 0])).tolist() == [[6, 7, 8], [0, 1, 2]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[NDArray[Any]], pd.DataFrame]:
    """Return folder, weights and history of a training that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    model, history, _ = tiny_training.train(folder)
    return folder, model.get_weights(), history


def run_killed(folder: Path, when: str, epoch: int) -> None:
    command = [sys.executable, tiny_training.__file__, str(folder), when, str(epoch)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


class TestUninterrupted:
    def test_the_tiny_training_has_everything_that_a_kill_could_spoil(self, whole: Any) -> None:
        """Its best epoch is early, its rate is halved and it stops before the last epoch."""
        history = whole[2]
        best = int(history["val_loss"].argmin()) + 1
        assert len(history) == best + tiny_training.PATIENCE < tiny_training.EPOCHS
        rates = history["learning_rate"].tolist()
        assert rates[0] == pytest.approx(0.05)
        assert rates[-1] == pytest.approx(0.025)
        # halved after half of the patience without a better loss
        assert rates.index(rates[-1]) == best + tiny_training.PATIENCE // 2

    def test_history(self, whole: Any) -> None:
        history = whole[2]
        assert set(history.columns) == {
            *("epoch", "loss", "accuracy", "val_loss", "val_accuracy", "learning_rate"),
        }
        assert history["epoch"].tolist() == list(range(1, len(history) + 1))

    def test_is_repeatable(self, whole: Any, tmp_path: Path) -> None:
        model, history, _ = tiny_training.train(tmp_path)
        assert_equal(model, history, whole)

    def test_ends_with_the_weights_of_the_best_epoch(self, whole: Any) -> None:
        folder, weights, history = whole
        state = read_json(folder / "state.json")
        assert state["best"]["epoch"] == int(history["val_loss"].argmin())
        assert sorted(p.name for p in folder.iterdir()) == [
            *(f"best-{state['best']['epoch']:04d}.weights.h5", f"last-{len(history) - 1:04d}.weights.h5"),
            "state.json",
        ]
        last = tiny_training.build_model()
        last.load_weights(next(folder.glob("last-*")))
        assert any(not np.array_equal(a, b) for a, b in zip(last.get_weights(), weights, strict=True))


def assert_equal(model: Any, history: pd.DataFrame, whole: Any) -> None:
    """Weights and history agree to the last bit."""
    for ours, theirs in zip(model.get_weights(), whole[1], strict=True):
        assert np.array_equal(ours, theirs)
    assert history.to_dict("list") == whole[2].to_dict("list")


class TestKilled:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        "kills",
        [
            # while the patience of both callbacks is half used up
            [("after the state", 6)],
            # a new best epoch, whose weights are written and count for nothing yet; then once more
            [("between weights and state", 5), ("before the last weights", 8)],
        ],
    )
    def test_goes_on_to_the_same_bits(self, whole: Any, tmp_path: Path, kills: list[tuple[str, int]]) -> None:
        for when, epoch in kills:
            run_killed(tmp_path, when, epoch)
            assert len(read_json(tmp_path / "state.json")["history"]) == epoch - (when != "after the state")
        model, history, _ = tiny_training.train(tmp_path)
        assert_equal(model, history, whole)

    def test_a_finished_training_is_not_trained_again(self, whole: Any) -> None:
        folder = whole[0]
        before = (folder / "state.json").read_bytes()
        model, again, run = tiny_training.train(folder)
        assert run.initial_epoch == tiny_training.EPOCHS
        assert run.seconds > 0
        assert_equal(model, again, whole)
        assert (folder / "state.json").read_bytes() == before

    def test_a_training_that_ran_out_of_epochs_is_finished_too(self, tmp_path: Path) -> None:
        first, history, _ = tiny_training.train(tmp_path, epochs=1)
        second, again, run = tiny_training.train(tmp_path, epochs=1)
        assert run.initial_epoch == 1
        assert again.to_dict() == history.to_dict()
        for a, b in zip(first.get_weights(), second.get_weights(), strict=True):
            assert np.array_equal(a, b)

    def test_no_epoch_leaves_the_model_as_it_was(self, tmp_path: Path) -> None:
        model = tiny_training.build_model()
        before = model.get_weights()
        run = training.Resumable(model, tmp_path / "none", epochs=0, patience=1, seed=0)
        history = run.finish()
        assert run.initial_epoch == run.epochs == 0
        assert history.empty
        assert list(history.columns) == ["epoch", *training._HISTORY]
        assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))

    def test_discard(self, tmp_path: Path) -> None:
        folder = tmp_path / "run"
        tiny_training.train(folder, epochs=1)[2].discard()
        assert not folder.exists()


class TestDamage:
    @pytest.fixture(scope="class")
    def good(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("good")
        tiny_training.train(folder, epochs=2)
        return folder

    @pytest.fixture
    def folder(self, good: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(good, tmp_path / "run"))

    @pytest.mark.parametrize("what", ["last", "best"])
    @pytest.mark.parametrize(
        "damage", ["cut short", "gone", "garbage", "of another model", "without the optimizer"]
    )
    def test_is_one_line_that_names_file_and_folder(self, folder: Path, what: str, damage: str) -> None:
        file = next(folder.glob(f"{what}-*"))
        if damage == "cut short":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        elif damage == "gone":
            file.unlink()
        elif damage == "garbage":
            file.write_bytes(b"no weights" * 100)
        elif damage == "of another model":
            keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)]).save_weights(file)
        else:  # Keras itself would warn and go on with a fresh optimizer
            tiny_training.build_model().save_weights(file)
        with pytest.raises(HematoVisionError, match=rf"{file.name} is damaged .*remove the folder") as caught:
            tiny_training.train(folder, epochs=2)
        assert str(folder) in caught.value.remedy
        assert "\n" not in str(caught.value)

    def test_of_the_state(self, folder: Path) -> None:
        (folder / "state.json").write_text("{")
        with pytest.raises(HematoVisionError, match=r"state\.json is not valid JSON"):
            tiny_training.train(folder, epochs=2)

    def test_divergence_is_told_and_what_was_good_is_kept(self, folder: Path) -> None:
        before = {p.name: p.read_bytes() for p in folder.iterdir()}
        with pytest.raises(HematoVisionError, match=r"diverged in epoch 3: .* number: set a smaller"):
            tiny_training.train(folder, poison(tiny_training.build_model()), epochs=3)
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def poison(model: Any) -> Any:
    """Return a model whose loss is not a number."""
    model.compile(
        keras.optimizers.Adam(0.05),
        lambda truth, said: keras.ops.sum(truth * said) * float("nan"),
        metrics=["accuracy"],
    )
    return model
