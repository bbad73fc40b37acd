"""Sampling over arbitrary finite logits: always a distribution, always a token that may be chosen."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tallystick_protocol.errors import CorruptResult
from tallystick_protocol.sampling import Sampling, distribution, pick

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
SAMPLINGS = st.builds(
    Sampling,
    temperature=st.one_of(st.floats(0, 100), st.sampled_from([5e-324, 1e-300, 1.0])),
    top_k=st.one_of(st.integers(0, 20), st.just(1 << 20)),
    top_p=st.one_of(st.floats(0, 1, exclude_min=True), st.sampled_from([5e-324, 1.0])),
    seed=st.integers(0, 2**64 - 1),
)


def top_k_row(logits: list[float]) -> bytes:
    ordered = sorted(enumerate(np.array(logits, dtype="<f4").tolist()), key=lambda pair: (-pair[1], pair[0]))
    return np.array(ordered, dtype=[("id", "<u4"), ("value", "<f4")]).tobytes()


@settings(max_examples=100, deadline=None)
@given(st.lists(FINITE, min_size=1, max_size=64), SAMPLINGS)
def test_probabilities_descend_and_sum_to_one(logits: list[float], sampling: Sampling) -> None:
    if sampling.temperature == 0:
        return
    found = distribution(np.array(sorted(logits, reverse=True), dtype=np.float32), sampling)
    assert 1 <= len(found) <= len(logits)
    assert np.isfinite(found).all()
    assert abs(float(found.sum()) - 1) < 1e-9
    assert (np.diff(found) <= 1e-15).all()


@settings(max_examples=100, deadline=None)
@given(st.lists(FINITE, min_size=1, max_size=64), SAMPLINGS, st.integers(0, 2**22))
def test_the_choice_is_one_that_top_k_and_top_p_leave(logits: list[float], sampling: Sampling, position: int) -> None:
    row = top_k_row(logits)
    token = pick(row, sampling, position)
    assert token == pick(row, sampling, position)
    ids = np.frombuffer(row, dtype="<u4")[::2].tolist()
    limit = 1 if sampling.temperature == 0 else (sampling.top_k or len(ids))
    assert token in ids[:limit]


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=64), SAMPLINGS)
def test_any_bytes_are_a_choice_or_a_corrupt_result(row: bytes, sampling: Sampling) -> None:
    try:
        token = pick(row, sampling, 0)
    except CorruptResult:
        return
    assert 0 <= token < 1 << 32
