"""The table of images: one schema, checked whenever it is read or written."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from hematovision.data.manifest import COLUMNS, check_manifest, manifest_key, read_manifest, write_manifest
from hematovision.errors import DataError


def frame(**changes: object) -> pd.DataFrame:
    """Return a manifest of three images, not in order."""
    columns: dict[str, object] = {
        "path": ["b/2.png", "a/1.png", "a/NA"],
        "dataset": "drawn",
        "label": ["monocyte", "neutrophil", ""],
        "source": ["p2", "p1", ""],
        "split": ["train", "test", ""],
        "sha256": ["22", "11", "33"],
        "width": [320, 64, 0],
        "height": [240, 64, 0],
        "status": ["ok", "ok", "unreadable"],
    }
    return pd.DataFrame({**columns, **changes})


def test_columns_and_rows_are_in_order() -> None:
    table = check_manifest(frame()[list(reversed(COLUMNS))])
    assert tuple(table.columns) == COLUMNS
    assert table["path"].tolist() == ["a/1.png", "a/NA", "b/2.png"]
    assert table["width"].tolist() == [64, 0, 320]
    assert table.index.tolist() == [0, 1, 2]
    assert table["width"].dtype == table["height"].dtype == "int64"


def test_the_caller_s_frame_is_left_alone() -> None:
    before = frame()
    check_manifest(before)
    pd.testing.assert_frame_equal(before, frame())


def test_missing_values_are_empty_text() -> None:
    assert check_manifest(frame(source=["p2", None, float("nan")]))["source"].tolist() == ["", "", "p2"]


def test_an_empty_manifest_is_one() -> None:
    assert check_manifest(frame().iloc[:0]).empty


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra": 1}, r"the manifest has the wrong columns \(missing none, unknown \['extra'\]\)"),
        ({"path": "same.png"}, "the manifest: same.png is listed twice: remove one"),
        ({"label": "cat"}, "'cat' is no label: use one of eosinophil"),
        ({"split": "Train"}, "'Train' is no split: use one of train"),
        ({"status": "fine"}, "'fine' is no status: use one of ok"),
        ({"width": "wide"}, "column width holds a value that is no whole number"),
        ({"width": None}, "column width holds a value that is no whole number"),
        ({"width": 1.5}, "column width holds a value that is no whole number"),
        ({"height": -1}, "column height holds a value that is no whole number"),
        ({"height": float("inf")}, "column height holds a value that is no whole number"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_manifest(frame(**changes))


def test_a_missing_column_is_named() -> None:
    with pytest.raises(DataError, match=r"my table has the wrong columns \(missing \['source'\]"):
        check_manifest(frame().drop(columns="source"), "my table")


def test_round_trip(tmp_path: Path) -> None:
    write_manifest(frame(), tmp_path / "deep" / "m.csv")
    pd.testing.assert_frame_equal(read_manifest(tmp_path / "deep" / "m.csv"), check_manifest(frame()))


def test_equal_tables_give_equal_bytes(tmp_path: Path) -> None:
    write_manifest(frame(), tmp_path / "1.csv")
    write_manifest(frame().iloc[::-1], tmp_path / "2.csv")
    assert (tmp_path / "1.csv").read_bytes() == (tmp_path / "2.csv").read_bytes()


def test_a_wrong_table_leaves_the_old_file(tmp_path: Path) -> None:
    write_manifest(frame(), tmp_path / "m.csv")
    with pytest.raises(DataError, match=r"m\.csv: 'cat' is no label"):
        write_manifest(frame(label="cat"), tmp_path / "m.csv")
    assert len(read_manifest(tmp_path / "m.csv")) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["m.csv"]


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\x00\x01", b'a,b\n"1,2\n3', b"path,label\nx,y\n"])
def test_what_is_no_manifest(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "m.csv"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(
        DataError, match=r"m\.csv (is not a readable manifest|has the wrong columns)"
    ) as caught:
        read_manifest(file)
    assert "\n" not in str(caught.value)


def test_key_follows_what_a_study_depends_on() -> None:
    table = check_manifest(frame())
    key = manifest_key(table)
    assert key == manifest_key(check_manifest(frame().iloc[::-1]))
    assert key == manifest_key(table.assign(dataset="renamed"))
    for column, value in (("label", "basophil"), ("source", "p9"), ("split", "train"), ("sha256", "44")):
        assert manifest_key(table.assign(**{column: value})) != key
