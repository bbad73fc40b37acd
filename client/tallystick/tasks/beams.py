"""Beam search over rows of log-probabilities, choosing as transformers' generate() does. Pure.

At every step the best (ends + 1) * num_beams continuations of all beams are looked at (at least 2 * num_beams): those
among the first num_beams that end become finished sequences, the best num_beams that do not end go on. A finished
sequence scores the sum of its log-probabilities over (number of new tokens) ** length_penalty, as in
https://arxiv.org/abs/1609.08144, section 7, without the constant. Equal scores: the lower beam, then the lower id.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tallystick.tasks.settings import Generation

_OUT = np.float32(-1e9)
"""What is added to a score that must not win; transformers' constant, which matters where scores are compared."""


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A finished sequence: its new ids, and its score with the length penalty."""

    ids: tuple[int, ...]
    score: float


@dataclass(frozen=True, slots=True)
class _Slot:
    ids: tuple[int, ...]
    score: np.float32
    finished: bool


class BeamSearch:
    """The state of a search. Until `done`, give `step` a row for each of the `running` sequences."""

    def __init__(self, prompt: int, settings: Generation, ended: Callable[[Sequence[int]], bool]) -> None:
        """prompt: how many ids come before the new ones. ended: whether new ids end a sequence (ends, stop strings)."""
        beams = settings.num_beams
        self.running: list[tuple[int, ...]] = [()] * beams
        self.parents = list(range(beams))
        self.done = False
        self._scores = np.array([0.0] + [_OUT] * (beams - 1), dtype=np.float32)
        self._slots = [_Slot((), _OUT, False)] * beams
        self._settings = settings
        self._ended = ended
        self._improvable = True
        self._room = settings.max_length - prompt
        self._looked_at = max(2, 1 + len(settings.eos)) * beams

    def step(self, log_probs: np.ndarray) -> None:
        """Go on by one token. log_probs: (num_beams, vocab) float32, processed, of the `running` sequences in order.

        Afterwards `parents[i]` is which of the sequences before running[i] continues.
        """
        beams, vocab = log_probs.shape
        total = (log_probs + self._scores[:, None]).reshape(-1)
        best = _top(total, min(self._looked_at, len(total)))
        scores = total[best]
        parents = (best // vocab).tolist()
        sequences = [(*self.running[p], int(t)) for p, t in zip(parents, best % vocab, strict=True)]
        length = len(sequences[0])
        ends = np.array([length >= self._room or self._ended(ids) for ids in sequences])
        self._collect(sequences, scores, ends, length)
        going_on = scores + ends.astype(np.float32) * _OUT
        chosen = _top(going_on, beams)
        self.running = [sequences[i] for i in chosen]
        self.parents = [parents[i] for i in chosen]
        self._scores = going_on[chosen]
        self._improvable = self._improvable and self._can_improve(length)
        full = self._settings.early_stopping is True and all(slot.finished for slot in self._slots)
        self.done = not self._improvable or full or bool(ends.all())

    def best(self, count: int) -> list[Hypothesis]:
        """The `count` best finished sequences, the best first."""
        return [Hypothesis(slot.ids, float(slot.score)) for slot in self._slots[:count]]

    def _collect(self, sequences: list[tuple[int, ...]], scores: np.ndarray, ends: np.ndarray, length: int) -> None:
        """Let sequences that ended among the first num_beams take the place of worse finished ones."""
        beams = self._settings.num_beams
        counted = ends & (np.arange(len(ends)) < beams)
        final = (scores / np.float32(length**self._settings.length_penalty)).astype(np.float32)
        if self._settings.early_stopping is True and all(slot.finished for slot in self._slots):
            final = final + _OUT
        if not self._improvable:
            final = final + _OUT
        final = final + (~counted).astype(np.float32) * _OUT
        merged = [
            *self._slots,
            *(_Slot(ids, score, bool(end)) for ids, score, end in zip(sequences, final, counted, strict=True)),
        ]
        order = _top(np.array([slot.score for slot in merged], dtype=np.float32), beams)
        self._slots = [merged[i] for i in order]

    def _can_improve(self, length: int) -> bool:
        """Whether the best running sequence could still beat the worst finished one.

        Its score is estimated at the current length, or with early_stopping="never" at the longest one possible.
        """
        settings = self._settings
        longest = settings.early_stopping == "never" and settings.length_penalty > 0.0
        hoped = self._scores[0] / np.float32((self._room if longest else length) ** settings.length_penalty)
        worst = min(slot.score for slot in self._slots)
        return any(hoped > (worst if slot.finished else _OUT) for slot in self._slots)


def _top(scores: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` largest scores, descending; of equal ones the lower index first."""
    if count < len(scores) // 4:  # the cut's own value decides which of its equals are in
        cut = np.partition(scores, len(scores) - count)[len(scores) - count]
        candidates = np.flatnonzero(scores >= cut)
    else:
        candidates = np.arange(len(scores))
    return candidates[np.argsort(-scores[candidates], kind="stable")][:count]
