"""What several routes have signed, compared where their spans end at the same layer: how far they agree. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tallystick_protocol.receipts import Receipt
from tallystick_protocol.types import Span

Signed = Sequence[tuple[Span, Sequence[Receipt]]]
"""One route: each hop's span and the receipts of it that stand, window by window."""


@dataclass(frozen=True, slots=True)
class Conflict:
    """The first window and, in it, the first shared boundary at which outputs differ.

    segment: the layers between the boundary before, at which all agree on this window and those before it, and this
    one: whoever is wrong computed some of them.
    """

    window: int
    segment: Span


@dataclass(frozen=True, slots=True)
class Comparison:
    """agreed: for each boundary that all routes share, how many first windows are the same in all of them there and at
    every shared boundary before it."""

    agreed: dict[int, int]
    conflict: Conflict | None = None

    def clears(self, span: Span) -> int:
        """Windows of a hop that are confirmed: those that agree at the next shared boundary."""
        return next((count for end, count in self.agreed.items() if end >= span.end), 0)


def compare(routes: Sequence[Signed]) -> Comparison:
    """Compare what routes over the same layers have signed so far; what only some have signed is left out."""
    receipts = [{span.end: signed for span, signed in route} for route in routes]
    ends = sorted(set[int].intersection(*(set(found) for found in receipts)))
    agreed: dict[int, int] = {}
    conflicts: list[Conflict] = []
    limit: int = 1 << 30
    start: int = routes[0][0][0].start
    for end in ends:
        signed = [found[end] for found in receipts]
        window = _num_same(signed, limit)
        if window < limit and _same(signed, window) is False:
            conflicts.append(Conflict(window, Span(start, end)))
        agreed[end] = limit = window
        start = end
    return Comparison(agreed, min(conflicts, key=lambda one: (one.window, one.segment.end), default=None))


def _num_same(signed: Sequence[Sequence[Receipt]], limit: int) -> int:
    """How many first windows, `limit` at most, are the same in all of them."""
    window = 0
    while window < limit and _same(signed, window):
        window += 1
    return window


def _same(signed: Sequence[Sequence[Receipt]], window: int) -> bool | None:
    """Whether all have signed the same outputs for a window; None while some have not signed the same positions."""
    found = [receipts[window] if window < len(receipts) else None for receipts in signed]
    if found[0] is None or any(one is None or one.positions != found[0].positions for one in found):
        return None
    return len({one.output for one in found if one is not None}) == 1
