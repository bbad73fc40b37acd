"""How many threads compute a forward: one, or as many as there are, whichever has been quicker of late.

The bits are the same (docs/numerics.md), the pace is not: two threads read the weights faster than one, until another
process wants their core as well; then they wait for each other. So more than one is not even tried while more threads
want to run, on the whole machine, than it has cores. That is looked at when a forward ends: when it begins, who has
sent its rows is often still busy with what comes after, and soon rests.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from tallystick_node.alone import set_threads

log = logging.getLogger(__name__)

TRIES = 3
"""Forwards that tell how quick a choice is. The first of them, which may begin threads, does not count."""

AGAIN = 64
"""After so many forwards the slower choice is tried again, twice."""

GAIN = 0.9
"""Several threads must take no more than this part of the time of one: their cores are taken from others."""

WEIGHT = 0.2
"""Of the newest forward in the averages."""

TAKEN, FREE = 0.5, 0.02
"""Cores are taken when more than this share of forwards, the newest counting most, ends with more threads than cores;
they are free again when it falls below the second: after some fifteen in a row that do not."""

FEW_ROWS = 4
"""Up to so many rows a forward takes as long as reading the weights does."""

_TASKS = Path("/proc/self/task")


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

    def __init__(self, most: int, cores: Cores | None, *, varies: bool = True) -> None:
        """cores: where they run, None on a device that has its own. varies: whether their number may."""
        self._most, self._now = most, 0
        self._cores, self._varies = cores, varies and cores is not None
        self._paces: dict[int, Pace] = {}

    @property
    def cores_are_taken(self) -> bool:
        """Whether what is computed now slows others down, and is slowed down by them."""
        return self._cores is not None and self._cores.are_taken

    @property
    def cores_were_taken(self) -> bool:
        """Whether they are, or were before others' steps began to wait for each other, which is what frees them."""
        return self._cores is not None and self._cores.were_taken

    def choose(self, rows: int) -> None:
        """Before a forward of so many rows."""
        takes_one = self._varies and (self.cores_are_taken or not self._pace(rows).takes_all())
        self._use(1 if takes_one else self._most)

    def note(self, rows: int, seconds: float) -> None:
        """It has taken so long. Its threads are still awake."""
        if self._cores is not None:
            self._cores.look()
        if self._varies:
            self._pace(rows).note(self._now > 1, seconds / max(rows, FEW_ROWS))

    def use_all(self) -> None:
        """Before other work."""
        self._use(self._most)

    def close(self) -> None:
        """At the end of the thread."""
        if self._cores is not None:
            self._cores.close()

    def _pace(self, rows: int) -> Pace:
        return self._paces.setdefault(max(rows, FEW_ROWS).bit_length(), Pace())

    def _use(self, count: int) -> None:
        if count != self._now:
            set_threads(count)
            self._now = count
        if count > 1 and self._varies and self._cores is not None:
            self._cores.part()


class Cores:
    """Keeps the threads that help the calling one off its core, and off each other's where they need all of them.

    Linux wakes a thread on its waker's core if it takes the others for busy, as it does in a virtual machine whose idle
    cores are given back to the host; they then take turns until it looks again. Measured: docs/sessions.md. Where the
    system does not let itself be asked, nothing is placed, and no core is taken.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._cores = _cores()
        self._helpers: list[int] = []
        self._tries = TRIES if threads <= len(self._cores) else 0
        self._own = -1
        self._load = -1
        self._share = 0.0
        self.were_taken = False
        if len(self._cores) == os.cpu_count():  # what else runs on some of the cores cannot be told
            try:
                self._load = os.open("/proc/loadavg", os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                log.info("how busy this machine is cannot be told")

    def close(self) -> None:
        if self._load >= 0:
            os.close(self._load)
            self._load = -1

    @property
    def are_taken(self) -> bool:
        """Whether, of late, more threads of this machine have wanted to run than it has cores, the calling one and its
        helpers included."""
        return self._share > TAKEN

    def look(self) -> None:
        """How many want to run now, when a forward ends."""
        try:
            taken = self._load >= 0 and _running(os.pread(self._load, 128, 0)) > len(self._cores)
        except (OSError, ValueError, IndexError):
            taken = False
        self._share += WEIGHT * (taken - self._share)
        self.were_taken = self._share > (FREE if self.were_taken else TAKEN)

    def part(self) -> None:
        """Before work with all threads."""
        if not self._tries:
            return
        try:
            self._part()
        except (OSError, ValueError) as error:  # a helper has ended and others have begun, or this process may not
            self._tries -= 1
            log.info("threads cannot be placed (%s)", error)
            for helper in self._helpers:
                with suppress(OSError):
                    os.sched_setaffinity(helper, self._cores)
            self._helpers, self._own = [], -1

    def _part(self) -> None:
        self._helpers = self._helpers or _helpers()
        own = _getcpu()
        if own == self._own:
            return
        others = sorted(self._cores - {own})
        for index, helper in enumerate(self._helpers):
            os.sched_setaffinity(helper, {others[index]} if self._threads == len(self._cores) else others)
        self._own = own


def _cores() -> set[int]:
    """Those that this process may use; none where threads cannot be placed."""
    can = hasattr(os, "sched_setaffinity") and _TASKS.is_dir() and _libc_getcpu() is not None
    return set(os.sched_getaffinity(0)) if can else set()


def _running(load: bytes) -> int:
    """How many threads want to run, out of /proc/loadavg: `0.20 0.18 0.12 1/80 11206`."""
    return int(load.split()[3].split(b"/")[0])


def _helpers() -> list[int]:
    """Native ids of the threads that torch begins for the calling one: they inherit its name, which nobody else has."""
    own = threading.get_native_id()
    name = f"device-{own}"
    (_TASKS / str(own) / "comm").write_text(name)
    torch.ones(1 << 20).add_(1)
    return [int(task.name) for task in _TASKS.iterdir() if _name(task) == name and task.name != str(own)]


def _name(task: Path) -> str:
    try:
        return (task / "comm").read_text().strip()
    except OSError:
        return ""


def _getcpu() -> int:
    getcpu = _libc_getcpu()
    return -1 if getcpu is None else int(getcpu())


@cache
def _libc_getcpu() -> Callable[[], int] | None:
    try:
        return getattr(ctypes.CDLL(None), "sched_getcpu", None)
    except OSError:
        return None
