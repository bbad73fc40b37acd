"""Programs: recordings at a few sizes run at every size, and are refused where they cannot."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from tallystick_model.canonical.learning import run_through
from tallystick_model.canonical.program import Program, Recording, Size, _size
from tallystick_model.canonical.recording import Recorder, Traits, Unrecordable, whole
from tallystick_model.canonical.straight import straighten

SIZES = ((5, 2), (7, 3), (10, 5), (13, 4))
WEIGHT = torch.randn(12, 12, generator=torch.Generator().manual_seed(0))
Forward = Callable[[torch.Tensor], torch.Tensor]


def recorded(forward: Forward, rows: int, selected: int = 0) -> Recording:
    x = torch.randn(rows, 12)
    with torch.inference_mode(), Recorder([x]) as recorder:
        out = forward(x)
    return Recording(rows, selected, recorder.steps, recorder.inputs, [recorder.number_of(out)])


def program(forward: Forward) -> Program:
    return Program([recorded(forward, rows, selected) for rows, selected in SIZES])


def with_views(x: torch.Tensor) -> torch.Tensor:
    """Views of views, a table that depends on the number of rows alone, the same twice, and what nobody needs."""
    heads = (x @ WEIGHT).view(1, len(x), 3, 4).transpose(1, 2)
    table = torch.arange(len(x)).float()[None, None, :, None].cos()
    left, right = heads[..., :2], heads[..., 2:]
    x.exp().sum()
    turned = torch.cat([-right, left], dim=-1)
    back = (heads * table + turned * table).transpose(1, 2).reshape(len(x), 12)
    return back + F.silu(x @ WEIGHT)


def in_place(x: torch.Tensor) -> torch.Tensor:
    total = x.sum(-1, keepdim=True)
    shares = x.exp()
    shares /= shares.sum(-1, keepdim=True)
    return shares.mul_(total)


@pytest.mark.parametrize("forward", [with_views, in_place])
def test_a_program_computes_what_the_function_does_at_every_size(forward: Forward) -> None:
    made = program(forward)
    for rows in (1, 4, 5, 64, 4, 1, 64):
        x = torch.randn(rows, 12)
        with torch.inference_mode():
            assert torch.equal(made.run([x], rows, 0)[0], forward(x))


def test_a_straight_list_has_no_step_too_many() -> None:
    recording = recorded(with_views, 6)
    x = torch.randn(6, 12)
    with torch.inference_mode():
        results, learnt = run_through(recording.steps, {recording.inputs[0]: x}, recording.results)
        straight = straighten(recording.steps, learnt, recording.inputs, recording.results)
        assert torch.equal(results[0], straight.run([x])[0])
    # One product, for it is the same twice; the cut into heads and its halves, turning, two sums, silu, the result.
    assert len(straight) <= 14
    assert len(recording.steps) >= 20


def test_a_whole_function_is_one_step_and_keeps_its_effect() -> None:
    seen: list[int] = []

    @whole(Traits(effect=True))
    def remembers(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return x * 2

    made = program(lambda x: remembers(x + 1) + remembers(x + 1))
    seen.clear()
    with torch.inference_mode():
        for _ in range(2):
            assert torch.equal(made.run([torch.ones(9, 12)], 9, 0)[0], torch.full((9, 12), 8.0))
    assert seen == [9] * 4, "what has an effect is called as often as it was"


@pytest.mark.parametrize(
    "forward",
    [
        lambda x: x * 2 if float(x.sum()) > 0 else x,
        lambda x: x * 2 if len(x) > 6 else x + 1,
        lambda x: x * (len(x) // 2),
        lambda x: x[:1].squeeze(0).add_(1) + x,
        lambda x: x.numpy().sum() + x,
    ],
    ids=["branches on values", "branches on sizes", "no multiple of the size", "writes into an input", "numpy"],
)
def test_what_a_list_of_steps_cannot_say_is_refused(forward: Forward) -> None:
    with pytest.raises((Unrecordable, RuntimeError)):
        program(forward)


def test_sizes_are_whole_numbers_of_rows_and_selected_ones() -> None:
    sizes = list(SIZES)
    assert _size(tuple(3 * rows - 2 for rows, _ in sizes), sizes) == Size(3, 0, -2)
    assert _size(tuple(rows + 4 * selected for rows, selected in sizes), sizes) == Size(1, 4, 0)
    assert _size(tuple(rows * selected for rows, selected in sizes), sizes) is None
    assert _size((1, 2, 3, 5), [(5, 0), (6, 0), (7, 0), (8, 0)]) is None
