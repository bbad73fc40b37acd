"""A simulation of nodes that come and go, with the decisions that real nodes take (`tallystick_node.planning`).

Time is events: nodes arrive as a Poisson process, live for a Pareto time (a few for days, most for hours), choose a
span as they come, look around for a better one at their own times, and are away for a while when they move.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import count
from statistics import fmean

from tallystick_node.planning.choice import Machine, candidates, choose, consider_move
from tallystick_node.planning.supply import coverage, missing, stacks_of, throughput
from tallystick_protocol.types import Span


@dataclass(frozen=True, slots=True)
class World:
    """Sizes and times of a simulation. Times in seconds, sizes in layers of the model."""

    nodes: int = 1000
    layers: int = 32
    encoder_layers: int = 0
    hours: float = 36.0
    warm_up_hours: float = 6.0
    mean_life_s: float = 10 * 3600.0
    life_exponent: float = 1.5
    memory_layers: float = 6.0
    memory_spread: float = 0.8
    row_s: float = 0.004
    speed_spread: float = 0.7
    look_around_s: float = 2 * 3600.0
    away_s: float = 120.0
    moves: bool = True
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was seen after the warm-up, over time. Throughputs in rows per second.

    served: the share of time in which every layer had a node; worst_layer: the same for the layer that lacked one most;
    holes: intervals in which some layer had none. upper_bound: all layer throughput over all layers, which no placement
    can beat; offline: the same nodes placed anew, all at once, largest first. of_bound, of_offline: ratios of means.
    """

    joins: int
    leaves: int
    moves: int
    mean_nodes: float
    served: float
    worst_layer: float
    holes: int
    hole_s: float
    throughput: float
    upper_bound: float
    offline: float
    of_bound: float
    of_offline: float

    def to_json(self) -> dict[str, float]:
        return asdict(self)


@dataclass(slots=True)
class _Node:
    machine: Machine
    best_layer_rate: float  # layers x rows per second at its best span
    span: Span | None
    since: float
    generation: int = 0  # raised at each move and at the end: older events are void


class Simulation:
    """One run. Deterministic for a World."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._draw = random.Random(world.seed)
        self._stacks = stacks_of(world.layers, world.encoder_layers)
        self._nodes: dict[int, _Node] = {}
        self._supply: dict[Span, float] = {}
        self._count: dict[Span, int] = {}
        self._events: list[tuple[float, int, str, int, int]] = []
        self._order = count()
        self._names = count()
        self._now = 0.0
        self.joins = self.leaves = self.moves = 0

    def run(self) -> Outcome:
        world = self.world
        for _ in range(world.nodes):  # the network as it is found: its nodes have lived for a while
            self._at(self._draw.uniform(0, 3600.0), "begin", 0)
        self._at(self._draw.expovariate(world.nodes / world.mean_life_s), "arrive", 0)
        seen = _Seen(world.layers)
        end, warm = world.hours * 3600.0, world.warm_up_hours * 3600.0
        sample_at = warm
        while self._events:
            at, _, what, name, generation = heapq.heappop(self._events)
            if at >= end:
                break
            if at > warm:
                seen.pass_time(at - max(self._now, warm), self._supply)
            self._now = at
            if at >= sample_at:
                seen.compare(self._supply, self._bound(), self._offline(), len(self._nodes))
                sample_at = at + (end - warm) / 8
            self._handle(what, name, generation)
        return seen.outcome(self)

    def _handle(self, what: str, name: int, generation: int) -> None:
        world = self.world
        if what == "arrive":
            self._join(self._life())
            self._at(self._draw.expovariate(world.nodes / world.mean_life_s), "arrive", 0)
        elif what == "begin":
            self._join(self._rest_of_life())
        elif name in self._nodes and what == "leave":
            self._place(self._nodes[name], None)
            del self._nodes[name]
            self.leaves += 1
        elif name in self._nodes and self._nodes[name].generation == generation:
            self._look_around(name) if what == "look" else self._arrive_again(name)

    def _join(self, life_s: float) -> None:
        node = self._new_node()
        chosen = choose(candidates(self._supply, self._stacks, node.machine), self._draw)
        if chosen is None:
            return
        name = next(self._names)
        self._nodes[name] = node
        self._place(node, chosen.span)
        self.joins += 1
        self._at(life_s, "leave", name)
        self._look_later(name)

    def _look_around(self, name: int) -> None:
        node = self._nodes[name]
        assert node.span is not None
        rate = node.machine.rate(node.span)
        others = dict(self._supply)
        others[node.span] -= rate
        if self._count[node.span] == 1:
            del others[node.span]
        dwelt = self._now - node.since
        verdict = consider_move(others, self._stacks, node.machine, node.span, dwelt, self._draw)
        if verdict.to is None or not self.world.moves:
            self._look_later(name)
            return
        self._place(node, None)
        node.generation += 1
        self.moves += 1
        self._at(self.world.away_s, "back", name, node.generation)

    def _arrive_again(self, name: int) -> None:
        """A node that moved chooses anew as it comes back: others may have moved meanwhile."""
        node = self._nodes[name]
        chosen = choose(candidates(self._supply, self._stacks, node.machine), self._draw)
        assert chosen is not None
        self._place(node, chosen.span)
        self._look_later(name)

    def _place(self, node: _Node, span: Span | None) -> None:
        if node.span is not None:
            self._count[node.span] -= 1
            self._supply[node.span] -= node.machine.rate(node.span)
            if not self._count[node.span]:
                del self._supply[node.span]
        node.span, node.since = span, self._now
        if span is not None:
            self._count[span] = self._count.get(span, 0) + 1
            self._supply[span] = self._supply.get(span, 0.0) + node.machine.rate(span)

    def _look_later(self, name: int) -> None:
        wait = self.world.look_around_s * self._draw.uniform(0.5, 1.5)
        self._at(wait, "look", name, self._nodes[name].generation)

    def _at(self, delay_s: float, what: str, name: int, generation: int = 0) -> None:
        heapq.heappush(self._events, (self._now + delay_s, next(self._order), what, name, generation))

    def _life(self) -> float:
        exponent = self.world.life_exponent
        return self.world.mean_life_s * (exponent - 1) / exponent * self._draw.paretovariate(exponent)

    def _rest_of_life(self) -> float:
        """What is left to a node found at a random time: a uniform part of a life drawn by its length."""
        exponent = self.world.life_exponent
        shortest = self.world.mean_life_s * (exponent - 1) / exponent
        return self._draw.random() * shortest * self._draw.paretovariate(exponent - 1)

    def _new_node(self) -> _Node:
        world, draw = self.world, self._draw
        room = max(1, round(world.memory_layers * draw.lognormvariate(0.0, world.memory_spread)))
        row_s = world.row_s * draw.lognormvariate(0.0, world.speed_spread)
        machine = Machine(room, (1,) * world.layers, (row_s,) * world.layers)
        largest = min(room, max(len(stack) for stack in self._stacks))
        return _Node(machine, largest * machine.rate(Span(0, largest)), None, self._now)

    def _bound(self) -> float:
        return sum(node.best_layer_rate for node in self._nodes.values()) / self.world.layers

    def _offline(self) -> float:
        """The throughput of the same nodes placed anew, those with most room first."""
        supply: dict[Span, float] = {}
        draw = random.Random(0)
        for node in sorted(self._nodes.values(), key=lambda node: -node.machine.memory_bytes):
            chosen = choose(candidates(supply, self._stacks, node.machine), draw)
            assert chosen is not None
            supply[chosen.span] = supply.get(chosen.span, 0.0) + chosen.rate
        return throughput(supply, self.world.layers)


class _Seen:
    """Sums over time."""

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._total = self._whole = self._flow = 0.0
        self._bare = [0.0] * layers
        self._holes = 0
        self._in_hole = False
        self._samples: list[tuple[float, float, float, int]] = []

    def pass_time(self, seconds: float, supply: dict[Span, float]) -> None:
        covered = coverage(supply, self._layers)
        hole = missing(supply, self._layers) > 0
        self._total += seconds
        self._whole += 0.0 if hole else seconds
        self._flow += seconds * (0.0 if hole else min(covered))
        self._holes += hole and not self._in_hole
        self._in_hole = hole
        if hole:
            for layer, rate in enumerate(covered):
                self._bare[layer] += seconds if rate <= 0.0 else 0.0

    def compare(self, supply: dict[Span, float], bound: float, offline: float, nodes: int) -> None:
        self._samples.append((throughput(supply, self._layers), bound, offline, nodes))

    def outcome(self, run: Simulation) -> Outcome:
        flow, bound, offline, nodes = (fmean(column) for column in zip(*self._samples, strict=True))
        return Outcome(
            joins=run.joins, leaves=run.leaves, moves=run.moves, mean_nodes=nodes,
            served=self._whole / self._total, worst_layer=1.0 - max(self._bare) / self._total,
            holes=self._holes, hole_s=self._total - self._whole,
            throughput=self._flow / self._total, upper_bound=bound, offline=offline,
            of_bound=flow / bound, of_offline=flow / offline,
        )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """`scripts/simulate`: run a world and print what was seen."""
    parser = argparse.ArgumentParser(prog="scripts/simulate", description="Nodes that come and go.")
    for field in fields(World):
        flag = "--" + field.name.replace("_", "-")
        if field.name == "moves":
            parser.add_argument("--no-moves", dest="moves", action="store_false", help="nodes stay where they joined")
        else:
            parser.add_argument(flag, type=type(field.default), default=field.default, help=f"default {field.default}")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    options = vars(parser.parse_args(arguments))
    as_json = options.pop("json")
    world = World(**options)
    if world.hours <= world.warm_up_hours:
        parser.error(f"--hours must be more than --warm-up-hours, which are {world.warm_up_hours:g}")
    outcome = Simulation(world).run()
    if as_json:
        print(json.dumps({"world": asdict(world), **outcome.to_json()}))
        return 0
    print(f"{outcome.mean_nodes:.0f} nodes, {world.layers} layers, {world.hours:g} h: {outcome.joins} joins,", end=" ")
    print(f"{outcome.leaves} leaves, {outcome.moves} moves")
    print(f"every layer served {outcome.served:.3%} of the time (the worst one {outcome.worst_layer:.3%});", end=" ")
    print(f"{outcome.holes} intervals with a hole, {outcome.hole_s:.0f} s in all")
    print(f"bottleneck {outcome.throughput:.1f} rows/s: {outcome.of_bound:.1%} of any placement's bound", end=" ")
    print(f"({outcome.upper_bound:.1f}), {outcome.of_offline:.1%} of these nodes placed anew ({outcome.offline:.1f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
