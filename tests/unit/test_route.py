"""Planning over known offers; tests/property compares it with brute force."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from harness import samples
from tallystick.routing.candidates import Candidate, Expected, Weights
from tallystick.routing.choice import auditors, checkable, draw, foreign_auditors, stand_ins
from tallystick.routing.cost import Workload, route_s
from tallystick.routing.planner import plan
from tallystick.routing.route import SPREAD, choose, standbys, successors
from tallystick.session.openings import Openings
from tallystick_protocol.errors import NoRoute
from tallystick_protocol.types import Digest, Span, Wei

A, B = Digest(samples.digest("class a")), Digest(samples.digest("class b"))
SLOW, FAST = Expected(layer_s=0.02), Expected(layer_s=0.001)
one = samples.candidate


def nodes(route: list[Candidate]) -> list[str]:
    return [hop.url.rsplit("/", 1)[1] for hop in route]


def spans(route: list[Candidate]) -> list[tuple[int, int]]:
    return [(hop.span.start, hop.span.end) for hop in route]


def test_one_node_that_has_everything_is_a_route() -> None:
    assert nodes(plan([one("all", 0, 4)], Workload(4))) == ["all"]


def test_hops_come_in_order_of_layers_whatever_the_order_of_offers() -> None:
    offered = [one("c", 4, 6), one("a", 0, 2), one("b", 2, 4)]
    assert nodes(plan(offered, Workload(6))) == ["a", "b", "c"]


def test_a_cheaper_node_and_a_nearer_node_are_preferred() -> None:
    offered = [one("dear", 0, 4, price=10**15), one("cheap", 0, 4, price=10**13), one("far", 0, 4, rtt_s=5.0)]
    assert nodes(plan(offered, Workload(4))) == ["cheap"]
    assert nodes(plan(offered, Workload(4, weights=Weights(seconds_per_wei=1e-12)))) == ["far"]


def test_of_equal_routes_the_one_with_fewer_hops_is_taken() -> None:
    offered = [one("a", 0, 2, rtt_s=0.0), one("b", 2, 4, rtt_s=0.0), one("all", 0, 4, rtt_s=0.0)]
    assert nodes(plan(offered, Workload(4))) == ["all"]


def test_the_plan_does_not_depend_on_the_order_of_offers() -> None:
    offered = [one(f"n{i}", start, start + 2) for i, start in enumerate((0, 0, 2, 2, 4, 4))]
    assert nodes(plan(offered, Workload(6))) == nodes(plan(offered[::-1], Workload(6)))


def test_overlaps_join_where_a_node_can_be_entered_late_or_left_early() -> None:
    early, late = one("early", 0, 4), one("late", 2, 6)
    with pytest.raises(NoRoute):
        plan([early, late], Workload(6))
    assert spans(plan([replace(early, serves_parts=True), late], Workload(6))) == [(0, 2), (2, 6)]
    assert spans(plan([early, replace(late, serves_parts=True)], Workload(6))) == [(0, 4), (4, 6)]
    with pytest.raises(NoRoute):
        plan([replace(early, serves_parts=True), late], Workload(6), whole=True)


def test_a_slow_node_is_left_as_early_as_possible() -> None:
    slow = one("slow", 0, 5, serves_parts=True, expected=SLOW)
    fast = one("fast", 1, 6, serves_parts=True, expected=FAST)
    assert spans(plan([slow, fast], Workload(6))) == [(0, 1), (1, 6)]


def test_no_node_is_used_twice_in_a_route() -> None:
    """The cheapest walk leaves the slow node for the fast one and comes back; a session cannot."""
    slow = one("slow", 0, 8, serves_parts=True, expected=SLOW)
    other = one("other", 0, 8, serves_parts=True, expected=replace(SLOW, layer_s=0.03))
    fast = one("fast", 3, 5, serves_parts=True, expected=FAST)
    route = plan([slow, other, fast], Workload(8))
    assert len(set(nodes(route))) == len(route)
    every = [[slow]] + [[a.over(Span(0, 3)), fast, b.over(Span(5, 8))] for a, b in ((slow, other), (other, slow))]
    assert route_s(route, Workload(8)) == pytest.approx(min(route_s(known, Workload(8)) for known in every))


def test_how_far_nodes_say_that_they_are_apart_counts_within_what_their_distance_to_us_allows() -> None:
    near = {samples.address("b"): 0.001}
    a, b, c = one("a", 0, 2, rtt_s=0.1, links=near), one("b", 2, 4, rtt_s=0.1), one("c", 2, 4, rtt_s=0.08)
    assert nodes(plan([a, b, c], Workload(4))) == ["a", "b"]
    a = replace(a, links={samples.address("b"): 0.5, samples.address("c"): -7.0})
    assert nodes(plan([a, b, c], Workload(4))) == ["a", "c"]
    assert route_s([a, b], Workload(4)) - route_s([a, one("b", 2, 4, rtt_s=0.1)], Workload(4)) < 0.101


def test_a_long_prompt_prefers_who_computes_prompts_fast() -> None:
    steps = one("steps", 0, 4, expected=Expected(layer_s=0.001, prefill_s=0.001))
    prompts = one("prompts", 0, 4, expected=Expected(layer_s=0.002, prefill_s=0.0001))
    assert nodes(plan([steps, prompts], Workload(4, prompt=10, new=100))) == ["steps"]
    assert nodes(plan([steps, prompts], Workload(4, prompt=4000, new=100))) == ["prompts"]


def test_who_loses_sessions_is_avoided_for_short_ones() -> None:
    shaky = one("shaky", 0, 4, expected=Expected(layer_s=0.001, failure=0.5))
    steady = one("steady", 0, 4, expected=Expected(layer_s=0.0015, failure=0.05))
    assert nodes(plan([shaky, steady], Workload(4, new=10))) == ["steady"]


def test_stand_ins_in_mid_session_come_in_the_order_of_standbys() -> None:
    """Operators without a hop first, then those of other hops, then the hop's own; within each by cost."""
    hops = [one("a", 0, 2, operator="x"), one("b", 2, 4, operator="y")]
    others = [
        one("own", 2, 4, operator="y", price=1),
        one("neighbour", 2, 4, operator="x", price=1),
        one("far", 2, 4, operator="z", rtt_s=0.5),
        one("near", 2, 4, operator="w", rtt_s=0.02),
        one("elsewhere", 0, 2, operator="v"),
        one("lost", 2, 4, operator="u"),
    ]
    setting = SimpleNamespace(candidates=[*hops, *others], work=Workload(4))
    lost = {samples.address("lost")}
    session: Any = SimpleNamespace(setting=setting, route=hops, nodes={c.node for c in hops}, unfit=lost)
    openings = Openings(session)
    assert nodes(openings.stand_ins(1)) == ["near", "far", "neighbour", "own"]
    assert nodes(openings.stand_ins(1, itself=True)) == ["near", "far", "neighbour", "own", "b"]
    found = standbys(setting.candidates, hops, setting.work, lost)
    assert [None if standby is None else nodes([standby])[0] for standby in found] == ["elsewhere", "near"]
    assert successors(setting.candidates, hops, 1, setting.work, session.nodes | lost) == openings.stand_ins(1)


def test_avoided_nodes_are_left_out() -> None:
    offered = [one("a", 0, 4, price=1), one("b", 0, 4, price=2)]
    assert nodes(plan(offered, Workload(4), avoid={samples.address("a")})) == ["b"]
    with pytest.raises(NoRoute):
        plan(offered, Workload(4), avoid={samples.address("a"), samples.address("b")})


def test_a_span_beyond_the_model_is_left_out() -> None:
    with pytest.raises(NoRoute):
        plan([one("a", 0, 5)], Workload(4))


def test_one_class_is_preferred_to_a_cheaper_mixture() -> None:
    offered = [
        one("a0", 0, 2, numeric_class=A, rtt_s=1.0),
        one("a1", 2, 4, numeric_class=A, rtt_s=1.0),
        one("b0", 0, 2, numeric_class=B, rtt_s=0.0),
    ]
    assert nodes(plan(offered, Workload(4))) == ["a0", "a1"]


def test_of_two_whole_classes_the_cheaper_is_taken_and_a_class_can_be_insisted_on() -> None:
    offered = [one("a", 0, 4, numeric_class=A, rtt_s=0.5), one("b", 0, 4, numeric_class=B, rtt_s=0.1)]
    assert nodes(plan(offered, Workload(4))) == ["b"]
    assert nodes(plan(offered, Workload(4), numeric_class=A)) == ["a"]


def test_classes_are_mixed_only_when_no_class_covers_the_model() -> None:
    offered = [one("a", 0, 2, numeric_class=A), one("b", 2, 4, numeric_class=B)]
    assert nodes(plan(offered, Workload(4))) == ["a", "b"]
    with pytest.raises(NoRoute):
        plan(offered, Workload(4), numeric_class=A)


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
        plan(offered, Workload(6))
    assert raised.value.fields == {"start": gap[0], "end": gap[1]}


def test_the_gap_in_the_class_that_was_insisted_on_is_named() -> None:
    offered = [one("b", 0, 4, numeric_class=B), one("a", 0, 2, numeric_class=A)]
    with pytest.raises(NoRoute) as raised:
        plan(offered, Workload(4), numeric_class=A)
    assert raised.value.fields == {"start": 2, "end": 4}


def test_a_thousand_mostly_useless_offers_are_planned() -> None:
    offered = [one(f"n{i}", i % 79, i % 79 + 1 + i % 3, numeric_class=samples.digest(f"class {i}")) for i in range(950)]
    offered += [one(f"u{i}", i, i + 2, numeric_class=A) for i in range(0, 80, 2)]
    offered += [one("dear", 0, 80, numeric_class=B, price=(1 << 256) - 1)]
    route = choose(offered, Workload(80)).hops
    assert nodes(route) == [f"u{i}" for i in range(0, 80, 2)]


# -- spreading and standbys


def test_load_spreads_over_like_nodes_and_stays_away_from_worse_ones() -> None:
    offered = [one(f"{name}{start}", start, start + 2) for name in "abcd" for start in (0, 2)]
    offered.append(one("worse0", 0, 2, expected=SLOW))
    coins = random.Random(3)
    routes = [choose(offered, Workload(4), uniform=coins.random) for _ in range(400)]
    drawn = [name for route in routes for name in nodes(route.hops)]
    assert set(drawn) == {f"{name}{start}" for name in "abcd" for start in (0, 2)}
    assert all(60 < drawn.count(name) < 140 for name in set(drawn))


def test_load_does_not_spread_to_slow_nodes_where_money_dwarfs_time() -> None:
    offered = [one(name, 0, 4, price=10**15, expected=SLOW if name == "slow" else FAST) for name in ("a", "b", "slow")]
    work, coins = Workload(4, weights=Weights(seconds_per_wei=1e-9)), random.Random(5)
    drawn = {nodes(choose(offered, work, uniform=coins.random).hops)[0] for _ in range(60)}
    assert drawn == {"a", "b"}


def test_a_drawn_route_costs_little_more_than_the_best() -> None:
    coins = random.Random(4)
    for _ in range(60):
        offered = []
        for i in range(12):
            start = coins.randrange(6)
            expected = Expected(coins.random() / 100, coins.random() / 1000, coins.random() / 100)
            end = coins.randrange(start + 1, 7)
            offered.append(one(f"n{i}", start, end, rtt_s=coins.random() / 10, serves_parts=True, expected=expected))
        offered.append(one("all", 0, 6, rtt_s=0.2))
        route = choose(offered, Workload(6, 100, 50, 4096), uniform=coins.random)
        assert route.best_s <= route.cost_s <= (1 + SPREAD) * route.best_s
        assert route.cost_s == pytest.approx(route_s(route.hops, Workload(6, 100, 50, 4096)))


def test_a_standby_is_of_an_operator_that_has_no_hop_where_there_is_one() -> None:
    hop, after = one("hop", 0, 2, operator="x"), one("after", 2, 4, operator="y")
    like = one("like", 0, 2, operator="x", rtt_s=0.011)
    neighbour = one("neighbour", 0, 2, operator="y", rtt_s=0.02)
    other = one("other", 0, 2, operator="z", rtt_s=0.03)
    for offered, expected in (
        ([hop, after, like, neighbour, other], "other"),
        ([hop, after, like, neighbour], "neighbour"),
        ([hop, after, like], "like"),
    ):
        route = choose(offered, Workload(4), spread=0)
        assert nodes(route.hops) == ["hop", "after"]
        standby = route.standbys[0]
        assert standby is not None and nodes([standby]) == [expected]
        assert route.is_disjoint(0) == (expected != "like")
        assert route.standbys[1] is None and not route.is_disjoint(1)


def test_a_standby_for_a_part_serves_the_very_part() -> None:
    offered = [
        one("slow", 0, 5, serves_parts=True, expected=SLOW),
        one("fast", 1, 6, expected=FAST),
        one("spare", 0, 6, serves_parts=True, expected=replace(SLOW, layer_s=0.5)),
    ]
    route = choose(offered, Workload(6))
    assert nodes(route.hops) == ["slow", "fast"]
    assert [standby and standby.span for standby in route.standbys] == [Span(0, 1), Span(1, 6)]


# -- who may take part


def test_a_hop_is_replaced_by_who_covers_its_span_in_its_class_other_operators_first() -> None:
    hop = one("hop", 0, 2, numeric_class=A)
    offered = [
        hop,
        one("dear", 0, 2, numeric_class=A, price=10**15),
        one("cheap", 0, 2, numeric_class=A, price=1),
        one("same", 0, 2, numeric_class=A, price=0, operator="hop"),
        one("class", 0, 2, numeric_class=B),
        one("span", 0, 3, numeric_class=A),
        one("part", 0, 3, numeric_class=A, serves_parts=True, rtt_s=0.5),
        one("banned", 0, 2, numeric_class=A),
    ]
    avoid = {samples.address("hop"), samples.address("banned")}
    found = stand_ins(offered, hop, avoid)
    assert nodes(found) == ["cheap", "dear", "part", "same"]
    assert spans(found) == [(0, 2)] * 4


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


def test_who_could_be_checked_has_a_like_node_of_another_operator() -> None:
    whole = one("whole", 0, 4, operator="w", serves_parts=True)
    pair = [one("one", 0, 2, operator="a"), one("two", 0, 2, operator="b")]
    twins = [one("left", 2, 4, operator="c"), one("right", 2, 4, operator="c")]
    assert checkable([*pair, *twins], ()) == pair
    assert checkable([whole, *pair, *twins], ()) == [*pair, *twins], "the twins by the whole node, and nobody by them"
    assert checkable([whole, *pair, *twins], {pair[0].node, whole.node}) == pair[:1]


def test_auditors_of_other_classes_are_of_other_operators_too_and_stock_nodes_are_none() -> None:
    def one(name: str, numeric_class: str, operator: str = "") -> Candidate:
        found = Digest(bytes(32)) if numeric_class == "stock" else samples.digest(numeric_class)
        return samples.candidate(name, 0, 2, operator=operator, numeric_class=found)

    hop = one("hop", "a")
    offered = [hop, one("twin", "a", "hop"), one("other", "b"), one("its own", "b", "hop"), one("stock", "stock")]
    assert nodes(foreign_auditors(offered, [hop], 0, ())) == ["other"]
    assert foreign_auditors(offered, [one("stock", "stock")], 0, ()) == []
    assert checkable(offered, ()) == [] or hop not in checkable(offered, ())
    assert hop in checkable(offered, (), across=True) and one("stock", "stock") not in checkable(offered, (), True)


def test_who_takes_a_place_again_and_again_and_fails_is_not_waited_for_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hops, told = [one("a", 0, 2), one("b", 2, 4)], []
    setting = SimpleNamespace(candidates=hops, work=Workload(4), wait_s=10.0, on_waiting=told.append)
    session: Any = SimpleNamespace(setting=setting, route=hops, is_open=True, ids=[1, 2, 3])
    openings, now = Openings(session), [100.0]
    monkeypatch.setattr("tallystick.session.openings.time", SimpleNamespace(monotonic=lambda: now[0]))
    for _ in range(5):  # it is back at once, and fails
        openings.miss(1)
        now[0] += 1.0
    assert openings._give_up_at[1] == 110.0 and len(told) == 1
    session.ids.append(4)
    openings.miss(1)
    assert openings._give_up_at[1] == 115.0 and len(told) == 2, "the answer has grown meanwhile"
    openings.filled(1)  # the same hop is back, with all that it had
    openings.miss(1)
    assert len(told) == 3
