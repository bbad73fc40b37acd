"""From errors to a manifest's thresholds, only ever tighter than the protocol's, and to what they are worth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import numpy as np

from tallystick_model.calibrating.measuring import Errors, Measured
from tallystick_protocol.errors import ConfigError
from tallystick_protocol.manifest import Manifest, Margin
from tallystick_protocol.sketching.accumulating import (
    FULL,
    MEANS,
    Capital,
    Level,
    Scores,
    level,
    protocol_level,
    scores,
)
from tallystick_protocol.sketching.thresholds import thresholds
from tallystick_protocol.types import Span

SLACK = 1.25
"""The rare level is so many times the largest error of an honest window, or a power of it."""

USUAL_SLACK, USUAL_PART = 1.1, 0.25
"""The usual level is so many times the one by which windows score this part of what is assumed, on average over all
texts: some of them are worse."""

QUIET_LEAST = 0.125
"""The quiet level is no less than this part of the rare one: that no quiet row of these classes erred says little of
devices that were not measured."""

CLEAR_SLACK = 2.0
LEAST_WINDOWS = 100
"""What one window in a hundred does must have had a chance to show."""

LEAST_LEVEL = 1e-9
"""Below what rounding to fp32 can show."""

RUNS, LONGEST = 200, 400


@dataclass(frozen=True, slots=True)
class Shown:
    """One kind of cheater in one span. lowest, median: errors. windows: after which 99 of 100 are found by slow
    evidence; None for more than LONGEST."""

    lowest: float
    median: float
    windows: int | None


@dataclass(frozen=True, slots=True)
class Judged:
    """One span. windows: distinct ones that honest nodes of two classes were compared over, exact: the share without
    any error; median, worst: their errors; stock: the worst of stock kernels.

    held_out: what windows of a text score on average against levels from all others, averaged over texts.
    """

    span: Span
    level: Level
    windows: int
    exact: float
    median: float
    worst: float
    stock: float
    held_out: Scores
    cheaters: dict[str, Shown]


def judge(measured: Measured, seed: int = 0) -> Judged:
    """The levels of a span, and what they show of cheaters. Raises ConfigError where no levels hold for other texts."""
    honest = np.concatenate(list(measured.honest.values()), axis=1)
    sizes = honest[..., 0]
    windows = sizes.size // measured.challenges
    if len(honest) < 2 or windows < LEAST_WINDOWS:
        raise ConfigError(
            f"layers {measured.span}: {windows} windows of {len(honest)} texts say too little of honest nodes: give two"
            f" texts and {LEAST_WINDOWS} windows at least"
        )
    for power in range(1, 9):
        held_out = _held_out(honest, SLACK**power)
        if all(found <= mean for found, mean in zip(held_out, MEANS, strict=True)):
            break
    else:
        raise ConfigError(f"layers {measured.span}: honest errors differ too much between texts; give more of them")
    found, draw = _levels(honest, SLACK**power), Random(seed)
    return Judged(
        measured.span,
        found,
        windows,
        float((sizes == 0).mean()),
        float(np.median(sizes)),
        float(sizes.max()),
        max((float(errors[..., 0].max()) for errors in measured.stock.values()), default=0.0),
        held_out,
        {name: _shown(errors.reshape(-1, 2), found, draw) for name, errors in measured.cheaters.items()},
    )


def _levels(honest: Errors, factor: float) -> Level:
    """The largest error times the factor, and what windows, and their quiet rows, seldom exceed by much."""
    rare = max(factor * float(honest[..., 0].max()), LEAST_LEVEL)
    usual = _seldom_exceeded(honest[..., 0], rare, MEANS[1])
    quiet = max(_seldom_exceeded(honest[..., 1], rare, MEANS[2]), QUIET_LEAST * rare)
    return Level(_up(rare), _up(usual), _up(quiet))


def _seldom_exceeded(errors: Any, most: float, mean: float) -> float:
    """The level by which windows score no more than USUAL_PART of what is assumed, on average, with its slack."""
    low, high = np.log(LEAST_LEVEL), np.log(most)
    while high - low > 0.01:
        middle = (low + high) / 2
        scored = float(_scores(errors, float(np.exp(middle))).mean())
        low, high = (low, middle) if scored <= USUAL_PART * mean else (middle, high)
    return min(USUAL_SLACK * float(np.exp(high)), most)


def _scores(errors: Any, limit: float) -> Any:
    """`accumulating.scores` by one level, of many windows."""
    with np.errstate(divide="ignore"):
        return np.clip(np.log(errors / limit) / math.log(FULL), 0.0, 1.0)


def _held_out(honest: Errors, factor: float) -> Scores:
    """Mean scores of each text against levels from all others."""
    found = []
    for text in range(len(honest)):
        limits = _levels(np.delete(honest, text, axis=0), factor)
        sizes, quiet = honest[text, :, 0], honest[text, :, 1]
        pairs = (sizes, limits.rare), (sizes, limits.usual), (quiet, limits.quiet)
        found.append([_scores(errors, limit).mean() for errors, limit in pairs])
    rare, usual, quiet = (float(mean) for mean in np.mean(found, axis=0))
    return rare, usual, quiet


def _up(value: float) -> float:
    """Three digits, not less than it was."""
    short = float(f"{value:.2e}")
    return short if short >= value else float(f"{1.005 * value:.2e}")


def _shown(errors: Any, limits: Level, draw: Random) -> Shown:
    windows = [scores(float(error), float(quiet), limits) for error, quiet in errors]
    needed = sorted(_needed(windows, draw) for _ in range(RUNS))
    at = needed[-(-99 * RUNS // 100) - 1]
    sizes = errors[:, 0]
    return Shown(float(sizes.min()), float(np.median(sizes)), at if at <= LONGEST else None)


def _needed(windows: Sequence[Scores], draw: Random) -> int:
    """Windows of one pair, drawn again and again, until it disagrees for good."""
    capital = Capital()
    while not capital.is_conclusive and capital.windows < LONGEST:
        capital = capital.after(draw.choice(windows))
    return capital.windows if capital.is_conclusive else LONGEST + 1


def calibrated(manifest: Manifest, judged: Sequence[Judged]) -> Manifest:
    """The manifest with margins, and with `clear` where that can be less.

    Raises ConfigError naming the spans in which honest nodes err more than the protocol, or the manifest, allows: what
    is tightened is never loosened.
    """
    allowed = {one.span: protocol_level(manifest, one.span) for one in judged}
    loud = [one for one in judged if one.level.rare > allowed[one.span]]
    if loud:
        told = ", ".join(f"{one.span} {one.level.rare:.1e} of {allowed[one.span]:.1e}" for one in loud[:5])
        raise ConfigError(f"honest nodes of other classes err more than the protocol's levels allow: {told}")
    beyond = [one for one in judged if one.level.rare > level(manifest, one.span).rare]
    if beyond:
        told = ", ".join(str(one.span) for one in beyond[:5])
        raise ConfigError(f"the manifest says less than was measured for layers {told}; thresholds are never loosened")
    hidden = [one for one in judged if manifest.output_of(one.span) == "hidden"]
    kept = {(one.start, one.end): one for one in manifest.margins}
    for one in judged:
        start, end = one.span.start, one.span.end
        before = level(manifest, one.span)
        usual, quiet = min(one.level.usual, before.usual), min(one.level.quiet, before.quiet)
        kept[start, end] = Margin(start, end, one.level.rare, usual, quiet)
    clear = manifest.clear
    if hidden:
        noise = CLEAR_SLACK * max(one.worst for one in hidden)
        if manifest.clear is not None and max(one.worst for one in hidden) > manifest.clear:
            raise ConfigError(f"the manifest's clear, {manifest.clear:.1e}, is less than honest nodes err")
        if LEAST_LEVEL < noise < min(thresholds(manifest, one.span).clear for one in hidden):
            clear = float(f"{noise:.3g}")
    return replace(manifest, clear=clear, margins=tuple(kept[span] for span in sorted(kept)))
