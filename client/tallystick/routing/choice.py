"""Who may take a hop's place in mid-session, and who may check it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

from tallystick.routing.candidates import Candidate
from tallystick.routing.cost import Workload, bounded, hop_s
from tallystick_protocol.types import Address

NO_WORK = Workload(0)
"""Where nothing is known of the session: one token, at the default weight of money."""


def stand_ins(
    candidates: Iterable[Candidate], hop: Candidate, avoid: Collection[Address], work: Workload = NO_WORK
) -> list[Candidate]:
    """Nodes that could take a hop's place in mid-session, cut to its span: of its class, the best first.

    Nodes of another operator come before others of the same: what made the hop fail may be its operator's.
    """
    same = [
        c.over(hop.span)
        for c in candidates
        if c.node not in avoid and c.offer.numeric_class == hop.offer.numeric_class and c.covers(hop.span)
    ]
    return sorted(same, key=lambda c: (c.operator == hop.operator, hop_s(c, work) + bounded(c.rtt_s), c.node))


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


def owners(nodes: Iterable[Candidate]) -> set[Address]:
    """Operators and payees: who may have no part in what checks these nodes, or runs beside them."""
    return {owner for node in nodes for owner in (node.operator, node.payee)}


def checkable(candidates: list[Candidate], avoid: Collection[Address]) -> list[Candidate]:
    """Those that somebody else could check, over their whole span and with no regard to the hop before."""
    return [candidate for candidate in candidates if auditors(candidates, [candidate], 0, avoid)]
