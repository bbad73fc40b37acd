"""Whose steps travel together: who is worth waiting for, while the cores are taken.

A forward of few rows takes nearly as long as one of many: it reads the same weights. Where more threads want to run on
a machine than it has cores (several nodes, or a node and its client), one that is begun at once slows down whatever the
next rows wait for; so steps wait a little for each other. Whose steps were computed together will come together again,
if a little apart; so companions are waited for longer than others. On a node that has some of the layers no company is
more than half of the sessions that are at work: when one is being computed here, another one is under way elsewhere.
While cores are free nothing waits, and a session alone never does. Measured: docs/sessions.md.
"""

from __future__ import annotations

from collections.abc import Collection

GAP_S = 0.004
"""No step for so long, and those that are there go."""

LAG_S = 0.012
"""The same, while companions are missing."""

MOST_S = 0.030
"""What a step waits for others at most."""

RECENT_S = 0.5
"""A session is at work while it has had rows computed within so long, or within PERIODS times what lay between its last
two forwards, if that is more."""

PERIODS = 3

LONGEST_S = 30.0
"""So long at most."""


class Company:
    """The sessions that are at work, and with whom each was computed last."""

    def __init__(self) -> None:
        self._last: dict[int, float] = {}
        self._until: dict[int, float] = {}
        self._companions: dict[int, frozenset[int]] = {}

    def note(self, sessions: Collection[int], now: float) -> None:
        """Rows of these have been computed in one forward."""
        self._forget(now)
        for session in sessions:
            apart_s = now - self._last.get(session, now)
            self._until[session] = now + min(max(RECENT_S, PERIODS * apart_s), LONGEST_S)
        self._last |= dict.fromkeys(sessions, now)
        self._companions |= dict.fromkeys(sessions, frozenset(sessions))

    def half(self, waiting: Collection[int], now: float) -> int:
        """How many sessions are half of those that are at work or wait."""
        self._forget(now)
        return max(-(-len(self._last.keys() | waiting) // 2), 1)

    def waits_s(self, waiting: Collection[int], now: float) -> float:
        """How long those that wait should wait for the next step; 0 for not at all."""
        if len(waiting) >= self.half(waiting, now):
            return 0.0
        return LAG_S if any(self._lacks(one, waiting) for one in waiting) else GAP_S

    def _lacks(self, one: int, waiting: Collection[int]) -> bool:
        """Whether somebody is missing with whom it was computed last, and who has not been computed since."""
        companions = self._companions.get(one, frozenset())
        return any(self._companions.get(other) is companions for other in companions.difference(waiting))

    def _forget(self, now: float) -> None:
        for session in [session for session, until in self._until.items() if until < now]:
            del self._last[session], self._until[session], self._companions[session]
