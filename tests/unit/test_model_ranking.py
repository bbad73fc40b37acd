"""The k largest logits, in one order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tallystick_model.ranking import top_k
from tallystick_protocol.errors import CorruptResult


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.data())
def test_ties_go_to_the_smaller_id(values: list[int], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(values)))
    logits = torch.tensor([values, values[::-1]], dtype=torch.float32)
    ids, tops = top_k(logits, k)
    for row in range(2):
        expected = sorted(range(len(values)), key=lambda index: (-float(logits[row, index]), index))[:k]
        assert ids[row].tolist() == expected
        assert tops[row].tolist() == [float(logits[row, index]) for index in expected]
    assert (ids.dtype, tops.dtype) == (np.int32, np.float32)


def test_zeros_of_both_signs_are_equal_and_leave_positive() -> None:
    ids, values = top_k(torch.tensor([[-0.0, 0.0, -1.0, -0.0]]), 3)
    assert ids.tolist() == [[0, 1, 3]]
    assert values.tobytes() == np.zeros(3, "<f4").tobytes()


def test_minus_infinity_is_a_value_and_nan_is_not() -> None:
    assert top_k(torch.tensor([[-torch.inf, 1.0, -torch.inf]]), 2)[0].tolist() == [[1, 0]]
    with pytest.raises(CorruptResult):
        top_k(torch.tensor([[1.0, float("nan")]]), 1)


@pytest.mark.parametrize("k", [0, 4])
def test_k_lies_within_the_vocabulary(k: int) -> None:
    with pytest.raises(ValueError, match="top"):
        top_k(torch.zeros(1, 3), k)
