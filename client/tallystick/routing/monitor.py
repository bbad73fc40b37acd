"""Measuring while serving: how long steps take, what that says of the hops, whether another node would do better."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from tallystick.routing.candidates import Candidate, Weights
from tallystick.routing.choice import stand_ins
from tallystick.routing.cost import BYTES_PER_S, Workload, bounded, unit_price_s
from tallystick.routing.reputation import Reputation, claim_of
from tallystick.routing.route import swapped_s
from tallystick_protocol.types import Address

STEPS = 16
"""Steps that a judgement rests on: the last so many, at least half as many since the route changed."""

SWITCH_S = 0.25
"""What a change of nodes takes besides the replay: two openings, a link, a voucher."""

MARGIN = 1.5
"""A change must gain this many times what it costs."""

LEAST_GAIN = 0.15
"""And shorten the step by this part of it, lest two like nodes be exchanged to and fro."""

UNPROVEN_GAIN = 0.4
"""Where it rests on what the other node says alone: all nodes may be slower at present than they think."""


@dataclass(frozen=True, slots=True)
class Switch:
    """Hop `index` should be left for `candidate`. gain_s: over the rest of the session, the replay's cost taken off."""

    index: int
    candidate: Candidate
    gain_s: float


class Monitor:
    """One session's steps. `fed` and `arrived` time them; who serves is read off the route, which others change."""

    def __init__(
        self,
        reputation: Reputation,
        route: Sequence[Candidate],
        candidates: Sequence[Candidate],
        work: Workload,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """route, candidates: the session's own lists, as they change. work: as the route was planned for."""
        self._reputation = reputation
        self._route, self._candidates = route, candidates
        self._hops = list(route)
        self._work = work
        self._clock = clock
        self._fed: tuple[int, float] | None = None
        self._steps: deque[float] = deque(maxlen=STEPS)
        self._count = self._looked = 0
        self._closed = False

    def fed(self, first: int, last: int) -> None:
        """Rows [first, last) were sent. Steps of one row are timed; a prompt's chunks say little of them."""
        if [hop.node for hop in self._hops] != [hop.node for hop in self._route]:
            self._book()
            self._hops = list(self._route)
            self._steps.clear()
        self._fed = (first, self._clock()) if last - first == 1 else None

    def arrived(self, position: int) -> None:
        """The result of a position is there."""
        if self._fed is not None and self._fed[0] == position:
            self._steps.append(self._clock() - self._fed[1])
            self._fed = None
            self._count += 1

    def look(self, position: int, room: int, avoid: Collection[Address] = ()) -> Switch | None:
        """`should_switch`, now and then. room: positions that are left; as many tokens are expected as came already."""
        if self._count % STEPS or self._count == self._looked:
            return None
        self._looked = self._count
        return self.should_switch(position, min(room, self._count), avoid)

    def should_switch(self, position: int, remaining: int, avoid: Collection[Address] = ()) -> Switch | None:
        """The change of nodes that gains most, if one pays. Call between two tokens.

        position: rows that a replacement would have to replay. remaining: tokens that are still expected.
        """
        if len(self._steps) < STEPS // 2 or remaining <= 0:
            return None
        step_s = statistics.median(self._steps)
        hops = self._as_measured(step_s)
        taken = {hop.node for hop in hops} | set(avoid)
        work = replace(self._work, prompt=0)
        free = replace(work, weights=Weights(0.0))
        best: Switch | None = None
        for index, hop in enumerate(hops):
            present_s, present_cost_s = swapped_s(hops, index, hop, free), swapped_s(hops, index, hop, work)
            for other in stand_ins(self._candidates, hop, taken, work):
                shorter_s = present_s - swapped_s(hops, index, other, free)
                cheaper_s = present_cost_s - swapped_s(hops, index, other, work)
                gain_s = remaining * cheaper_s - MARGIN * self.replay_s(other, position)
                least = LEAST_GAIN if self._reputation.is_sure_of(other.node) else UNPROVEN_GAIN
                if shorter_s > least * step_s and gain_s > 0 and (best is None or gain_s > best.gain_s):
                    best = Switch(index, other, gain_s)
        return best

    def replay_s(self, candidate: Candidate, position: int) -> float:
        """What it costs to fill a replacement up to a position, its price included."""
        units = len(candidate.span)
        once = replace(self._work, prompt=0)
        rows = units * (bounded(candidate.expected.prefill_s) + unit_price_s(candidate, once))
        return SWITCH_S + position * (rows + self._work.row_bytes / BYTES_PER_S)

    def close(self, lost: Collection[Address] = (), served: bool = True) -> None:
        """The session has ended: what it showed of its nodes goes into the reputation.

        lost: nodes that failed it. served: whether it was ever open.
        """
        if self._closed:
            return
        self._closed = True
        self._book()
        for hop in self._hops if served else ():
            self._reputation.served(hop.node)
        for node in lost:
            self._reputation.lost(node)

    def _book(self) -> None:
        if len(self._steps) >= STEPS // 4:
            step_s = statistics.median(self._steps)
            self._reputation.observe(self._hops, step_s, _deviation(self._steps, step_s))

    def _as_measured(self, step_s: float) -> list[Candidate]:
        """The hops with what the measured steps make of them."""
        beliefs = self._reputation.after(self._hops, step_s, noise=0.0)
        return [
            replace(
                hop,
                expected=replace(
                    hop.expected,
                    layer_s=max(bounded(hop.claimed.layer_s) + beliefs[hop.node].layer_s - claim_of(hop), 0.0),
                    wait_s=hop.claimed.wait_s,
                ),
            )
            for hop in self._hops
        ]


def _deviation(steps: Sequence[float], median: float) -> float:
    """The median's own uncertainty: the median absolute deviation over the root of their number."""
    return float(statistics.median(abs(step - median) for step in steps) / len(steps) ** 0.5)
