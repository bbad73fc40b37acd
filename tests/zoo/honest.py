"""Audits of honest nodes, in every way in which honest nodes differ: nobody may be accused."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from tallystick_model.canonical.cache import KvCache
from tallystick_model.parts import part_of
from tallystick_model.span import SpanModel
from tallystick_protocol.manifest import Numerics
from tallystick_protocol.types import WINDOW, Span
from zoo.audits import AtNode, Task, audit, differs, fill, go_on, outputs, serve, step
from zoo.models import TINY, tiny

COMPANY = 24
"""Sessions of a batch; between one and all of them share forwards."""

LENGTHS = (5, 72)
NUMERICS: tuple[Numerics, ...] = ("fp32", "bf16w")

Way = Callable[[SpanModel, Sequence[Task], random.Random], list[AtNode]]


def sessions_for(model: SpanModel, tasks: Sequence[Task]) -> list[AtNode]:
    return [AtNode(model, f"hop {number}", len(task)) for number, task in enumerate(tasks)]


def as_served(model: SpanModel, tasks: Sequence[Task], _: random.Random) -> list[AtNode]:
    """The prompt, then a row at a time."""
    return serve(model, tasks)


def in_chunks(model: SpanModel, tasks: Sequence[Task], draw: random.Random) -> list[AtNode]:
    """All in equal chunks: ones, sevens, windows, whatever."""
    sessions = sessions_for(model, tasks)
    go_on(sessions, tasks, draw.choice((1, 2, 3, 7, 31, WINDOW, 33)))
    return sessions


def in_company(model: SpanModel, tasks: Sequence[Task], draw: random.Random) -> list[AtNode]:
    """In every forward some of the sessions, each with some of its rows."""
    sessions = sessions_for(model, tasks)
    while waiting := [pair for pair in zip(sessions, tasks, strict=True) if pair[0].position < len(pair[1])]:
        chosen = draw.sample(waiting, draw.randint(1, len(waiting)))
        parts = [(s, task, slice(s.position, s.position + draw.choice((1, 1, 2, 5, 17)))) for s, task in chosen]
        step([(s, task.rows[part], task.want[part]) for s, task, part in parts])
    return sessions


def two_threads(model: SpanModel, tasks: Sequence[Task], draw: random.Random) -> list[AtNode]:
    """As in company, on two of torch's threads; fewer sessions, for threads wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        return in_company(model, tasks[: len(tasks) // 3], draw)
    finally:
        torch.set_num_threads(before)


def crop_and_go_on(model: SpanModel, tasks: Sequence[Task], draw: random.Random) -> list[AtNode]:
    """Drafts that were wrong are computed and taken back on the way."""
    sessions = sessions_for(model, tasks)
    for session, task in zip(sessions, tasks, strict=True):
        while session.position < len(task):
            at = session.position
            if at and at + 1 < len(task) and draw.random() < 0.5:
                drafts = list(reversed(task.rows[at + 1 :]))[: draw.randint(1, 7)]
                step([(session, drafts, [True] * len(drafts))])
                session.crop(at)
            part = slice(at, at + draw.randint(1, 20))
            step([(session, task.rows[part], task.want[part])])
    return sessions


def resumed(model: SpanModel, tasks: Sequence[Task], draw: random.Random) -> list[AtNode]:
    """Rows of an earlier session are taken over (FORK), the rest is computed row by row."""
    earlier, sessions = serve(model, tasks, "earlier"), sessions_for(model, tasks)
    for session, before, task in zip(sessions, earlier, tasks, strict=True):
        shared = draw.randint(1, len(task) - 1)
        assert isinstance(session.cache, KvCache) and isinstance(before.cache, KvCache)
        session.cache.take(before.cache, 0, shared)
        session.record.take(before.record, 0, shared)
    go_on(sessions, tasks, 1)
    return sessions


def stood_in(model: SpanModel, tasks: Sequence[Task], draw: random.Random) -> list[AtNode]:
    """A stand-in is filled with what there is when it comes, and goes on."""
    sessions = sessions_for(model, tasks)
    for session, task in zip(sessions, tasks, strict=True):
        fill([session], [task], draw.randint(1, len(task) - 1))
    go_on(sessions, tasks, 1)
    return sessions


WAYS: dict[str, Way] = {
    "as served": as_served,
    "other chunks": in_chunks,
    "company": in_company,
    "two threads": two_threads,
    "crop and go on": crop_and_go_on,
    "resumed": resumed,
    "stand-in": stood_in,
}


@dataclass(slots=True)
class Tally:
    """audits: session-spans that were recomputed, by way. accused: those that differed, in words."""

    audits: Counter[str] = field(default_factory=Counter)
    windows: int = 0
    accused: list[str] = field(default_factory=list)


class Nodes:
    """Spans of the tiny model: alone, as parts of the whole, with and without plans, with joined products."""

    def __init__(self) -> None:
        self._whole: dict[tuple[Numerics, str], SpanModel] = {}
        self._alone: dict[tuple[Numerics, Span, str], SpanModel] = {}

    def get(self, numerics: Numerics, span: Span, kind: str) -> SpanModel:
        model = tiny(numerics)
        if kind == "part":
            whole = self._whole.get((numerics, kind))
            if whole is None:
                whole = self._whole[numerics, kind] = model.load(Span(0, model.manifest.layers))
            return whole if span == whole.span else part_of(whole, span)
        found = self._alone.get((numerics, span, kind))
        if found is None:
            found = self._alone[numerics, span, kind] = model.load(span)
            if kind != "plain":
                assert found.prepare()
            if kind == "joined":
                for join in found.joins():
                    join()
        return found


KINDS = ("plain", "planned", "joined", "part")


def texts(draw: random.Random, count: int, vocab: int) -> list[Task]:
    """Random ids."""
    found = []
    for _ in range(count):
        length = draw.randint(*LENGTHS)
        prompt = draw.randint(1, length)
        ids = [draw.randrange(vocab).to_bytes(4, "little") for _ in range(length)]
        found.append(Task(ids, [at >= prompt - 1 for at in range(length)], prompt))
    return found


def spans(draw: random.Random, layers: int) -> list[Span]:
    """A way to cut a model."""
    cuts = sorted(draw.sample(range(1, layers), draw.randint(0, layers - 1)))
    return [Span(a, b) for a, b in zip([0, *cuts], [*cuts, layers], strict=True)]


def honest_audits(number: int, seed: int = 0) -> Tally:
    """At least so many audits of honest nodes by honest nodes."""
    draw, tally, nodes = random.Random(seed), Tally(), Nodes()
    while tally.audits.total() < number:
        numerics = draw.choice(NUMERICS)
        tasks = texts(draw, COMPANY, TINY.vocab_size)
        for span in spans(draw, TINY.num_hidden_layers):
            right = nodes.get(numerics, span, draw.choice(KINDS))
            done = serve(right, tasks, "auditor")
            answers = audit(right, tasks)
            for way in WAYS:
                kind = draw.choice(KINDS)
                hops = WAYS[way](nodes.get(numerics, span, kind), tasks, draw)
                for index, (hop, answer) in enumerate(zip(hops, answers, strict=False)):
                    claims = hop.receipts()
                    tally.audits[way] += 1
                    tally.windows += len(claims)
                    if (window := differs(claims, answer)) is not None:
                        tally.accused.append(f"{way}, {kind}, {numerics}, {span}, text {index}, window {window}")
            tasks = [outputs(session, task) for session, task in zip(done, tasks, strict=True)]
    return tally
