"""How far a publication is, for whoever waits for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """stage: "note", "pieces", "canary" or "done"; a note is a line to be shown.

    done and total: bytes of weights that the stage went through and has to, earlier runs' among them.

    eta_s: seconds until the stage ends at its present speed; rate: that speed, in bytes of this run per second. Both
    None before that can be told.
    """

    stage: str
    detail: str
    done: int
    total: int
    eta_s: float | None
    rate: float | None = None


Report = Callable[[Progress], None]


def quiet(progress: Progress) -> None:
    """Reports to nobody."""


class Meter:
    """Counts the bytes of a stage and reports at most ten times a second."""

    def __init__(self, report: Report, stage: str, total: int) -> None:
        self._report, self._stage, self._total = report, stage, total
        self._detail, self._done, self._skipped = "", 0, 0
        self._start = time.monotonic()
        self._last = 0.0

    def begin(self, detail: str) -> None:
        self._detail = detail
        self._tell()

    def add(self, count: int) -> None:
        self._done += count
        if time.monotonic() - self._last >= 0.1:
            self._tell()

    def skip(self, count: int) -> None:
        """Bytes that an earlier run went through."""
        self._skipped += count
        self._done += count

    def end(self) -> None:
        self._tell()

    def _tell(self) -> None:
        self._last = time.monotonic()
        worked, elapsed = self._done - self._skipped, self._last - self._start
        rate = worked / elapsed if worked > 0 and elapsed > 0.2 else None
        eta = None if rate is None else (self._total - self._done) / rate
        self._report(Progress(self._stage, self._detail, self._done, self._total, eta, rate))
