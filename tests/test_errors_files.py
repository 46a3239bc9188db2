"""One line for the user; a name never stands for half a file, whatever happens while it is written."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from disks import small_disk

from hematovision import files
from hematovision.errors import ConfigError, DataError, HematoVisionError, ImageError, WeightsError
from hematovision.files import atomic_path, content_key, read_json, sha256_file, write_json, write_text


class Interrupted(Exception):
    pass


def begin(path: Path) -> None:
    """Write half of something and fail."""
    path.parent.mkdir(exist_ok=True)
    path.write_text("half")
    raise Interrupted


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


class TestError:
    def test_says_what_and_what_to_do(self) -> None:
        error = HematoVisionError("a.png is empty", "remove it")
        assert str(error) == "a.png is empty: remove it"
        assert (error.what, error.remedy) == ("a.png is empty", "remove it")

    def test_needs_no_remedy(self) -> None:
        assert str(HematoVisionError("a.png is empty")) == "a.png is empty"

    def test_is_one_line_whatever_it_is_made_of(self) -> None:
        error = HematoVisionError("a parser\n  says\tthis", "do\r\nthat")
        assert str(error) == "a parser says this: do that"

    @pytest.mark.parametrize("kind", [ImageError, DataError, ConfigError, WeightsError])
    def test_every_kind_is_caught_as_one(self, kind: type[HematoVisionError]) -> None:
        with pytest.raises(HematoVisionError, match=r"^x: y$"):
            raise kind("x", "y")


class TestAtomicFile:
    def test_appears_only_when_complete(self, tmp_path: Path) -> None:
        path = tmp_path / "deep" / "er" / "a.txt"
        with atomic_path(path) as temporary:
            temporary.write_text("new")
            assert not path.exists()
        assert path.read_text() == "new"
        assert names(path.parent) == ["a.txt"]

    def test_keeps_the_suffix(self, tmp_path: Path) -> None:
        with atomic_path(tmp_path / "model.weights.h5") as temporary:
            assert temporary.name == "model.weights.h5"  # Keras reads the format from it
            temporary.touch()

    def test_an_error_inside_leaves_the_old_content(self, tmp_path: Path) -> None:
        path = tmp_path / "a.txt"
        path.write_text("old")
        with pytest.raises(Interrupted), atomic_path(path) as temporary:
            begin(temporary)
        assert path.read_text() == "old"
        assert names(tmp_path) == ["a.txt"]

    def test_replaces(self, tmp_path: Path) -> None:
        path = tmp_path / "a.txt"
        path.write_text("old")
        write_text(path, "new: é")
        assert path.read_bytes() == "new: é".encode()

    def test_a_folder_of_that_name_is_not_destroyed(self, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "kept").touch()
        with pytest.raises(HematoVisionError, match=r"this is a folder; name a file"):
            write_text(tmp_path / "a", "text")
        assert names(tmp_path / "a") == ["kept"]


class TestAtomicFolder:
    def write(self, path: Path, name: str) -> None:
        with atomic_path(path) as temporary:
            temporary.mkdir()
            (temporary / name).write_text(name)

    @pytest.mark.parametrize("exchange", [True, False])
    def test_is_replaced_as_a_whole(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
    ) -> None:
        if not exchange:  # what happens where the system cannot swap two names
            monkeypatch.setattr(files, "_exchange", lambda *_: False)
        self.write(tmp_path / "report", "first")
        self.write(tmp_path / "report", "second")
        assert names(tmp_path / "report") == ["second"]
        assert names(tmp_path) == ["report"]

    def test_an_error_inside_leaves_the_old_folder(self, tmp_path: Path) -> None:
        self.write(tmp_path / "report", "first")
        with pytest.raises(Interrupted), atomic_path(tmp_path / "report") as temporary:
            begin(temporary / "half")
        assert names(tmp_path / "report") == ["first"]
        assert names(tmp_path) == ["report"]

    def test_a_refused_rename_brings_the_old_folder_back(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.write(tmp_path / "report", "first")
        rename = os.rename

        def refuse(source: Path, target: Path) -> None:
            if Path(target) == tmp_path / "report" and Path(source).name == "report":
                raise OSError(errno.EACCES, "Permission denied")
            rename(source, target)

        monkeypatch.setattr(files, "_exchange", lambda *_: False)
        monkeypatch.setattr(os, "rename", refuse)
        with pytest.raises(HematoVisionError, match="permission denied; choose a folder"):
            self.write(tmp_path / "report", "second")
        assert names(tmp_path / "report") == ["first"]

    @pytest.mark.skipif(sys.platform != "linux", reason="only Linux swaps two names in one step")
    def test_a_kill_between_the_renames_finds_no_gap(self, tmp_path: Path) -> None:
        """Whatever rename the killed process was about to make, one of the two folders stands."""
        self.write(tmp_path / "report", "first")
        code = """
import os, signal, sys
from pathlib import Path
from hematovision.files import atomic_path
count = 0
def die(*_):
    global count
    count += 1
    if count == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(*_)
rename, os.rename, os.replace = os.rename, die, die
with atomic_path(Path(sys.argv[1])) as temporary:
    temporary.mkdir()
    (temporary / "second").touch()
"""
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "report")], check=False)
        assert names(tmp_path / "report") in (["first"], ["second"])


def test_kill_9_in_the_middle_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    code = """
import os, signal, sys
from hematovision.files import atomic_path
with atomic_path(sys.argv[1]) as temporary:
    with open(temporary, "w") as handle:
        handle.write("half of it")
        handle.flush()
        os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    write_text(path, "new")  # what the killed process left is in nobody's way
    assert path.read_text() == "new"


class TestRefusal:
    @pytest.mark.parametrize(
        ("number", "remedy"),
        [
            (errno.ENOSPC, "the disk is full; free some space"),
            (errno.EACCES, "permission denied; choose a folder you may write to"),
            (errno.EROFS, "the file system is read-only; choose a folder"),
            (errno.EIO, "input/output error"),  # not in the table: the system's own words
        ],
    )
    def test_names_the_file_and_the_remedy(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
    ) -> None:
        path = tmp_path / "a.txt"
        path.write_text("old")

        def refuse(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", refuse)
        with pytest.raises(HematoVisionError) as caught:
            write_text(path, "new")
        assert str(caught.value).startswith(f"cannot use {path}: {remedy}")
        assert "\n" not in str(caught.value)
        assert path.read_text() == "old"
        assert names(tmp_path) == ["a.txt"]

    def test_full_disk(self, tmp_path: Path) -> None:
        with small_disk(tmp_path / "disk", 64) as disk:
            write_text(disk / "a.txt", "old")
            with pytest.raises(HematoVisionError, match=r"a\.txt: the disk is full; free some space"):
                write_text(disk / "a.txt", "x" * 200_000)
            assert (disk / "a.txt").read_text() == "old"
            assert names(disk) == ["a.txt"]

    def test_a_file_where_a_folder_should_be(self, tmp_path: Path) -> None:
        (tmp_path / "out").write_text("a file")
        with pytest.raises(HematoVisionError, match=r"cannot use .*out: a file stands where a folder"):
            write_text(tmp_path / "out" / "a.txt", "new")
        assert (tmp_path / "out").read_text() == "a file"

    @pytest.mark.skipif(os.name != "posix", reason="permissions are those of POSIX")
    def test_unwritable_folder(self) -> None:
        # not under tmp_path, which nobody but its owner may even enter
        folder = Path(tempfile.mkdtemp())
        folder.chmod(0o555)
        user = os.geteuid()
        try:
            if user == 0:  # root may write anywhere
                os.seteuid(65534)
            with pytest.raises(HematoVisionError, match=r"a\.txt: permission denied; choose a folder"):
                write_text(folder / "a.txt", "new")
        finally:
            os.seteuid(user)
            folder.rmdir()

    def test_a_missing_input_is_not_blamed_on_the_output(self, tmp_path: Path) -> None:
        missing = pytest.raises(HematoVisionError, match=r"cannot use .*missing\.png: there is no such file")
        with missing, atomic_path(tmp_path / "out.png") as temporary:
            temporary.write_bytes((tmp_path / "missing.png").read_bytes())


class TestJson:
    def test_round_trip(self, tmp_path: Path) -> None:
        value = {"b": [1, 2.5, None, True], "a": "é"}
        write_json(tmp_path / "a.json", value)
        assert read_json(tmp_path / "a.json") == value

    def test_equal_values_give_equal_bytes(self, tmp_path: Path) -> None:
        write_json(tmp_path / "1.json", {"a": 1, "b": 2})
        write_json(tmp_path / "2.json", {"b": 2, "a": 1})
        assert (tmp_path / "1.json").read_bytes() == (tmp_path / "2.json").read_bytes()

    def test_a_value_that_json_lacks_leaves_the_old_file(self, tmp_path: Path) -> None:
        write_json(tmp_path / "a.json", 1)
        with pytest.raises(ValueError, match="not JSON compliant"):
            write_json(tmp_path / "a.json", float("nan"))
        assert read_json(tmp_path / "a.json") == 1

    @pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"{'a': 1}"])
    def test_garbage(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "a.json"
        path.write_bytes(content)
        with pytest.raises(HematoVisionError, match=r"a\.json is not valid JSON \(.*\): remove it"):
            read_json(path)

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(HematoVisionError, match=r"a\.json: there is no such file"):
            read_json(tmp_path / "a.json")


class TestHashes:
    def test_sha256(self, tmp_path: Path) -> None:
        content = bytes(range(256)) * 5000  # more than one read of the digest
        (tmp_path / "a").write_bytes(content)
        assert sha256_file(tmp_path / "a") == hashlib.sha256(content).hexdigest()

    def test_sha256_of_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(HematoVisionError, match="there is no such file"):
            sha256_file(tmp_path / "a")

    def test_key_names_the_values(self) -> None:
        key = content_key({"a": 1, "b": [2]}, "x")
        assert key == content_key({"b": [2], "a": 1}, "x")
        assert len(key) == 16
        assert int(key, 16) >= 0
        others = [content_key({"a": 1, "b": [3]}, "x"), content_key({"a": 1, "b": [2]}), content_key("x")]
        assert len({key, *others}) == 4

    def test_key_tells_parts_from_one_part(self) -> None:
        assert content_key("a", "b") != content_key("ab") != content_key(["a", "b"])
