"""When nodes of no numeric class are used, and what a verdict says of an answer that they worked on."""

from __future__ import annotations

from itertools import permutations

import pytest

from harness import samples
from tallystick.admission import find_route, note_stock
from tallystick.routing.candidates import Candidate
from tallystick.verdict import Policy, Verdict
from tallystick_protocol.errors import NoRoute
from tallystick_protocol.types import ZERO32, Span

LAYERS = 4


def classed(name: str, start: int, end: int) -> Candidate:
    return samples.candidate(name, start, end)


def stock(name: str, start: int, end: int) -> Candidate:
    return samples.candidate(name, start, end, numeric_class=ZERO32)


def first_cover(usable: list[Candidate]) -> list[Candidate]:
    """Any chain of whole spans over all layers, the shortest one first."""
    for count in range(1, len(usable) + 1):
        for chain in permutations(usable, count):
            ends = [0, *(hop.span.end for hop in chain)]
            if [hop.span.start for hop in chain] == ends[:-1] and ends[-1] == LAYERS:
                return list(chain)
    raise NoRoute("nobody serves some layers", start=2, end=4)


def route(candidates: list[Candidate], admit_stock: bool = True, policy: Policy = "off") -> list[str]:
    found = find_route(candidates, first_cover, admit_stock=admit_stock, policy=policy)
    return [hop.url.rsplit("/", 1)[1] for hop in found]


def test_nodes_with_a_class_go_first_however_many_hops_they_take() -> None:
    assert route([stock("all", 0, 4), classed("a", 0, 2), classed("b", 2, 4)]) == ["a", "b"]


def test_only_layers_without_a_class_go_to_nodes_without_one() -> None:
    assert route([stock("front", 0, 2), stock("back", 2, 4), classed("a", 0, 2)]) == ["a", "back"]
    assert route([stock("all", 0, 4), classed("a", 0, 2)]) == ["all"], "spans that do not meet"


def test_what_admits_them_is_said_where_they_would_fill_the_gap() -> None:
    there = [stock("back", 2, 4), classed("a", 0, 2)]
    with pytest.raises(NoRoute, match=r"layers \[2, 4\) are served only.*set admit_stock \(--admit-stock\)") as raised:
        route(there, admit_stock=False)
    assert raised.value.fields["start"] == 2
    with pytest.raises(NoRoute, match=r'verify="audit" cannot check them: set verify="off"'):
        route(there, policy="audit")
    for candidates in ([classed("a", 0, 2)], [classed("a", 0, 2), stock("late", 3, 4)]):
        with pytest.raises(NoRoute, match="nobody serves some layers"):
            route(candidates)


def test_a_verdict_names_them_and_says_when_a_failover_was_not_exact() -> None:
    front, back, spare = classed("a", 0, 2), stock("back", 2, 4), stock("spare", 2, 4)
    verdict = Verdict("off")
    note_stock(verdict, [front, back])
    note_stock(verdict, [front, back])
    assert verdict.unverifiable == [(back.node, Span(2, 4))]
    verdict.replaced.append((front.node, classed("b", 0, 2).node, "unreachable"))
    assert verdict.exact
    verdict.replaced.append((back.node, spare.node, "unreachable"))
    assert not verdict.exact
