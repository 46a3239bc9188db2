"""One notebook in a process of its own: reads what to do on stdin, tells what happens on stdout.

Run as ``python -m hematovision.report.tied PARENT hematovision.report.execute``. Papermill, the
kernel's client and whatever they print stay out of the runner, which can kill this process at any
time.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any, TextIO

import papermill
from nbclient.exceptions import DeadKernelError
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError

from hematovision.files import write_json

KERNEL = "hematovision-run"
START_TIMEOUT = 180
"""Seconds a kernel may take to answer; the first import on a cold disk is slow."""


class _Engine(NBClientEngine):
    """Papermill's engine, telling each cell as it starts."""

    tell: TextIO

    @classmethod
    def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **options: Any) -> Any:
        code = [i for i, cell in enumerate(nb_man.nb.cells) if cell.cell_type == "code"]
        start = nb_man.cell_start

        def cell_start(cell: Any, cell_index: int | None = None, **more: Any) -> Any:
            if cell_index in code:
                _say(cls.tell, cell=code.index(cell_index) + 1, cells=len(code))
            return start(cell, cell_index, **more)

        nb_man.cell_start = cell_start
        return super().execute_managed_notebook(nb_man, kernel_name, **options)


def _say(stream: TextIO, **event: Any) -> None:
    print(json.dumps(event), file=stream, flush=True)


def _install_kernel(folder: Path) -> None:
    # a kernel of our own: a user's kernelspec called python3 may point at another Python
    write_json(
        folder / "kernels" / KERNEL / "kernel.json",
        {
            "argv": [
                *(sys.executable, "-m", "hematovision.report.tied", str(os.getpid())),
                *("ipykernel_launcher", "-f", "{connection_file}"),
                # the history is a database in the user's home, which two kernels at once may lock
                "--HistoryManager.enabled=False",
            ],
            "display_name": "HematoVision",
            "language": "python",
        },
    )
    os.environ["JUPYTER_PATH"] = str(folder)
    os.environ["JUPYTER_RUNTIME_DIR"] = str(folder / "runtime")
    os.environ["IPYTHONDIR"] = str(folder / "ipython")


def execute(spec: dict[str, Any], tell: TextIO) -> None:
    """Execute a notebook with the given parameters, telling its progress.

    Parameters
    ----------
    spec : dict
        ``notebook``, ``output``, ``folder`` (working directory), ``jupyter`` (folder for Jupyter's
        own files) and ``parameters``.
    tell : text stream
        Gets one JSON object a line: ``{"cell", "cells"}`` as each starts, at the end either
        ``{"done", "peak_mb"}`` or ``{"error": {"kind", "message", "source"}}``.
    """
    _install_kernel(Path(spec["jupyter"]))
    _Engine.tell = tell
    papermill_engines.register("hematovision", _Engine)
    try:
        papermill.execute_notebook(
            spec["notebook"],
            spec["output"],
            parameters=spec["parameters"],
            engine_name="hematovision",
            kernel_name=KERNEL,
            language="python",
            cwd=spec["folder"],
            progress_bar=False,
            start_timeout=START_TIMEOUT,
        )
    except PapermillExecutionError as error:
        _say(
            tell,
            error={
                "kind": error.ename,
                "message": error.evalue,
                "cell": error.exec_count,
                "source": error.source,
            },
        )
    except DeadKernelError:
        _say(tell, error={"kind": "", "message": "the kernel died; most likely memory ran out", "source": ""})
    except OSError as error:
        _say(tell, error={"kind": "OSError", "errno": error.errno, "message": str(error), "source": ""})
    else:
        # kilobytes on Linux, bytes on macOS
        unit = 1024**2 if sys.platform == "darwin" else 1024
        _say(tell, done=True, peak_mb=round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / unit))


if __name__ == "__main__":
    # only events go to the runner; whatever a library prints goes to the log
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    execute(json.load(sys.stdin), events)
