"""Changing scores before a token is chosen, in the order and with the meaning of transformers' generate(). Pure.

Each rule takes the ids so far (prompt included) and a row of scores (vocab,) float32, and returns a row. In greedy
decoding and sampling the scores are logits, in beam search log-probabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tallystick.tasks.settings import Generation

Rule = Callable[[Sequence[int], np.ndarray], np.ndarray]
_NEVER = np.float32(-np.inf)


def rules(settings: Generation, prompt: int, encoder_ids: Sequence[int] = ()) -> list[Rule]:
    """The rules that settings name. prompt: ids before the first new one; encoder_ids: what an encoder was given."""
    found: list[Rule] = []
    if settings.encoder_repetition_penalty != 1.0 and encoder_ids:  # a penalty above 1 favours the encoder's ids
        found.append(repetition(1.0 / settings.encoder_repetition_penalty, encoder_ids))
    if settings.repetition_penalty != 1.0:
        found.append(repetition(settings.repetition_penalty))
    if settings.no_repeat_ngram_size:
        found.append(no_repeat_ngram(settings.no_repeat_ngram_size))
    if settings.encoder_no_repeat_ngram_size and encoder_ids:
        found.append(no_repeat_ngram(settings.encoder_no_repeat_ngram_size, encoder_ids))
    if settings.bad_words:
        found.append(bad_words(settings.bad_words, settings.eos))
    if settings.min_length and settings.eos:
        found.append(lambda ids, scores: without(scores, settings.eos) if len(ids) < settings.min_length else scores)
    if settings.forced_bos is not None:
        forced = (settings.forced_bos,)
        found.append(lambda ids, scores: only(scores, forced) if len(ids) == 1 else scores)
    if settings.forced_eos:
        found.append(
            lambda ids, scores: only(scores, settings.forced_eos) if len(ids) == settings.max_length - 1 else scores
        )
    if settings.remove_invalid_values:
        found.append(lambda _, scores: np.nan_to_num(scores, nan=0.0))
    if settings.suppress:
        found.append(lambda _, scores: without(scores, settings.suppress))
    if settings.begin_suppress:
        begin = prompt if prompt > 1 or settings.forced_bos is None else prompt + 1
        found.append(
            lambda ids, scores: without(scores, settings.begin_suppress) if len(ids) == begin else scores
        )
    if settings.renormalize_logits:
        found.append(lambda _, scores: log_softmax(scores))
    return found


def process(rules: list[Rule], ids: Sequence[int], scores: np.ndarray) -> np.ndarray:
    """Apply the rules one after the other."""
    for rule in rules:
        scores = rule(ids, scores)
    return scores


def repetition(penalty: float, of: Sequence[int] | None = None) -> Rule:
    """Scores of ids that occurred (in `of`, or so far) are divided by the penalty, negative ones multiplied.

    CTRL, https://arxiv.org/abs/1909.05858, section 4.1.
    """

    def rule(ids: Sequence[int], scores: np.ndarray) -> np.ndarray:
        seen = np.unique(np.array(ids if of is None else of, dtype=np.int64))
        changed = scores.copy()
        values = changed[seen[seen < len(scores)]]
        changed[seen[seen < len(scores)]] = np.where(values < 0, values * penalty, values / penalty)
        return changed

    return rule


def no_repeat_ngram(size: int, of: Sequence[int] | None = None) -> Rule:
    """No run of `size` ids occurs twice (or, with `of`, occurs in it)."""

    def rule(ids: Sequence[int], scores: np.ndarray) -> np.ndarray:
        if len(ids) + 1 < size:
            return scores
        source = list(ids if of is None else of)
        tail = list(ids[len(ids) + 1 - size :])
        runs = range(len(source) - size + 1)
        return without(scores, [source[i + size - 1] for i in runs if source[i : i + size - 1] == tail])

    return rule


def bad_words(words: Sequence[Sequence[int]], eos: Sequence[int]) -> Rule:
    """A word of one id never comes; a longer one is never completed. A word that is an end alone does not count."""
    counted = [tuple(word) for word in words if word and not (len(word) == 1 and word[0] in eos)]

    def rule(ids: Sequence[int], scores: np.ndarray) -> np.ndarray:
        known = tuple(ids)
        banned = [word[-1] for word in counted if len(word) == 1 or known[-(len(word) - 1) :] == word[:-1]]
        return without(scores, banned)

    return rule


def without(scores: np.ndarray, ids: Sequence[int]) -> np.ndarray:
    """The scores with some ids impossible; ids beyond the vocabulary do not matter."""
    changed = scores.copy()
    changed[[token for token in ids if token < len(scores)]] = _NEVER
    return changed


def only(scores: np.ndarray, ids: Sequence[int]) -> np.ndarray:
    """Scores that leave nothing but some ids."""
    changed = np.full_like(scores, _NEVER)
    changed[list(ids)] = 0.0
    return changed


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """Logarithms of the softmax over the last axis, float32."""
    wide = scores.astype(np.float64)
    top = wide.max(axis=-1, keepdims=True)
    shifted = wide - np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)), dtype=np.float32)
