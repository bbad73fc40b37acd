"""Attention tiles: what they compute, against plain formulas in fp64, and that a row's bits are its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import masking_utils

from tallystick_model.canonical.attention import Batch
from tallystick_model.canonical.masks import Mask, recognise
from tallystick_model.canonical.tiles import R, Scores, attend

SHAPES = [(6, 2, 12, 12), (8, 1, 64, 64), (4, 4, 7, 7), (2, 2, 48, 32), (1, 1, 16, 16)]
"""heads, groups, key_dim, value_dim"""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


def drawn(shape: tuple[int, int, int, int], keys: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    heads, groups, key_dim, value_dim = shape
    query, held = torch.randn(1, heads, R, key_dim), torch.randn(1, groups, keys, key_dim + value_dim)
    return query, held[..., :key_dim].contiguous(), held[..., key_dim:].contiguous()


def forms(heads: int) -> list[Scores]:
    sinks = torch.randn(heads)
    return [Scores(0.3), Scores(0.3, softcap=2.0), Scores(sinks=sinks), Scores(0.2, 30.0, sinks)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_tile_is_softmax_of_capped_scores_with_sinks(shape: tuple[int, int, int, int]) -> None:
    query, keys, values = drawn(shape, 20)
    mask = torch.zeros(R, 20)
    mask[:, -R:] = torch.full((R, R), float("-inf")).triu(1)
    for form in forms(shape[0]):
        again = shape[0] // shape[1]
        scores = query.double() @ keys.double().repeat_interleave(again, 1).transpose(2, 3)
        scores = scores * (form.scale or shape[2] ** -0.5)
        if form.softcap is not None:
            scores = (scores / form.softcap).tanh() * form.softcap
        weights = (scores + mask).exp()
        total = weights.sum(-1, keepdim=True)
        if form.sinks is not None:
            total = total + form.sinks.double().exp().view(1, -1, 1, 1)
        expected = weights / total @ values.double().repeat_interleave(again, 1)
        assert (attend(query, keys, values, mask, form) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_rows_bits_do_not_depend_on_the_other_rows_the_capacity_or_the_threads(
    shape: tuple[int, int, int, int],
) -> None:
    for count in (4, 20, 100, 600):
        query, keys, values = drawn(shape, count)
        for form in forms(shape[0]):
            torch.set_num_threads(1)
            expected = attend(query, keys, values, torch.zeros(R, count), form)
            for threads, capacity in ((1, 1024), (3, 608), (4, 640)):
                torch.set_num_threads(threads)
                room = [torch.zeros(1, held.shape[1], capacity, held.shape[3]) for held in (keys, values)]
                room[0][:, :, :count], room[1][:, :, :count] = keys, values
                other = torch.randn_like(query)
                other[:, :, 1] = query[:, :, 1]
                found = attend(other, room[0][:, :, :count], room[1][:, :, :count], torch.zeros(R, count), form)
                assert torch.equal(found[:, :, 1], expected[:, :, 1]), (count, threads)


@pytest.mark.parametrize(
    ("rule", "mask"),
    [
        (masking_utils.causal_mask_function, Mask(True)),
        (masking_utils.bidirectional_mask_function, Mask(False)),
        (masking_utils.sliding_window_causal_mask_function(37), Mask(True, window=37)),
        (masking_utils.sliding_window_bidirectional_mask_function(16), Mask(False, window=17)),
        (masking_utils.chunked_causal_mask_function(48, torch.zeros(1, dtype=torch.long)), Mask(True, chunk=48)),
    ],
    ids=["causal", "open", "window", "two-sided window", "chunks"],
)
def test_masks_are_read_off_the_rules_of_transformers(rule: object, mask: Mask) -> None:
    assert recognise(rule) == mask  # type: ignore[arg-type]
    positions = torch.arange(200)
    queries, keys = positions[:, None], positions[None]
    zero = torch.zeros(1, 1, dtype=torch.long)
    expected = torch.as_tensor(rule(zero, zero, queries, keys)).expand(200, 200)  # type: ignore[operator]
    assert torch.equal(mask.sees(positions, positions), expected.bool())
    if mask.causal:
        firsts = [int(row.long().argmax()) for row in expected]
        assert [mask.first_key(query) for query in range(200)] == firsts


def test_a_mask_with_holes_is_not_read() -> None:
    assert recognise(lambda batch, head, query, key: (query - key) % 3 == 0) is None


def test_a_tiles_mask_leaves_no_row_without_a_key() -> None:
    mask = Batch().mask(Mask(False, window=2), 8, 0, 9)
    assert mask.shape == (R, 9)
    assert bool((mask == 0).any(1).all())
    assert mask[0].tolist() == [float("-inf")] * 7 + [0.0, 0.0]
