"""How many threads compute a forward: one, or as many as there are, whichever has been quicker of late.

The bits are the same (docs/numerics.md), the pace is not: two threads read the weights faster than one, until another
process wants their core as well; then they wait for each other. So more than one is not even tried while more threads
want to run, on the whole machine, than it has cores.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

import torch

TRIES = 3
"""Forwards that tell how quick a choice is. The first of them, which may begin threads, does not count."""

AGAIN = 64
"""After so many forwards the slower choice is tried again, twice."""

GAIN = 0.9
"""Several threads must take no more than this part of the time of one: their cores are taken from others."""

WEIGHT = 0.2
"""Of the newest forward in the averages."""

FEW_ROWS = 4
"""Up to so many rows a forward takes as long as reading the weights does."""

_TASKS, _LOAD = Path("/proc/self/task"), Path("/proc/loadavg")


@dataclass(slots=True)
class Pace:
    """Seconds per row of forwards of about as many rows, with one thread and with all, and how many there were."""

    one_s: float = 0.0
    all_s: float = 0.0
    ones: int = 0
    alls: int = 0
    _since: int = 0

    def takes_all(self) -> bool:
        """Whether the next forward should take all threads."""
        if self.alls < TRIES or self.ones < TRIES:
            return self.alls < TRIES
        self._since = (self._since + 1) % AGAIN
        return (self.all_s <= GAIN * self.one_s) != (self._since < 2)

    def note(self, was_all: bool, row_s: float) -> None:
        if was_all:
            self.all_s, self.alls = _average(self.all_s, self.alls, row_s), self.alls + 1
        else:
            self.one_s, self.ones = _average(self.one_s, self.ones, row_s), self.ones + 1


def _average(before: float, count: int, value: float) -> float:
    return before + max(WEIGHT, 1 / count) * (value - before) if count else 0.0


class Threads:
    """Sets torch's threads for the thread that calls it, before its work with a model."""

    def __init__(self, most: int, varies: bool) -> None:
        """varies: whether the bits do not depend on their number."""
        self._most, self._now = most, 0
        self._varies = varies and most > 1
        self._paces: dict[int, Pace] = {}
        self._cores = Cores(most) if self._varies else None

    def choose(self, rows: int) -> None:
        """Before a forward of so many rows."""
        is_free = self._cores is None or not self._cores.are_taken
        self._use(self._most if not self._varies or (is_free and self._pace(rows).takes_all()) else 1)

    def note(self, rows: int, seconds: float) -> None:
        """It has taken so long."""
        if self._varies:
            self._pace(rows).note(self._now > 1, seconds / max(rows, FEW_ROWS))

    def use_all(self) -> None:
        """Before other work."""
        self._use(self._most)

    def _pace(self, rows: int) -> Pace:
        return self._paces.setdefault(max(rows, FEW_ROWS).bit_length(), Pace())

    def _use(self, count: int) -> None:
        if count != self._now:
            torch.set_num_threads(count)
            self._now = count
        if count > 1 and self._cores is not None:
            self._cores.part()


class Cores:
    """Keeps the threads that help the calling one off its core and off each other's.

    Linux wakes a thread on its waker's core if it takes the others for busy, as it does in a virtual machine whose idle
    cores are given back to the host; they then take turns until it looks again. Measured: docs/sessions.md.
    """

    def __init__(self, threads: int) -> None:
        self._cores = _cores()
        self._load = os.open(_LOAD, os.O_RDONLY | os.O_CLOEXEC) if _LOAD.exists() else -1
        self._helpers: list[int] | None = None if threads <= len(self._cores) else []
        self._own = -1

    def __del__(self) -> None:
        if self._load >= 0:
            os.close(self._load)

    @property
    def are_taken(self) -> bool:
        """Whether more threads of this machine want to run than there are cores for them, at this moment."""
        if self._load < 0:
            return False
        running = os.pread(self._load, 128, 0).split()[3].split(b"/")[0]
        return int(running) > (os.cpu_count() or 1)

    def part(self) -> None:
        """Before work with all threads."""
        if self._helpers is None:
            self._helpers = _helpers()
        if not self._helpers or (own := _getcpu()) == self._own:
            return
        self._own = own
        try:
            for helper, core in zip(self._helpers, sorted(self._cores - {own}), strict=False):
                os.sched_setaffinity(helper, {core})
        except OSError:  # it has ended, or this process may not
            self._helpers = []


def _cores() -> set[int]:
    """Those that this process may use; none where threads cannot be placed."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") and _TASKS.is_dir() else set()


def _helpers() -> list[int]:
    """Native ids of the threads that torch begins for the calling one: they inherit its name, which nobody else has."""
    own = ctypes.CDLL(None).gettid()
    name = f"device-{own}"
    (_TASKS / str(own) / "comm").write_text(name)
    torch.ones(1 << 20).add_(1)
    return [int(task.name) for task in _TASKS.iterdir() if _name(task) == name and task.name != str(own)]


def _name(task: Path) -> str:
    try:
        return (task / "comm").read_text().strip()
    except OSError:
        return ""


_getcpu = ctypes.CDLL(None).sched_getcpu if _TASKS.is_dir() else lambda: -1
