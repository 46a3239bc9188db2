"""Splits: nothing shared, nothing lost, the same whatever the order of the rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from public_set import load_recovered

from hematovision.classes import FOUR
from hematovision.config import cache_folder
from hematovision.data import splits
from hematovision.data.audit import linked_groups, near_duplicates
from hematovision.data.manifest import Manifest, check_manifest
from hematovision.data.splits import Split
from hematovision.errors import DataError

NO_PAIRS = pd.DataFrame(columns=["source_a", "source_b", "path_a", "path_b"], dtype=str)


def build_manifest(photographs: int = 10, copies: int = 4, status: dict[str, str] | None = None) -> Manifest:
    """Make a set of four classes: per class, ``photographs`` in TRAIN and half as many in TEST."""
    rows = []
    for label in FOUR:
        for side, count in (("train", photographs), ("test", photographs // 2)):
            for p, c in itertools.product(range(count), range(copies + (side == "test"))):
                shown = "test_simple" if c == copies else side
                rows.append((f"{shown}/{label}/{p}-{c}.jpg", label, f"{side}-{label}-{p}", shown))
    frame = pd.DataFrame(rows, columns=["path", "label", "source", "split"])
    frame = frame.assign(
        dataset="made", sha256=frame["path"].map(lambda p: f"hash of {p}"), width=32, height=32
    )
    frame["status"] = [(status or {}).get(path, "ok") for path in frame["path"]]
    return check_manifest(frame)


def pairs_of(*sources: tuple[str, str]) -> pd.DataFrame:
    rows = [(a, b, f"photographs/{a}.jpg", f"photographs/{b}.jpg") for a, b in sources]
    return pd.DataFrame(rows, columns=list(NO_PAIRS.columns))


def sources_of(manifest: Manifest, paths: tuple[str, ...]) -> set[str]:
    return set(manifest.set_index("path").loc[list(paths), "source"])


def make_all(manifest: Manifest, groups: pd.Series, seed: int = 3) -> list[Split]:
    return [
        splits.official_split(manifest, groups, 0.2, seed),
        splits.grouped_split(manifest, groups, seed),
        *splits.grouped_folds(manifest, groups, 5, seed),
        splits.random_split(manifest, seed),
    ]


def test_every_split_but_the_random_one_is_disjoint_and_complete() -> None:
    manifest = build_manifest()
    groups = linked_groups(manifest)
    pooled = set(manifest.loc[manifest["split"] != "test_simple", "path"])
    for split in make_all(manifest, groups):
        proof = splits.prove_disjoint(split, manifest, NO_PAIRS)
        assert set(split.train) | set(split.validation) | set(split.test) == pooled
        assert (proof["shared_images"] == 0).all()
        assert (proof["shared_photographs"] > 0).any() == split.leaky == (split.name == "random")


def test_the_official_split_keeps_the_authors_sides() -> None:
    manifest = build_manifest()
    split = splits.official_split(manifest, linked_groups(manifest), 0.2, 0)
    sides = manifest.set_index("path")["split"]
    assert set(sides[list(split.train + split.validation)]) == {"train"}
    assert set(split.test) == set(sides.index[sides == "test"])
    assert set(split.extra["test_simple"]) == set(sides.index[sides == "test_simple"])
    counts = splits.summarise_split(split, manifest, linked_groups(manifest))
    validation = counts[counts["side"] == "validation"]
    assert validation["photographs"].tolist() == [2, 2, 2, 2]  # a fifth of ten
    assert validation["images"].tolist() == [8, 8, 8, 8]


def test_validation_holds_a_photograph_of_each_class_however_few_there_are() -> None:
    manifest = build_manifest(photographs=2)
    split = splits.official_split(manifest, linked_groups(manifest), 0.05, 0)
    labels = manifest.set_index("path")["label"]
    assert set(labels[list(split.validation)]) == set(labels[list(split.train)]) == set(FOUR)


def test_splits_do_not_depend_on_the_order_of_rows() -> None:
    manifest = build_manifest()
    shuffled = manifest.sample(frac=1, random_state=1)
    groups = linked_groups(manifest)
    assert make_all(manifest, groups) == make_all(shuffled, groups.sample(frac=1, random_state=2))


def test_another_seed_gives_another_split() -> None:
    manifest = build_manifest()
    groups = linked_groups(manifest)
    for one, other in zip(make_all(manifest, groups, 1), make_all(manifest, groups, 2), strict=True):
        assert one.validation != other.validation, one.name


def test_near_duplicates_stay_on_one_side() -> None:
    manifest = build_manifest()
    pairs = pairs_of(
        ("train-eosinophil-0", "train-eosinophil-1"), ("train-eosinophil-1", "test-eosinophil-0")
    )
    groups = linked_groups(manifest, pairs)
    linked = {"train-eosinophil-0", "train-eosinophil-1", "test-eosinophil-0"}
    for seed in range(5):
        for split in make_all(manifest, groups, seed)[:-1]:
            splits.prove_disjoint(split, manifest, pairs)
            holders = [
                side
                for side in (split.train, split.validation, split.test)
                if linked & sources_of(manifest, side)
            ]
            assert len(holders) == 1


def test_training_photographs_that_look_like_test_ones_leave_the_official_split() -> None:
    manifest = build_manifest(copies=4)
    pairs = pairs_of(("train-eosinophil-0", "test-eosinophil-0"))
    split = splits.official_split(manifest, linked_groups(manifest, pairs), 0.2, 0)
    assert "train-eosinophil-0" not in sources_of(manifest, split.train + split.validation)
    assert "test-eosinophil-0" in sources_of(manifest, split.test)
    assert "4 images that look like a test photograph" in split.note


@pytest.mark.parametrize("status", ["unsure", "conflict"])
def test_doubtful_images_judge_officially_and_do_nothing_else(status: str) -> None:
    doubtful = ("train/monocyte/0-0.jpg", "test/monocyte/0-0.jpg")
    manifest = build_manifest(status=dict.fromkeys(doubtful, status))
    official, *others = make_all(manifest, linked_groups(manifest))
    assert doubtful[0] not in official.train + official.validation
    assert doubtful[1] in official.test
    assert "left out: 1 images" in official.note
    for split in others:
        assert not set(doubtful) & set(split.train + split.validation + split.test)
        assert "left out: 2 images" in split.note


@pytest.mark.parametrize("status", ["unreadable", "truncated", "unlabelled"])
def test_useless_rows_are_nowhere(status: str) -> None:
    useless = ("train/monocyte/0-0.jpg", "test/monocyte/0-0.jpg")
    manifest = build_manifest(status=dict.fromkeys(useless, status))
    for split in make_all(manifest, linked_groups(manifest)):
        assert not set(useless) & {path for side in split.sides().values() for path in side}


def test_identical_files_stay_together() -> None:
    manifest = build_manifest()
    manifest.loc[manifest["path"] == "train/monocyte/1-0.jpg", "sha256"] = "hash of train/monocyte/0-0.jpg"
    groups = linked_groups(manifest)
    assert groups["train/monocyte/1-3.jpg"] == groups["train/monocyte/0-3.jpg"]
    for split in make_all(manifest, groups)[:-1]:
        splits.prove_disjoint(split, manifest)


def test_folds_judge_every_image_once_and_balance_classes() -> None:
    manifest = build_manifest(photographs=10)
    groups = linked_groups(manifest)
    folds = splits.grouped_folds(manifest, groups, 5, 0)
    judged = [path for fold in folds for path in fold.test]
    assert len(judged) == len(set(judged)) == (manifest["split"] != "test_simple").sum()
    for fold in folds:
        counts = splits.summarise_split(fold, manifest, groups)
        assert counts.loc[counts["side"] == "test", "photographs"].tolist() == [3, 3, 3, 3]  # 15 / 5


def test_sets_without_copies_are_split_by_image() -> None:
    manifest = build_manifest(copies=1)
    manifest = check_manifest(manifest[manifest["split"] != "test_simple"].assign(source="", split=""))
    groups = linked_groups(manifest)
    grouped = splits.grouped_split(manifest, groups, 0)
    assert len(grouped.test) == 12  # a fifth of 15 images of each of four classes
    assert splits.random_split(manifest, 0).note.startswith("split by image: near-duplicates")
    with pytest.raises(DataError, match="no official train and test sides"):
        splits.official_split(manifest, groups)


def test_learning_subsets_are_nested_and_keep_proportions() -> None:
    manifest = build_manifest(photographs=10)
    groups = linked_groups(manifest)
    split = splits.official_split(manifest, groups, 0.2, 0)
    subsets = [splits.learning_subset(split, manifest, groups, n, 5) for n in (4, 8, 16, 32)]
    for small, large in itertools.pairwise(subsets):
        assert set(small.train) < set(large.train)
    for n, subset in zip((4, 8, 16, 32), subsets, strict=True):
        counts = splits.summarise_split(subset, manifest, groups)
        assert counts.loc[counts["side"] == "train", "photographs"].tolist() == [n // 4] * 4
        assert (subset.validation, subset.test) == (split.validation, split.test)
    assert subsets[-1].train == split.train
    for wrong in (3, 33):
        with pytest.raises(DataError, match="ask for 4 to 32"):
            splits.learning_subset(split, manifest, groups, wrong, 5)


def test_a_split_survives_its_file(tmp_path: Path) -> None:
    manifest = build_manifest()
    for split in make_all(manifest, linked_groups(manifest)):
        splits.write_split(split, tmp_path / "split.csv")
        assert splits.read_split(tmp_path / "split.csv") == split
        assert Split.from_frame(split.to_frame()) == split


def test_files_that_are_no_split_are_refused(tmp_path: Path) -> None:
    manifest = build_manifest()
    frame = splits.grouped_split(manifest, linked_groups(manifest)).to_frame()
    with pytest.raises(DataError, match="has no validation side"):
        Split.from_frame(frame[frame["side"] != "validation"])
    with pytest.raises(DataError, match="several splits"):
        Split.from_frame(pd.concat([frame, frame.assign(name="other")]))
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "wrong.csv").write_text("a,b\n1,2\n")
    for name in ("empty.csv", "wrong.csv"):
        with pytest.raises(DataError, match=name):
            splits.read_split(tmp_path / name)


SIDE_A, SIDE_B = "train/eosinophil/0-0.jpg", "test/eosinophil/0-0.jpg"


def two_sided(**changes: object) -> Split:
    values = {"train": (SIDE_A,), "validation": ("train/monocyte/0-0.jpg",), "test": (SIDE_B,), **changes}
    return Split(name="mine", **values)  # type: ignore[arg-type]


def test_the_proof_names_a_shared_photograph() -> None:
    manifest = build_manifest()
    leak = two_sided(validation=("train/eosinophil/0-1.jpg",))
    with pytest.raises(DataError, match="train and validation share the photograph train-eosinophil-0"):
        splits.prove_disjoint(leak, manifest)


def test_the_proof_names_a_shared_image_and_a_shared_file() -> None:
    manifest = build_manifest()
    with pytest.raises(DataError, match=f"train and test share the image {SIDE_A}"):
        splits.prove_disjoint(two_sided(test=(SIDE_A, SIDE_B)), manifest)
    manifest.loc[manifest["path"] == SIDE_B, "sha256"] = f"hash of {SIDE_A}"
    with pytest.raises(DataError, match="train and test share the hash"):
        splits.prove_disjoint(two_sided(), manifest)


@pytest.mark.parametrize("turned", [False, True])
def test_the_proof_names_near_duplicates_by_photograph_and_by_image(turned: bool) -> None:
    manifest = build_manifest()
    for pair in (("train-eosinophil-0", "test-eosinophil-0"), (SIDE_A, SIDE_B)):
        pairs = pairs_of((pair[1], pair[0]) if turned else pair)
        with pytest.raises(DataError, match="train and test share the near-duplicate"):
            splits.prove_disjoint(two_sided(), manifest, pairs)
    splits.prove_disjoint(two_sided(), manifest, pairs_of(("train-eosinophil-1", "test-eosinophil-0")))


def test_the_proof_covers_the_extra_sides() -> None:
    manifest = build_manifest()
    leak = two_sided(extra={"test_simple": ("train/eosinophil/0-2.jpg",)})
    with pytest.raises(DataError, match="train and test_simple"):
        splits.prove_disjoint(leak, manifest)


def test_a_leaky_split_is_counted_and_not_refused() -> None:
    manifest = build_manifest()
    proof = splits.prove_disjoint(two_sided(validation=("train/eosinophil/0-1.jpg",), leaky=True), manifest)
    assert proof.loc[0, "shared_photographs"] == 1


def test_the_proof_refuses_paths_it_does_not_know() -> None:
    with pytest.raises(DataError, match=r"nowhere\.jpg"):
        splits.prove_disjoint(two_sided(train=("nowhere.jpg",)), build_manifest())


def test_impossible_splits_are_refused_in_one_line() -> None:
    manifest = build_manifest(photographs=2)
    groups = linked_groups(manifest)
    with pytest.raises(DataError, match="eosinophil has 3 photographs"):
        splits.grouped_folds(manifest, groups, 4)
    with pytest.raises(DataError, match="ask for at least 2"):
        splits.grouped_folds(manifest, groups, 1)
    with pytest.raises(DataError, match="between 0 and 1"):
        splits.grouped_split(manifest, groups, 0, test_fraction=1.0)
    with pytest.raises(DataError, match="has no group"):
        splits.grouped_split(manifest, groups.iloc[1:])
    single = manifest[(manifest["split"] != "train") | manifest["source"].str.endswith("-0")]
    with pytest.raises(DataError, match="only one photograph"):
        splits.official_split(single, groups)


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda m, g: splits.official_split(m.assign(split=""), g), "use the grouped split"),
        (lambda m, g: splits.grouped_folds(m, g, 16), "ask for fewer"),
        (lambda m, _: splits.random_split(m.assign(status="unreadable")), "check the data folder"),
        (lambda m, _: splits.prove_disjoint(two_sided(test=(SIDE_A,)), m), "split by linked groups"),
    ],
)
def test_every_refusal_is_one_line_with_a_remedy(
    ask: Callable[[Manifest, pd.Series], object], said: str
) -> None:
    manifest = build_manifest()
    with pytest.raises(DataError) as caught:
        ask(manifest, linked_groups(manifest))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.data
def test_the_splits_of_the_public_set_share_nothing(real_data: Path) -> None:
    image_set, whole = load_recovered(real_data)
    manifest = image_set.manifest
    pairs = near_duplicates(manifest, real_data, cache_folder())
    assert len(pairs) > 0
    groups = linked_groups(manifest, pairs)
    official = splits.official_split(manifest, groups, 0.2, 0)
    for split in (official, splits.grouped_split(manifest, groups, 0)):
        proof = splits.prove_disjoint(split, manifest, pairs)
        assert (proof.filter(like="shared_") == 0).all(axis=None)
    sides = manifest.set_index("path")["split"]
    assert set(official.test) == set(sides.index[sides == "test"])
    assert len(official.extra["test_simple"]) == 71
    if whole:
        assert len(official.test) == 2487
    leaky = splits.prove_disjoint(splits.random_split(manifest, 0), manifest, pairs)
    assert leaky.loc[0, "shared_photographs"] > 0
