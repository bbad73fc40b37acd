"""Generation by the tasks equals transformers' generate() on the same model, token for token."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from harness import task_checkpoints as checkpoints
from harness.local_backend import LocalBackend, manifest_of
from tallystick.tasks.backend import look_up
from tallystick.tasks.decoding import Order, generate
from tallystick.tasks.settings import settle
from tallystick.tasks.text2text import encode_decode
from tallystick_protocol.errors import ConfigError, ContextLengthExceeded, CorruptResult

BEAMS: dict[str, dict[str, Any]] = {
    "plain": {"num_beams": 4, "max_new_tokens": 12},
    "two, short ones preferred": {"num_beams": 2, "max_new_tokens": 12, "length_penalty": -0.7},
    "long ones preferred": {"num_beams": 5, "max_new_tokens": 12, "length_penalty": 2.0},
    "no penalty, never early": {"num_beams": 3, "max_new_tokens": 12, "length_penalty": 0.0, "early_stopping": "never"},
    "early": {"num_beams": 4, "max_new_tokens": 12, "early_stopping": True},
    "all returned": {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 10},
    "rules": {
        "num_beams": 4, "max_new_tokens": 12, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 4,
        "bad_words_ids": [[7], [9, 11]], "suppress_tokens": [20, 21],
    },
    "never early, long": {"num_beams": 3, "max_new_tokens": 10, "length_penalty": 1.5, "early_stopping": "never"},
    "many ends": {"num_beams": 3, "max_new_tokens": 12, "eos_token_id": [2, 30, 31, 32, 33, 34, 35, 36, 37]},
}  # fmt: skip
GREEDY: dict[str, dict[str, Any]] = {
    "plain": {"max_new_tokens": 16},
    "penalised": {"max_new_tokens": 16, "repetition_penalty": 1.4},
    "no pair twice": {"max_new_tokens": 16, "no_repeat_ngram_size": 2},
    "not short": {"max_new_tokens": 16, "min_new_tokens": 10, "eos_token_id": [2, 30, 31, 32, 33]},
    "forced end": {"max_new_tokens": 6, "forced_eos_token_id": 2, "begin_suppress_tokens": [40, 41, 42, 43]},
}


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> LocalBackend:
    folder = checkpoints.llama(tmp_path_factory.mktemp("llama"), seed=3)
    model = checkpoints.whole(folder, "AutoModelForCausalLM")
    return LocalBackend(model, folder, manifest_of(model, folder, "text-generation", "logits"))


@pytest.fixture(scope="module")
def translator(tmp_path_factory: pytest.TempPathFactory) -> LocalBackend:
    folder = checkpoints.marian(tmp_path_factory.mktemp("marian"), seed=5)
    model = checkpoints.whole(folder, "AutoModelForSeq2SeqLM")
    return LocalBackend(model, folder, manifest_of(model, folder, "text2text-generation", "logits"))


def prompts(count: int, vocab: int, seed: int) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(4, vocab, generator.integers(2, 9)).tolist() for _ in range(count)]


def their_sequences(model: Any, prompt: list[int], settings: dict[str, Any]) -> list[list[int]]:
    """What transformers generates, new ids only."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **{"do_sample": False, **settings})
    start = 1 if model.config.is_encoder_decoder else len(prompt)
    return [row[start:].tolist() for row in out]


def assert_same(ours: list[tuple[int, ...]], theirs: list[list[int]]) -> None:
    """Equal ids; transformers fills shorter ones of several sequences up, with <pad> or </s>."""
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert list(one) == other[: len(one)]
        assert all(token in (0, 2) for token in other[len(one) :])


async def our_sequences(backend: LocalBackend, prompt: list[int], settings: dict[str, Any]) -> list[tuple[int, ...]]:
    served = await look_up(backend, "", ("logits",), "text")
    if backend.manifest.encoder_layers:
        found, _, _ = await encode_decode(backend, served, prompt, "off", None, dict(settings))
    else:
        order = Order(prompt, settle(backend.manifest, len(prompt), **settings), encoder_ids=tuple(prompt))
        found, _, _ = await generate(backend, served, order, "off")
    return [continuation.ids for continuation in found]


@pytest.mark.parametrize("name", BEAMS)
async def test_beam_search_is_transformers(causal: LocalBackend, name: str) -> None:
    for prompt in prompts(4, causal.manifest.vocab, seed=len(name)):
        ours = await our_sequences(causal, prompt, BEAMS[name])
        assert_same(ours, their_sequences(causal.whole, prompt, BEAMS[name]))


@pytest.mark.nightly
@pytest.mark.parametrize("name, seed", list(product(BEAMS, range(2))))
async def test_beam_search_is_transformers_over_many_prompts(causal: LocalBackend, name: str, seed: int) -> None:
    for prompt in prompts(20, causal.manifest.vocab, seed=1000 + seed):
        ours = await our_sequences(causal, prompt, BEAMS[name])
        assert_same(ours, their_sequences(causal.whole, prompt, BEAMS[name]))


@pytest.mark.parametrize("name", GREEDY)
async def test_greedy_is_transformers(causal: LocalBackend, name: str) -> None:
    for prompt in prompts(4, causal.manifest.vocab, seed=50 + len(name)):
        ours = await our_sequences(causal, prompt, GREEDY[name])
        assert_same(ours, their_sequences(causal.whole, prompt, GREEDY[name]))


@pytest.mark.parametrize(
    "settings",
    [{}, {"num_beams": 1}, {"no_repeat_ngram_size": 2, "num_beams": 5},
     {"num_beams": 3, "num_return_sequences": 2, "early_stopping": True, "max_length": 12},
     {"forced_bos_token_id": 50, "length_penalty": 0.8}, {"encoder_no_repeat_ngram_size": 2, "max_new_tokens": 9}],
    ids=lambda settings: ", ".join(settings) or "the checkpoint's own",
)  # fmt: skip
async def test_an_encoder_decoder_generates_as_in_transformers(
    translator: LocalBackend, settings: dict[str, Any]
) -> None:
    """Its own settings: four beams, a word that never comes, an end that is forced at the longest length."""
    for prompt in prompts(4, translator.manifest.vocab, seed=9):
        ours = await our_sequences(translator, prompt, settings)
        assert_same(ours, their_sequences(translator.whole, prompt, settings))


async def test_a_generation_begins_anew_when_a_cheater_was_caught(causal: LocalBackend) -> None:
    prompt, settings = prompts(1, causal.manifest.vocab, 1)[0], BEAMS["plain"]
    honest = await our_sequences(causal, prompt, settings)
    causal.asked, causal.catch_at = 0, {1, 9, 30}
    assert await our_sequences(causal, prompt, settings) == honest
    assert not causal.catch_at, "every fault was injected"


async def test_cheaters_without_end_are_an_error(causal: LocalBackend) -> None:
    causal.asked, causal.catch_at = 0, set(range(1, 100))
    with pytest.raises(CorruptResult, match="in a row"):
        await our_sequences(causal, [5, 6], {"max_new_tokens": 3})
    causal.catch_at = set()


async def test_sampling_with_a_seed_is_repeatable_and_stays_among_the_likeliest(causal: LocalBackend) -> None:
    settings = {"do_sample": True, "temperature": 0.8, "top_k": 5, "seed": 11, "max_new_tokens": 12}
    first = await our_sequences(causal, [5, 6, 7], settings)
    assert await our_sequences(causal, [5, 6, 7], settings) == first
    assert await our_sequences(causal, [5, 6, 7], settings | {"seed": 12}) != first
    ids = [5, 6, 7, *first[0]]
    with torch.inference_mode():
        rows = causal.whole(torch.tensor([ids])).logits[0]
    for position, token in enumerate(first[0]):
        assert token in rows[2 + position].topk(5).indices.tolist()


async def test_sampling_from_the_largest_logits_is_sampling_from_whole_rows(causal: LocalBackend) -> None:
    narrow = {"do_sample": True, "temperature": 1.3, "top_k": 30, "top_p": 0.9, "seed": 4, "max_new_tokens": 12}
    wide = narrow | {"suppress_tokens": [199]}  # a rule takes whole rows
    order = Order([5, 6], settle(causal.manifest, 2, **narrow))
    assert not order.dense and Order([5, 6], settle(causal.manifest, 2, **wide)).dense
    assert await our_sequences(causal, [5, 6], narrow) == await our_sequences(causal, [5, 6], wide)


@pytest.mark.parametrize(
    "settings, what",
    [({"num_beams": 0}, "num_beams"), ({"num_beams": 2, "do_sample": True}, "beam search with sampling"),
     ({"num_return_sequences": 2}, "num_return_sequences"), ({"lenght_penalty": 1.0}, "unknown settings"),
     ({"max_new_tokens": 0}, "max_new_tokens"), ({"repetition_penalty": math.nan}, "repetition_penalty"),
     ({"early_stopping": "soon"}, "early_stopping"), ({"do_sample": True, "temperature": 0}, "temperature")],
    ids=str,
)  # fmt: skip
def test_settings_out_of_range_are_named(causal: LocalBackend, settings: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        settle(causal.manifest, 4, **settings)


async def test_more_than_the_models_positions_is_refused_before_anything_is_sent(causal: LocalBackend) -> None:
    with pytest.raises(ContextLengthExceeded, match="256"):
        await our_sequences(causal, [5] * 250, {"max_new_tokens": 7})
