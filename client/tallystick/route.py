"""Planning: which nodes carry a session. A pure function of what is offered; no clock, no network."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from tallystick_protocol.errors import NoRoute
from tallystick_protocol.messages import Offer
from tallystick_protocol.types import Address, Digest, Span, Wei

HOP_COST = 1e-3
"""What one more hop is worth avoiding, in the planner's unit: seconds of expected time per token."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A node that could serve: its signed offer, who runs it, how far away it is."""

    offer: Offer
    offer_digest: Digest
    operator: Address
    payee: Address
    signer: Address
    stake: Wei
    url: str
    rtt_s: float

    @property
    def node(self) -> Address:
        return self.offer.node

    @property
    def span(self) -> Span:
        return self.offer.span


@dataclass(frozen=True, slots=True)
class Weights:
    """How the planner weighs money against time: seconds that one token base unit per position is worth."""

    seconds_per_wei: float = 1e-18


def plan(
    candidates: Iterable[Candidate],
    layers: int,
    avoid: Collection[Address] = (),
    numeric_class: Digest | None = None,
    weights: Weights = Weights(),
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


def stand_ins(candidates: Iterable[Candidate], hop: Candidate, avoid: Collection[Address]) -> list[Candidate]:
    """Nodes that could take a hop's place in mid-session: the same span and class, cheapest first."""
    same = [
        c
        for c in candidates
        if c.span == hop.span and c.offer.numeric_class == hop.offer.numeric_class and c.node not in avoid
    ]
    return sorted(same, key=lambda c: (c.offer.price, c.rtt_s, c.node))


def draw(candidates: list[Candidate], coins: Iterable[float], dearest: int) -> list[Candidate]:
    """All candidates that ask at most `dearest`, in a random order in which stake is the chance to come first.

    coins: one uniform number in (0, 1) per candidate, from a cryptographic generator (Efraimidis and Spirakis 2006).
    """
    keyed = [(math.log(coin) / max(c.stake, 1), c) for c, coin in zip(candidates, coins, strict=False)]
    ordered = sorted(keyed, key=lambda pair: -pair[0])
    return [candidate for _, candidate in ordered if candidate.offer.price <= dearest]


def auditors(
    candidates: Iterable[Candidate], route: list[Candidate], index: int, avoid: Collection[Address]
) -> list[Candidate]:
    """Nodes that may check hop `index`: its span and class, other operators and payees than it and the hop before."""
    judged = route[max(0, index - 1) : index + 1]
    operators = {c.operator for c in judged} | {c.payee for c in judged}
    return [
        c
        for c in stand_ins(candidates, route[index], avoid)
        if c.operator not in operators and c.payee not in operators
    ]


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
