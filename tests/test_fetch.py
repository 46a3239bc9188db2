"""Fetching, against a small server on this machine that speaks the Kaggle calls that kagglehub makes."""

from __future__ import annotations

import base64
import dataclasses
import errno
import gzip
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from hematovision.data import catalog, fetch
from hematovision.errors import DataError, HematoVisionError

kaggle_env = pytest.importorskip("kagglesdk.kaggle_env")

NAME = "blood-cells"
COPY = "dataset2-master/dataset2-master/images/TRAIN/MONOCYTE/_{}_1.jpeg"
PHOTOGRAPH = "dataset-master/dataset-master/JPEGImages/BloodImage_{:05d}.jpg"


def small_set() -> dict[str, bytes]:
    """Return path to content: 30 files in the set's layout, 5.8 MB in all.

    Larger than several of the pieces of 1 MiB in which kagglehub writes, so that a break leaves a part.
    """
    rng = np.random.default_rng(0)
    paths = [COPY.format(n) for n in range(20)] + [PHOTOGRAPH.format(n) for n in range(9)]
    files = {path: rng.bytes(200_000) for path in paths}
    files["dataset-master/dataset-master/labels.csv"] = b",Image,Category\r\n,0,MONOCYTE\r\n"
    return files


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)
    return buffer.getvalue()


def put(files: dict[str, bytes], folder: Path) -> None:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


class StandIn(ThreadingHTTPServer):
    """Kaggle, as far as `kagglehub.dataset_download` asks for it."""

    daemon_threads = True
    archive = b""
    md5: str | None = None  # what the header claims; None for no header
    breaks_at = 2_500_000  # bytes after which a connection is closed, or falls silent
    breaks: tuple[str, ...] = ()  # "whole", "part": the next request of that kind is broken; "all": every one
    stalls = False  # whether requests for the whole fall silent
    status = 200

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.ranges: list[str | None] = []
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: object) -> None:
        """Say nothing about connections that the client closed."""


class _Handler(BaseHTTPRequestHandler):
    server: StandIn

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.status != 200:
            self._answer({"code": self.server.status, "message": "no"}, self.server.status)
        elif self.path.endswith("/GetDataset"):
            self._answer({"currentVersionNumber": 6})
        else:
            self.send_response(302)
            self.send_header("Location", f"{self.server.url}/archive.zip")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def do_GET(self) -> None:
        content, asked = self.server.archive, self.headers.get("Range")
        self.server.ranges.append(asked)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        self.send_response(206 if asked else 200)
        self.send_header("Content-Type", "application/zip")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        if self.server.md5:
            self.send_header("x-goog-hash", f"crc32c=AAAAAA==,md5={self.server.md5}")
        self.end_headers()
        kind, until = "part" if asked else "whole", start + self.server.breaks_at
        if kind in self.server.breaks or "all" in self.server.breaks:
            self.server.breaks = tuple(left for left in self.server.breaks if left != kind)
            self.wfile.write(content[start:until])
        elif self.server.stalls and kind == "whole":
            self.wfile.write(content[start:until])
            self.wfile.flush()
            self.server.released.wait(20)
        else:
            self.wfile.write(content[start:])
        self.close_connection = True

    def _answer(self, value: object, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""


def md5_of(content: bytes) -> str:
    return base64.b64encode(hashlib.md5(content).digest()).decode()


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replace the row of the catalogue by the small set's, with the list of its files."""
    origin = tmp_path / "origin"
    put(small_set(), origin / NAME)
    listed = tmp_path / "known.csv.gz"
    assert fetch.write_known(NAME, listed, origin) == 30
    row = dataclasses.replace(catalog.CATALOG[NAME], known=listed, images=29, size=1_000_000)
    monkeypatch.setitem(catalog.CATALOG, NAME, row)
    return listed


@pytest.fixture
def server(tmp_path: Path, known: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    assert known.is_file()
    for variable in ("KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY", "KAGGLEHUB_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path / "home"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with StandIn() as stand_in:
        stand_in.archive = zipped(small_set())
        stand_in.md5 = md5_of(stand_in.archive)
        monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.PROD, stand_in.url)
        monkeypatch.setattr(fetch, "_PAUSE", 0.0)
        thread = threading.Thread(target=stand_in.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield stand_in
        stand_in.released.set()
        stand_in.shutdown()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


def left_in(data: Path) -> list[str]:
    return sorted(entry.name for entry in data.iterdir())


@pytest.mark.usefixtures("server")
def test_fetch_puts_the_whole_set_into_place(data: Path, capsys: pytest.CaptureFixture):
    lines: list[str] = []
    assert fetch.fetch(NAME, data, say=lines.append) == data / NAME
    for path, content in small_set().items():
        assert (data / NAME / path).read_bytes() == content
    assert left_in(data) == [NAME]
    assert "29 of 29 images, 30 files verified" in lines[-1]
    assert capsys.readouterr().out == "", "standard output belongs to the caller"
    assert "KAGGLEHUB_CACHE" not in os.environ


def test_a_set_that_is_there_is_verified_and_kept(server: StandIn, data: Path):
    put(small_set(), data / NAME)
    assert fetch.fetch(NAME, data) == data / NAME
    assert server.ranges == []


MIB = 1 << 20


def test_a_broken_connection_is_taken_up_where_it_broke(server: StandIn, data: Path):
    server.breaks = ("whole", "part")
    fetch.fetch(NAME, data)
    assert fetch.verify(NAME, data).complete
    # each break comes after 2.5 MB, of which two pieces of 1 MiB are written
    assert [asked for asked in server.ranges if asked] == [f"bytes={2 * MIB}-", f"bytes={4 * MIB}-"]


def test_a_download_that_broke_off_is_resumed_by_the_next_run(
    server: StandIn, data: Path, monkeypatch: pytest.MonkeyPatch
):
    server.breaks = ("whole", "part")
    monkeypatch.setattr(fetch, "_TRIES", 1)
    with pytest.raises(DataError, match=r"broke off after 2\.1 MB.*goes on"):
        fetch.fetch(NAME, data)
    assert not (data / NAME).exists()
    server.breaks = ()
    fetch.fetch(NAME, data)
    assert server.ranges[-1] == f"bytes={2 * MIB}-"
    assert fetch.verify(NAME, data).complete


def test_a_download_that_brings_nothing_is_given_up(server: StandIn, data: Path):
    server.breaks, server.breaks_at = ("all",), 0
    with pytest.raises(DataError, match="check the network and run again"):
        fetch.fetch(NAME, data)
    assert len(server.ranges) <= 4
    assert not (data / NAME).exists()


def test_a_silent_connection_is_given_up_and_resumed(
    server: StandIn, data: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(fetch, "TIMEOUT", (2.0, 0.5))
    server.stalls = True
    started = time.monotonic()
    fetch.fetch(NAME, data)
    assert time.monotonic() - started < 15, "it must not wait as long as the server is silent"
    assert [asked for asked in server.ranges if asked] == [f"bytes={2 * MIB}-"]


def test_a_truncated_archive_is_refused_and_not_kept(server: StandIn, data: Path):
    whole = server.archive
    server.archive, server.md5 = whole[: len(whole) // 2], None
    with pytest.raises(DataError, match="damaged"):
        fetch.fetch(NAME, data)
    assert not (data / NAME).exists()
    server.archive = whole
    fetch.fetch(NAME, data)
    assert fetch.verify(NAME, data).complete


def test_a_wrong_checksum_is_tried_again_once_then_refused(server: StandIn, data: Path):
    server.md5 = md5_of(b"something else")
    with pytest.raises(DataError, match="damaged"):
        fetch.fetch(NAME, data)
    assert server.ranges == [None, None]
    assert not (data / NAME).exists()


def test_changed_and_missing_files_are_named(server: StandIn, data: Path):
    files = small_set()
    files[COPY.format(3)] = b"changed"
    del files[PHOTOGRAPH.format(4)]
    server.archive = zipped(files)
    server.md5 = md5_of(server.archive)
    with pytest.raises(DataError, match=r"1 damaged \(.*_3_1.jpeg\), 1 missing \(.*BloodImage_00004"):
        fetch.fetch(NAME, data)
    assert not (data / NAME).exists()


def test_another_set_is_refused(server: StandIn, data: Path):
    server.archive = zipped({"readme.txt": b"hello"})
    server.md5 = md5_of(server.archive)
    with pytest.raises(DataError, match="0 of 29 images, 0 files verified, 30 missing"):
        fetch.fetch(NAME, data)


def test_a_member_that_climbs_out_stays_inside(server: StandIn, data: Path, tmp_path: Path):
    server.archive = zipped({**small_set(), "../../../../../climbed.jpg": b"x", "/rooted.jpg": b"x"})
    server.md5 = md5_of(server.archive)
    lines: list[str] = []
    fetch.fetch(NAME, data, say=lines.append)
    assert [path.parent for path in tmp_path.rglob("climbed.jpg")] == [data / NAME]
    assert "2 not on the list of known files" in lines[-1]


@pytest.mark.parametrize(("status", "said"), [(403, "KAGGLE_API_TOKEN"), (404, "404"), (429, "slow down")])
def test_refusals_give_one_line_with_a_remedy(server: StandIn, data: Path, status: int, said: str):
    server.status = status
    with pytest.raises(DataError, match=said) as caught:
        fetch.fetch(NAME, data)
    assert "\n" not in str(caught.value)
    assert catalog.CATALOG[NAME].url in str(caught.value)


@pytest.mark.usefixtures("server")
def test_no_network(data: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.PROD, "http://127.0.0.1:9")
    with pytest.raises(DataError, match="cannot be reached"):
        fetch.fetch(NAME, data)
    assert left_in(data) == []


@pytest.mark.usefixtures("server")
def test_malformed_credentials_are_named(data: Path, tmp_path: Path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "kaggle.json").write_text("{")
    with pytest.raises(DataError, match=r"kaggle.json.*KAGGLE_API_TOKEN"):
        fetch.fetch(NAME, data)


def test_a_full_disk_is_said_before_the_download(
    server: StandIn, data: Path, monkeypatch: pytest.MonkeyPatch
):
    usage = shutil.disk_usage(Path("/"))._replace(free=1000)
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DataError, match="free some space"):
        fetch.fetch(NAME, data)
    assert server.ranges == []


@pytest.mark.usefixtures("server")
def test_a_disk_that_fills_up_loses_nothing(data: Path, monkeypatch: pytest.MonkeyPatch):
    put({**small_set(), COPY.format(0): b"old"}, data / NAME)
    extract = zipfile.ZipFile._extract_member

    def full(archive: zipfile.ZipFile, member: str, *rest: object) -> str:
        if member == PHOTOGRAPH.format(3):
            raise OSError(errno.ENOSPC, "No space left on device")
        return extract(archive, member, *rest)

    monkeypatch.setattr(zipfile.ZipFile, "_extract_member", full)
    with pytest.raises(HematoVisionError, match="disk is full"):
        fetch.fetch(NAME, data, force=True)
    assert (data / NAME / COPY.format(0)).read_bytes() == b"old"


@pytest.mark.usefixtures("server")
def test_an_unwritable_data_folder(tmp_path: Path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(HematoVisionError, match="choose another path"):
        fetch.fetch(NAME, tmp_path / "file" / "data")


def test_a_damaged_set_is_named_and_replaced_by_force_alone(server: StandIn, data: Path):
    put({**small_set(), COPY.format(5): b"?"}, data / NAME)
    with pytest.raises(DataError, match=r"1 damaged \(.*_5_1.jpeg\).*--force"):
        fetch.fetch(NAME, data)
    assert server.ranges == []
    fetch.fetch(NAME, data, force=True)
    assert fetch.verify(NAME, data).complete
    assert left_in(data) == [NAME]


def test_a_part_of_the_set_is_not_called_damaged(data: Path, known: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(
        catalog.CATALOG, NAME, dataclasses.replace(catalog.CATALOG[NAME], known=known, images=100)
    )
    put(small_set(), data / NAME)
    with pytest.raises(DataError, match="is a part of the set, and can be used as it is"):
        fetch.fetch(NAME, data)


@pytest.mark.usefixtures("server")
def test_two_at_once(data: Path):
    with fetch._alone(data, NAME), pytest.raises(DataError, match="another process"):
        fetch.fetch(NAME, data)


CHILD = """
import dataclasses, sys, time, zipfile
from pathlib import Path
from kagglesdk import kaggle_env
from hematovision.data import catalog, fetch
url, known, data = sys.argv[1:]
kaggle_env._env_to_endpoint[kaggle_env.KaggleEnv.PROD] = url
row = dataclasses.replace(catalog.CATALOG["blood-cells"], known=Path(known), images=29, size=1_000_000)
catalog.CATALOG["blood-cells"] = row
extract = zipfile.ZipFile._extract_member
def slowly(*arguments):
    time.sleep(0.1)
    return extract(*arguments)
zipfile.ZipFile._extract_member = slowly
fetch.fetch("blood-cells", data)
"""


@pytest.mark.slow
def test_killed_while_unpacking_leaves_nothing_under_the_final_name(server: StandIn, data: Path, known: Path):
    command = [sys.executable, "-c", CHILD, server.url, str(known), str(data)]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: len(list(data.glob(".fetch-*/hub/**/*.jpeg"))) >= 5, child)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert not (data / NAME).exists()
    assert 5 <= len(list(data.glob(".fetch-*/hub/**/*.jpeg"))) < 20, "it was killed in the middle"
    asked = len(server.ranges)
    fetch.fetch(NAME, data)
    assert fetch.verify(NAME, data).complete
    assert left_in(data) == [NAME]
    assert server.ranges[asked:] == [None], "the archive that was there is used: only its length is asked for"


def wait_for(happened: Callable[[], bool], child: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60  # a loaded machine takes seconds to start Python
    while not happened():
        assert child.poll() is None, "the child ended early"
        assert time.monotonic() < deadline, "the child takes too long"
        time.sleep(0.05)


@pytest.mark.usefixtures("known")
def test_verify_accepts_folders_that_stand_once(data: Path):
    files = {path.partition("/")[0] + "/" + path.split("/", 2)[2]: b for path, b in small_set().items()}
    put(files, data / NAME)
    assert fetch.verify(NAME, data).complete


@pytest.mark.usefixtures("known")
def test_verify_counts(data: Path):
    files = small_set()
    files[COPY.format(0)] = files[COPY.format(0)][::-1]  # same size, other bytes
    del files[COPY.format(1)]
    files[COPY.format(99)] = b"new"
    put({**files, "notes.txt": b"no part of a set"}, data / NAME)
    result = fetch.verify(NAME, data)
    assert (result.intact, result.images, result.expected) == (28, 29, 29)
    assert result.damaged == (COPY.format(0),)
    assert len(result.missing) == len(result.unknown) == 1
    assert not result.sound


def test_the_list_of_known_files_is_reproducible(tmp_path: Path, known: Path):
    again = tmp_path / "again.csv.gz"
    fetch.write_known(NAME, again, tmp_path / "origin")
    assert again.read_bytes() == known.read_bytes()
    first = gzip.decompress(known.read_bytes()).decode().splitlines()[1]
    content = small_set()["dataset-master/dataset-master/JPEGImages/BloodImage_00000.jpg"]
    digest = hashlib.sha256(content).hexdigest()[:16]
    assert first == f"dataset-master/JPEGImages/BloodImage_00000.jpg,200000,{digest}"


def test_a_damaged_list_is_one_line(data: Path, known: Path):
    put(small_set(), data / NAME)
    known.write_bytes(known.read_bytes()[:100])
    with pytest.raises(DataError, match="install the library again"):
        fetch.verify(NAME, data)


@pytest.mark.parametrize("name", ["synthetic", "folder"])
def test_nothing_to_fetch(name: str, data: Path):
    with pytest.raises(DataError, match="nothing to download"):
        fetch.fetch(name, data)


def test_unknown_set(data: Path):
    with pytest.raises(DataError, match="choose one of blood-cells, pbc"):
        fetch.fetch("malaria", data)


def test_known_lists_are_those_of_the_catalogue():
    for name, files in (("blood-cells", 13_247), ("pbc", 4_216)):
        path = catalog.CATALOG[name].known
        assert path is not None
        assert len(fetch.read_known(path)) == files
    sizes = sum(path.stat().st_size for path in path.parent.glob("*.csv.gz"))
    assert sizes < 450_000, "they travel with the library"


@pytest.mark.data
@pytest.mark.parametrize(("name", "complete"), [("blood-cells", True), ("pbc", None)])
def test_the_real_sets_are_what_is_known(real_data: Path, name: str, complete: bool | None):
    result = fetch.verify(name, real_data)
    assert result.sound, result.describe()
    if complete is not None:  # of pbc a part may be here
        assert result.complete
        assert result.unknown == ()
