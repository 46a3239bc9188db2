"""The graph of the study for plain `doit`: ``PROFILE=full DATA=DIR doit -n 2``.

``hematovision report`` runs the same graph, and shows its progress.
"""

import os

from hematovision.config import load_profile
from hematovision.report.run import PUBLISH, Run

DOIT_CONFIG = {
    "backend": "sqlite3",
    "dep_file": ".doit.sqlite3",
    "par_type": "thread",
    "default_tasks": [PUBLISH],
}


def task_report():
    """One task a notebook, and the publication of report and models."""
    run = Run(load_profile(os.environ.get("PROFILE", "quick")), data=os.environ.get("DATA"))
    yield from run.tasks()
