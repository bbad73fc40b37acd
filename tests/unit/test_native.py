"""What machine code computes is what its rule says, on vectors of either width, whoever is computed with it."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tallystick_model.canonical.kernels import flushing_denormals
from tallystick_model.canonical.masks import Mask
from tallystick_model.canonical.native import attention as attentions
from tallystick_model.canonical.native import compiling
from tallystick_model.canonical.native import products as product_code
from tallystick_model.canonical.native.attention import TOGETHER, Attention, Table
from tallystick_model.canonical.native.products import BLOCK, Products

WIDTH = compiling.lanes()
pytestmark = pytest.mark.skipif(WIDTH is None, reason="there is no machine code for this processor")

WIDTHS = [width for width in (8, 16) if width <= (WIDTH or 0)]
SHAPES = [(768, 256), (37, 100), (1, 3072), (130, 257), (1001, 130), (2, 5), (64, 128)]


@pytest.fixture(autouse=True)
def one_thread_afterwards() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.set_num_threads(1)


def fused(one: np.ndarray, other: np.ndarray, added: np.ndarray) -> np.ndarray:
    """One rounding, to float32: a product of two of them is exact in float64."""
    return (one.astype(np.float64) * other.astype(np.float64) + added.astype(np.float64)).astype(np.float32)


def by_rule(rows: np.ndarray, weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    total = None
    for begin in range(0, rows.shape[1], BLOCK):
        block = np.zeros((len(rows), len(weight)), np.float32)
        for at in range(begin, min(begin + BLOCK, rows.shape[1])):
            block = fused(rows[:, at, None], weight[None, :, at], block)
        total = block if total is None else total + block
    assert total is not None
    return total if bias is None else total + bias


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_product_is_what_its_rule_says(shape: tuple[int, int], dtype: torch.dtype, width: int) -> None:
    code = product_code.compiled(dtype, width)
    weight, bias, rows = torch.randn(shape).to(dtype).float(), torch.randn(shape[0]), torch.randn(19, shape[1])
    packed = code.pack(weight)
    assert packed.dtype is dtype  # models look at it
    assert torch.equal(code.unpack(packed, *shape), weight)
    for added in (None, bias):
        product = code.over(packed, added, *shape, False)
        expected = by_rule(rows.numpy(), weight.numpy(), None if added is None else added.numpy())
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert np.array_equal(product(rows).numpy(), expected)
        for count in range(1, 9):
            assert torch.equal(product(rows[count : 2 * count].contiguous()), product(rows)[count : 2 * count])


def test_a_large_product_is_that_of_one_thread_and_near_the_exact_one() -> None:
    code, shape = product_code.compiled(torch.float32, WIDTHS[-1]), (3000, 1500)
    weight, rows = torch.randn(shape), torch.randn(250, 1500)
    product = code.over(code.pack(weight), None, *shape, False)
    alone = product(rows)
    exact = rows.double() @ weight.double().T
    assert ((alone - exact).abs().max() / exact.std()) < 1e-5
    torch.set_num_threads(4)
    for _ in range(5):
        assert torch.equal(product(rows), alone)


def test_threads_that_help_flush_denormals_as_their_caller_does() -> None:
    code = product_code.compiled(torch.float32, WIDTHS[-1])
    weight, rows = torch.full((4096, 1024), 1e-20), torch.full((2, 1024), 1e-20)
    product = code.over(code.pack(weight), None, 4096, 1024, False)
    torch.set_num_threads(4)
    kept = product(rows)
    assert bool((kept > 0).all())
    with flushing_denormals():
        for _ in range(5):
            assert bool((product(rows) == 0).all())
    assert torch.equal(product(rows), kept)


# -- attention


def table(rule: Mask, lengths: list[tuple[int, int]]) -> Table:
    """Sessions side by side, each with rows first .. first + count - 1."""
    rows, units = [], []
    for number, (first, count) in enumerate(lengths):
        at = np.arange(first, first + count)
        low, high = rule.ranges(at, first + count)
        begin = sum(map(len, rows))
        rows.append(np.stack([np.full(count, number), at, low, high], axis=1))
        units += [(begin + one, begin + min(one + TOGETHER, count)) for one in range(0, count, TOGETHER)]
    whole = np.concatenate(rows).astype(np.int64)
    return Table(whole, np.array(units, dtype=np.int64), len(whole))


class Session:
    """A cache of some groups, and the code that attends over it."""

    def __init__(self, code: Attention, groups: int, room: int = 320) -> None:
        self.code = code
        self.keys, self.values = torch.zeros(groups, room, code.key_dim), torch.zeros(groups, room, code.value_dim)

    @property
    def place(self) -> tuple[int, int, int, int]:
        return self.keys.data_ptr(), self.values.data_ptr(), self.keys.stride(0), self.values.stride(0)


def attend(
    sessions: list[Session], rule: Mask, given: list[tuple[torch.Tensor, ...]], firsts: list[int]
) -> torch.Tensor:
    lengths = [(first, one[0].shape[2]) for first, one in zip(firsts, given, strict=True)]
    query, key, value = (torch.cat(side, dim=2) for side in zip(*given, strict=True))
    places = np.array([session.place for session in sessions], dtype=np.int64)
    return sessions[0].code.attend(query, key, value, places, table(rule, lengths))


FORMS = [(12, 12, 64, 64), (8, 2, 32, 32), (4, 1, 7, 7), (2, 2, 24, 40), (6, 3, 80, 80), (1, 1, 16, 16)]
RULES = [Mask(True), Mask(True, window=50), Mask(True, chunk=40)]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_rows_attention_is_its_own_and_near_the_exact_one(form: tuple[int, int, int, int], rule: Mask) -> None:
    heads, groups, key_dim, value_dim = form
    count, drawn = 150, random.Random(3)
    query, key, value = (
        torch.randn(1, n, count, dim) for n, dim in ((heads, key_dim), (groups, key_dim), (groups, value_dim))
    )
    code = attentions.compiled(key_dim, value_dim, WIDTHS[-1])

    def part(at: int, n: int) -> tuple[torch.Tensor, ...]:
        return tuple(side[:, :, at : at + n] for side in (query, key, value))

    session = Session(code, groups)
    whole = attend([session], rule, [part(0, count)], [0])
    assert torch.equal(session.keys[:, :count], key[0]) and not session.keys[:, count:].any()
    seen = rule.sees(torch.arange(count), torch.arange(count))
    sides = (query.double(), key.double(), value.double())
    exact = F.scaled_dot_product_attention(*sides, attn_mask=seen, enable_gqa=True).transpose(1, 2)
    stock = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=True).transpose(1, 2)
    assert (whole - exact).abs().max() < max(2 * float((stock - exact).abs().max()), 1e-6)
    for width in WIDTHS:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            mine, other = (Session(attentions.compiled(key_dim, value_dim, width), groups) for _ in range(2))
            at, there = 0, 0
            while at < count:
                n, m = min(drawn.choice((1, 1, 2, 5, 40)), count - at), drawn.choice((1, 3))
                if there + m > count:
                    there = 0
                found = attend([mine, other], rule, [part(at, n), part(there, m)], [at, there])
                assert torch.equal(found[:, :n], whole[:, at : at + n]), (at, n)
                assert torch.equal(found[:, n:], whole[:, there : there + m])
                at, there = at + n, there + m


def exponential(x: np.ndarray) -> np.ndarray:
    rounder, single = np.float32(12582912.0), np.float32
    n = (x * single(1.4426950408889634) + rounder) - rounder
    r = fused(n, single(-1.4286068203094172e-06), fused(n, single(-0.693145751953125), x))
    result, factor = np.full_like(x, single(1 / 5040)), 5040.0
    for power in range(7, 0, -1):
        factor /= power
        result = fused(result, r, single(1 / factor))
    return np.where(x < -87, single(0), result * np.exp2(np.maximum(n, -126)).astype(single))


def in_halves(parts: np.ndarray) -> np.ndarray:
    while len(parts) > 1:
        half = len(parts) // 2
        parts = parts[:half] + parts[half:]
    return parts[0]


def attention_by_rule(
    query: np.ndarray, keys: np.ndarray, values: np.ndarray, low: int, scale: np.float32, sink: np.float32 | None
) -> np.ndarray:
    """query (dim,), keys and values (n, ...): one row and head, which sees keys low .. n - 1."""
    n, dim = keys.shape
    scores = np.full(-(-n // 16) * 16, -np.inf, np.float32)
    for key in range(low, n):
        parts = np.zeros(16, np.float32)
        for at in range(dim):
            parts[at % 16] = fused(query[at], keys[key, at], parts[at % 16])
        scores[key] = in_halves(parts) * scale
    top = scores.max() if sink is None else max(scores.max(), sink)
    with np.errstate(invalid="ignore"):
        shares = np.where(np.isneginf(scores), np.float32(0), exponential(scores - top))
    sums, result = np.zeros(16, np.float32), np.zeros(values.shape[1], np.float32)
    for chunk in range(low // 16 * 16, n, 16):
        sums = sums + shares[chunk : chunk + 16]
        block = np.zeros_like(result)
        for key in range(max(chunk, low), min(chunk + 16, n)):
            block = fused(shares[key], values[key], block)
        result = result + block
    total = in_halves(sums)
    return result / (total if sink is None else total + exponential(np.array(sink - top)))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("has_sinks", [False, True])
def test_attention_is_what_its_rule_says(width: int, has_sinks: bool) -> None:
    heads, groups, key_dim, value_dim, count, rule = 4, 2, 40, 24, 70, Mask(True, window=45)
    query, key, value = (
        2 * torch.randn(1, n, count, dim) for n, dim in ((heads, key_dim), (groups, key_dim), (groups, value_dim))
    )
    sinks = torch.randn(heads) if has_sinks else None
    session = Session(attentions.compiled(key_dim, value_dim, width), groups)
    places = np.array([session.place], dtype=np.int64)
    found = session.code.attend(query, key, value, places, table(rule, [(0, count)]), 0.2, sinks)
    for row in (0, 1, 15, 16, 44, 45, 63, 64, 69):
        for head in range(heads):
            sides = (side[0, head // 2, : row + 1].numpy() for side in (key, value))
            sink = None if sinks is None else sinks[head].numpy()
            expected = attention_by_rule(
                query[0, head, row].numpy(), *sides, max(0, row - 44), np.float32(0.2), sink
            )  # fmt: skip
            assert np.array_equal(found[0, row, head].numpy(), expected), (row, head)


@pytest.mark.parametrize("rule", [*RULES, Mask(False), Mask(False, window=9)], ids=str)
def test_ranges_are_what_a_mask_lets_rows_see(rule: Mask) -> None:
    low, high = rule.ranges(np.arange(90), 100)
    keys = np.arange(100)
    drawn = (keys >= low[:, None]) & (keys < high[:, None])
    assert np.array_equal(drawn, rule.sees(torch.arange(90), torch.arange(100)).numpy())


# -- code that is kept


def test_code_is_kept_and_taken_from_there_unless_it_was_spoiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "FOLDER", tmp_path / "code")
    made = []
    emitted = compiling._Kept.write
    monkeypatch.setattr(compiling._Kept, "write", lambda kept, code: (made.append(1), emitted(kept, code)))
    weight, rows = torch.randn(70, 30), torch.randn(3, 30)

    def computed(code: Products) -> torch.Tensor:
        return code.over(code.pack(weight), None, 70, 30, False)(rows)

    first = computed(product_code.compiled(torch.float32, WIDTHS[0]))
    assert torch.equal(computed(product_code.compiled(torch.float32, WIDTHS[0])), first) and len(made) == 1
    (file,) = (tmp_path / "code").iterdir()
    held = bytearray(file.read_bytes())
    held[100] ^= 1
    file.write_bytes(held)
    assert torch.equal(computed(product_code.compiled(torch.float32, WIDTHS[0])), first) and len(made) == 2
    os.chmod(tmp_path / "code", 0o777)  # others could have written it
    assert torch.equal(computed(product_code.compiled(torch.float32, WIDTHS[0])), first) and len(made) == 3


def test_where_nothing_can_be_kept_code_is_made_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(compiling, "FOLDER", tmp_path / "file" / "code")
    assert product_code.compiled(torch.float32, WIDTHS[0]).dtype is torch.float32
