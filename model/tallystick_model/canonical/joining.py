"""Products of the same rows, computed as one: a layer's queries, keys and values, or its gate and up projection.

One call reads memory faster than three. Weights lie side by side in one packed weight, and each product takes its own
columns of the result. Which products meet the same rows is read from a recorded forward; that they keep their bits is
tried before anything is replaced.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from tallystick_model.canonical.kernels import MAX_ROWS, CanonicalLinear
from tallystick_model.canonical.products import ENOUGH_ROWS
from tallystick_model.canonical.recording import Step, Value

_TRIED_ROWS = (ENOUGH_ROWS, 5, 17, 32, 64, 96, MAX_ROWS)
"""Besides the fewest: numbers of rows at which the bits are compared, with one thread and with all."""

_FEWEST_COLUMNS = 16
"""Narrower products (the gate of a shared expert) take other kernels alone, and little time."""


def joinable(recordings: Iterable[Sequence[Step]]) -> list[list[CanonicalLinear]]:
    """Groups of products that take the same value wherever they are called, each in one group alone."""
    groups: dict[tuple[int, ...], list[CanonicalLinear]] = {}
    places: dict[int, set[tuple[int, ...]]] = {}
    for steps in recordings:
        meeting: dict[int, dict[int, CanonicalLinear]] = {}
        for step in steps:
            if step.function is not _PRODUCT or not isinstance(step.leaves[1], Value):
                continue
            linear: CanonicalLinear = step.leaves[0]
            if linear.out_features >= _FEWEST_COLUMNS:
                meeting.setdefault(step.leaves[1].number, {})[id(linear)] = linear
        for group in meeting.values():
            groups[tuple(group)] = list(group.values())
            for one in group:
                places.setdefault(one, set()).add(tuple(group))
    return [
        group
        for key, group in groups.items()
        if len(group) > 1 and all(len(places[one]) == 1 for one in key) and _alike(group)
    ]


_PRODUCT = CanonicalLinear.forward.__wrapped__  # type: ignore[attr-defined]


def _alike(group: Sequence[CanonicalLinear]) -> bool:
    first = group[0]
    return first.packing is not None and all(
        one.within is None
        and (one.packing, one.rounds, one.in_features, one.bias is None)
        == (first.packing, first.rounds, first.in_features, first.bias is None)
        for one in group
    )


@torch.inference_mode()
def join(group: Sequence[CanonicalLinear]) -> bool:
    """Let products be computed as one, if that leaves every bit as it is. Takes as long as packing them.

    For the moment there are three copies of their weights; afterwards, one.
    """
    first = group[0]
    bias = None if first.bias is None else torch.cat([one.bias.float() for one in group if one.bias is not None])
    dense = torch.cat([one.plain_weight() for one in group])
    joint = CanonicalLinear(dense, bias, numerics="bf16w" if first.rounds else "fp32")
    del dense
    if not _agree(joint, group):
        return False
    begin = 0
    for one in group:
        one.compute_within(joint, begin)
        begin += one.out_features
    return True


def _agree(joint: CanonicalLinear, group: Sequence[CanonicalLinear]) -> bool:
    """Whether the joint product gives what the others do, however many rows and threads there are."""
    drawn, threads = torch.Generator().manual_seed(0), torch.get_num_threads()
    try:
        for count in {joint.fewest, *_TRIED_ROWS}:
            rows = torch.randn(count, joint.in_features, generator=drawn)
            apart = torch.cat([one(rows) for one in group], dim=-1)
            for number in {1, threads}:
                torch.set_num_threads(number)
                if not torch.equal(joint(rows), apart):
                    return False
    finally:
        torch.set_num_threads(threads)
    return True
