"""The one kind of error a user ever reads."""

from __future__ import annotations


class HematoVisionError(Exception):
    """Something the user can mend, said in one line.

    Parameters
    ----------
    what : str
        What is wrong, naming the file, folder or key.
    remedy : str, optional
        What to do about it.

    Notes
    -----
    The command line prints ``str(error)`` after ``hematovision: `` and exits with status 2; no
    traceback reaches a user. Anything else that is raised is a bug.
    """

    def __init__(self, what: str, remedy: str = "") -> None:
        self.what = " ".join(what.split())
        self.remedy = " ".join(remedy.split())
        super().__init__(f"{self.what}: {self.remedy}" if self.remedy else self.what)


class ImageError(HematoVisionError):
    """An image that can't be decoded, or must not be."""


class DataError(HematoVisionError):
    """A data set, manifest or split that is not what it should be."""


class ConfigError(HematoVisionError):
    """An unknown profile or key, or a value of the wrong type."""


class WeightsError(HematoVisionError):
    """Initial weights that can't be had, or do not fit."""
