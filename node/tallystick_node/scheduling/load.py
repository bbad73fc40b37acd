"""What a device is busy with, for those who choose where to go: measured over the last forwards."""

from __future__ import annotations

from dataclasses import dataclass

WEIGHT = 0.1
"""Of the newest forward in the averages."""


@dataclass(frozen=True, slots=True)
class Load:
    """waiting_jobs, waiting_rows: not computed yet; step_s: seconds that a forward takes; batch: sessions in it;
    rows_per_s: while it computes, None before the first forward."""

    waiting_jobs: int
    waiting_rows: int
    step_s: float
    batch: float
    rows_per_s: float | None

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

    def note(self, rows: int, sessions: int, seconds: float) -> None:
        """A forward is done."""
        weight = WEIGHT if self.forwards else 1.0
        self._step_s += weight * (seconds - self._step_s)
        self._batch += weight * (sessions - self._batch)
        self._step_rows += weight * (rows - self._step_rows)
        self.forwards += 1
        self.rows += rows
        self.busy_s += seconds

    def load(self, waiting_jobs: int, waiting_rows: int) -> Load:
        rate = self._step_rows / self._step_s if self._step_s > 0 else None
        return Load(waiting_jobs, waiting_rows, self._step_s, self._batch, rate)
