"""The runner: what is due runs, a kill at any moment costs nothing, an error is said in plain words."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from study import ROOT, Study, seconds_of_children

from hematovision.config import build_profile, load_profile
from hematovision.errors import ConfigError
from hematovision.report.notebook import bind_parameters, read_parameters, source_key
from hematovision.report.process import MARK
from hematovision.report.progress import Progress, spoken_time
from hematovision.report.steps import STEPS, Step, plan_jobs

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study(tmp_path / "study")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study run to its end; tests that change nothing share it."""
    study = Study(tmp_path_factory.mktemp("finished") / "study")
    done = study.run()
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done in") == 7
    return study


@pytest.fixture
def done_study(finished: Study, tmp_path: Path) -> Study:
    """A study run to its end, to change."""
    return Study(tmp_path / "study", like=finished)


def _running(study: Study) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == str(study.artifacts) and process.status() != "zombie":
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def _wait_until(condition, seconds: float = 240.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


# -- notebooks and the table ---------------------------------------------------------------------


def test_parameters_get_values_of_the_profile(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEMATOVISION_HOME", str(study.root))
    profile = load_profile("quick", {"head_epochs": "3", "weights.vgg16": "imagenet"})
    path = study.root / "notebooks" / "03_transfer_learning.ipynb"
    assert read_parameters(path)["backbone"] == "mobilenetv2"
    assert bind_parameters(path, profile, "vgg16") == {
        "profile": "quick",
        "backbone": "vgg16",
        "head_epochs": 3,
        "weights": "imagenet",
    }


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        (None, "no cell tagged 'parameters'"),
        ("profile = 'quick'\nlearning_speed = 3", "'learning_speed' that no profile knows"),
        ("profile = 'quick'\nseed = 1 + compute()", "the value of seed is no literal"),
        ("import os", "line 1 is no assignment"),
        ("profile = ", "can't be read"),
    ],
)
def test_a_bad_parameters_cell_stops_the_run_before_any_work(
    study: Study, cell: str | None, words: str
) -> None:
    study.write_notebook("05_comparison", cell, ["pass"])
    done = study.run()
    assert done.returncode == 2
    assert words in done.stderr
    assert "05_comparison.ipynb" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (study.artifacts / "eda.json").exists()


def test_outputs_and_metadata_do_not_change_the_key(study: Study) -> None:
    path = study.root / "notebooks" / "01_eda.ipynb"
    before = source_key(path)
    notebook = json.loads(path.read_text())
    notebook["metadata"]["noise"] = 1
    notebook["cells"][-1]["execution_count"] = 9
    notebook["cells"][-1]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": ["hello"]}]
    path.write_text(json.dumps(notebook))
    assert source_key(path) == before
    notebook["cells"][-1]["source"] += "\nprint(1)"
    path.write_text(json.dumps(notebook))
    assert source_key(path) != before


def test_jobs_follow_the_table(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEMATOVISION_HOME", str(study.root))
    profile = load_profile("quick")
    jobs = {job.name: job for job in plan_jobs(profile)}
    assert list(jobs)[2:4] == ["03_transfer_learning-vgg16", "03_transfer_learning-mobilenetv2"]
    assert jobs["05_comparison"].after == tuple(list(jobs)[2:4])
    extra = Step("07_more", "07_more.ipynb", "More", "And then?", "", after=("06_generalisation",))
    with pytest.raises(ConfigError, match=r"no notebook notebooks/07_more\.ipynb"):
        plan_jobs(profile, (*STEPS, extra))
    left_out = Step("08", "08.ipynb", "t", "q", "", when=lambda p: p.dataset != "synthetic")
    assert "08" not in {job.name for job in plan_jobs(profile, (*STEPS, left_out))}
    with pytest.raises(ConfigError, match="depends on 'nothing'"):
        plan_jobs(profile, (Step("a", "01_eda.ipynb", "t", "q", "", after=("nothing",)),))


# -- what is due ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_only_what_changed_is_run_again(done_study: Study) -> None:
    study, before = done_study, done_study.results()
    began = seconds_of_children()
    again = study.run()
    assert again.stdout.count("up to date") == 8
    # imports and a few hundred stat calls: far under the 15 s that are allowed
    assert seconds_of_children() - began < 10
    assert study.results() == before

    # text of a notebook whose files stay the same touches nothing after it
    study.add_cells("01_eda", "print('a thought')")
    again = study.run()
    assert again.stdout.count("done in") == 2
    assert "02_preprocessing                  up to date" in again.stdout

    # a value reaches the notebooks that ask for it, and all that read their files
    again = study.run("--set", "cell_size=48")
    assert "01_eda                            up to date" in again.stdout
    assert "02_preprocessing                  done" in again.stdout
    assert json.loads((study.root / "models/quick/vgg16/model.json").read_text())[0][0] == 48
    assert study.manifest()["overrides"] == {"cell_size": "48"}

    # a file that went missing is made again
    (study.artifacts / "predictions" / "vgg16.json").unlink()
    again = study.run("--set", "cell_size=48")
    assert "03_transfer_learning-vgg16        done" in again.stdout
    assert "03_transfer_learning-mobilenetv2  up to date" in again.stdout
    assert (study.artifacts / "predictions" / "vgg16.json").exists()


@pytest.mark.slow
def test_models_that_are_no_longer_asked_for_are_not_published(done_study: Study) -> None:
    assert done_study.run("--set", "backbones=[mobilenetv2]").returncode == 0
    assert {p.name for p in (done_study.root / "models" / "quick").iterdir()} == {"mobilenetv2"}


@pytest.mark.slow
def test_force_runs_everything(done_study: Study) -> None:
    assert done_study.run("--force").stdout.count("done in") == 7


@pytest.mark.slow
def test_backbones_run_side_by_side_with_the_same_result(done_study: Study, finished: Study) -> None:
    meet = (
        "import time; (seen.parent / f'{backbone}.start').touch(); end = time.monotonic() + 200\n"
        "while len(list(seen.parent.glob('*.start'))) < 2:\n"
        "    assert time.monotonic() < end, 'the other did not start'\n"
        "    time.sleep(0.1)"
    )
    done_study.add_cells("03_transfer_learning", meet)
    done = done_study.run("--jobs", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done in") == 3
    assert done_study.results() == finished.results()


@pytest.mark.slow
def test_plain_doit_runs_the_same_graph(done_study: Study) -> None:
    shutil.copy(ROOT / "dodo.py", done_study.root)

    def doit(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "doit", *arguments],
            cwd=done_study.root,
            env=done_study.environment(),
            capture_output=True,
            text=True,
            check=False,
        )

    listed = doit("list").stdout
    assert all(name in listed for name in ("prepare", "03_transfer_learning-vgg16", "publish"))
    done_study.add_cells("06_generalisation", "print('more')")
    done = doit("-n", "2")
    assert done.returncode == 0, done.stderr
    assert "[2/7] 02_preprocessing                  up to date" in done.stdout
    assert "[7/7] publish                           done" in done.stdout
    done_study.add_cells("06_generalisation", "1 / 0")
    failed = doit()
    assert failed.returncode
    assert "06_generalisation stopped at code cell" in failed.stdout + failed.stderr


# -- kills ---------------------------------------------------------------------------------------

KILL_AT = """
import os, signal, sys
count, limit = 0, int(sys.argv[1])
def counted(original):
    def call(*arguments, **options):
        global count
        count += 1
        if count == limit:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)
    return call
for name in ("rename", "replace", "mkdir", "unlink"):
    setattr(os, name, counted(getattr(os, name)))
from hematovision.cli import main
sys.exit(main(["report", *sys.argv[2:]]))
"""
"""The run kills itself before the n-th time that it renames, makes or removes a file or folder."""


@pytest.mark.slow
def test_killed_at_any_change_of_a_file_it_goes_on(study: Study, finished: Study) -> None:
    """One study, killed ever later until it comes to its end."""
    only = ("--set", "backbones=[mobilenetv2]")
    kills = 0
    for limit in range(4, 400, 6):
        done = study.run(str(limit), *only, program=KILL_AT)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        kills += 1
    assert done.returncode == 0
    assert kills > 5
    model = "models/quick/mobilenetv2/model.json"
    assert study.results()[model] == finished.results()[model]
    assert not list((study.root / "reports").glob(".quick.*"))


@pytest.mark.slow
def test_killed_at_any_moment_of_publishing_nothing_good_is_lost(done_study: Study, finished: Study) -> None:
    publication = done_study.artifacts / "run" / "steps" / "publish.json"
    for limit in range(1, 400, 5):
        publication.unlink(missing_ok=True)
        done = done_study.run(str(limit), program=KILL_AT)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        # the report is there, except between the two renames of its replacement
        holders = list((done_study.root / "reports").glob(".quick.*"))
        assert done_study.report.is_dir() or any((holder / "old").is_dir() for holder in holders)
    assert done.returncode == 0
    assert limit > 20  # renames and folders of models and report alone are more
    assert done_study.results() == finished.results()
    assert (done_study.report / "index.html").is_file()
    assert not list((done_study.root / "reports").glob(".quick.*"))


@pytest.mark.slow
@pytest.mark.parametrize("step", ["01_eda", "03_transfer_learning", "06_generalisation"])
def test_killed_within_a_notebook_no_kernel_is_left_and_it_goes_on(
    done_study: Study, finished: Study, step: str
) -> None:
    study = done_study
    study.add_cells(step, "import time\nif not seen.exists(): seen.touch(); time.sleep(300)")
    process = study.start()
    _wait_until(study.seen.exists)
    assert _running(study)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    _wait_until(lambda: not _running(study), 30)
    done = study.run()
    assert done.returncode == 0, done.stderr
    assert study.results() == finished.results()


@pytest.mark.slow
def test_workers_of_a_killed_run_are_ended_by_the_next(done_study: Study) -> None:
    study = done_study
    worker = (
        "import subprocess, sys, time\n"
        "if not seen.exists():\n"
        "    command = [sys.executable, '-c', 'import time; time.sleep(300)']\n"
        "    write_json(seen, subprocess.Popen(command, start_new_session=True).pid)\n"
        "    time.sleep(300)"
    )
    study.add_cells("06_generalisation", worker)
    process = study.start()
    _wait_until(study.seen.exists)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    pid = json.loads(study.seen.read_text())
    assert psutil.pid_exists(pid)
    assert study.run().returncode == 0
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie"


@pytest.mark.slow
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_ctrl_c_ends_in_one_line_and_keeps_what_was_done(done_study: Study, jobs: str) -> None:
    study = done_study
    study.add_cells("01_eda", "write_json(out / 'more.json', 1)")
    study.add_cells("02_preprocessing", "import time; seen.touch(); time.sleep(300)")
    process = study.start("--jobs", jobs)
    _wait_until(study.seen.exists)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err == "hematovision: stopped; what was done is kept, the same command goes on from here\n"
    assert "Traceback" not in out
    assert not _running(study)
    study.add_cells("02_preprocessing")
    assert "01_eda                            up to date" in study.run().stdout


# -- errors --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_failing_notebook_leaves_the_last_good_report_and_says_where(done_study: Study) -> None:
    study = done_study
    good, page = study.results(), (study.report / "index.html").read_bytes()
    study.add_cells("05_comparison", "total = 1", "ratio = total / 0")
    done = study.run()
    assert done.returncode == 2
    assert done.stderr.startswith("hematovision: 05_comparison stopped at code cell ")
    assert "notebooks/05_comparison.ipynb" in done.stderr
    assert "ratio = total / 0" in done.stderr
    assert "ZeroDivisionError: division by zero" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) < 12
    assert "06_generalisation                 started" not in done.stdout
    assert study.results() == good
    assert (study.report / "index.html").read_bytes() == page
    assert (study.artifacts / "run" / "failed" / "05_comparison.ipynb").is_file()


@pytest.mark.slow
def test_an_error_of_ours_in_a_notebook_is_its_one_line(study: Study) -> None:
    raising = (
        "from hematovision.errors import DataError\nraise DataError('labels.csv is empty', 'restore it')"
    )
    study.add_cells("01_eda", raising)
    done = study.run()
    assert "  error     labels.csv is empty: restore it\n" in done.stderr


@pytest.mark.slow
def test_a_kernel_that_dies_is_said_so(study: Study) -> None:
    study.add_cells("01_eda", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    done = study.run()
    assert done.returncode == 2
    assert "the kernel died" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_time_limit_ends_the_run(done_study: Study) -> None:
    study = done_study
    study.add_cells("02_preprocessing", "import time; time.sleep(300)")
    began = time.monotonic()
    done = study.run("--set", "time_limit_minutes=0.2")
    assert time.monotonic() - began < 200  # and not the 300 s of the cell
    assert done.returncode == 2
    assert "may run 0.2 minutes; stopped 02_preprocessing" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "01_eda                            up to date" in done.stdout  # the limit is no step's input
    assert not _running(study)


@pytest.mark.slow
def test_a_second_run_of_the_profile_is_told_so(done_study: Study) -> None:
    study = done_study
    study.add_cells("06_generalisation", "import time; seen.touch()\nwhile seen.exists(): time.sleep(0.1)")
    first = study.start()
    _wait_until(study.seen.exists)
    second = study.run()
    assert second.returncode == 2
    assert f"a run of profile 'quick' is going on (process {first.pid})" in second.stderr
    assert len(second.stderr.splitlines()) == 1
    study.seen.unlink()
    first.communicate(timeout=240)
    assert first.returncode == 0


def test_an_unknown_profile_key_or_value_is_one_line(study: Study) -> None:
    for arguments, words in (
        (("--profile", "huge"), "there is no profile 'huge'"),
        (("--set", "sead=3"), "unknown key 'sead'"),
        (("--set", "seed=soon"), "'seed' is 'soon'"),
        (("--set", "seed"), "has no value"),
        (
            ("--set", "dataset=blood-cells", "--data", str(study.root / "none")),
            "the data set 'blood-cells' is not at",
        ),
    ):
        done = study.run(*arguments)
        assert done.returncode == 2
        assert words in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_missing_weights_stop_the_run_before_any_work(study: Study, tmp_path: Path) -> None:
    done = study.run("--set", f"weights={tmp_path / 'absent.weights.h5'}")
    assert done.returncode == 2
    assert "absent.weights.h5" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "started" not in done.stdout


@pytest.mark.slow
def test_imagenet_weights_without_a_network_stop_the_run_before_any_work(
    study: Study, tmp_path: Path
) -> None:
    closed = {f"{p}_proxy": "http://127.0.0.1:9" for p in ("http", "https", "HTTP", "HTTPS")}
    done = study.run("--set", "weights=imagenet", KERAS_HOME=str(tmp_path / "keras"), **closed)
    assert done.returncode == 2
    (error,) = done.stderr.splitlines()
    assert error.startswith("hematovision: the ImageNet weights ")
    assert "--set weights=none" in error
    assert "started" not in done.stdout
    assert not (study.artifacts / "eda.json").exists()


def test_an_output_folder_that_cannot_be_written_is_named(study: Study) -> None:
    # a file in the place of the folder refuses root as well
    (study.root / "reports").write_text("not a folder")
    done = study.run()
    assert done.returncode == 2
    assert str(study.root / "reports") in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.fixture
def small_disk(tmp_path: Path):
    """A disk of 12 MB, or skip where one may not be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_too_small_a_disk_is_seen_before_any_work(study: Study, small_disk: Path) -> None:
    done = study.run(HEMATOVISION_CACHE=str(small_disk))
    assert done.returncode == 2
    assert "MB left, this run needs about" in done.stderr
    assert "started" not in done.stdout


@pytest.mark.slow
def test_a_disk_that_fills_up_keeps_the_last_good_report(done_study: Study, small_disk: Path) -> None:
    study, good = done_study, done_study.results()
    study.add_cells("01_eda", "_ = (out / 'big.bin').write_bytes(bytes(30_000_000))")
    # the check beforehand can't know what a notebook will write
    blind = (
        "import sys; from hematovision.report import run; run._MODEL_MB = 0\n"
        "from hematovision.cli import main; sys.exit(main(['report']))"
    )
    done = study.run(program=blind, HEMATOVISION_CACHE=str(small_disk))
    assert done.returncode == 2
    assert "disk is full" in done.stderr or "No space left" in done.stderr
    assert "Traceback" not in done.stderr
    assert study.results() == good


# -- progress and provenance ---------------------------------------------------------------------


@pytest.mark.slow
def test_the_manifest_tells_where_a_report_comes_from(finished: Study) -> None:
    manifest = finished.manifest()
    assert manifest["profile"] == build_profile(manifest["profile"]).to_dict()
    assert manifest["hardware"]["cores"] >= 1
    assert manifest["packages"]["papermill"]
    assert manifest["code"]["version"]
    steps = manifest["times"]["steps"]
    assert set(steps) >= {"01_eda", "03_transfer_learning-vgg16"}
    assert all(s["seconds"] > 0 and s["peak_memory_mb"] > 10 for s in steps.values())
    assert str(finished.root) not in json.dumps(manifest)


def test_progress_on_a_terminal_is_one_line_rewritten(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(list):
        def write(self, text: str) -> None:
            self.append(text)

        def flush(self) -> None:
            pass

        def isatty(self) -> bool:
            return True

    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    screen = Terminal()
    progress = Progress(screen, ["a", "b"], {"a": 60.0, "b": 30.0}, {"a", "b"})
    progress.start("a")
    progress.cell("a", 2, 9)
    now[0] = 20.0
    progress.tick()
    assert "[1/2] a, cell 2 of 9, 20 s" in screen[-1]
    assert "about 1 min 10 s left" in screen[-1]
    assert "\n" not in screen[-1]
    drawn = len(screen[-1])
    progress.end("a")
    assert "\r" + " " * drawn + "\r" in screen
    assert "done in 20 s" in "".join(screen)


@pytest.mark.parametrize(
    ("seconds", "words"), [(41.2, "41 s"), (185, "3 min 05 s"), (3599.7, "1 h 00 min"), (4800, "1 h 20 min")]
)
def test_durations_are_spoken(seconds: float, words: str) -> None:
    assert spoken_time(seconds) == words
