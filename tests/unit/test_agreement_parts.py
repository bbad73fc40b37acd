"""What `agree=k` decides by itself: which routes share nobody, how far receipts agree, who is outvoted."""

from __future__ import annotations

from dataclasses import replace

import pytest

from harness import samples
from tallystick.agreement.comparison import Conflict, compare
from tallystick.agreement.routes import apart, disjoint
from tallystick.routing.candidates import Candidate
from tallystick.routing.choice import owners
from tallystick.routing.cost import Workload
from tallystick.routing.planner import plan
from tallystick.session.ballot import Ballot
from tallystick_protocol.errors import NoRoute
from tallystick_protocol.messages import Offer
from tallystick_protocol.receipts import Receipt
from tallystick_protocol.types import WINDOW, Address, Digest, Span, Wei

LAYERS = 4


def candidate(
    name: str, start: int, end: int, *, operator: str = "", payee: str = "", price: int = 1000, kind: str = "class"
) -> Candidate:
    offer = Offer(
        node=samples.address(name), model=samples.MODEL, numeric_class=samples.digest(kind), start=start, end=end,
        price=Wei(price), credit=Wei(10**9), max_length=512, seq=1, expires=2_000_000_000,
    )  # fmt: skip
    owner = samples.address(operator or name)
    return Candidate(
        offer=offer, offer_digest=samples.digest(name), operator=owner,
        payee=samples.address(payee) if payee else owner, signer=offer.node, stake=Wei(1), url=name, rtt_s=0.0,
    )  # fmt: skip


def best(usable: list[Candidate]) -> list[Candidate]:
    return plan(usable, Workload(LAYERS))


def test_routes_share_neither_operator_nor_payee() -> None:
    nodes = [
        candidate("a", 0, 2), candidate("b", 2, 4), candidate("c", 0, 2), candidate("d", 2, 4),
        candidate("same operator", 0, 4, operator="a", price=1), candidate("same payee", 2, 4, payee="b", price=1),
    ]  # fmt: skip
    routes = disjoint(nodes, 2, best)
    assert not owners(routes[0]) & owners(routes[1])
    assert all(hop in nodes for route in routes for hop in route)


def test_the_best_route_gives_way_where_it_leaves_no_other() -> None:
    """Who owns a hop of the cheapest route owns a node that a second route cannot do without."""
    nodes = [
        candidate("x", 0, 2, price=1), candidate("y", 2, 4, price=1), candidate("z", 0, 2, operator="y"),
        candidate("w", 2, 4, operator="v"),
    ]  # fmt: skip
    assert owners(best(nodes)) == owners(nodes[:2])
    routes = disjoint(nodes, 2, best)
    assert {frozenset(hop.node for hop in route) for route in routes} == {
        frozenset({nodes[0].node, nodes[3].node}),
        frozenset({nodes[2].node, nodes[1].node}),
    }


def test_routes_are_of_one_class() -> None:
    nodes = [candidate("a", 0, 4), candidate("b", 0, 4, kind="other")]
    with pytest.raises(NoRoute, match=r"of one numeric class; there are 1, and beside them nobody serves.*\[0, 4\)"):
        disjoint(nodes, 2, best)
    assert len(disjoint([*nodes, candidate("c", 0, 4)], 2, best)) == 2


def test_the_command_for_a_node_that_is_missing_says_which_model_where_there_are_several() -> None:
    def find(pool: list[Candidate]) -> list[Candidate]:
        return plan(pool, Workload(4, model="0x12"))

    with pytest.raises(NoRoute, match=r"--span 0:4 --model 0x12$") as caught:
        disjoint([candidate("a", 0, 4)], 2, find)
    assert caught.value.fields == {"start": 0, "end": 4, "model": "0x12"}


def test_no_node_at_all_is_told() -> None:
    with pytest.raises(NoRoute, match="no node of any class"):
        disjoint([], 2, best)


def test_apart_leaves_out_whom_owners_have_a_part_in() -> None:
    a, b = candidate("a", 0, 4), candidate("b", 0, 4, payee="a")
    assert apart([a, b, candidate("c", 0, 4)], owners([a])) == [candidate("c", 0, 4)]


def receipts(span: Span, *outputs: str, last: int = WINDOW) -> tuple[Span, list[Receipt]]:
    """A hop's receipts: one window for each output; the last one has `last` rows."""
    found = []
    for window, output in enumerate(outputs):
        rows = last if window == len(outputs) - 1 else WINDOW
        first = window * WINDOW
        found.append(
            replace(samples.receipt(), start=span.start, end=span.end, first=first, last=first + rows,
                    output=samples.digest(output))
        )  # fmt: skip
    return span, found


A, B, C = Span(0, 1), Span(1, 2), Span(2, 3)


def test_windows_that_all_have_signed_alike_are_agreed() -> None:
    one = [receipts(A, "a0", "a1"), receipts(B, "b0")]
    other = [receipts(A, "a0", "a1", "a2"), receipts(B, "b0", "b1")]
    found = compare([one, other])
    assert found.agreed == {1: 2, 2: 1} and found.conflict is None
    assert (found.clears(A), found.clears(B), found.clears(Span(0, 2))) == (2, 1, 1)


def test_the_first_window_that_differs_is_the_conflict_though_it_shows_at_a_later_boundary() -> None:
    one = [receipts(A, "a0", "a1"), receipts(B, "b0", "b1")]
    other = [receipts(A, "a0", "x1"), receipts(B, "x0", "x1")]
    found = compare([one, other])
    assert found.conflict == Conflict(0, B) and found.agreed == {1: 1, 2: 0}


def test_within_a_window_the_first_shared_boundary_is_the_conflict() -> None:
    one = [receipts(A, "a0", "a1"), receipts(B, "b0", "b1")]
    other = [receipts(A, "a0", "x1"), receipts(B, "b0", "x2")]
    assert compare([one, other]).conflict == Conflict(1, A)


def test_routes_that_are_cut_differently_are_compared_where_they_meet() -> None:
    one = [receipts(Span(0, 2), "b0"), receipts(C, "c0")]
    other = [receipts(A, "a0"), receipts(B, "x0"), receipts(C, "x1")]
    found = compare([one, other])
    assert found.conflict == Conflict(0, Span(0, 2)) and found.agreed == {2: 0, 3: 0}


def test_what_only_one_has_signed_and_windows_of_other_lengths_are_left_out() -> None:
    one = [receipts(A, "a0", "a1", last=5)]
    assert compare([one, [receipts(A, "a0", "x1", last=9)]]).conflict is None
    assert compare([one, [receipts(A, "a0")]]).agreed == {1: 1}
    assert compare([one, [receipts(A, "a0", "x1", last=5)]]).conflict == Conflict(1, A)


@pytest.mark.parametrize(
    ("votes", "won"),
    [({"x": "a"}, None), ({"x": "a", "y": "b"}, None), ({"x": "ab", "y": "c"}, "x"), ({"x": "a", "y": "bc"}, "y"),
     ({"x": "ab", "y": "cd"}, None), ({}, None)],
)  # fmt: skip
def test_two_alike_win_unless_others_are_as_many(votes: dict[str, str], won: str | None) -> None:
    ballots: dict[Digest, list[Address]] = {
        samples.digest(output): [samples.address(name) for name in names] for output, names in votes.items()
    }
    assert Ballot(ballots).won == (None if won is None else samples.digest(won))
