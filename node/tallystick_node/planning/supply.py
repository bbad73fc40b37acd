"""Who serves which layers, how fast: coverage, missing layers, and the throughput of the whole network.

A session takes whole spans, so a route is a path over layer boundaries 0..L with spans as its edges. Spans that nodes
choose by themselves are blocks: a stack, its halves, their halves, down to single layers. Two blocks are nested or
disjoint, hence whatever blocks cover every layer contain a route, and the maximum flow over all routes is the smallest
coverage of a layer (by induction: a block's own servers add to the smaller flow of its halves).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from functools import cache

from tallystick_protocol.types import Span

Supply = Mapping[Span, float]
"""Rows per second that all servers of a span offer together, by span. A span without servers is absent."""


def stacks_of(layers: int, encoder_layers: int) -> tuple[Span, ...]:
    """The stacks that no span crosses: the encoder's, if there is one, and the rest."""
    return (Span(0, encoder_layers), Span(encoder_layers, layers)) if encoder_layers else (Span(0, layers),)


@cache
def blocks(stack: Span) -> frozenset[Span]:
    """A stack, its halves, their halves and so on: 2 n - 1 spans for n layers."""
    if len(stack) == 1:
        return frozenset({stack})
    middle = stack.start + (len(stack) + 1) // 2
    return frozenset({stack}) | blocks(Span(stack.start, middle)) | blocks(Span(middle, stack.end))


@cache
def all_blocks(stacks: tuple[Span, ...]) -> frozenset[Span]:
    return frozenset(block for stack in stacks for block in blocks(stack))


def coverage(supply: Supply, layers: int) -> list[float]:
    """Rows per second that each layer's servers offer together."""
    covered = [0.0] * layers
    for span, rate in supply.items():
        for layer in range(span.start, span.end):
            covered[layer] += rate
    return covered


def with_server(supply: Supply, span: Span, rate: float) -> dict[Span, float]:
    """The supply and one more server."""
    return {**supply, span: supply.get(span, 0.0) + rate}


def missing(spans: Iterable[Span], layers: int) -> int:
    """The fewest layers that have to be added, one by one, to make a route; 0 when there is one."""
    starting: dict[int, list[int]] = {}
    for span in spans:
        starting.setdefault(span.start, []).append(span.end)
    cost = [layers] * (layers + 1)
    cost[0] = 0
    for boundary in range(layers):
        cost[boundary + 1] = min(cost[boundary + 1], cost[boundary] + 1)
        for end in starting.get(boundary, ()):
            cost[end] = min(cost[end], cost[boundary])
    return cost[layers]


def joints(spans: Iterable[Span], layers: int) -> tuple[set[int], set[int]]:
    """(boundaries that rows can reach from the first layer, boundaries from which they reach the end)."""
    starts: dict[int, list[int]] = {}
    ends: dict[int, list[int]] = {}
    for span in spans:
        starts.setdefault(span.start, []).append(span.end)
        ends.setdefault(span.end, []).append(span.start)
    reached, leads = {0}, {layers}
    for boundary in range(layers):
        if boundary in reached:
            reached.update(starts.get(boundary, ()))
    for boundary in range(layers, 0, -1):
        if boundary in leads:
            leads.update(ends.get(boundary, ()))
    return reached, leads


def crosses(one: Span, other: Span) -> bool:
    """Whether two spans overlap and neither holds the other: no route takes both, nor parts of both."""
    return one.start < other.start < one.end < other.end or other.start < one.start < other.end < one.end


def is_laminar(spans: Iterable[Span]) -> bool:
    """Whether no two spans cross."""
    open_ends: list[int] = []
    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        while open_ends and open_ends[-1] <= span.start:
            open_ends.pop()
        if open_ends and open_ends[-1] < span.end:
            return False
        open_ends.append(span.end)
    return True


def in_use(supply: Supply, layers: int) -> Supply:
    """The supply without spans that lie on no route and cross others, so that they will not soon be on one.

    All of it as long as there is no route.
    """
    if is_laminar(supply):
        return supply
    reached, leads = joints(supply, layers)
    if layers not in reached:
        return supply
    joined = {span for span in supply if span.start in reached and span.end in leads}
    return {
        span: rate for span, rate in supply.items() if span in joined or not any(crosses(span, one) for one in supply)
    }


def throughput(supply: Supply, layers: int) -> float:
    """Rows per second that the network can carry from the first layer to the end: the maximum flow over routes."""
    if is_laminar(supply):
        return min(coverage(supply, layers))
    return _max_flow(supply, layers)


def _max_flow(supply: Supply, layers: int) -> float:
    """Edmonds and Karp 1972, over boundaries."""
    room: dict[int, dict[int, float]] = {boundary: {} for boundary in range(layers + 1)}
    for span, rate in supply.items():
        room[span.start][span.end] = room[span.start].get(span.end, 0.0) + rate
        room[span.end].setdefault(span.start, 0.0)
    smallest = 1e-9 * max(supply.values(), default=0.0)
    flow = 0.0
    while (path := _widening_path(room, layers, smallest)) is not None:
        width = min(room[a][b] for a, b in path)
        for a, b in path:
            room[a][b] -= width
            room[b][a] += width
        flow += width
    return flow


def _widening_path(room: dict[int, dict[int, float]], goal: int, smallest: float) -> list[tuple[int, int]] | None:
    came_from: dict[int, int] = {0: 0}
    waiting = deque([0])
    while waiting and goal not in came_from:
        here = waiting.popleft()
        for there, left in room[here].items():
            if left > smallest and there not in came_from:
                came_from[there] = here
                waiting.append(there)
    if goal not in came_from:
        return None
    path, at = [], goal
    while at:
        path.append((came_from[at], at))
        at = came_from[at]
    return path[::-1]
