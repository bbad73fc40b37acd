"""A row's bits depend on the row alone, in every kernel that canonical execution uses."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from tallystick_model.canonical.kernels import CanonicalLinear, in_blocks
from tallystick_model.canonical.products import packing
from tallystick_model.canonical.scopes import CanonicalOperators
from tallystick_protocol.manifest import Numerics

SHAPES = [(168, 56), (37, 100), (1000, 1001), (3072, 1), (256, 688)]
FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "sigmoid": torch.sigmoid,
    "softplus": F.softplus, "mish": F.mish, "elu": F.elu, "exp": torch.exp, "erf": torch.erf, "tanh": torch.tanh,
    "sin": torch.sin, "cos": torch.cos,
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread_afterwards() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("numerics", ["fp32", "bf16w"])
@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_product_keeps_a_rows_bits_at_any_number_of_rows(
    shape: tuple[int, int], packs: bool, numerics: Numerics
) -> None:
    if packs and packing(numerics) is None:
        pytest.skip("this machine has no packed products")
    torch.set_num_threads(1)
    linear = CanonicalLinear(torch.randn(shape[1], shape[0]), torch.randn(shape[1]), numerics=numerics, packs=packs)
    rows = torch.randn(600, shape[0])
    whole = linear(rows)
    drawn = random.Random(1)
    for count in [1, 1, 2, 3, 4, 5, 31, 255, 256, 257, *(drawn.randint(1, 600) for _ in range(6))]:
        at = drawn.randint(0, 600 - count)
        assert torch.equal(linear(rows[None, at : at + count])[0], whole[at : at + count]), count


@pytest.mark.parametrize("packs", [True, False])
def test_bf16w_rounds_the_sum_of_rounded_values_once(packs: bool) -> None:
    weight, bias, rows = torch.randn(300, 200), torch.randn(300), torch.randn(64, 200)
    found = CanonicalLinear(weight, bias, numerics="bf16w", packs=packs)(rows)
    exact = F.linear(*(value.bfloat16().double() for value in (rows, weight, bias))).bfloat16().float()
    assert found.dtype is torch.float32 and (found == exact).float().mean() > 0.99
    assert torch.allclose(found, exact, rtol=2**-7)


def test_a_product_keeps_its_bits_with_any_number_of_threads() -> None:
    linear, rows = CanonicalLinear(torch.randn(688, 256), None), torch.randn(300, 256)
    torch.set_num_threads(1)
    whole = linear(rows)
    for threads in (2, 4):
        torch.set_num_threads(threads)
        for count in (1, 2, 7, 300):
            assert torch.equal(linear(rows[:count]), whole[:count])


def test_a_product_is_that_of_the_module_it_replaces() -> None:
    rows = torch.randn(9, 48)
    for module in (nn.Linear(48, 30), nn.Linear(48, 30, bias=False), Conv1D(30, 48)):
        assert torch.allclose(CanonicalLinear.of(module)(rows), module(rows), atol=1e-5)
    assert CanonicalLinear.of(nn.Linear(48, 30))(rows[:0]).shape == (0, 30)


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_an_elementwise_function_in_blocks_keeps_an_elements_bits(name: str) -> None:
    function, drawn = FUNCTIONS[name], random.Random(2)
    for width in (37, 64, 100, 688, 1001):
        values = torch.randn(200, width) * 3
        torch.set_num_threads(1)
        whole = in_blocks(function, values)
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            for _ in range(4):
                count = drawn.randint(1, 200)
                at = drawn.randint(0, 200 - count)
                assert torch.equal(in_blocks(function, values[at : at + count]), whole[at : at + count])


def test_plain_silu_does_not_keep_its_bits_so_the_test_above_means_something() -> None:
    torch.set_num_threads(1)
    values = torch.randn(64, 37) * 3
    whole = F.silu(values)
    if all(torch.equal(F.silu(values[at : at + 1]), whole[at : at + 1]) for at in range(64)):
        pytest.skip("on this machine ATen's scalar tail has the vector's bits")


def test_operators_inside_a_scope_run_in_blocks_and_in_place() -> None:
    values = torch.randn(5, 37)
    expected = in_blocks(torch.sigmoid, values)
    with CanonicalOperators():
        assert torch.equal(torch.sigmoid(values), expected)
        assert torch.equal(values.sigmoid_(), expected)
    assert torch.equal(values, expected)
