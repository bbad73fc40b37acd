"""Nodes of no numeric class ("stock"): when a client uses them, and what it says of an answer that they worked on.

What such a node computes cannot be recomputed to the same bits, not even by itself in another session's company. Its
receipts are linked, signed and paid like any other's; nothing can be concluded from another node's result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tallystick.routing.candidates import Candidate
from tallystick.verdict import Policy, Verdict
from tallystick_protocol.errors import NoRoute

Find = Callable[[list[Candidate]], list[Candidate]]


def has_class(candidate: Candidate) -> bool:
    """Whether a node's results can be compared bit by bit with another one's."""
    return any(candidate.offer.numeric_class)


def find_route(candidates: Sequence[Candidate], find: Find, *, admit_stock: bool, policy: Policy) -> list[Candidate]:
    """The route over nodes with a class; where they leave a gap and it is admitted, over stock nodes for those layers.

    find(usable): a route, or NoRoute. Raises NoRoute; where stock nodes would fill the gap, saying what admits them.
    """
    checkable = [candidate for candidate in candidates if has_class(candidate)]
    try:
        return find(checkable)
    except NoRoute as gap:
        if len(checkable) == len(candidates):
            raise
        route = _with_stock(candidates, checkable, find)
        if route is None:
            raise
        if admit_stock and policy == "off":
            return route
        lacking = 'set admit_stock (--admit-stock) and verify="off"'
        if admit_stock:
            lacking = f'verify="{policy}" cannot check them: set verify="off"'
        layers = ", ".join(str(hop.span) for hop in route if not has_class(hop))
        raise NoRoute(
            f"layers {layers} are served only by nodes of no numeric class (stock), whose results no other node"
            f" reproduces bit by bit; to use them unchecked, {lacking}",
            **gap.fields,
        ) from None


def _with_stock(candidates: Sequence[Candidate], checkable: list[Candidate], find: Find) -> list[Candidate] | None:
    """A route that uses stock nodes where layers lack others, if there is one; else any."""
    served = {layer for candidate in checkable for layer in range(candidate.span.start, candidate.span.end)}
    needed = [c for c in candidates if has_class(c) or not served.issuperset(range(c.span.start, c.span.end))]
    for usable in (needed, list(candidates)):
        try:
            return find(usable)
        except NoRoute:
            continue
    return None


def note_stock(verdict: Verdict, route: Sequence[Candidate]) -> None:
    """Record in a verdict which hops of a route have no class."""
    found = [(hop.node, hop.span) for hop in route if not has_class(hop)]
    verdict.unverifiable += [one for one in found if one not in verdict.unverifiable]
