"""A route for a session: near the best, drawn so that load spreads, with somebody ready for each hop."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from tallystick.routing.candidates import Candidate
from tallystick.routing.choice import stand_ins
from tallystick.routing.cost import LONGEST_S, Workload, hop_s, links_s, route_s, step_s
from tallystick.routing.planner import plan
from tallystick_protocol.types import Address, Digest, Span

SPREAD = 0.1
"""A route may cost this much more than the best one, and take this much longer, for the sake of spreading load."""

DRAWS = 3
"""Draws, each from a narrower range, before the best route itself is taken."""

_uniform: Callable[[], float] = secrets.SystemRandom().random


@dataclass(frozen=True, slots=True)
class Route:
    """Hops in the order of layers. standbys: for each the node that would take its place, or None.

    cost_s: expected seconds per token, money and risk included (`cost.route_s`); best_s: the cheapest route's; step_s:
    of these the seconds that a client would measure.
    """

    hops: list[Candidate]
    standbys: list[Candidate | None]
    cost_s: float
    best_s: float
    step_s: float

    def is_disjoint(self, index: int) -> bool:
        """Whether hop `index` has a standby of another operator."""
        standby = self.standbys[index]
        return standby is not None and standby.operator != self.hops[index].operator


def choose(
    candidates: Iterable[Candidate],
    work: Workload,
    goal: Span | None = None,
    *,
    avoid: Collection[Address] = (),
    numeric_class: Digest | None = None,
    whole: bool = False,
    spread: float = SPREAD,
    uniform: Callable[[], float] = _uniform,
) -> Route:
    """A route within `spread` of the best one, at random among those that are. Arguments otherwise as for `plan`.

    uniform: numbers in [0, 1), from a cryptographic generator: who can foretell the draw can lie in wait for a session.
    Raises NoRoute.
    """
    candidates = list(candidates)
    best = plan(candidates, work, goal, avoid=avoid, numeric_class=numeric_class, whole=whole)
    best_s = route_s(best, work)
    hops, range_s = best, min(spread * best_s / max(len(best), 1), LONGEST_S / 2)
    own = {c.node: c for c in candidates}
    for _ in range(DRAWS if spread > 0 else 0):
        drawn = [_delayed(c, range_s * uniform()) for c in candidates if c.node not in avoid]
        found = plan(drawn, work, goal, numeric_class=numeric_class, whole=whole)
        found = [own[hop.node].over(hop.span) for hop in found]
        if route_s(found, work) <= (1 + spread) * best_s and step_s(found) <= (1 + spread) * step_s(best):
            hops = found
            break
        range_s /= 2
    return Route(hops, standbys(candidates, hops, work, avoid), route_s(hops, work), best_s, step_s(hops))


def route_over(
    candidates: Sequence[Candidate], hops: list[Candidate], work: Workload, avoid: Collection[Address] = ()
) -> Route:
    """A route that was chosen before, with its standbys and what it costs."""
    cost_s = route_s(hops, work)
    return Route(hops, standbys(candidates, hops, work, avoid), cost_s, cost_s, step_s(hops))


def standbys(
    candidates: Sequence[Candidate], hops: Sequence[Candidate], work: Workload, avoid: Collection[Address] = ()
) -> list[Candidate | None]:
    """For each hop the first of its `successors`, or None."""
    taken = {hop.node for hop in hops} | set(avoid)
    ranked = [successors(candidates, hops, index, work, taken) for index in range(len(hops))]
    return [found[0] if found else None for found in ranked]


def successors(
    candidates: Iterable[Candidate], hops: Sequence[Candidate], index: int, work: Workload, avoid: Collection[Address]
) -> list[Candidate]:
    """Who could take hop `index`'s place, cut to its span, the best one first.

    Operators that have no hop here come before those that have: what made the hop fail may be its operator's, and one
    operator's failure shall not cost two hops. Its own operator's nodes are the last ones. Among like ones, those with
    which the route costs least.
    """
    operators, hop = {hop.operator for hop in hops}, hops[index]

    def rank(other: Candidate) -> tuple[bool, bool, float, str]:
        cost_s = swapped_s(hops, index, other, work)
        return other.operator in operators, other.operator == hop.operator, cost_s, other.node

    return sorted(stand_ins(candidates, hop, avoid, work), key=rank)


def swapped_s(hops: Sequence[Candidate], index: int, candidate: Candidate, work: Workload) -> float:
    """What hop `index` and its links would cost with another node in its place, seconds per token."""
    around = [*hops[:index], candidate, *hops[index + 1 :]]
    return links_s(around, work) + hop_s(candidate, work)


def _delayed(candidate: Candidate, seconds: float) -> Candidate:
    return replace(candidate, expected=replace(candidate.expected, wait_s=candidate.expected.wait_s + seconds))
