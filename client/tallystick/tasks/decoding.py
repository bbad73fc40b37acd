"""Generating with a decoder on the network: greedy, sampled or by beams; begun anew when a cheater was caught."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from tallystick.routing.candidates import Candidate
from tallystick.session.repair import RolledBack
from tallystick.tasks.backend import Backend, Decoder, Row, Served, check_length, check_rows, merge
from tallystick.tasks.beams import BeamSearch
from tallystick.tasks.processors import Rule, log_softmax, process, rules
from tallystick.tasks.settings import Generation
from tallystick.verdict import Policy, Verdict
from tallystick_protocol.errors import CorruptResult
from tallystick_protocol.sampling import draw

MAX_RESTARTS = 8
TOP_ROWS = 64
"""How many logits of a row come back when not all are asked for: sampling among more takes whole rows."""


@dataclass(frozen=True, slots=True)
class Scored:
    """A token's log-probability in the model's own row, before any rule, and the likeliest tokens there."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Continuation:
    """New ids, ends included. stopped: by an end or a stop string, not for its length. score: of a beam.

    tokens, prefill: what was asked for with `logprobs`.
    """

    ids: tuple[int, ...]
    stopped: bool
    score: float | None = None
    tokens: tuple[Scored, ...] = ()
    prefill: tuple[Scored, ...] = ()


@dataclass(frozen=True, slots=True)
class Order:
    """What to generate. ended: whether new ids end a sequence besides its ends (stop strings).

    logprobs: none (None), or of each token and of this many likeliest ones. prefill: of the prompt's tokens, too.
    """

    prompt: list[int]
    settings: Generation
    memory: np.ndarray | None = None
    encoder_ids: tuple[int, ...] = ()
    ended: Callable[[Sequence[int]], bool] = field(default=lambda _: False)
    logprobs: int | None = None
    prefill: bool = False

    @property
    def dense(self) -> bool:
        settings = self.settings
        sampled_widely = settings.sampling.temperature > 0 and not 0 < settings.sampling.top_k <= TOP_ROWS
        return settings.num_beams > 1 or settings.processes or self.logprobs is not None or sampled_widely

    def is_end(self, ids: Sequence[int]) -> bool:
        return ids[-1] in self.settings.eos or self.ended(ids)


async def generate(
    backend: Backend, served: Served, order: Order, verify: Policy
) -> tuple[list[Continuation], list[Candidate], Verdict]:
    """The continuations (one, or num_return_sequences), the route and the verdict.

    A session in which a cheater was caught is begun anew, MAX_RESTARTS times at most. Raises CorruptResult beyond
    that, ContextLengthExceeded, and what opening a session raises.
    """
    check_length(served.manifest, order.settings.max_length)
    verdicts: list[Verdict] = []
    for _ in range(MAX_RESTARTS):
        opened = backend.decoder(
            served.id,
            max_length=order.settings.max_length,
            beams=order.settings.num_beams,
            dense=order.dense,
            memory=order.memory,
            verify=verify,
        )
        async with opened as decoder:
            verdicts.append(decoder.verdict)
            try:
                if order.settings.num_beams > 1:
                    found = await _search(decoder, order)
                else:
                    found = [await _follow(decoder, order)]
                await decoder.finish()
            except RolledBack:
                continue
            route = list(decoder.route)
        return found, route, merge(verdicts)  # sessions tell what was paid when they close
    raise CorruptResult(f"{MAX_RESTARTS} generations in a row met a cheater; try later, or with other nodes")


async def _follow(decoder: Decoder, order: Order) -> Continuation:
    """One sequence, token by token."""
    settings, prompt = order.settings, order.prompt
    vocab = decoder.manifest.vocab
    applied = rules(settings, len(prompt), order.encoder_ids)
    ids: list[int] = []
    told: list[Scored] = []
    await decoder.feed(prompt, want="all" if order.prefill else "last")
    prefill = await _told_of_prompt(decoder, order) if order.prefill else ()
    while True:
        row = await decoder.row(len(prompt) + len(ids) - 1)
        token = _choose(row, applied, prompt + ids, settings, vocab)
        ids.append(token)
        if order.logprobs is not None:
            told.append(_score(_dense(row, vocab), token, order.logprobs))
        stopped = order.is_end(ids)
        if stopped or len(prompt) + len(ids) >= settings.max_length:
            return Continuation(tuple(ids), stopped, None, tuple(told), prefill)
        await decoder.feed([token])


def _choose(row: Row, applied: list[Rule], ids: list[int], settings: Generation, vocab: int) -> int:
    if isinstance(row, tuple):
        return draw(row[0], row[1], settings.sampling, len(ids))
    scores = process(applied, ids, _dense(row, vocab))
    if settings.sampling.temperature == 0.0:
        return int(scores.argmax())
    order = np.argsort(-scores, kind="stable")[: settings.sampling.top_k or None]
    return draw(order, scores[order], settings.sampling, len(ids))


async def _told_of_prompt(decoder: Decoder, order: Order) -> tuple[Scored, ...]:
    """The prompt's tokens, each with its log-probability after those before it; of the first nothing is known."""
    told = [Scored(order.prompt[0], float("nan"))]
    for position, token in enumerate(order.prompt[1:]):
        row = _dense(await decoder.row(position), decoder.manifest.vocab)
        told.append(_score(row, token, order.logprobs or 0))
    return tuple(told)


async def _search(decoder: Decoder, order: Order) -> list[Continuation]:
    """Beam search: one session a beam, forked from the first after the prompt."""
    settings, prompt, beams = order.settings, order.prompt, order.settings.num_beams
    vocab = decoder.manifest.vocab
    applied = rules(settings, len(prompt), order.encoder_ids)
    search = BeamSearch(len(prompt), settings, order.is_end)
    await decoder.feed(prompt)
    rows = [_dense(await decoder.row(len(prompt) - 1), vocab)] * beams
    parents = [0] * beams
    while True:
        log_probs = [
            process(applied, [*prompt, *ids], log_softmax(row)) for ids, row in zip(search.running, rows, strict=True)
        ]
        search.step(np.stack(log_probs))
        if search.done:
            best = search.best(settings.num_return_sequences)
            return [Continuation(found.ids, bool(found.ids) and order.is_end(found.ids), found.score) for found in best]
        parents = [parents[p] for p in search.parents]  # before the first fork everything is beam 0
        if parents != list(range(beams)):
            await decoder.reorder(parents)
        parents = list(range(beams))
        for beam, ids in enumerate(search.running):
            await decoder.feed([ids[-1]], beam=beam)
        last = len(prompt) + len(search.running[0]) - 1
        rows = [_dense(await decoder.row(last, beam=beam), vocab) for beam in range(beams)]


def _dense(row: Row, vocab: int) -> np.ndarray:
    if isinstance(row, tuple):
        raise CorruptResult("the largest logits came where all were asked for")
    dense: np.ndarray = check_rows(row[None], (1, vocab))[0]
    return dense


def _score(row: np.ndarray, token: int, top: int) -> Scored:
    logprobs = log_softmax(row)
    likeliest = np.argsort(-row, kind="stable")[:top]
    return Scored(token, float(logprobs[token]), tuple((int(i), float(logprobs[i])) for i in likeliest))
