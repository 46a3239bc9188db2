"""The command line: thin, fast, and never a traceback."""

from __future__ import annotations

import errno
import subprocess
import sys

import pytest
from study import seconds_of_children

from hematovision import cli
from hematovision.errors import DataError


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch):
    """Return a function that makes the command ``report`` raise."""

    def install(error: BaseException) -> None:
        def run(_options: object) -> int:
            raise error

        command = cli.Command("report", "fail", cli._report_arguments, run)
        monkeypatch.setattr(cli, "COMMANDS", (command,))

    return install


@pytest.mark.parametrize("command", [c.name for c in cli.COMMANDS])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    assert f"hematovision {command}" in capsys.readouterr().out


def test_no_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([])
    assert stopped.value.code == 2
    assert "usage: hematovision" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (DataError("labels.csv is empty", "restore it"), "hematovision: labels.csv is empty: restore it"),
        (OSError(errno.ENOSPC, "No space", "/x/y"), "hematovision: cannot use /x/y: the disk is full"),
        (OSError(errno.ENOSPC, "No space left"), "hematovision: no space left"),
        (ValueError("two\nlines"), "hematovision: unexpected ValueError: two lines"),
    ],
)
def test_an_error_is_one_line(
    failing, capsys: pytest.CaptureFixture[str], error: Exception, line: str
) -> None:
    failing(error)
    assert cli.main(["report"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(line)
    assert len(err.splitlines()) == 1


def test_debug_shows_the_traceback(
    failing, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(ValueError("oh"))
    assert cli.main(["--debug", "report"]) == 2
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("HEMATOVISION_DEBUG", "1")
    assert cli.main(["report"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_is_one_line(failing, capsys: pytest.CaptureFixture[str]) -> None:
    failing(KeyboardInterrupt())
    assert cli.main(["report"]) == 130
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_report_gets_what_was_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hematovision.report import run

    asked = {}
    monkeypatch.setattr(
        run, "run_report", lambda profile, **more: asked.update(more, profile=profile) or "i.html"
    )
    arguments = [
        "--profile",
        "full",
        "--set",
        "seed=3",
        "--set",
        "weights.vgg16=a=b",
        "--jobs",
        "2",
        "--force",
    ]
    assert cli.main(["report", *arguments]) == 0
    assert asked == {
        "profile": "full",
        "data": None,
        "overrides": {"seed": "3", "weights.vgg16": "a=b"},
        "jobs": 2,
        "force": True,
    }
    assert capsys.readouterr().out == "report: i.html\n"


@pytest.mark.parametrize("number", ["0", "-1", "two"])
def test_a_number_of_jobs_is_checked(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["report", "--jobs", number])
    assert "--jobs" in capsys.readouterr().err


def test_a_manifest_is_refused_for_a_set_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["manifest", "nothing", "--out", "x.csv"]) == 2
    assert "there is no data set 'nothing'" in capsys.readouterr().err


def test_help_is_fast() -> None:
    command = [sys.executable, "-c", "from hematovision.cli import main; main(['--help'])"]
    times = []
    for _ in range(3):
        before = seconds_of_children()
        subprocess.run(command, check=True, capture_output=True)
        times.append(seconds_of_children() - before)
    # 0.13 s alone on the machine, where importing TensorFlow takes 5
    assert min(times) < 0.5
