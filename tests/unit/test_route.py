"""Planning over known offers; tests/property compares it with brute force."""

from __future__ import annotations

import random
import time
from dataclasses import replace

import pytest

from harness import samples
from tallystick.routing.candidates import Candidate, Weights
from tallystick.routing.choice import auditors, draw, stand_ins
from tallystick.routing.planner import plan
from tallystick_protocol.errors import NoRoute
from tallystick_protocol.types import Digest, Wei

A, B = Digest(samples.digest("class a")), Digest(samples.digest("class b"))
one = samples.candidate


def nodes(route: list[Candidate]) -> list[str]:
    return [hop.url.rsplit("/", 1)[1] for hop in route]


def test_one_node_that_has_everything_is_a_route() -> None:
    assert nodes(plan([one("all", 0, 4)], 4)) == ["all"]


def test_hops_come_in_order_of_layers_whatever_the_order_of_offers() -> None:
    offered = [one("c", 4, 6), one("a", 0, 2), one("b", 2, 4)]
    assert nodes(plan(offered, 6)) == ["a", "b", "c"]


def test_a_cheaper_node_and_a_nearer_node_are_preferred() -> None:
    offered = [one("dear", 0, 4, price=10**15), one("cheap", 0, 4, price=10**13), one("far", 0, 4, rtt_s=5.0)]
    assert nodes(plan(offered, 4)) == ["cheap"]
    assert nodes(plan(offered, 4, weights=Weights(seconds_per_wei=1e-12))) == ["far"]


def test_of_equal_routes_the_one_with_fewer_hops_is_taken() -> None:
    offered = [one("a", 0, 2, rtt_s=0.0), one("b", 2, 4, rtt_s=0.0), one("all", 0, 4, rtt_s=0.0)]
    assert nodes(plan(offered, 4)) == ["all"]


def test_the_plan_does_not_depend_on_the_order_of_offers() -> None:
    offered = [one(f"n{i}", start, start + 2) for i, start in enumerate((0, 0, 2, 2, 4, 4))]
    assert nodes(plan(offered, 6)) == nodes(plan(offered[::-1], 6))


def test_spans_are_used_whole_so_that_overlaps_do_not_join() -> None:
    with pytest.raises(NoRoute):
        plan([one("a", 0, 3), one("b", 2, 6)], 6)


def test_avoided_nodes_are_left_out() -> None:
    offered = [one("a", 0, 4, price=1), one("b", 0, 4, price=2)]
    assert nodes(plan(offered, 4, avoid={samples.address("a")})) == ["b"]
    with pytest.raises(NoRoute):
        plan(offered, 4, avoid={samples.address("a"), samples.address("b")})


def test_a_span_beyond_the_model_is_left_out() -> None:
    with pytest.raises(NoRoute):
        plan([one("a", 0, 5)], 4)


def test_one_class_is_preferred_to_a_cheaper_mixture() -> None:
    offered = [
        one("a0", 0, 2, numeric_class=A, rtt_s=1.0),
        one("a1", 2, 4, numeric_class=A, rtt_s=1.0),
        one("b0", 0, 2, numeric_class=B, rtt_s=0.0),
    ]
    assert nodes(plan(offered, 4)) == ["a0", "a1"]


def test_of_two_whole_classes_the_cheaper_is_taken_and_a_class_can_be_insisted_on() -> None:
    offered = [one("a", 0, 4, numeric_class=A, rtt_s=0.5), one("b", 0, 4, numeric_class=B, rtt_s=0.1)]
    assert nodes(plan(offered, 4)) == ["b"]
    assert nodes(plan(offered, 4, numeric_class=A)) == ["a"]


def test_classes_are_mixed_only_when_no_class_covers_the_model() -> None:
    offered = [one("a", 0, 2, numeric_class=A), one("b", 2, 4, numeric_class=B)]
    assert nodes(plan(offered, 4)) == ["a", "b"]
    with pytest.raises(NoRoute):
        plan(offered, 4, numeric_class=A)


@pytest.mark.parametrize(
    ("spans", "gap"),
    [
        ([], (0, 6)),
        ([(2, 6)], (0, 2)),
        ([(0, 2), (4, 6)], (2, 4)),
        ([(0, 2)], (2, 6)),
        ([(0, 2), (2, 3), (5, 6)], (3, 5)),
        ([(0, 4), (0, 2), (5, 6)], (4, 5)),
        ([(0, 2), (3, 4), (5, 6)], (2, 3)),
    ],
)
def test_the_first_gap_is_named_with_the_command_that_fills_it(
    spans: list[tuple[int, int]], gap: tuple[int, int]
) -> None:
    offered = [one(f"n{start}{end}", start, end) for start, end in spans]
    with pytest.raises(NoRoute, match=rf"layers \[{gap[0]}, {gap[1]}\) of 6.*--span {gap[0]}:{gap[1]}$") as raised:
        plan(offered, 6)
    assert raised.value.fields == {"start": gap[0], "end": gap[1]}


def test_the_gap_in_the_class_that_was_insisted_on_is_named() -> None:
    offered = [one("b", 0, 4, numeric_class=B), one("a", 0, 2, numeric_class=A)]
    with pytest.raises(NoRoute) as raised:
        plan(offered, 4, numeric_class=A)
    assert raised.value.fields == {"start": 2, "end": 4}


def test_a_thousand_mostly_useless_offers_are_planned_within_two_seconds() -> None:
    offered = [one(f"n{i}", i % 79, i % 79 + 1 + i % 3, numeric_class=samples.digest(f"class {i}")) for i in range(950)]
    offered += [one(f"u{i}", i, i + 2, numeric_class=A) for i in range(0, 80, 2)]
    offered += [one("dear", 0, 80, numeric_class=B, price=(1 << 256) - 1)]
    began = time.perf_counter()
    route = plan(offered, 80)
    assert time.perf_counter() - began < 2
    assert nodes(route) == [f"u{i}" for i in range(0, 80, 2)]


def test_a_hop_is_replaced_by_the_same_span_and_class_only_cheapest_first() -> None:
    hop = one("hop", 0, 2, numeric_class=A)
    offered = [
        hop,
        one("dear", 0, 2, numeric_class=A, price=99),
        one("cheap", 0, 2, numeric_class=A, price=1),
        one("class", 0, 2, numeric_class=B),
        one("span", 0, 3, numeric_class=A),
        one("banned", 0, 2, numeric_class=A),
    ]
    avoid = {samples.address("hop"), samples.address("banned")}
    assert nodes(stand_ins(offered, hop, avoid)) == ["cheap", "dear"]


def test_an_auditor_has_neither_operator_nor_payee_of_the_hop_or_of_the_one_before() -> None:
    route = [
        one("h0", 0, 2, operator="op0", payee="pay0"),
        one("h1", 2, 4, operator="op1", payee="pay1"),
        one("h2", 4, 6, operator="op2", payee="pay2"),
    ]
    offered = [
        *route,
        one("free", 2, 4, operator="x", payee="y"),
        one("same operator", 2, 4, operator="op1", payee="y"),
        one("same payee", 2, 4, operator="x", payee="pay1"),
        one("operator before", 2, 4, operator="op0", payee="y"),
        one("payee before", 2, 4, operator="x", payee="pay0"),
        one("paid to operator", 2, 4, operator="x", payee="op1"),
        one("operated by payee", 2, 4, operator="pay0", payee="y"),
        one("operator after", 2, 4, operator="op2", payee="pay2"),
        one("class", 2, 4, operator="x", payee="y", numeric_class=A),
        one("span", 2, 5, operator="x", payee="y"),
        one("banned", 2, 4, operator="x", payee="y"),
    ]
    assert set(nodes(auditors(offered, route, 1, {samples.address("banned")}))) == {"free", "operator after"}


def test_the_first_hop_has_nobody_before_it() -> None:
    route = [one("h0", 0, 2), one("h1", 2, 4)]
    assert nodes(auditors([*route, one("h1 too", 0, 2, operator="h1")], route, 0, ())) == ["h1 too"]


def test_auditors_are_drawn_by_stake_among_acceptable_prices() -> None:
    small, large = one("small", 0, 2), replace(one("large", 0, 2), stake=Wei(3 * 10**21))
    offered = [small, one("dear", 0, 2, price=11), large]
    coins = random.Random(1)
    drawn = [nodes(draw(offered, [coins.random() for _ in offered], 10)) for _ in range(2000)]
    assert {frozenset(order) for order in drawn} == {frozenset({"small", "large"})}
    share = sum(order[0] == "large" for order in drawn) / len(drawn)
    assert abs(share - 0.75) < 0.04


def test_stake_of_nothing_is_drawn_last_and_not_divided_by() -> None:
    offered = [replace(one("none", 0, 2), stake=Wei(0)), one("some", 0, 2)]
    assert nodes(draw(offered, [0.999, 0.001], 10)) == ["some", "none"]
