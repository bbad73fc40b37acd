"""How long is too long: a limit learnt from what was usual at this very peer."""

from __future__ import annotations

from collections import deque

KEPT = 64
ENOUGH = 8


class Patience:
    """Durations of one kind, and the one that cannot be explained by them any more.

    The limit is `factor` times the longest of the last 64, no less than `floor_s` and never more than `prior_s`; before
    there are eight of them it is `prior_s`. So whoever pauses on purpose, longer each time, gains nothing by it.
    """

    def __init__(self, floor_s: float, prior_s: float, factor: float = 4.0) -> None:
        self._floor_s = floor_s
        self._prior_s = prior_s
        self._factor = factor
        self._seen: deque[float] = deque(maxlen=KEPT)

    def note(self, seconds: float) -> None:
        """Something took this long and came to a good end. What took longer than the limit teaches nothing."""
        if seconds <= self.limit_s:
            self._seen.append(seconds)

    @property
    def is_informed(self) -> bool:
        """Whether enough of them were seen for the floor to count."""
        return len(self._seen) >= ENOUGH

    @property
    def limit_s(self) -> float:
        if not self.is_informed:
            return self._prior_s
        return min(self._prior_s, max(self._floor_s, self._factor * max(self._seen)))
