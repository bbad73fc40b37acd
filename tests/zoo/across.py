"""Audits by a node of another numeric class: bits differ, so sketches are compared against thresholds."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from faults.computing import matching
from tallystick_model.segments import Segment
from tallystick_model.span import SpanModel
from tallystick_protocol.manifest import Numerics
from tallystick_protocol.sketching.logits import Apart, compare
from tallystick_protocol.sketching.rows import Sketches, sketch
from tallystick_protocol.sketching.statistic import rms, squares
from tallystick_protocol.sketching.thresholds import Zone, logits_thresholds, thresholds
from tallystick_protocol.types import WINDOW, Positions
from zoo.audits import Task, serve
from zoo.cheaters import spoilt, walk
from zoo.other_class import Answer, OtherClass

HONEST = "honest"
BUDGET = 32
"""Audits of one node that are looked at before it counts as never found."""

RUNS = 200
Windows = list[Any]
"""Of one audit: for each window what `squares` gave, or an `Apart` where results are compared."""


@dataclass(slots=True)
class Seen:
    """audits: of one node, over one span, by one auditor of another class. worst: the largest error of a window."""

    model: SpanModel
    audits: list[Windows] = field(default_factory=list)

    @property
    def worst(self) -> float:
        """As a share of `guilty`."""
        return max(self._share(window) for audit in self.audits for window in audit)

    def _share(self, window: Any) -> float:
        if isinstance(window, Apart):
            limits = logits_thresholds(self.model.manifest)
            return limits.share(window) / limits.guilty
        return rms(window) / thresholds(self.model.manifest, self.model.span).guilty

    def is_found(self, audits: Sequence[Windows]) -> bool:
        """Whether so many audits, one after the other, show that it is guilty."""
        windows = [window for audit in audits for window in audit]
        if self.model.is_last:
            limits = logits_thresholds(self.model.manifest)
            return any(limits.zone(window) is Zone.GUILTY for window in windows)
        limits_of_rows = thresholds(self.model.manifest, self.model.span)
        return limits_of_rows.zone(windows) is Zone.GUILTY

    def audits_needed(self, draw: random.Random) -> int | None:
        """After how many audits, in some order and perhaps again, it is found; None beyond the budget."""
        looked: list[Windows] = []
        for _ in range(BUDGET):
            looked.append(draw.choice(self.audits))
            if self.is_found(looked):
                return len(looked)
        return None


def entered(right: SpanModel, task: Task) -> Any:
    """What enters the first layer, (n, width): of token ids their embedding, which is the same in every class."""
    session = serve(right, [Task(task.rows, task.want, len(task))])[0]
    segment = session.segment(task.rows, task.want)
    fresh = Segment(right.new_cache(len(task)), 0, segment.rows)
    return right.rows_between(fresh)[0].numpy()


def windows_of(
    model: SpanModel, task: Task, x: Any, claimed: Sequence[bytes], answer: Answer, challenge: Callable[[], bytes]
) -> Windows:
    """What sketches and results say, window by window. challenge: a new one for each."""
    found: Windows = []
    for first in range(0, len(task), WINDOW):
        at = slice(first, min(first + WINDOW, len(task)))
        mine, theirs = list(claimed[at]), answer.outputs[at]
        if model.is_last:
            found.append(compare(mine, theirs, answer.scales[at], ranked=True))
            continue
        drawn, positions = challenge(), Positions(at.start, at.stop)
        found.append(squares(*(_sketch(drawn, positions, x[at], rows) for rows in (mine, theirs))))
    return found


def _sketch(challenge: bytes, positions: Positions, x: Any, rows: Sequence[bytes]) -> Sketches:
    return sketch(challenge, positions, x, np.frombuffer(b"".join(rows), dtype="<f4").reshape(x.shape))


def measure_across(
    count: int, seed: int, numerics: Numerics, say: Callable[[str], None] = lambda _: None
) -> dict[str, list[Seen]]:
    """For honest nodes and every cheater what an auditor of another class sees in each of three spans."""
    draw, found = random.Random(seed), dict[str, list[Seen]]()
    with OtherClass() as other:
        for span, right, tasks in walk(count, seed, numerics):
            answers = other.compute(numerics, span, tasks)
            rows = [entered(right, task) for task in tasks]
            for name in (HONEST, *matching(right)):
                model = right if name == HONEST else spoilt(span, name, numerics)
                seen = Seen(model)
                for session, task, x, answer in zip(serve(model, tasks), tasks, rows, answers, strict=True):
                    claimed = session.record._outputs
                    seen.audits.append(windows_of(model, task, x, claimed, answer, lambda: draw.randbytes(32)))
                found.setdefault(name, []).append(seen)
            say(f"{numerics}, layers {span}, across classes: honest at {found[HONEST][-1].worst:.1e} of guilty")
    return found


@dataclass(frozen=True, slots=True)
class Across:
    """detected: the share of nodes that are found within the budget. audits_to_99: after which 99 of 100 are."""

    detected: float
    audits_to_99: int | None


def judge(seen: Sequence[Seen], seed: int, runs: int = RUNS) -> Across:
    """A node in one of the spans, drawn at random, audited until it is found; so often."""
    draw = random.Random(seed)
    needed = [draw.choice(seen).audits_needed(draw) for _ in range(runs)]
    counts = sorted(count for count in needed if count is not None)
    at = -(-99 * runs // 100) - 1
    return Across(len(counts) / runs, counts[at] if at < len(counts) else None)
