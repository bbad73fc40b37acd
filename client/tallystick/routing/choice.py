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
    same = [c for c in candidates if c.offer.numeric_class == hop.offer.numeric_class]
    return _ranked(same, hop, avoid, work)


def of_other_classes(
    candidates: Iterable[Candidate], hop: Candidate, avoid: Collection[Address], work: Workload = NO_WORK
) -> list[Candidate]:
    """As `stand_ins`, of other classes than the hop's: they compute other bits. None for a hop without a class."""
    own = hop.offer.numeric_class
    others = [c for c in candidates if any(own) and any(c.offer.numeric_class) and c.offer.numeric_class != own]
    return _ranked(others, hop, avoid, work)


def _ranked(candidates: list[Candidate], hop: Candidate, avoid: Collection[Address], work: Workload) -> list[Candidate]:
    usable = [c.over(hop.span) for c in candidates if c.node not in avoid and c.covers(hop.span)]
    return sorted(usable, key=lambda c: (c.operator == hop.operator, hop_s(c, work) + bounded(c.rtt_s), c.node))


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
    return _independent(stand_ins(candidates, route[index], avoid), route, index)


def foreign_auditors(
    candidates: Iterable[Candidate], route: list[Candidate], index: int, avoid: Collection[Address]
) -> list[Candidate]:
    """As `auditors`, but of other classes than the hop's: what they compute is compared by sketches."""
    return _independent(of_other_classes(candidates, route[index], avoid), route, index)


def _independent(found: list[Candidate], route: list[Candidate], index: int) -> list[Candidate]:
    return apart(found, owners(route[max(0, index - 1) : index + 1]))


def strangers_first(drawn: list[Candidate], hop: Candidate, acquainted: Collection[Address]) -> list[Candidate]:
    """Auditors in the order in which they are asked: the hop's class before others, and in each first those who have
    not been shown what the hop answered. Who has could say the same without computing.

    acquainted: owners of nodes that get the hop's rows and receipts anyhow, as its next hop or to check that one.
    """
    return sorted(
        drawn,
        key=lambda c: (
            c.offer.numeric_class != hop.offer.numeric_class,
            c.operator in acquainted or c.payee in acquainted,
        ),
    )


def checkable(candidates: list[Candidate], avoid: Collection[Address], across: bool = False) -> list[Candidate]:
    """Those that somebody else could check, over their whole span and with no regard to the hop before.

    across: also by nodes of other classes.
    """
    return [
        candidate
        for candidate in candidates
        if auditors(candidates, [candidate], 0, avoid)
        or (across and any(candidate.offer.numeric_class) and foreign_auditors(candidates, [candidate], 0, avoid))
    ]


def owners(nodes: Iterable[Candidate]) -> set[Address]:
    """Operators and payees: who may have no part in what checks these nodes, or runs beside them."""
    return {owner for node in nodes for owner in (node.operator, node.payee)}


def apart(candidates: Iterable[Candidate], taken: Collection[Address]) -> list[Candidate]:
    """Those of whom nobody in `taken` is the operator or the payee."""
    return [c for c in candidates if c.operator not in taken and c.payee not in taken]


def price_of(route: Iterable[Candidate]) -> int:
    """Token base units for each position that goes through a route."""
    return sum(hop.offer.price * len(hop.span) for hop in route)
