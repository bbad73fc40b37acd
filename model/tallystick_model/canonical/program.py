"""Recordings of one forward at several numbers of rows, made into a program for any number of rows.

Sizes among the steps' arguments are found as multiples of the rows that travel and of those that are selected, plus a
constant. For every number of rows that occurs, the first run goes step by step and learns what is constant, what is a
view of what, and what nobody needs (`learning.py`); later runs are a straight list of calls (`straight.py`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tallystick_model.canonical.learning import run_through
from tallystick_model.canonical.recording import Step, Unrecordable
from tallystick_model.canonical.straight import Straight, Tried, straighten_and_tape
from tallystick_model.canonical.taped import Scratch

MAX_KEPT = 64
"""Numbers of rows for which a straight list is kept; the one used longest ago goes first."""


@dataclass(frozen=True, slots=True)
class Recording:
    """rows, selected: the sizes it was made at; results: the numbers of the values that the forward returned."""

    rows: int
    selected: int
    steps: list[Step]
    inputs: list[int]
    results: list[int]


@dataclass(frozen=True, slots=True)
class Size:
    """per_row * rows + per_selected * selected + constant."""

    per_row: int
    per_selected: int
    constant: int

    def at(self, rows: int, selected: int) -> int:
        return self.per_row * rows + self.per_selected * selected + self.constant


class Program:
    """The steps of a forward at any number of rows."""

    def __init__(self, recordings: Sequence[Recording]) -> None:
        """recordings: four or more, at sizes in general position. Raises Unrecordable where they differ by more."""
        first = recordings[0]
        if any(
            (len(other.steps), other.inputs, other.results) != (len(first.steps), first.inputs, first.results)
            for other in recordings
        ):
            raise Unrecordable("another number of rows makes other steps")
        sizes = [(recording.rows, recording.selected) for recording in recordings]
        self.steps = [_merged(steps, sizes) for steps in zip(*(one.steps for one in recordings), strict=True)]
        self._inputs, self._results = first.inputs, first.results
        self._by_selected = any(
            isinstance(leaf, Size) and leaf.per_selected for step in self.steps for leaf in step.leaves
        )
        self._straight: OrderedDict[tuple[int, int], Straight | Tried] = OrderedDict()
        self._scratch = Scratch()

    def run(self, inputs: Sequence[torch.Tensor], rows: int, selected: int) -> list[torch.Tensor]:
        """inputs: contiguous, in the recording's order. Returns what the forward would."""
        key = (rows, selected if self._by_selected else 0)
        straight = self._straight.get(key)
        if straight is not None:
            self._straight.move_to_end(key)
            return straight.run(inputs)
        steps = [self._at(step, rows, selected) for step in self.steps]
        results, learnt = run_through(steps, dict(zip(self._inputs, inputs, strict=True)), self._results)
        self._straight[key] = straighten_and_tape(steps, learnt, self._inputs, self._results, self._scratch)
        if len(self._straight) > MAX_KEPT:
            self._straight.popitem(last=False)
        return results

    def forget(self) -> None:
        """Straighten anew: what products are computed in has changed."""
        self._straight.clear()

    def _at(self, step: Step, rows: int, selected: int) -> Step:
        leaves = [leaf.at(rows, selected) if isinstance(leaf, Size) else leaf for leaf in step.leaves]
        return Step(step.function, leaves, step.spec, step.outs, step.many, step.traits)


def _merged(steps: Sequence[Step], sizes: list[tuple[int, int]]) -> Step:
    first = steps[0]
    for other in steps[1:]:
        if (other.function, other.spec, other.outs, other.many) != (first.function, first.spec, first.outs, first.many):
            raise Unrecordable(f"{first.function} at one number of rows, {other.function} at another")
    leaves = [_leaf(found, sizes, first) for found in zip(*(step.leaves for step in steps), strict=True)]
    return Step(first.function, leaves, first.spec, first.outs, first.many, first.traits)


def _leaf(found: tuple[Any, ...], sizes: list[tuple[int, int]], step: Step) -> Any:
    first = found[0]
    if isinstance(first, torch.Tensor):
        if all(isinstance(other, torch.Tensor) and _same(first, other) for other in found[1:]):
            return first
    elif type(first) is int and all(type(other) is int for other in found):
        if all(other == first for other in found):
            return first
        size = _size(found, sizes)
        if size is not None:
            return size
    elif all(type(other) is type(first) and other == first for other in found[1:]):
        return first
    raise Unrecordable(f"an argument of {step.function} depends on the rows in a way that is not a size")


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one is other or (one.dtype == other.dtype and one.device == other.device and torch.equal(one, other))


def _size(found: tuple[int, ...], sizes: list[tuple[int, int]]) -> Size | None:
    """The whole numbers that explain every one of them; None when there are none. By the differences to the first."""
    (rows, selected), first = sizes[0], found[0]
    steps = [(r - rows, s - selected, value - first) for (r, s), value in zip(sizes[1:], found[1:], strict=True)]
    (r1, s1, v1), (r2, s2, v2) = steps[:2]
    determinant = r1 * s2 - r2 * s1
    if determinant:
        per_row, per_selected = (v1 * s2 - v2 * s1) // determinant, (r1 * v2 - r2 * v1) // determinant
    else:
        per_row, per_selected = v1 // r1, 0
    size = Size(per_row, per_selected, first - per_row * rows - per_selected * selected)
    return size if all(size.at(*at) == value for at, value in zip(sizes, found, strict=True)) else None
