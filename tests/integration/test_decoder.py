"""Decoders on the running network, against the unsharded model: dense rows, crops, forks, and what they cost."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import Running
from tallystick import AsyncClient
from tallystick.decoding import Decoder
from tallystick_protocol.errors import ConfigError
from tallystick_protocol.types import Wei


@pytest.fixture(scope="module")
def whole(running: Running) -> torch.nn.Module:
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
        running.checkpoint, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
    ).eval()
    return model


def logits(whole: torch.nn.Module, ids: list[int]) -> np.ndarray:
    with torch.inference_mode():
        out: np.ndarray = whole(torch.tensor([ids])).logits[0].numpy()
    return out


def some_ids(count: int, seed: int, vocab: int) -> list[int]:
    return random.Random(seed).choices(range(vocab), k=count)


async def check_last(whole: torch.nn.Module, decoder: Decoder, histories: list[list[int]]) -> None:
    """Every beam's last row is what the unsharded model computes of the beam's whole history."""
    for beam, ids in enumerate(histories):
        assert decoder.length(beam) == len(ids)
        row = await decoder.row(len(ids) - 1, beam=beam)
        assert isinstance(row, np.ndarray)
        np.testing.assert_allclose(row, logits(whole, ids)[-1], atol=2e-4)


@pytest.mark.parametrize("verify", ["off", "full"])
async def test_beams_are_fed_cropped_and_forked_and_are_the_whole_model_each_time(
    running: Running, whole: torch.nn.Module, verify: str
) -> None:
    vocab = running.manifest.vocab
    prompt = some_ids(37, 1, vocab)
    histories = [list(prompt) for _ in range(3)]
    async with AsyncClient(running.key, running.net.settings()) as client:
        async with client.decoder(running.id, max_length=100, beams=3, dense=True, verify=verify) as decoder:  # type: ignore[arg-type]
            await decoder.feed(prompt)
            await decoder.reorder([0, 0, 0])
            await check_last(whole, decoder, histories)
            for round_, parents in enumerate([[0, 1, 2], [1, 1, 0], [2, 0, 1], [2, 2, 2], [0, 2, 2]]):
                for beam, ids in enumerate(histories):
                    more = some_ids(1 + (beam + round_) % 3, 100 * round_ + beam, vocab)
                    ids += more
                    await decoder.feed(more, beam=beam)
                await check_last(whole, decoder, histories)
                await decoder.reorder(parents)
                histories = [list(histories[parent]) for parent in parents]
                await check_last(whole, decoder, histories)
            await decoder.crop(39, beam=1)
            del histories[1][39:]
            await decoder.feed([5, 6], beam=1, want="all")
            histories[1] += [5, 6]
            rows = [await decoder.row(at, beam=1) for at in (39, 40)]
            np.testing.assert_allclose(np.stack(rows), logits(whole, histories[1])[-2:], atol=2e-4)  # type: ignore[arg-type]
            await decoder.finish()
            verdict = decoder.verdict
        assert not verdict.accusations and not verdict.replaced
        assert not any(verdict.withheld.values())
        if verify == "full":
            assert verdict.checks and verdict.failed == 0


async def test_a_forked_row_costs_nothing_and_a_cropped_one_is_paid(running: Running) -> None:
    prompt = some_ids(40, 2, running.manifest.vocab)
    async with AsyncClient(running.key, running.net.settings()) as client:
        async with client.decoder(running.id, max_length=64, beams=2, verify="off") as decoder:
            await decoder.feed(prompt)
            await decoder.reorder([0, 0])
            await decoder.feed([1, 2, 3], beam=1)
            await decoder.row(42, beam=1)
            await decoder.crop(41, beam=1)
            await decoder.feed([4], beam=1)
            ids, values = await decoder.row(41, beam=1)
            assert len(ids) == 64 and bool((values[:-1] >= values[1:]).all())
            await decoder.finish()
            route, verdict = decoder.route, decoder.verdict
    computed = 40 + 3 + 1
    for hop in route:
        units = hop.span.units(running.manifest.layers)
        assert verdict.paid[hop.node] == Wei(computed * units * hop.offer.price)


async def test_a_pass_over_a_causal_model_and_what_a_decoder_refuses(running: Running, whole: torch.nn.Module) -> None:
    ids = some_ids(30, 3, running.manifest.vocab)
    async with AsyncClient(running.key, running.net.settings()) as client:
        done = await client.run(running.id, ids, want=[3, 29])
        np.testing.assert_allclose(done.rows, logits(whole, ids)[[3, 29]], atol=2e-4)
        with pytest.raises(ConfigError, match="memory"):
            async with client.decoder(running.id, max_length=8, memory=np.zeros((2, running.manifest.width), "f4")):
                pass
        with pytest.raises(ConfigError, match="beams"):
            client.decoder(running.id, max_length=8, beams=0)
        async with client.decoder(running.id, max_length=8) as decoder:
            with pytest.raises(ConfigError, match="reorder"):
                await decoder.reorder([0, 1])
