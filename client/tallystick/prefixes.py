"""What the nodes may still hold of earlier generations: a new one with the same beginning need not pay for it again.

A node keeps the rows of a session that ended in order for some minutes. A session of the same client on the same nodes
takes them over (`Rewinding.take_over`); a node that has them no more refuses, and the rows are fed as usual.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

from tallystick.routing.candidates import Candidate
from tallystick_protocol.types import WINDOW, Address, ModelId, SessionId, Span

KEEP_S = 300.0
"""For as long as nodes keep rows, unless their operators say otherwise."""

MAX_KEPT = 32
MIN_SHARED = WINDOW
"""Fewer rows are not worth the round trip."""


@dataclass(frozen=True, slots=True)
class Form:
    """What two sessions must have in common for rows of one to stand for rows of the other. wire: how rows travel."""

    model: ModelId
    top_k: int
    wire: str


@dataclass(frozen=True, slots=True)
class Prefix:
    """What a session holds, or held when it ended.

    hops: nodes and the layers that they computed, first one first; want: whose results were wanted; results: these, by
    position.
    """

    session: SessionId
    form: Form
    hops: tuple[tuple[Address, Span], ...]
    ids: tuple[int, ...]
    want: tuple[bool, ...]
    results: dict[int, bytes]

    def shared(self, ids: Sequence[int]) -> int:
        """How many first rows a session about to be fed `ids` may take over: the last one it computes itself."""
        same = takewhile(lambda pair: pair[0] == pair[1], zip(self.ids, ids[:-1], strict=False))
        return sum(1 for _ in same)

    def route(self, candidates: Sequence[Candidate]) -> list[Candidate] | None:
        """The same nodes with the same layers, if all of them are still there."""
        found = []
        for node, span in self.hops:
            there = next((c for c in candidates if c.node == node and c.covers(span)), None)
            if there is None:
                return None
            found.append(there.over(span))
        return found


class Prefixes:
    """The sessions of one client that ended last."""

    def __init__(self, keep_s: float = KEEP_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._keep_s = keep_s
        self._clock = clock
        self._kept: dict[SessionId, tuple[Prefix, float]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def remember(self, prefix: Prefix) -> None:
        """A session has ended in order. One whose rows it holds all, on the same nodes, is of no more use."""
        if len(prefix.ids) < MIN_SHARED:
            return
        self._expire()
        for kept, _ in list(self._kept.values()):
            if (kept.form, kept.hops) == (prefix.form, prefix.hops) and prefix.ids[: len(kept.ids)] == kept.ids:
                self.forget(kept.session)
        self._kept[prefix.session] = prefix, self._clock() + self._keep_s
        if len(self._kept) > MAX_KEPT:
            del self._kept[next(iter(self._kept))]

    def used(self, session: SessionId) -> None:
        """The nodes have just been seen to have its rows: they keep them for as long again."""
        if session in self._kept:
            self._kept[session] = self._kept.pop(session)[0], self._clock() + self._keep_s

    def forget(self, session: SessionId) -> None:
        """The nodes have its rows no more."""
        self._kept.pop(session, None)

    def find(self, form: Form, ids: Sequence[int]) -> list[tuple[Prefix, int]]:
        """Sessions that shared rows with `ids`, and how many; the longest first, of equal ones the newest."""
        self._expire()
        found = [
            (prefix, shared)
            for prefix, _ in reversed(self._kept.values())
            if prefix.form == form and (shared := prefix.shared(ids)) >= MIN_SHARED
        ]
        return sorted(found, key=lambda one: -one[1])

    def _expire(self) -> None:
        now = self._clock()
        self._kept = {session: kept for session, kept in self._kept.items() if kept[1] > now}
