"""Which span a machine should serve, and when it is worth moving to another. Values in, values out.

The network's throughput is its bottleneck's. A new server can rarely lift every bottleneck at once, so candidates are
compared by a soft bottleneck, the power mean of the layers' coverage with exponent -SHARPNESS: smooth, never above the
mean, and the true minimum in the limit.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import accumulate

from tallystick_node.planning.supply import (
    Supply,
    all_blocks,
    coverage,
    crosses,
    in_use,
    joints,
    missing,
    throughput,
    with_server,
)
from tallystick_protocol.types import Span

SHARPNESS = 6
NEARLY_BEST = 0.98
"""Candidates that gain this share of the best one's gain are drawn from: nodes that come at once should differ."""

UNJOINED = 0.5
"""What the gain of a span counts that is on no route until others come."""

MIN_GAIN = 0.5
"""A move must raise the network's throughput by this part of what the node itself is of it. While it moves, that is
what the network lacks; a threshold without that scale would be met by every node of a small network and by none of a
large one."""

MIN_DWELL_S = 2 * 3600.0
HOLE_DWELL_S = 60.0
"""How long a node stays where it is at least; the second one while no route is complete."""

ROW_OVERHEAD_S = 1e-3
"""What a row costs a node besides its layers: frames, hashes, a receipt's share."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What a node can hold and do. One entry per layer; the first and last of a stack carry embedding and head, too.

    memory_bytes: for weights; layer_bytes: their size in memory; row_s: seconds for one row through a layer.
    """

    memory_bytes: int
    layer_bytes: tuple[int, ...]
    row_s: tuple[float, ...]

    def fits(self, span: Span) -> bool:
        return sum(self.layer_bytes[span.start : span.end]) <= self.memory_bytes

    def rate(self, span: Span) -> float:
        """Rows per second through a span."""
        return 1.0 / (sum(self.row_s[span.start : span.end]) + ROW_OVERHEAD_S)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A span that a machine can hold. fills: layers of the best route that nobody served before.

    joined: whether it lies on a complete route. gain: what it adds to the soft bottleneck, rows per second, by half
    when it is not joined.
    """

    span: Span
    rate: float
    fills: int
    joined: bool
    gain: float


def soft_bottleneck(covered: Sequence[float], floor: float) -> float:
    """(mean of coverage^-SHARPNESS)^(-1/SHARPNESS), rows per second; no layer counts as less than `floor` > 0."""
    worst = max(min(covered), floor)  # scaled by it, so that no power leaves the floats
    powers = sum((worst / max(rate, floor)) ** SHARPNESS for rate in covered)
    return float(worst * (len(covered) / powers) ** (1.0 / SHARPNESS))


def candidates(supply: Supply, stacks: tuple[Span, ...], machine: Machine) -> list[Candidate]:
    """What a machine could serve beside the others, best first: blocks, and spans that others serve already.

    First what fills most missing layers, then what lifts the soft bottleneck most. Blocks that cross a span in use are
    left out: no session could take both.
    """
    layers = stacks[-1].end
    spans: AbstractSet[Span] = all_blocks(stacks)
    used = supply
    if not spans >= supply.keys():  # blocks alone never cross
        used = in_use(supply, layers)
        spans = {span for span in spans if not any(crosses(span, one) for one in used)}
        spans |= {span for span in used if any(s.start <= span.start and span.end <= s.end for s in stacks)}
    held = [0, *accumulate(machine.layer_bytes)]
    fitting = [span for span in spans if held[span.end] - held[span.start] <= machine.memory_bytes]
    if not fitting:
        return []
    return sorted(_weigh(supply, used, layers, machine, fitting), key=lambda one: (-one.fills, -one.gain, one.span))


def weigh(supply: Supply, stacks: tuple[Span, ...], machine: Machine, span: Span) -> Candidate:
    """What one span would bring, whether or not it fits the machine or the others' cuts."""
    layers = stacks[-1].end
    return _weigh(supply, in_use(supply, layers), layers, machine, [span])[0]


def _weigh(
    supply: Supply, used: Supply, layers: int, machine: Machine, spans: Sequence[Span]
) -> list[Candidate]:
    """used: of the supply, what routes take."""
    taken = [0.0, *accumulate(machine.row_s)]
    rates = [1.0 / (taken[span.end] - taken[span.start] + ROW_OVERHEAD_S) for span in spans]
    lacking = missing(supply, layers)
    reached, leads = joints(supply, layers)
    gain = _gains(coverage(used, layers), min(rates))
    found = []
    for span, rate in zip(spans, rates, strict=True):
        fills = lacking - missing([*supply, span], layers) if lacking else 0
        joined = lacking == fills if lacking else span.start in reached and span.end in leads
        found.append(Candidate(span, rate, fills, joined, gain(span, rate) * (1.0 if joined else UNJOINED)))
    return found


def choose(ranked: Sequence[Candidate], draw: random.Random) -> Candidate | None:
    """The best candidate, or one drawn from those that are nearly as good. None when nothing fits."""
    if not ranked:
        return None
    best = ranked[0]
    equal = [one for one in ranked if one.fills == best.fills]
    return draw.choice([one for one in equal if one.gain >= NEARLY_BEST * best.gain])


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether to move, where to, and why (or why not)."""

    to: Span | None
    why: str


def consider_move(
    others: Supply,
    stacks: tuple[Span, ...],
    machine: Machine,
    span: Span,
    dwelt_s: float,
    draw: random.Random,
    min_dwell_s: float = MIN_DWELL_S,
) -> Verdict:
    """Whether a machine that serves `span` should serve another one. others: the supply without it.

    It moves when layers are missing and it fills more of them elsewhere, or after min_dwell_s when the soft bottleneck
    gains at least MIN_GAIN of the node's share; never when a layer would be missing while it is on its way.
    """
    layers = stacks[-1].end
    here = with_server(others, span, machine.rate(span))
    lacking = missing(here, layers)
    if dwelt_s < (min(HOLE_DWELL_S, min_dwell_s) if lacking else min_dwell_s):
        return Verdict(None, f"it has served {span} for {dwelt_s:.0f} s only")
    if not lacking and missing(others, layers):
        return Verdict(None, "without it no route is complete, and a move takes a while")
    best = choose(candidates(others, stacks, machine), draw)
    if best is None or best.span == span:
        return Verdict(None, f"{span} is the best place")
    there = with_server(others, best.span, best.rate)
    if lacking:
        left = missing(there, layers)
        words = f"{lacking} layers are missing, {left} if it served {best.span}"
        return Verdict(best.span if left < lacking else None, words)
    now, then = (coverage(in_use(supply, layers), layers) for supply in (here, there))
    floor = min(machine.rate(span), best.rate)
    gained = soft_bottleneck(then, floor) / soft_bottleneck(now, floor) - 1.0
    needed = MIN_GAIN * machine.rate(span) * len(span) / sum(now)
    words = f"at {best.span} the network would carry {gained:+.2%}, {needed:.2%} is what a move must bring"
    flows = f" (bottleneck {throughput(here, layers):.1f} -> {throughput(there, layers):.1f} rows/s)"
    return Verdict(best.span if gained >= needed else None, words + flows)


def _gains(covered: list[float], floor: float) -> Callable[[Span, float], float]:
    """gain(span, rate): what a server adds to the soft bottleneck."""
    worst = max(min(covered), floor)
    powers = [(worst / max(rate, floor)) ** SHARPNESS for rate in covered]
    total, count = sum(powers), len(covered)
    before = worst * (count / total) ** (1.0 / SHARPNESS)

    def gain(span: Span, rate: float) -> float:
        changed = 0.0
        for layer in range(span.start, span.end):
            changed += (worst / (covered[layer] + rate)) ** SHARPNESS - powers[layer]
        return float(worst * (count / max(total + changed, 1e-300)) ** (1.0 / SHARPNESS) - before)

    return gain
