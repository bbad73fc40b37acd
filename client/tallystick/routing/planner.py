"""Planning: which nodes carry a session. A pure function of what is offered; no clock, no network."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from tallystick.routing.candidates import DEFAULT_WEIGHTS, Candidate, Weights
from tallystick_protocol.errors import NoRoute
from tallystick_protocol.types import Address, Digest, Span

HOP_COST = 1e-3
"""What one more hop is worth avoiding, in the planner's unit: seconds of expected time per token."""


def plan(
    candidates: Iterable[Candidate],
    layers: int,
    avoid: Collection[Address] = (),
    numeric_class: Digest | None = None,
    weights: Weights = DEFAULT_WEIGHTS,
    stack: Span | None = None,
) -> list[Candidate]:
    """The cheapest chain of spans that covers [0, layers), first hop first; cost = time + price, spans used whole.

    stack: cover these layers only (an encoder, a decoder). All hops are of one numeric class where that is possible, so
    that failovers are exact and audits sharp; with `numeric_class`, of that one or none. Raises NoRoute naming the
    layers that nobody serves.
    """
    goal = stack or Span(0, layers)
    usable = [c for c in candidates if c.node not in avoid and goal.start <= c.span.start and c.span.end <= goal.end]
    classes = {Digest(c.offer.numeric_class) for c in usable} if numeric_class is None else {numeric_class}
    found = [
        route
        for one in sorted(classes)
        if (route := _cheapest([c for c in usable if c.offer.numeric_class == one], goal, layers, weights)) is not None
    ]
    if not found and numeric_class is None:
        mixed = _cheapest(usable, goal, layers, weights)
        found = [mixed] if mixed is not None else []
    if not found:
        raise no_route([c for c in usable if numeric_class in (None, c.offer.numeric_class)], goal)
    return min(found, key=lambda route: sum(_cost(hop, layers, weights) for hop in route))


def no_route(usable: list[Candidate], goal: Span) -> NoRoute:
    """The error that names the first gap and the command that would fill it."""
    start = max(_reach(usable, goal.start))
    onward = [c.span.start for c in usable if c.span.start > start]
    end = min(onward, default=goal.end)
    return NoRoute(
        f"nobody serves layers [{start}, {end}) of {goal.end};"
        f" to serve them: tallystick-node run --join --span {start}:{end}",
        start=start,
        end=end,
    )


def _cost(candidate: Candidate, layers: int, weights: Weights) -> float:
    price = candidate.offer.price * candidate.span.units(layers)
    return HOP_COST + candidate.rtt_s / 2 + price * weights.seconds_per_wei


def _cheapest(candidates: list[Candidate], goal: Span, layers: int, weights: Weights) -> list[Candidate] | None:
    """Shortest path over layer boundaries; spans only go forward, so one pass in order of their start is enough."""
    best: dict[int, tuple[float, list[Candidate]]] = {goal.start: (0.0, [])}
    for candidate in sorted(candidates, key=lambda c: (c.span.start, c.span.end, c.offer.price, c.node)):
        reached = best.get(candidate.span.start)
        if reached is None:
            continue
        cost = reached[0] + _cost(candidate, layers, weights)
        if cost < best.get(candidate.span.end, (float("inf"), []))[0]:
            best[candidate.span.end] = (cost, [*reached[1], candidate])
    return best[goal.end][1] if goal.end in best else None


def _reach(candidates: list[Candidate], start: int) -> set[int]:
    reached = {start}
    for candidate in sorted(candidates, key=lambda c: c.span.start):
        if candidate.span.start in reached:
            reached.add(candidate.span.end)
    return reached
