"""Measuring while serving: when it pays to leave a hop, and when it does not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from harness import samples
from tallystick.routing.candidates import Candidate, Expected
from tallystick.routing.cost import Workload, step_s
from tallystick.routing.monitor import STEPS, Monitor
from tallystick.routing.reputation import Reputation
from tallystick_protocol.types import Address

WORK = Workload(8, prompt=64, new=200, row_bytes=4096)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def node(name: str, start: int, end: int, layer_s: float = 0.002, **changes: object) -> Candidate:
    expected = Expected(layer_s=layer_s, prefill_s=layer_s / 8)
    return samples.candidate(name, start, end, claimed=expected, expected=expected, rtt_s=0.002, **changes)


class Served:
    """A session on a pretended clock."""

    def __init__(self, hops: list[Candidate], others: list[Candidate]) -> None:
        self.clock = Clock()
        self.reputation = Reputation(clock=lambda: 1e9)
        self.hops = list(hops)
        self.route = list(hops)
        self.monitor = Monitor(self.reputation, self.route, [*hops, *others], WORK, self.clock)
        self.position = 64
        self.monitor.fed(0, 64)
        self.clock.now += 1
        self.monitor.arrived(63)

    def steps(self, count: int, seconds: float) -> None:
        for _ in range(count):
            self.monitor.fed(self.position, self.position + 1)
            self.clock.now += seconds
            self.monitor.arrived(self.position)
            self.position += 1

    @property
    def usual_s(self) -> float:
        return step_s(self.hops)


A, B = node("a", 0, 4), node("b", 4, 8)


def test_nothing_is_said_of_a_route_that_goes_as_expected() -> None:
    served = Served([A, B], [node("c", 0, 4), node("d", 4, 8, 0.0019)])
    served.steps(STEPS, served.usual_s)
    assert served.monitor.should_switch(served.position, 1000) is None


def test_a_slow_hop_is_left_for_one_that_is_worth_its_replay() -> None:
    served = Served([A, B], [node("c", 0, 4), node("wrong", 4, 6)])
    served.steps(STEPS // 2 - 1, served.usual_s + 0.1)
    assert served.monitor.should_switch(served.position, 1000) is None  # too early to tell
    served.steps(1, served.usual_s + 0.1)
    switch = served.monitor.should_switch(served.position, 1000)
    assert switch is not None and (switch.index, switch.candidate.node) == (0, samples.address("c"))
    assert 0 < switch.gain_s < 1000 * 0.1
    assert served.monitor.should_switch(served.position, 3) is None  # the replay costs more
    assert served.monitor.should_switch(10**6, 100) is None
    assert served.monitor.should_switch(served.position, 1000, avoid={samples.address("c")}) is None


def test_the_hop_of_which_less_is_known_is_the_one_that_is_left() -> None:
    served = Served([A, B], [node("c", 0, 4), node("d", 4, 8)])
    for _ in range(3):
        served.reputation.observe([A], step_s([A]))
    served.steps(STEPS, served.usual_s + 0.1)
    switch = served.monitor.should_switch(served.position, 1000)
    assert switch is not None and switch.index == 1


def test_after_a_change_it_is_measured_anew_and_what_was_seen_is_kept() -> None:
    served = Served([A, B], [node("c", 0, 4), node("d", 4, 8)])
    served.steps(STEPS, served.usual_s + 0.1)
    switch = served.monitor.should_switch(served.position, 1000)
    assert switch is not None
    served.route[switch.index] = switch.candidate
    served.steps(1, served.usual_s)
    assert served.monitor.should_switch(served.position, 1000) is None
    left = served.hops[switch.index]
    assert served.reputation.expect(left.node, left.claimed, 4).layer_s > 5 * left.claimed.layer_s
    served.steps(STEPS, served.usual_s)
    assert served.monitor.should_switch(served.position, 1000) is None


def test_what_a_node_only_says_must_promise_more_than_what_it_has_shown() -> None:
    for shown in (False, True):
        served = Served([A, B], [C := node("c", 0, 4)])
        if shown:
            for _ in range(3):
                served.reputation.observe([C], step_s([C]))
        served.steps(STEPS, served.usual_s * 1.8)
        switch = served.monitor.should_switch(served.position, 10_000)
        assert (switch is not None) == shown


def test_two_like_nodes_are_not_exchanged_to_and_fro() -> None:
    served = Served([A, B], [node("c", 0, 4), node("d", 4, 8)])
    changes = 0
    for turn in range(30):
        served.steps(STEPS, served.usual_s * (1.05 if turn % 2 else 0.95))
        if (switch := served.monitor.should_switch(served.position, 10_000)) is not None:
            served.route[switch.index] = switch.candidate
            changes += 1
    assert changes == 0


def test_the_end_of_a_session_is_what_is_remembered() -> None:
    served = Served([A, B], [])
    served.steps(STEPS, served.usual_s + 0.05)
    served.monitor.close(lost=[samples.address("x")])
    served.monitor.close()
    of = served.reputation.expect
    assert of(A.node, A.claimed, 4).layer_s > 2 * A.claimed.layer_s
    assert of(samples.address("x"), A.claimed, 4).failure > of(Address("0x"), A.claimed, 4).failure
    assert of(A.node, A.claimed, 4).failure < of(Address("0x"), A.claimed, 4).failure


def test_a_session_of_few_steps_says_nothing_of_speed() -> None:
    served = Served([A, B], [])
    served.steps(2, 5.0)
    served.monitor.close()
    assert served.reputation.expect(A.node, A.claimed, 4).layer_s == pytest.approx(A.claimed.layer_s)


def test_steps_of_which_nothing_came_or_that_were_fed_together_are_not_timed() -> None:
    served = Served([A, B], [node("c", 0, 4)])
    for _ in range(STEPS):
        served.monitor.fed(served.position, served.position + 4)  # drafts
        served.clock.now += 9
        served.monitor.arrived(served.position + 3)
        served.monitor.arrived(served.position)
    assert served.monitor.should_switch(served.position, 1000) is None


def test_a_price_is_weighed_against_the_time_and_is_no_reason_by_itself() -> None:
    served = Served([A, B], [node("c", 0, 4, price=10**17)])
    served.steps(STEPS, served.usual_s + 0.1)
    assert served.monitor.should_switch(served.position, 1000) is None
    dear = [replace(hop, offer=replace(hop.offer, price=10**17)) for hop in (A, B)]
    served = Served(dear, [node("c", 0, 4, price=1), node("d", 4, 8, price=1)])
    served.steps(STEPS, served.usual_s)
    assert served.monitor.should_switch(served.position, 1000) is None
    served.steps(STEPS, served.usual_s + 0.1)
    assert served.monitor.should_switch(served.position, 1000) is not None


def test_it_is_looked_at_now_and_then_and_as_much_is_expected_as_came() -> None:
    served = Served([A, B], [node("c", 0, 4)])
    seen = []
    for _ in range(3 * STEPS):
        served.steps(1, served.usual_s + 0.1)
        seen.append(served.monitor.look(served.position, 10_000))
    assert [number for number, switch in enumerate(seen, 1) if switch] == [STEPS, 2 * STEPS, 3 * STEPS]
    gains = [switch.gain_s for switch in seen if switch]
    assert gains[0] < gains[1] < gains[2]
    served.steps(STEPS, served.usual_s + 0.1)
    assert served.monitor.look(served.position, 2) is None
