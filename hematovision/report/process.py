"""Finding and ending what a killed run has left behind."""

from __future__ import annotations

import contextlib
import os

import psutil

MARK = "HEMATOVISION_RUN"
"""Environment variable that every process of a run carries: the run's folder."""
JOB_MARK = "HEMATOVISION_JOB"
"""Environment variable that every process of a job carries: its name."""


def end_processes(folder: str, job: str | None = None) -> int:
    """Kill every process that a run has left behind, workers of notebooks included.

    Parameters
    ----------
    folder : str
        The run's folder, as in `MARK`.
    job : str, optional
        Only those of one job.

    Returns
    -------
    int
        How many there were.
    """
    spared = {os.getpid(), *(p.pid for p in psutil.Process().parents())}
    found = []
    for process in psutil.process_iter():
        # another user's processes can't be read, and any may end meanwhile
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid in spared:
                continue
            environment = process.environ()
            if environment.get(MARK) == folder and job in (None, environment.get(JOB_MARK)):
                process.kill()
                found.append(process)
    psutil.wait_procs(found, timeout=10)
    return len(found)
