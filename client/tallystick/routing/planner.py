"""Planning: which nodes carry a session. A pure function of what is offered; no clock, no network."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from tallystick.routing.candidates import Candidate
from tallystick.routing.cost import Workload, route_s
from tallystick.routing.gaps import unserved
from tallystick.routing.paths import cheapest
from tallystick_protocol.errors import NoRoute
from tallystick_protocol.types import Address, Digest, Span


def plan(
    candidates: Iterable[Candidate],
    work: Workload,
    goal: Span | None = None,
    *,
    avoid: Collection[Address] = (),
    numeric_class: Digest | None = None,
    whole: bool = False,
) -> list[Candidate]:
    """The route of least expected cost (`cost.route_s`) over all covers of the goal, first hop first.

    goal: the layers to cover, an encoder's or a decoder's; None for all. whole: use every span from its start to its
    end. All hops are of one numeric class where that is possible, so that failovers are exact and audits sharp; with
    `numeric_class`, of that one or none. Does not depend on the order of candidates. Raises NoRoute naming the layers
    that nobody serves.
    """
    goal = goal or Span(0, work.layers)
    usable = usable_for(candidates, goal, avoid, numeric_class)
    if whole:
        usable = as_whole(usable)
    by_class: dict[Digest, list[Candidate]] = {}
    for candidate in usable:
        by_class.setdefault(Digest(candidate.offer.numeric_class), []).append(candidate)
    pools = [pool for _, pool in sorted(by_class.items()) if reach(pool, goal) == goal.end]
    found = [route for pool in pools if (route := cheapest(pool, goal, work)) is not None]
    if not found and numeric_class is None:
        mixed = cheapest(usable, goal, work)
        found = [mixed] if mixed is not None else []
    if not found:
        raise no_route(usable, goal, work.model)
    return min(found, key=lambda route: route_s(route, work))


def as_whole(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Candidates as if they served all that they offer, or nothing."""
    return [replace(c, serves_parts=False) for c in candidates]


def usable_for(
    candidates: Iterable[Candidate], goal: Span, avoid: Collection[Address], numeric_class: Digest | None = None
) -> list[Candidate]:
    """Who can serve some of the goal, one entry for each node, in an order that does not depend on theirs."""
    inside = {
        c.node: replace(c, part=None) if c.part else c
        for c in candidates
        if c.node not in avoid
        and goal.start <= c.offer.start
        and c.offer.end <= goal.end
        and numeric_class in (None, c.offer.numeric_class)
    }
    return sorted(inside.values(), key=lambda c: (c.offer.start, c.offer.end, c.offer.price, c.node))


def no_route(usable: Sequence[Candidate], goal: Span, model: str = "") -> NoRoute:
    """The error that names the first gap and the command that would fill it. model: as for `unserved`."""
    start = reach(usable, goal)
    onward = [c.offer.start for c in usable if c.offer.start > start]
    end = min(onward, default=goal.end)
    return unserved(f"nobody serves layers [{start}, {end}) of {goal.end}; to serve them", Span(start, end), model)


def reach(candidates: Sequence[Candidate], goal: Span) -> int:
    """The furthest boundary to which candidates lead from the goal's start without a gap."""
    whole: dict[int, list[int]] = {}
    parts: dict[int, int] = {}
    for c in candidates:
        if c.serves_parts:
            parts[c.offer.start] = max(c.offer.end, parts.get(c.offer.start, 0))
        else:
            whole.setdefault(c.offer.start, []).append(c.offer.end)
    reached, through, longest = {goal.start}, goal.start, 0
    for boundary in range(goal.start, goal.end):
        longest = max(longest, parts.get(boundary, 0))
        if boundary in reached or boundary <= through:
            through = max(through, longest)
            reached.update(whole.get(boundary, ()))
    return max(through, *reached)
