"""The rules on scores, one by one, against transformers' own processors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as theirs

from tallystick.tasks.processors import log_softmax, process, rules
from tallystick.tasks.settings import Generation
from tallystick_protocol.sampling import Sampling, distribution

VOCAB, EOS, MAX = 40, (2, 5), 24
ENCODER = [7, 8, 9, 7, 30, 31]


def bias(words: list[list[int]]) -> Callable[[int], theirs.LogitsProcessor]:
    return lambda _: theirs.NoBadWordsLogitsProcessor(words, list(EOS))


CASES: dict[str, tuple[dict[str, object], Callable[[int], theirs.LogitsProcessor]]] = {
    "repetition": ({"repetition_penalty": 1.7}, lambda _: theirs.RepetitionPenaltyLogitsProcessor(1.7)),
    "encoder repetition": (
        {"encoder_repetition_penalty": 1.3},
        lambda _: theirs.EncoderRepetitionPenaltyLogitsProcessor(1.3, torch.tensor([ENCODER])),
    ),
    "no repeated pair": ({"no_repeat_ngram_size": 2}, lambda _: theirs.NoRepeatNGramLogitsProcessor(2)),
    "no repeated id": ({"no_repeat_ngram_size": 1}, lambda _: theirs.NoRepeatNGramLogitsProcessor(1)),
    "no repeated triple": ({"no_repeat_ngram_size": 3}, lambda _: theirs.NoRepeatNGramLogitsProcessor(3)),
    "no pair of the encoder's": (
        {"encoder_no_repeat_ngram_size": 2},
        lambda _: theirs.EncoderNoRepeatNGramLogitsProcessor(2, torch.tensor([ENCODER])),
    ),
    "bad words": ({"bad_words": ((3,), (2,), (1, 4), (3, 3, 6))}, bias([[3], [2], [1, 4], [3, 3, 6]])),
    "shortest": ({"min_length": 9}, lambda _: theirs.MinLengthLogitsProcessor(9, list(EOS))),
    "forced start": ({"forced_bos": 11}, lambda _: theirs.ForcedBOSTokenLogitsProcessor(11)),
    "forced end": ({"forced_eos": (5,)}, lambda _: theirs.ForcedEOSTokenLogitsProcessor(MAX, [5])),
    "suppressed": ({"suppress": (1, 2)}, lambda _: theirs.SuppressTokensLogitsProcessor([1, 2])),
    "suppressed first": (
        {"begin_suppress": (4,)},
        lambda prompt: theirs.SuppressTokensAtBeginLogitsProcessor([4], prompt),
    ),
    "no invalid values": ({"remove_invalid_values": True}, lambda _: theirs.InfNanRemoveLogitsProcessor()),
    "renormalised": ({"renormalize_logits": True}, lambda _: theirs.LogitNormalization()),
}


@pytest.mark.parametrize("name", CASES)
def test_a_rule_does_what_transformers_processor_does(name: str) -> None:
    changes, make = CASES[name]
    settings = Generation(eos=EOS, max_length=MAX, **changes)  # type: ignore[arg-type]
    generator = np.random.default_rng(0)
    for trial in range(40):
        length = [1, 2, 8, 9, 10, MAX - 1, int(generator.integers(1, MAX))][trial % 7]
        prompt = min(3, length)
        ids = generator.integers(0, 12, length).tolist()
        scores = generator.normal(size=VOCAB).astype(np.float32) * 4
        if name == "no invalid values":
            scores[:3] = np.nan, np.inf, -np.inf
        found = process(rules(settings, prompt, ENCODER), ids, scores)
        expected = make(prompt)(torch.tensor([ids]), torch.from_numpy(scores.copy())[None])[0].numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_rules_leave_the_row_they_are_given_as_it_was() -> None:
    settings = Generation(eos=EOS, max_length=MAX, repetition_penalty=2.0, min_length=9, suppress=(1,))
    scores = np.ones(VOCAB, dtype=np.float32)
    process(rules(settings, 1), [1, 2, 3], scores)
    assert (scores == 1).all()


def test_log_softmax_is_torchs_and_takes_minus_infinity() -> None:
    scores = np.random.default_rng(1).normal(size=(3, 1000)).astype(np.float32) * 9
    scores[0, :10] = -np.inf
    expected = torch.log_softmax(torch.from_numpy(scores), -1).numpy()
    np.testing.assert_allclose(log_softmax(scores), expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("top_k, top_p, min_p", [(0, 1.0, 0.1), (7, 1.0, 0.0), (0, 0.6, 0.0), (20, 0.9, 0.05)])
def test_what_sampling_leaves_is_what_transformers_warpers_leave(top_k: int, top_p: float, min_p: float) -> None:
    generator = np.random.default_rng(2)
    for _ in range(20):
        scores = torch.from_numpy(generator.normal(size=(1, VOCAB)).astype(np.float32) * 3)
        left = theirs.TemperatureLogitsWarper(0.7)(None, scores)
        if top_k:
            left = theirs.TopKLogitsWarper(top_k)(None, left)
        if top_p < 1:
            left = theirs.TopPLogitsWarper(top_p)(None, left)
        if min_p:
            left = theirs.MinPLogitsWarper(min_p)(None, left)
        expected = np.sort(torch.softmax(left, -1)[0].numpy())[::-1]
        found = distribution(np.sort(scores[0].numpy())[::-1], Sampling(0.7, top_k, top_p, 0, min_p))
        np.testing.assert_allclose(found, expected[: len(found)], atol=1e-6)
        assert (expected[len(found) :] == 0).all()
