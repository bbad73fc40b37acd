"""What a route costs: seconds per new token, with money and risk told in seconds. Additive over hops and links."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from tallystick.routing.candidates import DEFAULT_WEIGHTS, Candidate, Weights

HOP_S = 1e-3
"""What one more hop takes besides computing and waiting: framing, hashing, a wake-up of its process."""

FAILOVER_S = 2.0
"""What losing a hop costs the user: noticing it, and a replay."""

BYTES_PER_S = 12.5e6
"""Bandwidth that is expected of a link: 100 Mbit/s."""

LONGEST_S = 3600.0
"""No figure of a node counts for more than this, whatever it says."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What a session is going to do. row_bytes: of a hidden row between two hops. layers: the model's, for its price.

    prompt, new: positions that are given, and tokens that are expected; what the prompt takes is spread over them.
    model: its id, where a node must say which of several on chain it serves; no cost depends on it.
    """

    layers: int
    prompt: int = 0
    new: int = 64
    row_bytes: int = 0
    weights: Weights = DEFAULT_WEIGHTS
    model: str = ""

    @property
    def rows_per_token(self) -> float:
        return 1.0 + self.prompt / max(self.new, 1)


def bounded(seconds: float) -> float:
    """A figure from elsewhere as a cost: NaN and infinity count as the most, what is below zero as nothing."""
    return LONGEST_S if math.isnan(seconds) else min(max(seconds, 0.0), LONGEST_S)


def link_s(rtt_s: float, work: Workload, row_bytes: int) -> float:
    """Seconds per token for one direction of a link: half of its round trip, and the prompt's rows on the wire."""
    rows = work.prompt * row_bytes / BYTES_PER_S
    return bounded(rtt_s) / 2 + (bounded(rtt_s) / 2 + rows) / max(work.new, 1) * (work.prompt > 0)


def between(one: Candidate, other: Candidate) -> float:
    """The round trip between two nodes, seconds: as either says, the longer of the two; else from their distance to us.

    Distances obey the triangle inequality: it lies in [|a - b|, a + b], whose middle is max(a, b).
    """
    told = [bounded(s.links[t.node]) for s, t in ((one, other), (other, one)) if t.node in s.links]
    near, far = sorted((bounded(one.rtt_s), bounded(other.rtt_s)))
    return min(max(max(told), far - near), far + near) if told else far


def enter_s(hop: Candidate, work: Workload) -> float:
    """Seconds per token of using a node at all: its turn, and the chance that it is lost."""
    failure = min(bounded(hop.expected.failure), 1.0)
    return HOP_S + bounded(hop.expected.wait_s) + failure * FAILOVER_S / max(work.new, 1)


def unit_price_s(hop: Candidate, work: Workload) -> float:
    """What one layer for one token costs, in seconds."""
    price = min(hop.offer.price * work.weights.seconds_per_wei, 1e30)
    return price * work.rows_per_token


def layer_s(hop: Candidate, work: Workload) -> float:
    """Seconds per token and layer: its step, its part of the prompt, its price."""
    prompt = bounded(hop.expected.prefill_s) * work.prompt / max(work.new, 1)
    return bounded(hop.expected.layer_s) + prompt + unit_price_s(hop, work)


def hop_s(hop: Candidate, work: Workload) -> float:
    """A hop over its span, without links."""
    ends = hop.span.units(work.layers) - len(hop.span)
    return enter_s(hop, work) + len(hop.span) * layer_s(hop, work) + ends * unit_price_s(hop, work)


def links_s(route: Sequence[Candidate], work: Workload) -> float:
    """All links of a route: from the client, from hop to hop, back to the client."""
    if not route:
        return 0.0
    ends = link_s(route[0].rtt_s, work, 4) + link_s(route[-1].rtt_s, work, 0)
    inner = pairwise(route)
    return ends + sum(link_s(between(one, other), work, work.row_bytes) for one, other in inner)


def route_s(route: Sequence[Candidate], work: Workload) -> float:
    """Expected cost of a route, seconds per new token."""
    return links_s(route, work) + sum(hop_s(hop, work) for hop in route)


def measured_work() -> Workload:
    """A workload whose cost is what a client measures of one step: no prompt, no money."""
    return Workload(0, weights=Weights(0.0))


def step_s(route: Sequence[Candidate]) -> float:
    """Expected seconds of one decode step, without money, risk and prompt: what a client measures."""
    own = sum(HOP_S + bounded(h.expected.wait_s) + len(h.span) * bounded(h.expected.layer_s) for h in route)
    return links_s(route, measured_work()) + own
