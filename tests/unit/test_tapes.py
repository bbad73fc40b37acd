"""Tapes compute what ATen computes, bit for bit, and lists of calls that have them are what they were without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from tallystick_model.canonical import straight
from tallystick_model.canonical.kernels import CanonicalLinear, flushing_denormals, in_blocks
from tallystick_model.canonical.native import compiling
from tallystick_model.canonical.native.tape import MEAN_LIMIT, SHORTEST_MEAN, Seen, Tape, exponential, is_possible
from tallystick_model.canonical.program import Program
from tallystick_model.canonical.straight import Tried
from tallystick_model.canonical.taped import MOST_BYTES, Stretch, _Room
from unit.test_programs import program

pytestmark = pytest.mark.skipif(not is_possible(), reason="there is no machine code for this processor")

Writes = Callable[..., bool]
ODD = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 3e38, -3e38, float("inf"), -float("inf"), float("nan"), 1.0])


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(write: Writes, out: torch.Tensor, *given: torch.Tensor) -> bool:
    """Write one step over tensors where they lie, and run it."""
    tape, tensors = Tape(), [out, *given]
    seen = [Seen(at, 0, tuple(one.shape), tuple(one.stride())) for at, one in enumerate(tensors)]
    if not write(tape, *seen):
        return False
    addresses = np.array([one.data_ptr() for one in tensors], dtype=np.int64)
    tape.finished({at: (at, 0) for at in range(len(tensors))})(addresses.ctypes.data)
    return True


def bits(value: torch.Tensor) -> torch.Tensor:
    """All NaNs are one."""
    return torch.where(value.isnan(), torch.nan, value).contiguous().view(torch.int32)


def assert_same(write: Writes, expected: torch.Tensor, *given: torch.Tensor) -> None:
    out = torch.empty_strided(expected.shape, expected.stride())
    assert run(write, out, *given)
    assert torch.equal(bits(out), bits(expected))


HEADS = drawn(1, 4, 12, 64).transpose(1, 2)
PAIRS = {
    "alike": (HEADS, drawn(1, 4, 12, 64, seed=1).transpose(1, 2)),
    "a table for all heads": (HEADS, drawn(1, 1, 4, 64)),
    "a number for each row": (drawn(1, 4, 768), drawn(1, 4, 1)),
    "a weight for each column": (drawn(768), drawn(1, 4, 768)),
    "a constant": (drawn(3, 77), torch.tensor(1e-6)),
    "a constant first": (torch.tensor(1.0), drawn(1, 5, 19)),
    "one number": (drawn(1, 1), drawn(1, 1, seed=1)),
    "odd ones": (ODD[:, None], ODD[None, :].clone()),
}


@pytest.mark.parametrize("name", ["add", "sub", "mul", "div"])
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("flushes", [False, True])
def test_what_becomes_of_two_elements(name: str, pair: str, flushes: bool) -> None:
    one, other = PAIRS[pair]
    if flushes:
        with flushing_denormals():
            assert_same(lambda tape, *seen: tape.elementwise(name, *seen), getattr(torch, name)(one, other), one, other)
    else:
        assert_same(lambda tape, *seen: tape.elementwise(name, *seen), getattr(torch, name)(one, other), one, other)


UNARY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "copy": torch.clone,
    "neg": torch.neg,
    "square": lambda x: x.pow(2),
    "rsqrt": torch.rsqrt,
    "round": lambda x: x.bfloat16().float(),
}


@pytest.mark.parametrize("name", UNARY)
@pytest.mark.parametrize("x", [HEADS, drawn(5, 77), ODD.repeat(7), drawn(1, 4, 1)], ids=["heads", "tail", "odd", "few"])
def test_what_becomes_of_an_element(name: str, x: torch.Tensor) -> None:
    x = x.abs() if name == "rsqrt" and not bool(x.isnan().any()) else x
    assert_same(lambda tape, *seen: tape.elementwise(name, *seen), UNARY[name](x), x)


@pytest.mark.parametrize("size", [8, 9, 31, 32, 33, 64, 511, 512, 513, 768, 1000, 2048, 4096, MEAN_LIMIT - 1])
def test_means_are_added_up_as_aten_does(size: int) -> None:
    x = drawn(1, 5, size) ** 2 + 1
    assert_same(lambda tape, *seen: tape.mean(*seen), x.mean(-1, keepdim=True), x)


@pytest.mark.parametrize("size", [SHORTEST_MEAN - 1, MEAN_LIMIT])
def test_means_that_are_added_up_otherwise_are_left_alone(size: int) -> None:
    assert not run(lambda tape, *seen: tape.mean(*seen), torch.empty(2, 1), drawn(2, size))


def test_silu_takes_the_exponential_function_of_aten() -> None:
    found = exponential()
    if found is None:
        pytest.skip("torch has no exponential function that can be called")
    x = torch.cat([drawn(1, 4, 2048) * 20, torch.linspace(-110, 110, 4096)[None, None].repeat(1, 4, 1)], dim=-1)
    assert_same(lambda tape, *seen: tape.silu(*seen, found), torch.nn.functional.silu(x), x)


def test_what_does_not_lie_side_by_side_is_left_alone() -> None:
    turned = drawn(6, 8).t()
    assert not run(lambda tape, *seen: tape.elementwise("neg", *seen), torch.empty(8, 6), turned)
    assert not run(lambda tape, *seen: tape.mean(*seen), torch.empty(8, 1), turned)
    five = drawn(2, 2, 2, 2, 2).permute(0, 2, 4, 1, 3)
    assert not run(lambda tape, *seen: tape.elementwise("neg", *seen), torch.empty(2, 2, 2, 2, 2), five)


# -- lists of calls


class Layer:
    """A norm, two products, halves that are turned, a gate: what layers are made of."""

    def __init__(self, rounds: bool) -> None:
        numerics = "bf16w" if rounds else "fp32"
        self._up, self._down = (
            CanonicalLinear(drawn(*shape) / 8, None, numerics=numerics)  # type: ignore[arg-type]
            for shape in ((128, 12), (12, 64))
        )
        self._gate, self._weight = nn.SiLU(), drawn(12)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.pow(2).mean(-1, keepdim=True)
        normed = self._weight * (x * torch.rsqrt(rows + 1e-6))
        left, right = self._up(normed).chunk(2, dim=-1)
        turned = torch.cat([-right, left], dim=-1)[..., 32:96]
        return x + self._down(in_blocks(self._gate, left.contiguous()) * turned) * 0.5


def lists(made: Program) -> list[object]:
    return list(made._straight.values())


@pytest.mark.parametrize("rounds", [False, True])
def test_a_list_on_tapes_gives_the_same_bits(rounds: bool) -> None:
    layer = Layer(rounds)
    made = program(lambda x: layer(layer(x)))
    kept = []
    for turn in range(4):
        for rows in (1, 4, 30, 2):
            x = drawn(rows, 12, seed=turn)
            with torch.inference_mode():
                kept.append((made.run([x], rows, 0)[0], layer(layer(x))))
    assert all(torch.equal(found, expected) for found, expected in kept), "or the next run has written over it"
    for one in lists(made):
        assert isinstance(one, Tried) and one.is_taped
        parts = one.parts
        assert sum(isinstance(part, Stretch) for part in parts) == 1, "nothing here needs another call"
        assert len(parts) == 1


def test_values_that_others_take_and_make_go_in_and_out() -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        doubled = x * 2.0
        odd = torch.cumsum(doubled, -1)  # no tape has it
        whole = torch.cat([odd - doubled, doubled], dim=-1)
        return (whole + 1.0).view(len(x), 2, 12).transpose(0, 1).flip(0) * 3.0

    made = program(forward)
    for turn in range(3):
        x = drawn(6, 12, seed=turn)
        with torch.inference_mode():
            assert torch.equal(made.run([x], 6, 0)[0], forward(x))
    (one,) = lists(made)
    assert isinstance(one, Tried) and one.is_taped and len(one.parts) > 2


def test_a_tape_that_gives_other_bits_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Tape.elementwise

    def wrong(self: Tape, name: str, out: Seen, *given: Seen) -> bool:
        return right(self, "sub" if name == "add" else name, out, *given)

    monkeypatch.setattr(Tape, "elementwise", wrong)
    layer = Layer(False)
    made = program(layer)
    for turn in range(3):
        x = drawn(4, 12, seed=turn)
        with torch.inference_mode():
            assert torch.equal(made.run([x], 4, 0)[0], layer(x))
    (one,) = lists(made)
    assert isinstance(one, Tried) and not one.is_taped


def test_a_call_whose_numbers_are_not_finite_tells_nothing() -> None:
    layer = Layer(True)
    made = program(layer)
    with torch.inference_mode():
        for bad in (float("nan"), 3e38, 1.0, 1.0, 1.0):
            made.run([torch.full((4, 12), bad)], 4, 0)
    (one,) = lists(made)
    assert isinstance(one, Tried) and one.is_taped


def test_a_tape_that_cannot_be_written_or_run_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ValueError

    layer, x = Layer(False), drawn(4, 12)
    for name in ("mean", "finished"):
        with monkeypatch.context() as patched:
            patched.setattr(Tape, name, broken)
            made = program(layer)
            with torch.inference_mode():
                for _ in range(3):
                    assert torch.equal(made.run([x], 4, 0)[0], layer(x))
        assert not isinstance(lists(made)[0], Tried)


def test_one_memory_serves_all_lists_of_a_program() -> None:
    made = program(Layer(False))
    with torch.inference_mode():
        for _ in range(3):
            for rows in range(1, 50):
                made.run([drawn(rows, 12)], rows, 0)
    memories = {id(one._taped._taped._memory) for one in lists(made)}  # type: ignore[attr-defined]
    assert len(memories - {id(None)}) == 1


def test_lists_of_many_rows_and_machines_without_code_go_without(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(False)
    made = program(layer)
    rows = MOST_BYTES // 4 // 128
    with torch.inference_mode():
        for _ in range(2):
            assert torch.equal(made.run([x := drawn(rows, 12)], rows, 0)[0], layer(x))
    assert not isinstance(lists(made)[0], Tried)
    monkeypatch.setattr(straight, "is_possible", lambda: False)
    made = program(layer)
    with torch.inference_mode():
        made.run([drawn(4, 12)], 4, 0)
    assert not isinstance(lists(made)[0], Tried)


@pytest.mark.parametrize("width", [width for width in (8, 16) if width <= (compiling.lanes() or 0)])
def test_tapes_are_made_for_vectors_of_either_width(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from tallystick_model.canonical.native import tape

    code = tape.compiled(width)
    assert tape._computes_as_aten(code)
    monkeypatch.setattr(tape, "_machine", lambda: code)
    assert_same(lambda tape, *seen: tape.elementwise("mul", *seen), HEADS * HEADS, HEADS, HEADS)
    x = drawn(3, 768)
    assert_same(lambda tape, *seen: tape.mean(*seen), x.mean(-1, keepdim=True), x)


def test_places_are_used_again_and_never_twice_at_once() -> None:
    room = _Room()
    held: dict[int, tuple[int, int]] = {}
    draws: Sequence[int] = torch.randint(1, 5000, (400,), generator=torch.Generator().manual_seed(3)).tolist()
    for turn, size in enumerate(draws):
        held[turn] = room.take(size), size
        if turn % 3:
            begin, its = held.pop(sorted(held)[size % len(held)])
            room.give_back(begin, its)
        spans = sorted((begin, begin + its) for begin, its in held.values())
        assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))
    assert room.size < sum(draws) / 2
