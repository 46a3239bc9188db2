"""The runner: doit decides which notebooks are due, papermill runs them, complete things are published.

Three rules make a run that is killed at any moment go on with the same result: a job is recorded
only when it is complete (`records`), whatever stands under a final name was renamed to it, and no
process of a run outlives the runner (`tied`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, TextIO

from doit.cmd_base import TaskLoader2
from doit.dependency import JsonDB
from doit.doit_cmd import DoitMain
from doit.exceptions import TaskFailed
from doit.loader import generate_tasks
from doit.reporter import ZeroReporter

from hematovision.config import (
    Profile,
    artifacts,
    cache_folder,
    data_folder,
    load_profile,
    model_folder,
    project_root,
    report_folder,
)
from hematovision.errors import HematoVisionError
from hematovision.files import atomic_path, check_writable, content_key, explain_os_error
from hematovision.report import inputs, records
from hematovision.report.notebook import bind_parameters, read_cells, source_key
from hematovision.report.process import JOB_MARK, MARK, end_processes
from hematovision.report.progress import Progress, spoken_time
from hematovision.report.records import RUN, Record
from hematovision.report.steps import STEPS, Job, Step, plan_jobs

PUBLISH = "publish"
PREPARE = "prepare"
_MEGABYTE = 1024**2
_MODEL_MB = 150
"""Disk for one backbone's model and checkpoint: VGG16, the largest, has 15 million values kept twice."""


_NOTE_SECONDS = 10.0
"""Between two notes of how long a job has been going on: what a kill may lose of its time."""


class StepFailed(HematoVisionError):
    """A notebook that stopped.

    Attributes
    ----------
    block : str
        A few lines for the reader: the notebook, the cell, its source and what was raised.
    """

    def __init__(self, what: str, block: str) -> None:
        super().__init__(what)
        self.block = block


class Run:
    """One run of a profile: its jobs as tasks of doit, and what they share.

    Parameters
    ----------
    profile : Profile
    overrides : mapping of str to str, optional
        The ``--set`` values that led to ``profile``; noted in ``manifest.json``.
    data : str or Path, optional
        Folder that holds the image sets.
    steps : tuple of Step, optional
    stream : text stream, optional
        Gets the progress.
    force : bool, optional
        Run every job again.
    """

    def __init__(
        self,
        profile: Profile,
        overrides: Mapping[str, Any] | None = None,
        data: str | Path | None = None,
        steps: tuple[Step, ...] = STEPS,
        stream: TextIO | None = None,
        force: bool = False,
    ) -> None:
        self.profile = profile
        self.overrides = dict(overrides or {})
        self.data = data_folder(data)
        self.folder = artifacts(profile.name).resolve()
        self.jobs = plan_jobs(profile, steps)
        self.failure: Exception | None = None
        self._stream = stream or sys.stdout
        self._force = force
        self._children: set[subprocess.Popen[bytes]] = set()
        self._guard = threading.Lock()
        self._lock: IO[str] | None = None
        self._deadline = float("inf")

    def tasks(self) -> Iterator[dict[str, Any]]:
        """Yield the tasks for doit: a preparation, one task a job, and the publication."""
        plain = {"io": {"capture": False}, "verbosity": 2}
        yield {
            "basename": PREPARE,
            "doc": "take the lock, check everything",
            "actions": [self._prepare],
            **plain,
        }
        for job in self.jobs:
            yield {
                "basename": job.name,
                "doc": job.step.question,
                "actions": [(self._guarded, [job.name, self._run_job, job])],
                "uptodate": [(self._is_current, [job])],
                "task_dep": [PREPARE, *job.after],
                **plain,
            }
        yield {
            "basename": PUBLISH,
            "doc": "make the pages, put report and models under their final names",
            "actions": [(self._guarded, [PUBLISH, self._publish])],
            "uptodate": [self._is_published],
            "task_dep": [job.name for job in self.jobs] or [PREPARE],
            **plain,
        }

    def close(self) -> None:
        """End what is still running and give up the lock."""
        if self._lock is None:
            return
        for child in list(self._children):
            child.kill()
        end_processes(str(self.folder))
        self._lock.close()
        self._lock = None

    # -- before any work ---------------------------------------------------------------------

    def _prepare(self) -> TaskFailed | None:
        try:
            self._check_writable()
            self._lock = self._take_lock()
            end_processes(str(self.folder))
            self._sweep()
            self._read_inputs()
            due = self._due()
            if due - {PUBLISH}:
                self._check_disk(due)
                self._check_weights()
            self._announce(due)
        except Exception as error:
            self.failure = error
            return TaskFailed(getattr(error, "block", str(error)))
        return None

    def _check_writable(self) -> None:
        for folder in (self.folder / RUN, report_folder(self.profile.name).parent, model_folder("").parent):
            check_writable(folder)

    def _take_lock(self) -> IO[str]:
        path = self.folder / RUN / "lock"
        handle = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - it is held until the run ends
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            other = handle.read().strip() or "?"
            handle.close()
            raise HematoVisionError(
                f"a run of profile '{self.profile.name}' is going on (process {other})",
                "wait for it to end, or stop it",
            ) from None
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        return handle

    def _sweep(self) -> None:
        """Clear away what a killed run left half done, and bring back what it was replacing."""
        shutil.rmtree(self.folder / RUN / "jupyter", ignore_errors=True)
        for final in (report_folder(self.profile.name), model_folder(self.profile.name)):
            for holder in final.parent.glob(f".{final.name}.*"):
                old = holder / "old"
                if old.exists() and not final.exists():
                    os.rename(old, final)
                shutil.rmtree(holder, ignore_errors=True)

    def _read_inputs(self) -> None:
        self._data_key = inputs.data_key(self.profile, self.data)
        self._library_key = inputs.library_key()
        self._page_key = inputs.page_key()
        self._versions = inputs.numeric_versions()
        self._parameters = {
            job.name: bind_parameters(job.path, self.profile, job.backbone) for job in self.jobs
        }
        self._sources = {job.name: source_key(job.path) for job in self.jobs}
        if self._force:
            self._force = False
            for name in (*(job.name for job in self.jobs), PUBLISH):
                if record := records.read_record(self.folder, name):
                    records.write_record(self.folder, name, dataclasses.replace(record, key=""))

    def _due(self) -> set[str]:
        due: set[str] = set()
        for job in self.jobs:
            if due & set(job.after) or not self._is_current(job, quiet=True):
                due.add(job.name)
        if due or not self._is_published(quiet=True):
            due.add(PUBLISH)
        return due

    def _check_disk(self, due: set[str]) -> None:
        images = inputs.count_files(self.profile, self.data)
        models = len({job.backbone for job in self.jobs if job.backbone and job.name in due})
        needed = images * 3 * self.profile.cell_size**2 / _MEGABYTE + models * _MODEL_MB
        for folder in {self.folder, report_folder(self.profile.name).parent}:
            free = shutil.disk_usage(folder).free / _MEGABYTE
            if free < needed:
                raise HematoVisionError(
                    f"the disk of {folder} has {free:.0f} MB left, this run needs about {needed:.0f} MB",
                    "free some space, or set HEMATOVISION_CACHE to a folder on another disk",
                )

    def _check_weights(self) -> None:
        from hematovision.learn.backbones import check_weights

        check_weights(self.profile)

    def _announce(self, due: set[str]) -> None:
        names = [*(job.name for job in self.jobs), PUBLISH]
        known = {name: r.seconds for name in names if (r := records.read_record(self.folder, name))}
        self._progress = Progress(self._stream, names, known, due)
        limit = self.profile.time_limit_minutes * 60
        self._deadline = time.monotonic() + limit
        ahead = f"about {spoken_time(sum(known[n] for n in due))}, " if due and due <= set(known) else ""
        self._progress.say(
            f"report '{self.profile.name}': {len(due)} of {len(names)} steps to do, "
            + (f"{ahead}at most {spoken_time(limit)}" if due else "all up to date")
        )

    # -- a job -------------------------------------------------------------------------------

    def _key(self, job: Job) -> str:
        before = {name: r.outputs for name in job.after if (r := records.read_record(self.folder, name))}
        return content_key(
            job.name,
            self._sources[job.name],
            self._parameters[job.name],
            self._library_key,
            self._versions,
            self._data_key,
            inputs.weights_key(self._parameters[job.name]),
            before,
        )

    def _is_current(self, job: Job, quiet: bool = False) -> bool:
        current = records.is_current(self.folder, job.name, self._key(job))
        if current and not quiet:
            self._progress.skip(job.name)
        return current

    def _guarded(self, name: str, action: Any, *arguments: Any) -> TaskFailed | None:
        """Run an action of doit, keeping the first failure for the caller of the run."""
        self._progress.start(name)
        try:
            action(*arguments)
        except Exception as error:
            with self._guard:
                self.failure = self.failure or error
            self._progress.end(name, "failed")
            return TaskFailed(getattr(error, "block", str(error)))
        self._progress.end(name)
        return None

    def _run_job(self, job: Job) -> None:
        key = self._key(job)
        started = time.monotonic()
        records.begin_job(self.folder, job.name, key)
        before = records.seconds_before(self.folder, job.name)
        executed = records.executed_path(self.folder, job.name)
        with atomic_path(executed) as partial:
            last = self._execute(job, partial)
            if "error" in last:
                raise self._explain(job, last["error"], partial)
        record = Record(
            key=key,
            outputs=records.finish_job(self.folder, job.name, job.backbone),
            seconds=round(before + time.monotonic() - started, 2),
            peak_mb=last["peak_mb"],
            finished=_now(),
        )
        records.write_record(self.folder, job.name, record)
        records.forget_begin(self.folder, job.name)

    def _execute(self, job: Job, output: Path) -> dict[str, Any]:
        """Run the notebook in a process of its own; return the last event that it told."""
        log_path = self.folder / RUN / "logs" / f"{job.name}.txt"
        log_path.parent.mkdir(exist_ok=True)
        spec = {
            "notebook": str(job.path),
            "output": str(output),
            "folder": str(job.path.parent),
            "jupyter": str(self.folder / RUN / "jupyter" / job.name),
            "parameters": self._parameters[job.name],
        }
        command = (sys.executable, "-m", "hematovision.report.tied", str(os.getpid()))
        with open(log_path, "wb") as log:
            child = subprocess.Popen(
                [*command, "hematovision.report.execute"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self._environment(job),
                start_new_session=True,  # a Ctrl-C at the terminal is the runner's to handle
            )
        self._children.add(child)
        try:
            assert child.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(json.dumps(spec).encode())
                child.stdin.close()
            last = self._follow(job, child)
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
                end_processes(str(self.folder), job.name)
            self._children.discard(child)
        if not {"done", "error"} & set(last):
            raise HematoVisionError(
                f"{job.name} was ended from outside (status {child.returncode})",
                f"most likely memory ran out; what was done is kept, the log is {log_path}",
            )
        return last

    def _environment(self, job: Job) -> dict[str, str]:
        return {
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "PYTHONHASHSEED": "0",
            **os.environ,
            "HEMATOVISION_HOME": str(project_root()),
            "HEMATOVISION_CACHE": str(cache_folder()),
            "HEMATOVISION_DATA": str(self.data),
            MARK: str(self.folder),
            JOB_MARK: job.name,
        }

    def _follow(self, job: Job, child: subprocess.Popen[bytes]) -> dict[str, Any]:
        assert child.stdout is not None
        pipe, rest = child.stdout.fileno(), b""
        last: dict[str, Any] = {}
        began, noted = time.monotonic(), 0.0
        before = records.seconds_before(self.folder, job.name)
        while True:
            if select.select([pipe], [], [], 0.5)[0]:
                block = os.read(pipe, 65536)
                if not block:
                    child.wait()
                    return last
                *lines, rest = (rest + block).split(b"\n")
                for line in lines:
                    last = json.loads(line)
                    if "cell" in last:
                        self._progress.cell(job.name, last["cell"], last["cells"])
            self._progress.tick()
            if (spent := time.monotonic() - began) - noted > _NOTE_SECONDS:
                noted = spent
                records.note_seconds(self.folder, job.name, before + spent)
            if time.monotonic() > self._deadline:
                where = f" at cell {last['cell']} of {last['cells']}" if "cell" in last else ""
                raise HematoVisionError(
                    f"profile '{self.profile.name}' may run {self.profile.time_limit_minutes:g} minutes; "
                    f"stopped {job.name}{where}, what was done is kept",
                    "run again to go on, with more time by --set time_limit_minutes=N",
                )

    def _explain(self, job: Job, error: dict[str, Any], partial: Path) -> HematoVisionError:
        if error.get("errno"):
            return explain_os_error(OSError(error["errno"], error["message"]), self.folder)
        kept = self.folder / RUN / "failed" / f"{job.name}.ipynb"
        with contextlib.suppress(OSError):
            kept.parent.mkdir(exist_ok=True)
            os.replace(partial, kept)
        return _describe_failure(job, error, kept if kept.is_file() else None)

    # -- the end -----------------------------------------------------------------------------

    def _publish_key(self) -> str:
        done = [records.read_record(self.folder, job.name) for job in self.jobs]
        return content_key(
            [dataclasses.asdict(r) for r in done if r], self.profile.to_dict(), self.overrides, self._page_key
        )

    def _is_published(self, quiet: bool = False) -> bool:
        record = records.read_record(self.folder, PUBLISH)
        current = (
            record is not None
            and record.key == self._publish_key()
            and (report_folder(self.profile.name) / "index.html").is_file()
            and (not self._models() or model_folder(self.profile.name).is_dir())
        )
        if current and not quiet:
            self._progress.skip(PUBLISH)
        return current

    def _models(self) -> list[str]:
        owned = set()
        for job in self.jobs:
            if record := records.read_record(self.folder, job.name):
                owned |= {path for path in record.outputs if path.startswith("models/")}
        return sorted(path for path in owned if (self.folder / path).is_file())

    def _publish(self) -> None:
        from hematovision.report.page import build_report
        from hematovision.report.provenance import code_state, hardware, package_versions

        started = time.monotonic()
        key = self._publish_key()
        done = {j.name: records.read_record(self.folder, j.name) or Record("") for j in self.jobs}
        manifest = {
            "profile": self.profile.to_dict(),
            "overrides": self.overrides,
            "data": {"dataset": self.profile.dataset, "key": self._data_key},
            "code": {**code_state(), "library": self._library_key},
            "python": sys.version.split()[0],
            "packages": package_versions(),
            "seed": self.profile.seed,
            "hardware": hardware(),
            "times": {
                "published": _now(),
                "steps": {
                    name: {"seconds": r.seconds, "peak_memory_mb": r.peak_mb, "finished": r.finished}
                    for name, r in done.items()
                },
            },
        }
        with atomic_path(report_folder(self.profile.name)) as report:
            build_report(report, self.jobs, self.folder, manifest, data=self.data)
            # inside: where the pages can't be made, the models stay those that the last pages tell of
            if models := self._models():
                with atomic_path(model_folder(self.profile.name)) as folder:
                    for path in models:
                        target = folder / Path(path).relative_to("models")
                        target.parent.mkdir(parents=True, exist_ok=True)
                        shutil.copy2(self.folder / path, target)
        seconds = round(time.monotonic() - started, 2)
        records.write_record(self.folder, PUBLISH, Record(key, {}, seconds, 0, _now()))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _describe_failure(job: Job, error: dict[str, Any], kept: Path | None) -> StepFailed:
    code = [c["source"] for c in read_cells(job.path) if c["cell_type"] == "code"]
    source = error["source"].strip("\n")
    number = next((i + 1 for i, text in enumerate(code) if text.strip("\n") == source), None)
    where = f"code cell {number} of {len(code)}" if number else "the parameters cell"
    message = " ".join(error["message"].split())
    if error["kind"] and error["kind"] not in _names_of_errors(HematoVisionError):
        message = f"{error['kind']}: {message}"
    lines = [f"{job.name} stopped at {where}", f"  notebook  notebooks/{job.step.notebook}"]
    lines += [f"  {'cell' if i == 0 else '':<10}{line}" for i, line in enumerate(_excerpt(source))]
    lines += [f"  error     {message}"]
    if kept:
        lines += [f"  so far    {kept}"]
    lines += ["  The last good report is as it was; mend the cause and run the same command again."]
    return StepFailed(f"{job.name}, {where}: {message}", "\n".join(lines))


def _excerpt(source: str, most: int = 8) -> list[str]:
    lines = [line[:100] for line in source.splitlines() if line.strip()]
    return lines if len(lines) <= most else [*lines[: most - 1], "..."]


def _names_of_errors(kind: type[Exception]) -> set[str]:
    return {kind.__name__}.union(*(_names_of_errors(sub) for sub in kind.__subclasses__()))


class _Forgetful(JsonDB):
    """doit's store of states, kept in memory: `records` are the graph's memory, safe from a kill."""

    desc = "nothing on disk"

    def dump(self) -> None:
        pass


class _Silent(ZeroReporter):
    """doit's reporter; `Progress` speaks instead."""

    desc = "nothing"


class _Loader(TaskLoader2):
    """Hands the tasks of a `Run` to doit."""

    def __init__(self, run: Run, jobs: int) -> None:
        super().__init__()
        self._run, self._jobs = run, jobs

    def setup(self, opt_values: dict[str, Any]) -> None:
        pass

    def load_doit_config(self) -> dict[str, Any]:
        return {
            "backend": "forgetful",
            "dep_file": str(self._run.folder / RUN / "none"),
            "reporter": _Silent,
            "num_process": self._jobs if self._jobs > 1 else 0,
            "par_type": "thread",
            "default_tasks": [PUBLISH],
        }

    def load_tasks(self, cmd: Any, pos_args: list[str]) -> list[Any]:  # noqa: ARG002 - doit's interface
        return list(generate_tasks("report", self._run.tasks()))


def run_report(
    profile: str = "quick",
    *,
    data: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    jobs: int = 1,
    force: bool = False,
    steps: tuple[Step, ...] = STEPS,
    stream: TextIO | None = None,
) -> Path:
    """Run what is due of a profile's notebooks and publish report and models.

    Parameters
    ----------
    profile : str, optional
        Name of a profile.
    data : str or Path, optional
        Folder that holds ``blood-cells/`` and ``pbc/``.
    overrides : mapping, optional
        Values that replace the profile's, as for `config.load_profile`.
    jobs : int, optional
        How many notebooks may run side by side.
    force : bool, optional
        Run everything again.
    steps : tuple of Step, optional
        The table of notebooks.
    stream : text stream, optional
        Gets the progress; standard output if not given.

    Returns
    -------
    Path
        The report's first page.

    Raises
    ------
    StepFailed
        If a notebook stops; the last good report and models stay as they were.
    HematoVisionError
        If the run can't start (profile, data, weights, disk, another run), or its time is up.
    KeyboardInterrupt
        If stopped at the terminal; what was done is kept.
    """
    run = Run(load_profile(profile, overrides), overrides, data, steps, stream, force)
    main = DoitMain(
        _Loader(run, jobs),
        extra_config={"BACKEND": {"forgetful": f"{__name__}:_Forgetful"}},
        config_filenames=(),
    )
    try:
        status = main.run(["run"])
    finally:
        run.close()
    if run.failure is not None:
        raise run.failure
    if status:
        raise HematoVisionError(f"doit ended with status {status}", "see the lines above")
    return report_folder(profile) / "index.html"
