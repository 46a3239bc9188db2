"""The photograph behind a copy: right where the truth is known, unsure where it can't be known."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from public_set import load_recovered

from hematovision.data import photographs as ph
from hematovision.data import synthetic
from hematovision.data.manifest import Manifest, check_manifest
from hematovision.errors import DataError
from hematovision.files import sha256_file
from hematovision.vision.field import RGB
from hematovision.vision.image import encode_jpeg, read_image

Drawn = tuple[Manifest, Path]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    """Return a drawn set whose ``source`` is the truth."""
    return synthetic.read(tmp_path_factory.mktemp("drawn"), 12, 3, seed=11)


@pytest.fixture(scope="module")
def picture(drawn: Drawn) -> RGB:
    manifest, root = drawn
    return read_image(root / photographs_of(manifest)["path"].iloc[0])


def copies_of(manifest: Manifest) -> Manifest:
    return check_manifest(manifest[manifest["split"] != "photograph"])


def photographs_of(manifest: Manifest) -> Manifest:
    return check_manifest(manifest[manifest["split"] == "photograph"])


def test_every_photograph_is_recovered(drawn: Drawn) -> None:
    manifest, root = drawn
    copies = copies_of(manifest)
    found = ph.recover_sources(copies, photographs_of(manifest), root, None)
    assert list(found.columns) == list(ph.SOURCE_COLUMNS)
    assert found["path"].tolist() == copies["path"].tolist()
    sure = found["sure"].to_numpy()
    truth = copies["source"].to_numpy()
    assert (found["source"].to_numpy()[sure] == truth[sure]).all(), "a sure answer must never be wrong"
    assert sure.mean() > 0.98, "the project's own bar"
    assert (found["source"] != found["runner_up"]).all()


def test_a_copy_whose_photograph_is_missing_is_unsure(drawn: Drawn) -> None:
    manifest, root = drawn
    copies, photographs = copies_of(manifest), photographs_of(manifest)
    gone = photographs["source"].iloc[0]
    found = ph.recover_sources(copies, photographs[photographs["source"] != gone], root, None)
    orphan = (copies["source"] == gone).to_numpy()
    assert not found["sure"][orphan].any()
    assert found["sure"][~orphan].all()


def test_the_result_does_not_depend_on_workers(drawn: Drawn) -> None:
    manifest, root = drawn
    some = copies_of(manifest).iloc[::3]
    one, three = (ph.recover_sources(some, photographs_of(manifest), root, None, workers=n) for n in (1, 3))
    pd.testing.assert_frame_equal(one, three)


def test_a_killed_run_goes_on_and_a_finished_one_returns_at_once(
    drawn: Drawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, root = drawn
    monkeypatch.setattr(ph, "_CHUNK", 16)
    arguments = (copies_of(manifest), photographs_of(manifest), root)
    whole = ph.recover_sources(*arguments, None)

    class KilledError(BaseException):
        pass

    def kill(done: int, total: int) -> None:
        if done > total / 2:
            raise KilledError

    with pytest.raises(KilledError):
        ph.recover_sources(*arguments, tmp_path, kill)
    kept = sorted(tmp_path.rglob("*.csv"))
    assert kept
    seen: list[int] = []
    resumed = ph.recover_sources(*arguments, tmp_path, lambda done, _: seen.append(done))
    assert len(seen) == -(-len(whole) // 16) - len(kept)
    pd.testing.assert_frame_equal(resumed, whole)
    monkeypatch.setattr(ph, "view_picture", lambda *_: pytest.fail("nothing is left to look at"))
    pd.testing.assert_frame_equal(ph.recover_sources(*arguments, tmp_path), whole)


def test_a_damaged_cache_is_named(drawn: Drawn, tmp_path: Path) -> None:
    manifest, root = drawn
    arguments = (copies_of(manifest).iloc[:4], photographs_of(manifest), root, tmp_path)
    ph.recover_sources(*arguments)
    file = next(tmp_path.rglob("quick-*.csv"))
    file.write_text("nonsense\n")
    with pytest.raises(DataError, match="is damaged"):
        ph.recover_sources(*arguments)


def test_sources_are_assigned_and_doubt_is_marked(drawn: Drawn) -> None:
    manifest, root = drawn
    blind = manifest.copy()
    truth = manifest.set_index("path")["source"]
    gone = truth[photographs_of(manifest)["path"].iloc[0]]
    blind.loc[blind["split"] != "photograph", "source"] = ""
    missing = (blind["split"] == "photograph") & (blind["source"] == gone)
    found = ph.assign_sources(blind[~missing], root, None).set_index("path")
    orphan = truth[found.index] == gone
    assert (found.loc[~orphan, "source"] == truth[found.index][~orphan]).all()
    assert (found.loc[~orphan, "status"] == "ok").all()
    assert (found.loc[orphan, "status"] == "unsure").all()


def test_sets_without_photographs_are_left_as_they_are(drawn: Drawn) -> None:
    manifest, root = drawn
    copies = copies_of(manifest)
    pd.testing.assert_frame_equal(ph.assign_sources(copies, root, None), copies)


def test_the_same_photograph_twice_is_no_rival_of_itself(drawn: Drawn, tmp_path: Path) -> None:
    manifest, root = drawn
    first = photographs_of(manifest).iloc[0]
    shutil.copytree(root / "photographs", tmp_path / "photographs")
    shutil.copy(root / first["path"], tmp_path / "photographs" / "twin.jpg")
    twin = first.to_frame().T.assign(path="photographs/twin.jpg", source="twin")
    photographs = check_manifest(pd.concat([photographs_of(manifest), twin]))
    copies = copies_of(manifest)
    copies = copies[copies["source"] == first["source"]].iloc[:3]
    for path in copies["path"]:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / path, tmp_path / path)
    found = ph.recover_sources(copies, photographs, tmp_path, None)
    assert found["sure"].all()
    assert set(found["source"]) == {first["source"]}


def test_copies_of_two_photographs_that_hardly_differ_are_not_sure(drawn: Drawn, tmp_path: Path) -> None:
    manifest, root = drawn
    first = photographs_of(manifest).iloc[0]
    rgb = read_image(root / first["path"])
    rows = []
    for name, saved in (("a", encode_jpeg(rgb, 95)), ("b", encode_jpeg(rgb, 90))):
        (tmp_path / f"{name}.jpg").write_bytes(saved)
        sha256 = sha256_file(tmp_path / f"{name}.jpg")
        rows.append({**first, "path": f"{name}.jpg", "source": name, "sha256": sha256})
    copy = encode_jpeg(synthetic.copy_of(rgb, 3), 75)
    (tmp_path / "copy.jpg").write_bytes(copy)
    copies = check_manifest(pd.DataFrame([{**first, "path": "copy.jpg", "source": "", "split": "train"}]))
    found = ph.recover_sources(copies, check_manifest(pd.DataFrame(rows)), tmp_path, None)
    assert found["confidence"].iloc[0] > ph.SURE_SCORE
    assert not found["sure"].iloc[0]


def test_a_photograph_of_an_overlapping_field_is_no_sure_source(drawn: Drawn, tmp_path: Path) -> None:
    manifest, _ = drawn
    first = photographs_of(manifest).iloc[0]
    field = synthetic.draw_field(5, ("neutrophil",), size=(480, 840)).rgb
    rows = []
    # 440 of 640 columns are in both: many keypoints agree, a third of the copy is not explained
    for name, rgb in (("copy", field[:, :640]), ("next", field[:, 200:])):
        (tmp_path / f"{name}.jpg").write_bytes(encode_jpeg(np.ascontiguousarray(rgb), 92))
        rows.append({**first, "path": f"{name}.jpg", "source": name, "sha256": name})
    copy, photograph = (check_manifest(pd.DataFrame([row])) for row in rows)
    found = ph.recover_sources(copy, photograph, tmp_path, None).iloc[0]
    assert found["inliers"] >= ph.SURE_INLIERS
    assert found["confidence"] == pytest.approx(440 / 640, abs=0.05)
    assert not found["sure"]


def test_a_copy_that_cannot_be_read_or_has_no_candidate_gets_no_source(drawn: Drawn, tmp_path: Path) -> None:
    manifest, root = drawn
    shutil.copytree(root / "photographs", tmp_path / "photographs")
    rows = copies_of(manifest).iloc[:2].assign(label=["eosinophil", "basophil"])
    (tmp_path / rows["path"].iloc[0]).parent.mkdir(parents=True)
    (tmp_path / rows["path"].iloc[0]).write_text("not an image")
    found = ph.recover_sources(rows, photographs_of(manifest), tmp_path, None)
    assert found["source"].tolist() == ["", ""]
    assert found["confidence"].tolist() == [0.0, 0.0]
    assert not found["sure"].any()


@pytest.mark.parametrize("flip", [(1, 1), (-1, 1), (1, -1), (-1, -1)])
def test_the_map_of_a_flipped_picture_is_found(picture: RGB, flip: tuple[int, int]) -> None:
    half = picture[::2, ::2]
    flipped = np.ascontiguousarray(half[:: flip[1], :: flip[0]])
    match = ph.match_views(ph.view_picture(flipped), ph.view_picture(half, mirrored=True))
    assert match.matrix is not None
    height, width = half.shape[:2]
    expected = [
        [flip[0], 0, 0 if flip[0] == 1 else width - 1],
        [0, flip[1], 0 if flip[1] == 1 else height - 1],
    ]
    # a keypoint is placed to a fraction of a pixel; half a pixel would already blur the comparison
    np.testing.assert_allclose(
        match.matrix @ [[0, width], [0, height], [1, 1]],
        np.array(expected) @ [[0, width], [0, height], [1, 1]],
        atol=0.5,
    )
    assert match.score > 0.98


def test_coverage_is_the_share_that_both_show(picture: RGB) -> None:
    half = np.ascontiguousarray(picture[::2, ::2])
    moved = np.zeros_like(half)
    moved[:, :220] = half[:, 100:]
    moved[:, 220:] = half[::-1, :100]  # other content, not fill: it is looked at and not covered
    match = ph.match_views(ph.view_picture(moved), ph.view_picture(half, mirrored=True))
    assert match.coverage == pytest.approx(220 / 320, abs=0.02)  # a column is 0.003
    assert match.correlation > 0.98


def test_fill_is_not_compared(picture: RGB) -> None:
    half = np.ascontiguousarray(picture[::2, ::2])
    filled = half.copy()
    filled[:, :80] = 0
    match = ph.match_views(ph.view_picture(filled), ph.view_picture(half, mirrored=True))
    assert match.coverage == pytest.approx(1, abs=0.02)
    assert match.score > 0.98


def test_pictures_without_structure_match_nothing() -> None:
    flat = np.full((240, 320, 3), 200, np.uint8)
    view = ph.view_picture(flat, mirrored=True)
    assert len(view.points) == 0
    assert ph.match_views(view, view) == ph.Match()
    assert ph.Gallery(["flat"], [view]).best(view, 3) == [("flat", ph.Match())]


def test_correlation_ignores_brightness_and_contrast() -> None:
    values = np.random.default_rng(0).normal(size=1000)
    assert ph.correlate(values, 3 * values + 7) == pytest.approx(1)
    assert ph.correlate(values, -values) == pytest.approx(-1)
    assert ph.correlate(values, np.ones(1000)) == 0


@pytest.mark.data
def test_the_photographs_of_the_public_set(real_data: Path) -> None:
    """277 photographs behind TRAIN, 71 behind TEST, none behind both."""
    image_set, whole = load_recovered(real_data)
    copies = copies_of(image_set.manifest)
    sure = copies[copies["status"] != "unsure"]
    assert len(sure) >= 0.98 * len(copies)
    sides = {side: set(part["source"]) for side, part in sure.groupby("split")}
    assert not sides["train"] & (sides["test"] | sides["test_simple"])
    assert len(sides["test_simple"]) == 69  # 71 files, two of them twice
    assert sides["test"] <= sides["test_simple"] | {"BloodImage_00062", "BloodImage_00095"}
    assert "" not in sides["train"] | sides["test"]
    if whole:
        assert (len(sides["train"]), len(sides["test"])) == (277, 71)
    given = set(photographs_of(image_set.manifest)["source"])
    assert sides["train"] | sides["test"] | sides["test_simple"] <= given
