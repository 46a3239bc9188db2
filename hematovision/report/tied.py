"""Run a module in a process that dies with the one that started it.

``python -m hematovision.report.tied PARENT MODULE [ARGUMENT ...]``, where PARENT is the process id
of the starter. A runner that is killed with ``kill -9`` can end nothing itself; on Linux the
system then kills what is tied to it (elsewhere IPython's own watch on its parent does so within a
second or two). This module imports nothing slow, so that the tie holds from the first moment.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Have the system kill this process when its parent dies; leave at once if that has happened."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    module = sys.argv[2]
    sys.argv = sys.argv[2:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
