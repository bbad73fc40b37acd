"""Figures of a run, and how many measurements become one: pure arithmetic."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

Figures = dict[str, float | None]
"""What a run ends with: one flat object. None: not measured."""


def spread(name: str, values: Sequence[float]) -> Figures:
    """The median under the name, and the range: `_low`, `_high`. None for no values."""
    if not values:
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    return {name: statistics.median(values), f"{name}_low": min(values), f"{name}_high": max(values)}


def ratios(values: Sequence[float], bases: Sequence[float]) -> list[float]:
    """Pair by pair. Raises ValueError when there are not as many of both."""
    return [value / base for value, base in zip(values, bases, strict=True)]


class Measured:
    """Measurements by name, in the order of `names` and then as they come."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        """names: of what is to be measured; None where that fails."""
        self.values: dict[str, list[float]] = {name: [] for name in names}

    def note(self, name: str, value: float) -> None:
        self.values.setdefault(name, []).append(value)

    def figures(self) -> Figures:
        """Median and range of each."""
        found: Figures = {}
        for name, values in self.values.items():
            found |= spread(name, values)
        return found

    def last(self, part: str = "") -> str:
        """The newest of each that has `part` in its name, for a person who watches."""
        newest = ((name, values[-1]) for name, values in self.values.items() if values and part in name)
        return ", ".join(f"{name} {value:.4g}" for name, value in newest)


def first_repeat(ids: Sequence[int], start: int, run: int = 8) -> int | None:
    """The first position from `start + run` on behind a run of ids that stood in the text before; None for none."""
    seen = {tuple(ids[at - run : at]) for at in range(run, start + run)}
    for at in range(start + run, len(ids) + 1):
        last = tuple(ids[at - run : at])
        if last in seen:
            return at
        seen.add(last)
    return None
