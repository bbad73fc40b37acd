"""The planner against brute force on small random networks."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from harness import samples
from tallystick.routing.candidates import Candidate, Expected, Weights
from tallystick.routing.cost import FAILOVER_S, HOP_S, Workload, route_s
from tallystick.routing.planner import plan
from tallystick_protocol.errors import NoRoute
from tallystick_protocol.types import Digest, Span

LAYERS = 5
WORK = Workload(LAYERS, prompt=100, new=50, row_bytes=4096, weights=Weights(seconds_per_wei=1e-3))
CLASSES = [samples.digest("class a"), samples.digest("class b")]
ODD = [math.nan, math.inf, -math.inf, -1.0, 0.0, 1e308, 5e-324]


@st.composite
def networks(draw: st.DrawFn) -> list[Candidate]:
    count = draw(st.integers(0, 6))
    found = []
    for index in range(count):
        start = draw(st.integers(0, LAYERS - 1))
        end = draw(st.integers(start + 1, LAYERS))
        others = draw(st.lists(st.integers(0, count - 1), max_size=3))
        expected = Expected(
            layer_s=draw(st.integers(0, 30)) / 1000,
            prefill_s=draw(st.integers(0, 10)) / 1000,
            wait_s=draw(st.integers(0, 30)) / 1000,
            failure=draw(st.integers(0, 10)) / 10,
        )
        found.append(
            samples.candidate(
                f"n{index}",
                start,
                end,
                rtt_s=draw(st.integers(0, 40)) / 1000,
                price=draw(st.integers(0, 4)),
                numeric_class=draw(st.sampled_from(CLASSES)),
                serves_parts=draw(st.booleans()),
                expected=expected,
                links={samples.address(f"n{other}"): draw(st.integers(0, 90)) / 1000 for other in others},
            )
        )
    return found


def cost(route: list[Candidate]) -> float:
    """As docs/routing.md says it, written once more."""
    spread = WORK.prompt / WORK.new

    def link(rtt: float, row_bytes: int) -> float:
        return rtt / 2 + (rtt / 2) / WORK.new + spread * row_bytes / 12.5e6

    total = link(route[0].rtt_s, 4) + link(route[-1].rtt_s, 0)
    for one, other in pairwise(route):
        told = [a.links[b.node] for a, b in ((one, other), (other, one)) if b.node in a.links]
        shortest, longest = abs(one.rtt_s - other.rtt_s), one.rtt_s + other.rtt_s
        rtt = sorted([shortest, max(told), longest])[1] if told else max(one.rtt_s, other.rtt_s)
        total += link(rtt, WORK.row_bytes)
    for hop in route:
        units = len(hop.span) + (hop.span.start == 0) + (hop.span.end == LAYERS)
        total += HOP_S + hop.expected.wait_s + hop.expected.failure * FAILOVER_S / WORK.new
        total += len(hop.span) * (hop.expected.layer_s + spread * hop.expected.prefill_s)
        total += hop.offer.price * units * 1e-3 * (1 + spread)
    return total


def routes(network: list[Candidate], start: int = 0) -> list[list[Candidate]]:
    """Every cover of [start, LAYERS) by different nodes."""
    if start == LAYERS:
        return [[]]
    found = []
    for hop in network:
        rest = [other for other in network if other is not hop]
        if hop.serves_parts:
            ends = range(start + 1, hop.offer.end + 1) if hop.offer.start <= start else range(0)
        else:
            ends = range(hop.offer.end, hop.offer.end + (hop.offer.start == start))
        found += [[hop.over(Span(start, end)), *after] for end in ends for after in routes(rest, end)]
    return found


@settings(max_examples=200, deadline=None)
@given(networks())
def test_the_plan_is_the_cheapest_of_one_class_or_else_the_cheapest(network: list[Candidate]) -> None:
    every = routes(network)
    pure = [route for route in every if len({hop.offer.numeric_class for hop in route}) == 1]
    if not every:
        with pytest.raises(NoRoute):
            plan(network, WORK)
        return
    found = plan(network, WORK)
    assert found in every
    assert cost(found) == pytest.approx(min(map(cost, pure or every)))
    assert route_s(found, WORK) == pytest.approx(cost(found))
    assert (found in pure) == bool(pure)
    assert plan(network[::-1], WORK) == found


@settings(max_examples=80, deadline=None)
@given(networks(), st.sampled_from(CLASSES))
def test_a_class_that_is_insisted_on_is_kept(network: list[Candidate], numeric_class: bytes) -> None:
    every = [r for r in routes(network) if all(hop.offer.numeric_class == numeric_class for hop in r)]
    if not every:
        with pytest.raises(NoRoute):
            plan(network, WORK, numeric_class=Digest(numeric_class))
        return
    found = plan(network, WORK, numeric_class=Digest(numeric_class))
    assert cost(found) == pytest.approx(min(map(cost, every)))


@settings(max_examples=100, deadline=None)
@given(networks())
def test_the_gap_that_is_named_is_one_and_filling_it_leads_on(network: list[Candidate]) -> None:
    assume(not routes(network))
    with pytest.raises(NoRoute) as raised:
        plan(network, WORK)
    start, end = raised.value.fields["start"], raised.value.fields["end"]
    assert 0 <= start < end <= LAYERS
    filler = samples.candidate("filler", start, end)
    try:
        plan([*network, filler], WORK)
    except NoRoute as next_gap:
        assert next_gap.fields["start"] >= end


@settings(max_examples=60, deadline=None)
@given(networks(), st.data())
def test_odd_figures_never_raise_and_never_hide_a_route(network: list[Candidate], data: st.DataObject) -> None:
    odd = st.sampled_from(ODD)
    strange = [
        samples.candidate(
            f"n{index}",
            c.offer.start,
            c.offer.end,
            rtt_s=data.draw(odd),
            price=data.draw(st.sampled_from([0, 1, (1 << 256) - 1])),
            numeric_class=c.offer.numeric_class,
            serves_parts=c.serves_parts,
            expected=Expected(data.draw(odd), data.draw(odd), data.draw(odd), data.draw(odd)),
            links={samples.address("n0"): data.draw(odd)},
        )
        for index, c in enumerate(network)
    ]
    try:
        route = plan(strange, WORK)
    except NoRoute:
        assert not routes(network)
        return
    assert [hop.span.start for hop in route] == [0, *(hop.span.end for hop in route[:-1])]
    assert math.isfinite(route_s(route, WORK))
