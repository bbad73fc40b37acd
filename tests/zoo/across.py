"""Audits by nodes of another numeric class: bits differ, so sketches are compared against thresholds, and what lies
below them adds up (docs/verification.md, "Slow evidence")."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from faults.computing import matching
from tallystick_model.calibrating.judging import judge as levels_of
from tallystick_model.calibrating.measuring import Measured
from tallystick_model.segments import Segment
from tallystick_model.span import SpanModel
from tallystick_protocol.manifest import Numerics
from tallystick_protocol.sketching.accumulating import Capital, Level, Scores, counts, results_count, scores
from tallystick_protocol.sketching.logits import Apart, compare
from tallystick_protocol.sketching.rows import Sketches, sketch
from tallystick_protocol.sketching.statistic import quiet, rms, squares
from tallystick_protocol.sketching.thresholds import Zone, logits_thresholds, thresholds
from tallystick_protocol.types import WINDOW, Positions
from zoo.audits import Task, serve
from zoo.cheaters import spoilt, walk
from zoo.other_class import Answer, OtherClass

HONEST = "honest"
LENGTH_ACROSS = 3 * WINDOW
"""Positions of a session, of which an audit compares every window."""

BUDGET = 128
"""Audited sessions of one node that are looked at before it counts as never found: their windows are a quarter of those
that the economics promise (`economics.audited_windows`)."""

AUDITORS = 2
"""That take turns, a session each: a client avoids a node that disagrees for good with two others."""

CALIBRATED_ON, CALIBRATED_LENGTH = 26, 160
"""Longer pieces of the same text, which give the levels of slow evidence, as `tallystick calibrate` does."""

RUNS = 200

Windows = list[Any]
"""Of one audited session: for each window what `squares` gave, or an `Apart` where results are compared."""


@dataclass(frozen=True, slots=True)
class Needed:
    """Sessions that were audited until a node was found, and their windows."""

    audits: int
    windows: int


@dataclass(slots=True)
class Seen:
    """audits: of one node, over one span, by auditors of another class. level: what honest windows stay below."""

    model: SpanModel
    level: Level
    audits: list[Windows] = field(default_factory=list)

    @property
    def worst(self) -> float:
        """The largest error of a window as a share of `guilty`."""
        return max(self._share(window) for audit in self.audits for window in audit)

    def _share(self, window: Any) -> float:
        if isinstance(window, Apart):
            limits = logits_thresholds(self.model.manifest)
            return limits.share(window) / limits.guilty
        return rms(window) / thresholds(self.model.manifest, self.model.span).guilty

    def is_found(self, audit: Windows) -> bool:
        """Whether the windows of a session, one after the other, show that it is guilty."""
        if self.model.is_last:
            limits = logits_thresholds(self.model.manifest)
            return any(limits.zone(window) is Zone.GUILTY for window in audit)
        limits_of_rows = thresholds(self.model.manifest, self.model.span)
        return any(limits_of_rows.zone(audit[: at + 1]) is Zone.GUILTY for at in range(len(audit)))

    def scored(self, audit: Windows) -> list[Scores]:
        """What an audit adds to slow evidence."""
        errors = [
            ((w.window, w.quiet), results_count(w)) if isinstance(w, Apart) else ((rms(w), quiet(w)), counts(len(w)))
            for w in audit
        ]
        return [scores(*error, self.level) for error, is_whole in errors if is_whole]

    def audits_needed(self, draw: random.Random, zones: bool = True) -> Needed | None:
        """After how many audits, in some order and perhaps again, it is found; None beyond the budget.

        zones: or is it slow evidence alone that counts?
        """
        windows, pairs = 0, [Capital()] * AUDITORS
        for number in range(BUDGET):
            audit = draw.choice(self.audits)
            windows += len(audit)
            for one in self.scored(audit):
                pairs[number % AUDITORS] = pairs[number % AUDITORS].after(one)
            if all(pair.is_conclusive for pair in pairs) or (zones and self.is_found(audit)):
                return Needed(number + 1, windows)
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
        longer = walk(CALIBRATED_ON, seed + 1, numerics, CALIBRATED_LENGTH)
        walked = walk(count, seed, numerics, LENGTH_ACROSS)
        for (span, right, tasks), (_, _, others) in zip(walked, longer, strict=True):
            level = calibrate(right, others, other.compute(numerics, span, others), draw)
            answers = other.compute(numerics, span, tasks)
            rows = [entered(right, task) for task in tasks]
            for name in (HONEST, *matching(right)):
                model = right if name == HONEST else spoilt(span, name, numerics)
                seen = Seen(model, level)
                for session, task, x, answer in zip(serve(model, tasks), tasks, rows, answers, strict=True):
                    claimed = session.record._outputs
                    seen.audits.append(windows_of(model, task, x, claimed, answer, lambda: draw.randbytes(32)))
                found.setdefault(name, []).append(seen)
            levels = f"{level.rare:.1e}, {level.usual:.1e} and {level.quiet:.1e}"
            told = f"honest at {found[HONEST][-1].worst:.1e} of guilty, levels {levels}"
            say(f"{numerics}, layers {span}, across classes: {told}")
    return found


def calibrate(right: SpanModel, tasks: Sequence[Task], answers: Sequence[Answer], draw: random.Random) -> Level:
    """The levels of a span, from honest nodes of two classes."""
    errors = []
    for session, task, answer in zip(serve(right, tasks), tasks, answers, strict=True):
        found = windows_of(
            right, task, entered(right, task), session.record._outputs, answer, lambda: draw.randbytes(32)
        )
        errors.append([
            (w.window, w.quiet) if isinstance(w, Apart) else (rms(w), quiet(w)) for w in found[right.is_last :]
        ])  # fmt: skip
    return levels_of(Measured(right.span, 1, {"as it is / AVX2": np.array(errors)})).level


@dataclass(frozen=True, slots=True)
class Across:
    """detected: the share of nodes that are found within the budget. audits_to_99: after which 99 of 100 are;
    windows_to_99: in their windows."""

    detected: float
    audits_to_99: int | None
    windows_to_99: int | None


def judge(seen: Sequence[Seen], seed: int, runs: int = RUNS, zones: bool = True) -> Across:
    """A node in one of the spans, drawn at random, audited until it is found; so often."""
    draw = random.Random(seed)
    needed = [draw.choice(seen).audits_needed(draw, zones) for _ in range(runs)]
    found = [one for one in needed if one is not None]
    at = -(-99 * runs // 100) - 1
    if at >= len(found):
        return Across(len(found) / runs, None, None)
    audits, windows = sorted(one.audits for one in found), sorted(one.windows for one in found)
    return Across(len(found) / runs, audits[at], windows[at])
