"""The sessions of models that keep no cache, or one of a class of their own: every step computes all rows again."""

from __future__ import annotations

import torch


class ReplayCache:
    """One session's rows as they entered a span: ids (n,) int64, or hidden rows (n, width) fp32; `length` is the clock.

    memory: (m, width) fp32, an encoder's output, for its decoder.
    """

    def __init__(self, max_length: int, memory: torch.Tensor | None = None) -> None:
        self.max_length = max_length
        self.length = 0
        self.memory = memory
        self._rows: torch.Tensor | None = None

    def with_rows(self, first: int, rows: torch.Tensor) -> torch.Tensor:
        """Rows [0, first) and, behind them, `rows`, which are kept; `commit` says that they count."""
        self._rows = rows if self._rows is None or not first else torch.cat([self._rows[:first], rows])
        return self._rows

    def commit(self, length: int) -> None:
        self.length = length

    def take(self, other: ReplayCache, first: int, last: int) -> None:
        """Hold what another session of the same span and memory holds, up to row `last`; our `first` rows are equal."""
        if not 0 <= first <= last <= other.length:
            raise ValueError(f"cannot take rows [{first}, {last}) of {other.length}")
        self._rows = None if other._rows is None else other._rows[:last].clone()
        self.length = last

    def crop(self, length: int) -> None:
        """Forget rows from `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot crop {self.length} rows to {length}")
        self.length = length

    @property
    def size_bytes(self) -> int:
        return 0 if self._rows is None else self._rows.nbytes
