"""What a device is busy with, for those who choose where to go: measured over the last forwards."""

from __future__ import annotations

from dataclasses import dataclass

WEIGHT = 0.1
"""Of the newest forward in the averages."""


@dataclass(frozen=True, slots=True)
class Load:
    """waiting_jobs, waiting_rows: not computed yet; step_s: seconds that a forward takes; batch: sessions in it;
    rows_per_s: while it computes, None before the first forward.

    single_s: seconds of a forward with one row of each session, bulk_row_s: seconds per row of the others; both over
    the whole span, None before the first of the kind.
    """

    waiting_jobs: int
    waiting_rows: int
    step_s: float
    batch: float
    rows_per_s: float | None
    single_s: float | None = None
    bulk_row_s: float | None = None

    @property
    def backlog_s(self) -> float:
        """Seconds until everything that waits has been computed."""
        return self.waiting_rows / self.rows_per_s if self.rows_per_s else 0.0


class Meter:
    """Averages and totals of the forwards of one device. The device thread notes; anybody may read."""

    def __init__(self) -> None:
        self.forwards = 0
        self.rows = 0
        self.busy_s = 0.0
        self._step_s = self._batch = self._step_rows = 0.0
        self._single, self._bulk = _Average(), _Average()

    def note(self, rows: int, sessions: int, seconds: float, share: float = 1.0) -> None:
        """A forward is done. share: the part of the span's layers that it was over."""
        if rows == sessions:
            self._single.take(seconds / share)
        else:
            self._bulk.take(seconds / share / rows)
        weight = WEIGHT if self.forwards else 1.0
        self._step_s += weight * (seconds - self._step_s)
        self._batch += weight * (sessions - self._batch)
        self._step_rows += weight * (rows - self._step_rows)
        self.forwards += 1
        self.rows += rows
        self.busy_s += seconds

    def load(self, waiting_jobs: int, waiting_rows: int) -> Load:
        rate = self._step_rows / self._step_s if self._step_s > 0 else None
        kinds = self._single.value, self._bulk.value
        return Load(waiting_jobs, waiting_rows, self._step_s, self._batch, rate, *kinds)


class _Average:
    """A mean at first, then one that forgets."""

    def __init__(self) -> None:
        self.value: float | None = None
        self._count = 0

    def take(self, value: float) -> None:
        self._count += 1
        before = self.value or 0.0
        self.value = before + max(WEIGHT, 1 / self._count) * (value - before)
