"""What nodes deliver takes the place of what they say: over simulated sessions, and over odd ones."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from harness import samples
from tallystick.routing.candidates import Candidate, Expected
from tallystick.routing.cost import Workload, step_s
from tallystick.routing.reputation import HALF_LIFE_S, LEAST_DOUBT, Reputation
from tallystick.routing.route import choose
from tallystick_protocol.errors import NoRoute
from tallystick_protocol.types import Address, Span

WORK = Workload(8)


class Clock:
    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        return self.now


def node(name: str, start: int, end: int, claim_s: float, **changes: object) -> Candidate:
    return samples.candidate(name, start, end, claimed=Expected(layer_s=claim_s), rtt_s=0.002, **changes)


def delivered(route: list[Candidate], true_s: dict[Address, float], noise: float) -> float:
    """What a client would measure of a step."""
    real = [replace(hop, expected=Expected(layer_s=true_s[hop.node])) for hop in route]
    return step_s(real) * noise


@pytest.mark.parametrize("seed", range(5))
def test_a_node_that_does_not_deliver_what_it_says_loses_its_traffic_within_ten_sessions(seed: int) -> None:
    """Eight honest nodes and two that claim to be ten times faster than they are, in company of all kinds."""
    coins = random.Random(seed)
    honest = {f"h{i}": (i % 2 * 4, i % 2 * 4 + 4, 0.004 * (0.8 + 0.4 * coins.random())) for i in range(8)}
    network = [node(name, *layers, claim, serves_parts=True) for name, (*layers, claim) in honest.items()]
    network += [node("liar0", 0, 4, 0.001, serves_parts=True), node("liar1", 2, 8, 0.001, serves_parts=True)]
    liars = {samples.address("liar0"), samples.address("liar1")}
    true_s = {samples.address(name): claim for name, (_, _, claim) in honest.items()} | dict.fromkeys(liars, 0.02)
    clock, sessions = Clock(), []
    reputation = Reputation(clock=clock)
    for _ in range(60):
        route = choose(reputation.inform(network), WORK, uniform=coins.random).hops
        sessions.append(any(hop.node in liars for hop in route))
        reputation.observe(route, delivered(route, true_s, coins.gauss(1, 0.05)))
        clock.now += 20
    assert sessions[0]
    assert sum(sessions[10:]) <= 2  # forgetting lets it be tried again, once in a long while


def test_what_was_measured_is_told_apart_by_who_is_known() -> None:
    clock = Clock()
    reputation = Reputation(clock=clock)
    known, new = node("known", 0, 4, 0.002), node("new", 4, 8, 0.002)
    for _ in range(5):
        reputation.observe([known], step_s([replace(known, expected=known.claimed)]))
    both = [replace(hop, expected=hop.claimed) for hop in (known, new)]
    reputation.observe(both, step_s(both) + 0.04)
    blamed = {hop.node: reputation.expect(hop.node, hop.claimed, 4).layer_s for hop in both}
    assert blamed[known.node] < 0.003
    assert blamed[new.node] == pytest.approx(0.012, rel=0.15)


def test_a_claim_to_have_become_slower_is_believed_and_faster_of_who_was_honest() -> None:
    reputation = Reputation(clock=Clock())
    honest, liar = node("honest", 0, 4, 0.01), node("liar", 0, 4, 0.001)
    for hop in (honest, liar):
        reputation.observe([hop], step_s([replace(hop, expected=Expected(layer_s=0.01))]))

    def expected(hop: Candidate, claim: float) -> float:
        return reputation.expect(hop.node, Expected(layer_s=claim), 4).layer_s

    assert expected(honest, 0.03) == pytest.approx(0.03, rel=0.05)
    assert expected(honest, 0.005) == pytest.approx(0.005, rel=0.05)
    assert expected(liar, 0.0005) == pytest.approx(0.01, rel=0.05)


def test_what_was_seen_is_forgotten() -> None:
    clock = Clock()
    reputation = Reputation(clock=clock)
    hop = node("a", 0, 4, 0.001)
    reputation.observe([hop], step_s([replace(hop, expected=Expected(layer_s=0.101))]))
    reputation.lost(hop.node)
    seen = [reputation.expect(hop.node, hop.claimed, 4)]
    for _ in range(2):
        clock.now += HALF_LIFE_S
        seen.append(reputation.expect(hop.node, hop.claimed, 4))
    beyond = [each.layer_s - 0.001 for each in seen]
    assert beyond[1] == pytest.approx(beyond[0] / 2) and beyond[2] == pytest.approx(beyond[0] / 4)
    unknown = reputation.expect(Address("0x"), hop.claimed, 4)
    assert seen[0].failure > seen[1].failure > seen[2].failure > unknown.failure


def test_beliefs_survive_a_restart_and_a_broken_file_does_not_matter(tmp_path: Path) -> None:
    path, clock = tmp_path / "cache" / "reputation.json", Clock()
    hop, other = node("a", 0, 4, 0.001), node("b", 0, 4, 0.001)
    first, second = Reputation(path, clock), Reputation(path, clock)
    first.observe([hop], 0.1)
    second.observe([other], 0.1)
    first.save()
    second.save()
    again = Reputation(path, clock)
    assert len(again) == 2
    assert again.expect(hop.node, hop.claimed, 4) == first.expect(hop.node, hop.claimed, 4)
    known = json.loads(path.read_text())
    for broken in (
        "",
        "[]",
        '{"version": 1, "nodes": {"0x": 7}}',
        '{"version": 1, "nodes": {"0x": {"layer_s": 1}}}',
        json.dumps({**known, "version": 99}),
        json.dumps({"version": 1, "nodes": {hop.node: {**known["nodes"][hop.node], "layer_s": float("nan")}}}),
    ):
        path.write_text(broken)
        assert len(Reputation(path, clock)) == 0


@pytest.mark.parametrize("step", [float("nan"), float("inf"), -1.0, 0.0, 1e-12, 1e300])
def test_odd_measurements_break_nothing(step: float) -> None:
    reputation = Reputation(clock=Clock())
    hops = [node("a", 0, 4, 0.0), node("b", 4, 8, 1e300)]
    for _ in range(3):
        reputation.observe(hops, step, deviation_s=step)
        for hop in hops:
            expected = reputation.expect(hop.node, hop.claimed, 4)
            assert 0 <= expected.layer_s <= 3600 and 0 <= expected.failure <= 1
    for belief in reputation.after(hops, step).values():
        assert LEAST_DOUBT <= belief.doubt <= 1


def test_a_liar_that_is_the_only_one_is_still_used() -> None:
    reputation = Reputation(clock=Clock())
    only = node("only", 0, 8, 0.001)
    for _ in range(5):
        reputation.observe([only], 5.0)
        reputation.lost(only.node)
    assert choose(reputation.inform([only]), WORK).hops[0].node == only.node
    with pytest.raises(NoRoute):
        choose(reputation.inform([only]), WORK, avoid={only.node})


def test_a_part_is_judged_by_its_layers() -> None:
    reputation = Reputation(clock=Clock())
    hop = node("a", 0, 8, 0.001, serves_parts=True).over(Span(0, 2))
    real = step_s([replace(hop, expected=Expected(layer_s=0.01))])
    reputation.observe([hop], real)
    assert reputation.expect(hop.node, hop.claimed, 8).layer_s == pytest.approx(0.01, rel=0.02)
