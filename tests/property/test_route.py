"""The planner against brute force on small random networks."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from harness import samples
from tallystick.routing.candidates import Candidate, Weights
from tallystick.routing.planner import HOP_COST, plan
from tallystick_protocol.errors import NoRoute
from tallystick_protocol.types import Digest

LAYERS = 5
WEIGHTS = Weights(seconds_per_wei=1e-3)
CLASSES = [samples.digest("class a"), samples.digest("class b")]


@st.composite
def networks(draw: st.DrawFn) -> list[Candidate]:
    found = []
    for index in range(draw(st.integers(0, 9))):
        start = draw(st.integers(0, LAYERS - 1))
        end = draw(st.integers(start + 1, LAYERS))
        found.append(
            samples.candidate(
                f"n{index}",
                start,
                end,
                rtt_s=draw(st.integers(0, 40)) / 100,
                price=draw(st.integers(0, 40)),
                numeric_class=draw(st.sampled_from(CLASSES)),
            )
        )
    return found


def cost(route: list[Candidate]) -> float:
    total = 0.0
    for hop in route:
        units = hop.offer.end - hop.offer.start + (hop.offer.start == 0) + (hop.offer.end == LAYERS)
        total += HOP_COST + hop.rtt_s / 2 + hop.offer.price * units * WEIGHTS.seconds_per_wei
    return total


def routes(network: list[Candidate], start: int = 0) -> list[list[Candidate]]:
    if start == LAYERS:
        return [[]]
    return [[hop, *rest] for hop in network if hop.offer.start == start for rest in routes(network, hop.offer.end)]


@settings(max_examples=200, deadline=None)
@given(networks())
def test_the_plan_is_the_cheapest_of_one_class_or_else_the_cheapest(network: list[Candidate]) -> None:
    every = routes(network)
    pure = [route for route in every if len({hop.offer.numeric_class for hop in route}) == 1]
    if not every:
        with pytest.raises(NoRoute):
            plan(network, LAYERS, weights=WEIGHTS)
        return
    found = plan(network, LAYERS, weights=WEIGHTS)
    assert found in every
    assert cost(found) == pytest.approx(min(map(cost, pure or every)))
    assert (found in pure) == bool(pure)


@settings(max_examples=100, deadline=None)
@given(networks(), st.sampled_from(CLASSES))
def test_a_class_that_is_insisted_on_is_kept(network: list[Candidate], numeric_class: bytes) -> None:
    every = [r for r in routes(network) if all(hop.offer.numeric_class == numeric_class for hop in r)]
    if not every:
        with pytest.raises(NoRoute):
            plan(network, LAYERS, numeric_class=Digest(numeric_class), weights=WEIGHTS)
        return
    found = plan(network, LAYERS, numeric_class=Digest(numeric_class), weights=WEIGHTS)
    assert cost(found) == pytest.approx(min(map(cost, every)))


@settings(max_examples=150, deadline=None)
@given(networks())
def test_the_gap_that_is_named_is_one_and_filling_it_leads_on(network: list[Candidate]) -> None:
    assume(not routes(network))
    with pytest.raises(NoRoute) as raised:
        plan(network, LAYERS)
    start, end = raised.value.fields["start"], raised.value.fields["end"]
    assert 0 <= start < end <= LAYERS
    filler = samples.candidate("filler", start, end)
    try:
        plan([*network, filler], LAYERS)
    except NoRoute as next_gap:
        assert next_gap.fields["start"] >= end
