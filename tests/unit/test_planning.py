"""Which span a node serves: coverage, routes, choices, moves as plain functions; and a simulation of them at work."""

from __future__ import annotations

import random

import networkx
import pytest

from tallystick_devnet.joins import Outcome, Simulation, World
from tallystick_node.planning.choice import (
    HOLE_DWELL_S,
    MIN_DWELL_S,
    Machine,
    candidates,
    choose,
    consider_move,
    soft_bottleneck,
    weigh,
)
from tallystick_node.planning.report import why_told
from tallystick_node.planning.supply import (
    Supply,
    all_blocks,
    blocks,
    coverage,
    is_laminar,
    missing,
    stacks_of,
    throughput,
)
from tallystick_protocol.types import Span


def machine(layers: int, room: int, row_s: float = 0.01) -> Machine:
    return Machine(room, (1,) * layers, (row_s,) * layers)


def best(supply: Supply, stacks: tuple[Span, ...], room: int) -> Span:
    chosen = choose(candidates(supply, stacks, machine(stacks[-1].end, room)), random.Random(0))
    assert chosen is not None
    return chosen.span


def networkx_flow(supply: Supply, layers: int) -> float:
    graph = networkx.DiGraph()
    graph.add_nodes_from(range(layers + 1))
    for span, rate in supply.items():
        graph.add_edge(span.start, span.end, capacity=rate)
    return float(networkx.maximum_flow_value(graph, 0, layers))


@pytest.mark.parametrize("layers", [1, 2, 5, 8, 13])
def test_blocks_are_nested_or_disjoint_and_go_down_to_single_layers(layers: int) -> None:
    found = blocks(Span(0, layers))
    assert len(found) == 2 * layers - 1 and is_laminar(found)
    assert {Span(0, layers), *(Span(k, k + 1) for k in range(layers))} <= found


@pytest.mark.parametrize("seed", range(20))
def test_throughput_is_the_maximum_flow_and_over_blocks_the_smallest_coverage(seed: int) -> None:
    draw = random.Random(seed)
    layers = draw.randint(2, 9)
    family = sorted(blocks(Span(0, layers)))
    by_blocks = {draw.choice(family): draw.uniform(0.5, 2) for _ in range(12)}
    assert throughput(by_blocks, layers) == pytest.approx(networkx_flow(by_blocks, layers))
    assert (missing(by_blocks, layers) == 0) == (min(coverage(by_blocks, layers)) > 0)
    spans = [Span(*sorted(draw.sample(range(layers + 1), 2))) for _ in range(12)]
    anyhow = {span: draw.uniform(0.5, 2) for span in spans}
    assert throughput(anyhow, layers) == pytest.approx(networkx_flow(anyhow, layers))


def test_missing_layers_are_those_of_the_best_route() -> None:
    assert missing([], 4) == 4
    assert missing([Span(0, 2), Span(2, 4)], 4) == 0
    assert missing([Span(0, 3), Span(2, 4)], 4) == 1, "spans that overlap make no route"


def test_the_first_nodes_fill_the_model_and_later_ones_its_weakest_place() -> None:
    stacks = stacks_of(8, 0)
    assert best({}, stacks, 8) == Span(0, 8)
    assert best({Span(0, 4): 50.0}, stacks, 8) == Span(4, 8), "the whole model would fill no more and be slower"
    assert best({Span(0, 4): 5.0}, stacks, 4) == Span(4, 8)
    assert best({Span(0, 4): 500.0, Span(4, 6): 500.0, Span(6, 8): 1.0}, stacks, 4) == Span(6, 8)


def test_a_span_is_of_one_stack() -> None:
    stacks = stacks_of(6, 2)
    assert best({}, stacks, 6) == Span(2, 6)
    assert best({Span(2, 6): 9.0}, stacks, 6) == Span(0, 2)
    assert all(not span.start < 2 < span.end for span in all_blocks(stacks))


def test_a_network_with_other_cuts_is_joined_as_it_is() -> None:
    thirds = {Span(0, 2): 50.0, Span(2, 5): 20.0, Span(5, 8): 50.0}
    ranked = candidates(thirds, stacks_of(8, 0), machine(8, 4))
    assert ranked[0].span == Span(2, 5)
    assert Span(0, 4) not in {one.span for one in ranked}, "no session could take [0, 4) and [2, 5)"


def test_nothing_is_chosen_when_no_layer_fits() -> None:
    assert choose(candidates({}, stacks_of(4, 0), machine(4, 0)), random.Random(0)) is None


def test_a_span_that_was_told_is_weighed_though_it_does_not_fit_or_meet_the_others() -> None:
    supply = {Span(0, 2): 10.0, Span(2, 4): 10.0}
    stacks, small = stacks_of(4, 0), machine(4, 1)
    crossing = weigh(supply, stacks, small, Span(1, 3))
    assert not crossing.joined and crossing.fills == 0 and crossing.rate == pytest.approx(small.rate(Span(1, 3)))
    words = why_told(crossing, candidates(supply, stacks, small), small)
    assert "no route passes" in words and "left for weights" in words and "auto would take" in words
    good = candidates(supply, stacks, machine(4, 2))[0]
    assert weigh(supply, stacks, machine(4, 2), good.span) == good
    assert "too" in why_told(good, [good], machine(4, 2)) and "left for" not in why_told(good, [good], machine(4, 2))
    assert weigh({Span(0, 2): 10.0}, stacks, small, Span(2, 4)).fills == 2


def test_nodes_that_come_at_once_differ_among_equals() -> None:
    ranked = candidates({Span(0, 8): 1.0}, stacks_of(8, 0), machine(8, 2))
    drawn = [choose(ranked, random.Random(seed)) for seed in range(20)]
    assert len({one.span for one in drawn if one}) > 1


def test_the_soft_bottleneck_lies_between_the_smallest_and_the_mean() -> None:
    assert soft_bottleneck([3.0, 3.0], 0.1) == pytest.approx(3.0)
    assert 1.0 < soft_bottleneck([1.0, 9.0], 0.1) < 2.0
    assert soft_bottleneck([0.0, 1e9], 0.1) < 0.2


def test_a_node_moves_where_it_brings_much_but_not_at_once_and_not_for_little() -> None:
    stacks, mine = stacks_of(4, 0), machine(4, 2)
    others = {Span(0, 2): 500.0, Span(2, 4): 40.0}
    move = consider_move(others, stacks, mine, Span(0, 2), MIN_DWELL_S, random.Random(0))
    assert move.to == Span(2, 4) and "+" in move.why
    assert consider_move(others, stacks, mine, Span(0, 2), MIN_DWELL_S - 1, random.Random(0)).to is None
    even = {Span(0, 2): 500.0, Span(2, 4): 545.0}
    assert consider_move(even, stacks, mine, Span(0, 2), MIN_DWELL_S, random.Random(0)).to is None


def test_after_a_move_nothing_calls_the_node_back() -> None:
    stacks, mine = stacks_of(4, 0), machine(4, 2)
    others = {Span(0, 2): 500.0, Span(2, 4): 40.0}
    assert consider_move(others, stacks, mine, Span(2, 4), 1e9, random.Random(0)).to is None


def test_a_move_never_opens_a_hole_and_one_that_closes_a_hole_is_made_soon() -> None:
    stacks, mine = stacks_of(4, 0), machine(4, 2)
    alone = {Span(2, 4): 1.0}
    assert "a move takes a while" in consider_move(alone, stacks, mine, Span(0, 2), 1e9, random.Random(0)).why
    assert consider_move(alone, stacks, mine, Span(0, 2), 1e9, random.Random(0)).to is None
    hole = {Span(0, 2): 1.0}
    assert consider_move(hole, stacks, mine, Span(0, 2), HOLE_DWELL_S, random.Random(0)).to == Span(2, 4)
    assert consider_move(hole, stacks, mine, Span(0, 2), HOLE_DWELL_S - 1, random.Random(0)).to is None


def test_while_nodes_come_and_go_every_layer_stays_served_near_the_best_throughput() -> None:
    outcome = Simulation(World(nodes=150, layers=24, hours=20.0, warm_up_hours=4.0, seed=3)).run()
    assert outcome.leaves > 100 and outcome.moves > 0
    assert (outcome.served, outcome.worst_layer, outcome.holes) == (1.0, 1.0, 0)
    assert outcome.of_bound > 0.8 and outcome.of_offline > 0.9


def test_moves_keep_small_networks_whole_and_make_them_faster() -> None:
    def outcomes(moves: bool) -> list[Outcome]:
        worlds = [World(nodes=20, hours=24.0, look_around_s=1800.0, seed=seed, moves=moves) for seed in range(4)]
        return [Simulation(world).run() for world in worlds]

    moving, staying = outcomes(True), outcomes(False)
    assert sum(one.hole_s for one in moving) < sum(one.hole_s for one in staying) / 2
    assert sum(one.of_bound for one in moving) > 1.2 * sum(one.of_bound for one in staying)
    assert outcomes(True) == moving, "a world is deterministic"
