"""The readers, on small drawn sets in the layouts of the real ones, and on what goes wrong with them."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hematovision.data import blood_cells, folder, pbc, scan
from hematovision.data.manifest import check_manifest
from hematovision.errors import DataError, HematoVisionError
from hematovision.vision.field import Box


def picture(seed: int, size: tuple[int, int] = (32, 24), kind: str = "JPEG") -> bytes:
    """Return an encoded picture of random blocks; another seed, other bytes."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(np.kron(blocks, np.ones((8, 8, 1), np.uint8))).save(buffer, kind)
    return buffer.getvalue()


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


ANNOTATION = """<annotation><size><width>640</width><height>480</height><depth>3</depth></size>
<object><name>WBC</name><truncated>0</truncated>
<bndbox><xmin>11</xmin><ymin>21</ymin><xmax>110</xmax><ymax>220</ymax></bndbox></object>
<object><name>RBC</name><truncated>0</truncated>
<bndbox><xmin>600</xmin><ymin>400</ymin><xmax>640</xmax><ymax>450</ymax></bndbox></object></annotation>"""

LABELS = """,Image,Category\r
,0,NEUTROPHIL\r
,1,"NEUTROPHIL, EOSINOPHIL"\r
,2,\r
,3,BASOPHIL\r
,4,"MONOCYTE,MONOCYTE"\r
,77,LYMPHOCYTE\r
"""


def photograph(number: int) -> str:
    return f"blood-cells/dataset-master/dataset-master/JPEGImages/BloodImage_{number:05d}.jpg"


@pytest.fixture
def bccd(tmp_path: Path) -> Path:
    """Return a data folder with a small set in the layout of the real one."""
    root = tmp_path / "blood-cells"
    images = root / "dataset2-master" / "dataset2-master" / "images"
    seed = 0
    for side in ("TRAIN", "TEST", "TEST_SIMPLE"):
        for name in ("EOSINOPHIL", "LYMPHOCYTE", "MONOCYTE", "NEUTROPHIL"):
            seed += 1
            put(images / side / name / f"_{seed}_7.jpeg", picture(seed))
    for number in range(6):
        put(tmp_path / photograph(number), picture(100 + number, (640, 480)))
    inner = root / "dataset-master" / "dataset-master"
    put(inner / "JPEGImages" / "index.txt", "no image")
    put(inner / "labels.csv", LABELS)
    put(inner / "Annotations" / "BloodImage_00000.xml", ANNOTATION)
    put(inner / "Annotations" / "BloodImage_00099.xml", ANNOTATION)
    return tmp_path


def read_bccd(data: Path) -> scan.Reading:
    return blood_cells.read(data, data / "blood-cells")


def labels_file(data: Path) -> Path:
    return data / "blood-cells" / "dataset-master" / "dataset-master" / "labels.csv"


class TestBloodCells:
    def test_sides_labels_and_sources(self, bccd: Path):
        images = {image.path: image for image in read_bccd(bccd).images}
        copy = images["blood-cells/dataset2-master/dataset2-master/images/TEST_SIMPLE/MONOCYTE/_11_7.jpeg"]
        assert (copy.split, copy.label, copy.source) == ("test_simple", "monocyte", "")
        assert sorted(image.split for image in images.values()) == sorted(
            ["train", "test", "test_simple"] * 4 + ["photograph"] * 6
        )
        labels = [images[photograph(number)].label for number in range(6)]
        assert labels == ["neutrophil", "", "", "basophil", "", ""], "none, or several, is no label"
        assert images[photograph(3)].source == "BloodImage_00003"

    def test_boxes_count_pixels_from_one(self, bccd: Path):
        boxes = read_bccd(bccd).boxes
        assert boxes == {
            photograph(0): (
                Box(10, 20, 100, 200, "WBC"),
                Box(599, 399, 41, 51, "RBC", cut=True),  # its right side is the edge of the picture
            )
        }

    def test_folders_that_stand_once(self, bccd: Path):
        root = bccd / "blood-cells"
        (root / "dataset2-master" / "dataset2-master" / "images").rename(root / "dataset2-master" / "images")
        paths = [image.path for image in read_bccd(bccd).images]
        assert "blood-cells/dataset2-master/images/TRAIN/EOSINOPHIL/_1_7.jpeg" in paths
        assert len(paths) == 18

    def test_hidden_files_are_not_images(self, bccd: Path):
        images = bccd / "blood-cells" / "dataset2-master" / "dataset2-master" / "images"
        put(images / "TRAIN" / "MONOCYTE" / "._3_7.jpeg", "left by another system")
        put(images / "TRAIN" / ".DS_Store", "left by another system")
        assert len(read_bccd(bccd).images) == 18

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (None, "is missing"),
            (b"", "lacks the columns"),
            (b"a,b\n1,2\n", "lacks the columns Image and Category"),
            (b",Image,Category\n", "holds no row"),
            (b",Image,Category\n,seven,MONOCYTE\n", "line 2 has no image number"),
            (b",Image,Category\n,1,MONOCYTE\n,2\n", "line 3 has no image number"),
            (b",Image,Category\n,1,UNICORN\n", "line 2: 'UNICORN' is not a cell class"),
            (b',Image,Category\n,1,"MONOCYTE\n', "not a readable CSV"),
            (b"\xff\xfe\x00\x01", "is not UTF-8"),
        ],
    )
    def test_labels_that_are_missing_or_malformed(self, bccd: Path, content: bytes | None, said: str):
        path = labels_file(bccd)
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(DataError, match=said) as caught:
            read_bccd(bccd)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert caught.value.remedy

    @pytest.mark.parametrize(
        "text", ["\ufeff,Image,Category\n,1,Monocyte\n", "category , IMAGE\nmonocyte,1\n\n"]
    )
    def test_labels_as_other_programs_write_them(self, tmp_path: Path, text: str):
        assert blood_cells.read_labels(put(tmp_path / "labels.csv", text)) == {1: ("monocyte",)}

    def test_rows_of_one_photograph_are_joined(self, tmp_path: Path):
        path = put(tmp_path / "labels.csv", ",Image,Category\n,1,MONOCYTE\n,1,NEUTROPHIL\n")
        assert blood_cells.read_labels(path) == {1: ("monocyte", "neutrophil")}

    @pytest.mark.parametrize(
        "missing",
        ["dataset-master", "dataset2-master", "dataset2-master/dataset2-master/images/TEST"],
    )
    def test_a_missing_folder_is_named(self, bccd: Path, missing: str):
        (bccd / "blood-cells" / missing).rename(bccd / "elsewhere")
        with pytest.raises(DataError, match=f"{missing}.* is missing.*hematovision fetch blood-cells"):
            read_bccd(bccd)

    def test_a_folder_named_after_no_class(self, bccd: Path):
        images = bccd / "blood-cells" / "dataset2-master" / "dataset2-master" / "images"
        (images / "TRAIN" / "UNICORN").mkdir()
        with pytest.raises(DataError, match="UNICORN is named after no class"):
            read_bccd(bccd)

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"no xml",
            b"<annotation>",
            b"<annotation><object/></annotation>",
            ANNOTATION.replace("11", "eleven").encode(),
            b'<!DOCTYPE a [<!ENTITY x "y">]>' + ANNOTATION.replace("WBC", "&x;").encode(),
            b"<!DOCTYPE annotation>" + ANNOTATION.encode(),
            ANNOTATION.encode() + b" " * (1 << 20),
        ],
    )
    def test_a_damaged_annotation_is_left_out_and_noted(self, bccd: Path, content: bytes):
        annotations = bccd / "blood-cells" / "dataset-master" / "dataset-master" / "Annotations"
        put(annotations / "BloodImage_00001.xml", content)
        reading = read_bccd(bccd)
        assert list(reading.boxes) == [photograph(0)]
        assert reading.notes == ("1 annotations cannot be read and were left out: BloodImage_00001.xml",)

    def test_entities_are_never_expanded(self, tmp_path: Path):
        bomb = '<!DOCTYPE a [<!ENTITY a "ha">' + "".join(
            f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip("abcdefgh", "bcdefghi", strict=True)
        )
        path = put(tmp_path / "bomb.xml", (bomb + "]><annotation>&i;</annotation>").encode("utf-16"))
        with pytest.raises(DataError, match="document type"):
            blood_cells.read_annotation(path)

    def test_boxes_beyond_the_picture_are_clipped(self, tmp_path: Path):
        text = ANNOTATION.replace("<xmin>11<", "<xmin>-5<").replace("<xmin>600<", "<xmin>700<")
        assert blood_cells.read_annotation(put(tmp_path / "a.xml", text)) == (
            Box(0, 20, 110, 200, "WBC", cut=True),
        )


class TestPbc:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        for seed, name in enumerate(("eosinophil", "ig", "platelet")):
            put(tmp_path / "pbc" / name / f"X_{seed}.jpg", picture(seed))
        return tmp_path / "pbc"

    def test_each_picture_is_its_own_source(self, tmp_path: Path, root: Path):
        images = pbc.read(tmp_path, root).images
        assert [(i.path, i.label, i.source, i.split) for i in images] == [
            ("pbc/eosinophil/X_0.jpg", "eosinophil", "X_0", ""),
            ("pbc/ig/X_1.jpg", "ig", "X_1", ""),
            ("pbc/platelet/X_2.jpg", "platelet", "X_2", ""),
        ]

    def test_a_part_is_said(self, tmp_path: Path, root: Path):
        first, second = pbc.read(tmp_path, root).notes
        assert first == "pbc: 3 of the 17,092 images are here"
        assert "lymphocyte" in second
        assert "platelet" not in second

    def test_no_image(self, tmp_path: Path):
        (tmp_path / "pbc" / "ig").mkdir(parents=True)
        with pytest.raises(DataError, match="holds no image"):
            pbc.read(tmp_path, tmp_path / "pbc")


class TestFolder:
    @pytest.fixture
    def own(self, tmp_path: Path) -> Path:
        put(tmp_path / "Neutrophils" / "1.png", picture(1, kind="PNG"))
        put(tmp_path / "Neutrophils" / "slide7" / "2.TIF", picture(2, kind="TIFF"))
        put(tmp_path / "MO" / "1.bmp", picture(3, kind="BMP"))
        return tmp_path

    def test_folders_give_labels_and_files_sources(self, own: Path):
        images = folder.read(own, own).images
        assert [(i.path, i.label, i.source) for i in images] == [
            ("MO/1.bmp", "monocyte", "MO/1"),
            ("Neutrophils/1.png", "neutrophil", "Neutrophils/1"),
            ("Neutrophils/slide7/2.TIF", "neutrophil", "Neutrophils/slide7/2"),
        ]

    def test_sources_csv(self, own: Path):
        put(own / "sources.csv", "path,source\nMO/1.bmp,patient 3\nNeutrophils\\slide7\\2.TIF,patient 3\n")
        assert [i.source for i in folder.read(own, own).images] == ["patient 3", "Neutrophils/1", "patient 3"]

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("file,source\n", "lacks the columns path and source"),
            ("path,source\nMO/9.bmp,a\n", "line 2 names 'MO/9.bmp', which is no image here"),
            ("path,source\nMO/1.bmp\n", "names no source"),
            ("path,source\nMO/1.bmp,a\nMO/1.bmp,b\n", "line 3 names 'MO/1.bmp' again"),
            ("", "lacks the columns"),
        ],
    )
    def test_malformed_sources(self, own: Path, text: str, said: str):
        put(own / "sources.csv", text)
        with pytest.raises(DataError, match=said):
            folder.read(own, own)

    def test_what_is_no_image_is_left_out(self, own: Path):
        put(own / "MO" / ".hidden.png", picture(9))
        put(own / "MO" / "notes.txt", "seen on Monday")
        put(own / "loose.png", picture(9))
        reading = folder.read(own, own)
        assert len(reading.images) == 3
        assert reading.notes == ("2 files are no images and were left out: MO/notes.txt, loose.png",)

    def test_unknown_folders_are_named(self, own: Path):
        put(own / "unicorn" / "1.png", picture(4))
        put(own / "blast" / "1.png", picture(5))
        with pytest.raises(DataError, match=r"'blast', 'unicorn'.*known classes are eosinophil"):
            folder.read(own, own)

    def test_one_class_only(self, own: Path):
        (own / "MO" / "1.bmp").unlink()
        with pytest.raises(DataError, match=r"one class only \(neutrophil\).*at least two"):
            folder.read(own, own)

    def test_no_image(self, tmp_path: Path):
        (tmp_path / "neutrophil").mkdir()
        with pytest.raises(DataError, match=r"holds no image.*folders named after their class"):
            folder.read(tmp_path, tmp_path)

    def test_no_folder(self, tmp_path: Path):
        put(tmp_path / "1.png", picture(1))
        with pytest.raises(DataError, match="holds 1 images but no class folder"):
            folder.read(tmp_path, tmp_path)

    def test_links_are_followed_once(self, own: Path):
        (own / "LY").symlink_to(own / "MO", target_is_directory=True)
        (own / "MO" / "loop").symlink_to(own, target_is_directory=True)
        paths = [image.path for image in folder.read(own, own).images]
        assert "LY/1.bmp" in paths
        assert len(paths) == 4, "a link back to the top leads nowhere new"


class TestScan:
    def test_damaged_files_keep_their_rows(self, tmp_path: Path):
        whole = picture(1, (320, 240))
        files = {
            "a.jpg": whole,
            "b.jpg": whole[: len(whole) // 2],
            "c.jpg": b"",
            "d.jpg": b"this is text",
            "e.jpg": picture(2, (320, 240), "PNG"),
        }
        for name, content in files.items():
            put(tmp_path / name, content)
        listed = [scan.Listed(name, "monocyte", name) for name in (*files, "f.jpg")]
        seen: list[tuple[int, int]] = []
        frame = scan.inspect_images(listed, "folder", tmp_path, lambda *done: seen.append(done))
        assert frame["status"].tolist() == [
            "ok", "truncated", "unreadable", "unreadable", "ok", "unreadable",
        ]  # fmt: skip
        assert frame["width"].tolist() == [320, 0, 0, 0, 320, 0]
        assert frame["sha256"].str.len().tolist() == [64, 64, 64, 64, 64, 0]
        assert seen[-1] == (6, 6)
        check_manifest(frame)

    def test_a_large_file_gives_the_same_row(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        put(tmp_path / "a.jpg", picture(1))
        listed = [scan.Listed("a.jpg", "monocyte", "a")]
        small = scan.inspect_images(listed, "folder", tmp_path)
        monkeypatch.setattr(scan, "_IN_MEMORY", 10)
        assert scan.inspect_images(listed, "folder", tmp_path).equals(small)

    def test_duplicates_and_conflicts(self, tmp_path: Path):
        same, other = picture(1), picture(2)
        rows = [
            ("a.jpg", "monocyte", same), ("b.jpg", "monocyte", same), ("c.jpg", "", same),
            ("d.jpg", "monocyte", other), ("e.jpg", "neutrophil", other), ("f.jpg", "neutrophil", other),
            ("g.jpg", "neutrophil", b"x"), ("h.jpg", "monocyte", b"x"), ("i.jpg", "monocyte", picture(3)),
        ]  # fmt: skip
        for name, _, content in rows:
            put(tmp_path / name, content)
        listed = [scan.Listed(name, label, Path(name).stem) for name, label, _ in rows]
        frame = scan.mark_duplicates(scan.inspect_images(listed, "folder", tmp_path))
        assert frame["status"].tolist() == [
            "ok", "duplicate", "unlabelled", "conflict", "conflict", "conflict",
            "unreadable", "unreadable", "ok",
        ]  # fmt: skip
        sources = scan.share_sources(frame)["source"].tolist()
        assert sources == ["a", "a", "a", "d", "d", "d", "g", "g", "i"]

    def test_unknown_sources_stay_unknown(self, tmp_path: Path):
        put(tmp_path / "a.jpg", picture(1))
        put(tmp_path / "b.jpg", picture(1))
        listed = [scan.Listed("a.jpg", "monocyte", ""), scan.Listed("b.jpg", "monocyte", "")]
        frame = scan.share_sources(scan.inspect_images(listed, "blood-cells", tmp_path))
        assert frame["source"].tolist() == ["", ""]

    def test_fingerprint_sees_names_sizes_and_times(self, tmp_path: Path):
        path = put(tmp_path / "a" / "1.png", b"123")
        keys = [scan.fingerprint(tmp_path)]
        os.utime(path, ns=(1, 1))
        keys.append(scan.fingerprint(tmp_path))
        put(path, b"1234")
        os.utime(path, ns=(1, 1))
        keys.append(scan.fingerprint(tmp_path))
        path.rename(tmp_path / "a" / "2.png")
        keys.append(scan.fingerprint(tmp_path))
        assert len(set(keys)) == 4
        put(tmp_path / "a" / ".hidden", b"")
        assert scan.fingerprint(tmp_path) == keys[-1]

    def test_a_folder_that_is_not_there(self, tmp_path: Path):
        with pytest.raises(HematoVisionError, match="there is no such file or folder"):
            list(scan.walk_files(tmp_path / "nowhere"))
