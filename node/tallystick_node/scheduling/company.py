"""Whose steps travel together: how many are worth waiting for, while the cores are taken.

A forward of few rows takes nearly as long as one of many: it reads the same weights. Where more threads want to run on
a machine than it has cores (several nodes, or a node and its client), one that is begun at once slows down whatever the
next rows wait for; so steps wait a little for each other, until half of the sessions that are at work are there. Where
a core is free nothing waits, and a session alone never does. Measured: docs/sessions.md.
"""

from __future__ import annotations

from collections.abc import Iterable

GAP_S = 0.004
"""No step for so long, and those that are there go."""

MOST_S = 0.010
"""What a step waits for others at most."""

RECENT_S = 0.5
"""A session is at work while it has had rows computed within so long."""


class Company:
    """The sessions that are at work."""

    def __init__(self) -> None:
        self._last: dict[int, float] = {}

    def note(self, sessions: Iterable[int], now: float) -> None:
        """Rows of these have been computed."""
        self._last |= dict.fromkeys(sessions, now)

    def wanted(self, now: float) -> int:
        """How many steps a forward should have: one for every two sessions at work."""
        self._last = {session: at for session, at in self._last.items() if now - at <= RECENT_S}
        return len(self._last) // 2
