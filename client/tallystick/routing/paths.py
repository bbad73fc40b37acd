"""The cheapest path through layers: which node computes each, exactly, where links cost what the pair of nodes says.

Between two layers a route stays at a node or goes over to another one. D[b, v], the least cost of having layers up to b
computed with v the last node, follows from D[b - 1]: v computes one layer more, or takes over from the best u. That is
Bellman's recursion over (boundary, node); a row of it is one addition of matrices and a minimum over columns.

A node takes part in a session once. Where the cheapest path comes back to a node, the recursion is repeated with that
node's visits remembered in the state, until no path of least cost comes back (decremental state space relaxation:
Righini and Salani 2008). The result is the optimum over all covers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tallystick.routing.candidates import Candidate
from tallystick.routing.cost import Workload, between, enter_s, layer_s, link_s, unit_price_s
from tallystick_protocol.types import Address, Span

REMEMBERED = 5
"""Nodes whose visits are remembered at most; those that come back beyond are used whole, which they can be but once."""


def cheapest(candidates: Sequence[Candidate], goal: Span, work: Workload) -> list[Candidate] | None:
    """The route of least cost over a goal, each candidate cut to the layers that it computes; None if none covers it.

    candidates: one per node, within the goal.
    """
    if not candidates:
        return None
    grid = _Grid(candidates, goal, work)
    while True:
        path = grid.solve()
        if path is None:
            return None
        nodes = [v for v, _, _ in path]
        again = {v for v in nodes if nodes.count(v) > 1}
        if not again:
            return [candidates[v].over(Span(first, last)) for v, first, last in path]
        grid.restrict(again)


class _Grid:
    """The costs of one set of candidates as arrays over nodes (n) and boundaries (b)."""

    def __init__(self, candidates: Sequence[Candidate], goal: Span, work: Workload) -> None:
        count, length = len(candidates), goal.end - goal.start
        self._count, self._length, self._start = count, length, goal.start
        self._parts = np.array([c.serves_parts for c in candidates])
        self._first = np.array([c.offer.start - goal.start for c in candidates])
        self._last = np.array([c.offer.end - goal.start for c in candidates])
        layer = np.array([layer_s(c, work) for c in candidates])
        price = np.array([unit_price_s(c, work) for c in candidates])
        enter = np.array([enter_s(c, work) for c in candidates])
        begin = np.array([link_s(c.rtt_s, work, 4) for c in candidates])
        self._finish = np.array([link_s(c.rtt_s, work, 0) for c in candidates])
        self._begin = begin + enter
        self._links = _links(candidates, work) + enter[None, :]
        self._layer = np.repeat(layer[None], length, axis=0)
        self._layer[0] += price * (goal.start == 0)
        self._layer[-1] += price * (goal.end == work.layers)
        self._remembered: list[int] = []

    def restrict(self, again: set[int]) -> None:
        """Let nodes that a path came back to be visited once."""
        for v in sorted(again):
            if len(self._remembered) < REMEMBERED and v not in self._remembered:
                self._remembered.append(v)
            else:
                self._parts[v] = False

    def solve(self) -> list[tuple[int, int, int]] | None:
        """(node, first layer, last layer + 1) of each hop of the cheapest path.

        States carry the set of remembered nodes visited so far; others may be visited again.
        """
        masks, count, length = 1 << len(self._remembered), self._count, self._length
        bit = np.zeros(count, dtype=np.int64)
        for number, v in enumerate(self._remembered):
            bit[v] = 1 << number
        best = np.full((masks, count), np.inf)
        came = np.full((length, masks, count), -1, dtype=np.int64)  # from which (mask, node); -1 from the client
        for at in range(length):
            arriving = self._arrivals(at, best, bit, came[at])
            going = (self._first <= at) & (at < self._last)
            best = np.where(going[None], arriving + self._layer[at][None], np.inf)
        best = np.where((self._last == length) | self._parts, best, np.inf) + self._finish
        end = int(np.argmin(best))
        if not np.isfinite(best.flat[end]):
            return None
        return self._walk_back(divmod(end, count), came)

    def _arrivals(self, at: int, best: np.ndarray, bit: np.ndarray, came: np.ndarray) -> np.ndarray:
        """The least cost of being at boundary `at` with each node about to compute the next layer."""
        masks, count = best.shape
        columns = np.arange(count)
        arriving = np.full_like(best, np.inf)
        for mask in range(masks):  # staying
            arriving[mask] = best[mask]
            came[mask] = mask * count + columns
        opens = self._first == at if at == 0 else (self._first == at) | (self._parts & (self._first < at))
        opens &= self._last > at
        entered = np.flatnonzero(opens)
        if not len(entered):
            return arriving
        if at == 0:
            for v in entered:
                arriving[bit[v], v], came[bit[v], v] = self._begin[v], -1
            return arriving
        for mask in range(masks):
            left = np.flatnonzero(np.isfinite(best[mask]) & (self._parts | (self._last == at)))
            allowed = entered[(bit[entered] & mask) == 0]
            if not len(left) or not len(allowed):
                continue
            costs = best[mask, left][:, None] + self._links[np.ix_(left, allowed)]
            sources = np.argmin(costs, axis=0)
            values = costs[sources, np.arange(len(allowed))]
            targets = mask | bit[allowed]
            better = values < arriving[targets, allowed]
            arriving[targets[better], allowed[better]] = values[better]
            came[targets[better], allowed[better]] = mask * count + left[sources[better]]
        return arriving

    def _walk_back(self, state: tuple[int, int], came: np.ndarray) -> list[tuple[int, int, int]]:
        path: list[tuple[int, int, int]] = []
        (mask, v), last = state, self._length
        for at in reversed(range(self._length)):
            before = int(came[at, mask, v])
            mask, u = divmod(before, self._count) if before >= 0 else (0, -1)
            if u != v:
                path.append((v, self._start + at, self._start + last))
                v, last = u, at
        return path[::-1]


def _links(candidates: Sequence[Candidate], work: Workload) -> np.ndarray:
    """(n, n) seconds per token from node u to node v; no node hands over to itself."""
    rtt = np.array([min(max(c.rtt_s, 0.0), 3600.0) if c.rtt_s == c.rtt_s else 3600.0 for c in candidates])
    rounds = np.maximum.outer(rtt, rtt)
    index: dict[Address, int] = {c.node: number for number, c in enumerate(candidates)}
    for u, c in enumerate(candidates):
        for node in c.links:
            v = index.get(node, u)
            if v != u:
                rounds[u, v] = rounds[v, u] = between(c, candidates[v])
    once, more = link_s(0.0, work, work.row_bytes), link_s(1.0, work, work.row_bytes)
    links: np.ndarray = once + rounds * (more - once)
    np.fill_diagonal(links, np.inf)
    return links
