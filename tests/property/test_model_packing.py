"""Packing: every row travels once, in order, and its bits do not depend on the plan."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import checkpoints
from harness.checkpoints import Published, published
from tallystick_model.canonical.packing import pack
from tallystick_model.segments import Segment
from tallystick_protocol.types import Span

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=8)


@given(LENGTHS, st.booleans(), st.integers(1, 50))
def test_every_row_travels_once_and_in_order(lengths: list[int], divisible: bool, limit: int) -> None:
    calls = pack(lengths, divisible=divisible, limit=limit)
    rows = [(part.segment, row) for call in calls for part in call for row in range(part.first, part.last)]
    assert rows == [(segment, row) for segment, length in enumerate(lengths) for row in range(length)]
    assert all(call and all(len(part) for part in call) for call in calls)
    for call in calls:
        assert sum(len(part) for part in call) <= limit or (not divisible and len(call) == 1)
        if not divisible:
            assert all(len(part) == lengths[part.segment] for part in call)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Published:
    root = tmp_path_factory.mktemp("packing")
    torch.set_num_threads(1)
    return published(checkpoints.mistral(root / "checkpoint", num_hidden_layers=2), root)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=4), min_size=1, max_size=4))
def test_sessions_in_lockstep_get_the_rows_they_get_alone(served: Published, sessions: list[list[int]]) -> None:
    """Each inner list is one session's chunks; round k packs the k-th chunk of every session that has one."""
    span = served.load(Span(0, 2))
    ids = [torch.arange(sum(chunks)) * 7 % 320 + index for index, chunks in enumerate(sessions)]
    ids = [row % 320 for row in ids]
    alone = [span.forward([Segment(span.new_cache(200), 0, row)])[0] for row in ids]
    caches = [span.new_cache(200) for _ in sessions]
    for turn in range(4):
        going = [index for index, chunks in enumerate(sessions) if turn < len(chunks)]
        bounds = {index: (sum(sessions[index][:turn]), sum(sessions[index][: turn + 1])) for index in going}
        segments = [Segment(caches[i], bounds[i][0], ids[i][slice(*bounds[i])]) for i in going]
        for index, out in zip(going, span.forward(segments) if going else [], strict=True):
            assert torch.equal(out, alone[index][slice(*bounds[index])])
