"""Extractive question answering: the span of a context that answers a question, with its place in characters.

Each window's start and end scores become probabilities over the positions of its context; a span's score is their
product. Long contexts are read in overlapping windows; https://arxiv.org/abs/1810.04805, section 4.2, for the head.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tallystick.routing.candidates import Candidate
from tallystick.tasks.backend import Answers, Backend, TaskAnswers, look_up, merge
from tallystick.tasks.options import checked
from tallystick.tasks.passes import longest, one_pass
from tallystick.tokens import Encoding
from tallystick.verdict import Policy, Verdict
from tallystick_protocol.errors import ConfigError

DEFAULT_LENGTH = 384
DEFAULT_STRIDE = 128


@checked
async def question_answering(
    backend: Backend,
    question: str,
    context: str,
    *,
    model: str = "",
    top_k: int = 1,
    doc_stride: int | None = None,
    max_answer_len: int = 15,
    max_seq_len: int | None = None,
    handle_impossible_answer: bool = False,
    align_to_words: bool = True,
    verify: Policy = "audit",
) -> TaskAnswers:
    """[{"answer", "score", "start", "end"}], the best first: context[start:end] is the answer.

    max_answer_len: tokens. max_seq_len: tokens of a window, question included; doc_stride: tokens that neighbouring
    windows share. handle_impossible_answer: the empty answer, {"answer": "", "start": 0, "end": 0}, competes too.
    align_to_words: an answer begins and ends with whole words. Raises ConfigError.
    """
    served = await look_up(backend, model, ("scores",), "an answer's place")
    if served.manifest.labels != ("start", "end"):
        raise ConfigError(f"{served.manifest.name} is a model for {served.manifest.task}, not for answers")
    if not question or not context or top_k < 1 or max_answer_len < 1:
        raise ConfigError("question and context are not empty, top_k and max_answer_len are at least 1")
    length = min(max_seq_len or DEFAULT_LENGTH, longest(served))
    room = length - len(served.tokens.analyse(question).ids)
    stride = max(min(room // 2, DEFAULT_STRIDE), 0) if doc_stride is None else doc_stride
    found: list[dict[str, Any]] = []
    no_answer = 1.0
    route: list[Candidate] = []
    verdicts: list[Verdict] = []
    for window in served.tokens.windows(question, context, length, stride):
        rows, route, verdict = await one_pass(backend, served, window, None, verify)
        verdicts.append(verdict)
        starts, ends, empty = place_probabilities(window, rows, handle_impossible_answer)
        no_answer = min(no_answer, empty)
        for first, last, score in best_spans(starts, ends, max_answer_len, top_k):
            start, end = _characters(window, first, last, align_to_words)
            found.append({"answer": context[start:end], "score": score, "start": start, "end": end})
    if handle_impossible_answer:
        found.append({"answer": "", "score": no_answer, "start": 0, "end": 0})
    unique: dict[tuple[int, int], dict[str, Any]] = {}
    for result in sorted(found, key=lambda entry: -float(entry["score"])):
        unique.setdefault((result["start"], result["end"]), result)
    return Answers(list(unique.values())[:top_k], route, merge(verdicts))


def place_probabilities(window: Encoding, rows: np.ndarray, empty: bool) -> tuple[np.ndarray, np.ndarray, float]:
    """Probabilities (n,) float64 that the answer starts and ends at each position of the context; those of no answer.

    rows: (n, 2) scores. empty: position 0 stands for "no answer" and competes; it is then taken out of the rest.
    """
    inside = np.array([text == 1 for text in window.texts])
    inside[0] |= empty
    scores = np.where(inside[:, None], rows.astype(np.float64), -np.inf)
    if not inside.any():
        return np.zeros(len(rows)), np.zeros(len(rows)), 1.0
    weights = np.exp(scores - scores.max(axis=0))
    starts, ends = (weights / weights.sum(axis=0)).T.copy()
    if not empty:
        return starts, ends, 0.0
    none = float(starts[0] * ends[0])
    starts[0] = ends[0] = 0.0
    return starts, ends, none


def best_spans(starts: np.ndarray, ends: np.ndarray, longest: int, count: int) -> list[tuple[int, int, float]]:
    """The `count` spans [first, last] of at most `longest` tokens with the largest starts[first] * ends[last]."""
    products = np.triu(np.tril(np.outer(starts, ends), longest - 1)).reshape(-1)
    order = np.argsort(-products, kind="stable")[:count]
    size = len(starts)
    return [(int(i // size), int(i % size), float(products[i])) for i in order if products[i] > 0]


def _characters(window: Encoding, first: int, last: int, whole_words: bool) -> tuple[int, int]:
    """Where tokens [first, last] stand in the context, or the words that they are of."""
    start, end = window.offsets[first][0], window.offsets[last][1]
    if whole_words:
        start = min([start, *(o[0] for o in _word_of(window, first))])
        end = max([end, *(o[1] for o in _word_of(window, last))])
    return start, end


def _word_of(window: Encoding, index: int) -> list[tuple[int, int]]:
    """The offsets of all tokens that are of one word with the token at `index`."""
    word = window.words[index]
    if word is None:
        return []
    places = zip(window.words, window.texts, window.offsets, strict=True)
    return [offset for other, text, offset in places if other == word and text == 1]
