"""What a run says while it runs: a line as a step starts and ends, and one that lives between."""

from __future__ import annotations

import shutil
import threading
import time
from dataclasses import dataclass
from typing import TextIO

HEARTBEAT_SECONDS = 30.0
_REDRAW_SECONDS = 0.5


def spoken_time(seconds: float) -> str:
    """Return a duration for people: ``41 s``, ``3 min 05 s``, ``1 h 20 min``."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    return f"{total // 3600} h {total % 3600 // 60:02d} min"


@dataclass
class _Running:
    number: int
    since: float
    cell: int = 0
    cells: int = 0


class Progress:
    """Plain lines on a stream: rewritten in place on a terminal, else a heartbeat now and then.

    Parameters
    ----------
    stream : text stream
    names : list of str
        Every step, in order.
    expected : dict of str to float
        Seconds that a step took last time; a step that is not there makes the estimate unknown.
    todo : set of str
        The steps expected to run; the others are up to date.
    """

    def __init__(self, stream: TextIO, names: list[str], expected: dict[str, float], todo: set[str]) -> None:
        self._stream = stream
        self._numbers = {name: i + 1 for i, name in enumerate(names)}
        self._width = max(map(len, names), default=0)
        self._expected = expected
        self._todo = set(todo)
        self._running: dict[str, _Running] = {}
        self._lock = threading.RLock()
        self._live = bool(getattr(stream, "isatty", bool)())
        self._drawn = ""
        self._last = self._start = time.monotonic()

    def say(self, text: str) -> None:
        """Print a line that stays."""
        with self._lock:
            self._wipe()
            print(text, file=self._stream, flush=True)
            self._last = time.monotonic()

    def skip(self, name: str) -> None:
        """A step is up to date."""
        self._todo.discard(name)
        self.say(f"{self._head(name)}  up to date")

    def start(self, name: str) -> None:
        """A step begins."""
        with self._lock:
            self._running[name] = _Running(self._numbers[name], time.monotonic())
            if not self._live:
                self.say(f"{self._head(name)}  started")

    def cell(self, name: str, cell: int, cells: int) -> None:
        """A step has reached a cell."""
        with self._lock:
            if name in self._running:
                self._running[name].cell, self._running[name].cells = cell, cells

    def end(self, name: str, outcome: str = "done") -> None:
        """A step has ended."""
        with self._lock:
            running = self._running.pop(name, None)
            self._todo.discard(name)
            took = f" in {spoken_time(time.monotonic() - running.since)}" if running else ""
            self.say(f"{self._head(name)}  {outcome}{took}")

    def tick(self) -> None:
        """Redraw what is running, if it is time."""
        with self._lock:
            now = time.monotonic()
            if not self._running or now - self._last < (_REDRAW_SECONDS if self._live else HEARTBEAT_SECONDS):
                return
            line = self._status(now)
            if self._live:
                self._wipe()
                # a line that wraps could not be taken back
                line = line[: shutil.get_terminal_size().columns - 1]
                self._stream.write(line)
                self._stream.flush()
                self._drawn = line
            else:
                print(line, file=self._stream, flush=True)
            self._last = now

    def seconds(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self._start

    def _head(self, name: str) -> str:
        return f"[{self._numbers[name]}/{len(self._numbers)}] {name:<{self._width}}"

    def _status(self, now: float) -> str:
        parts = [
            f"[{r.number}/{len(self._numbers)}] {name}"
            + (f", cell {r.cell} of {r.cells}" if r.cells else "")
            + f", {spoken_time(now - r.since)}"
            for name, r in self._running.items()
        ]
        left = self._left(now)
        tail = f"; about {spoken_time(left)} left" if left is not None else ""
        return f"      {' + '.join(parts)}; {spoken_time(self.seconds())} in all{tail}"

    def _left(self, now: float) -> float | None:
        """Seconds still to come, if every step still to run has been timed before."""
        if any(name not in self._expected for name in self._todo):
            return None
        spent = {name: now - r.since for name, r in self._running.items()}
        ahead = sum(max(self._expected[name] - spent.get(name, 0.0), 0.0) for name in self._todo)
        return ahead / max(len(self._running), 1)

    def _wipe(self) -> None:
        if self._drawn:
            self._stream.write("\r" + " " * len(self._drawn) + "\r")
            self._drawn = ""
