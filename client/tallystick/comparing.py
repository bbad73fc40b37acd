"""One window recomputed in another numeric class: by sketches, or by the results that the client holds. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tallystick.checks import agree, same_work
from tallystick_protocol.errors import CorruptResult
from tallystick_protocol.manifest import Manifest
from tallystick_protocol.receipts import Receipt
from tallystick_protocol.sketching import accumulating, logits, statistic
from tallystick_protocol.sketching.rows import Sketches
from tallystick_protocol.sketching.thresholds import Zone, logits_thresholds, thresholds


@dataclass(frozen=True, slots=True)
class Work:
    """What a node claims for one window. results: the rows it returned, where its span ends the model; empty ones were
    not wanted."""

    receipt: Receipt
    sketches: Sketches | None = None
    results: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Found:
    """error: against `tolerance`, up to which it is clear. squares: of the window's rows, for later windows; None where
    results were compared. scores: what the window adds to slow evidence; None for too few rows."""

    zone: Zone
    error: float
    tolerance: float
    squares: Any = None
    scores: accumulating.Scores | None = None


def across(claim: Work, answer: Work, manifest: Manifest, top_k: int, earlier: Sequence[Any] = ()) -> Found:
    """Compare a claim with what a node of another class answers to the same work under the same challenge.

    earlier: `squares` of the windows before, of the same two. Raises CorruptResult where the answer contradicts itself.
    """
    mine, theirs = claim.sketches, answer.sketches
    assert mine is not None and theirs is not None and mine.challenge == theirs.challenge
    entered = statistic.input_error(mine, theirs)
    if not entered <= statistic.INPUT_TOLERANCE:  # over the same bytes: one of the two has sketched something else
        return Found(Zone.GUILTY, entered, statistic.INPUT_TOLERANCE)
    span = claim.receipt.span
    if manifest.output_of(span) == "hidden":
        if not statistic.states_its_scale(theirs):
            raise CorruptResult(f"{answer.receipt.node} understates what it added", hop=answer.receipt.node)
        limits, squares = thresholds(manifest, span), statistic.squares(mine, theirs)
        error, level = statistic.rms(squares), accumulating.level(manifest, span)
        whole = accumulating.counts(len(squares))
        scores = accumulating.scores(error, statistic.quiet(squares), level) if whole else None
        return Found(limits.zone([*earlier, squares]), error, limits.clear, squares, scores)
    ranked = manifest.output == "logits" and top_k > 0
    apart = logits.compare(list(claim.results), list(answer.results), theirs.scales, ranked)
    of_results, level = logits_thresholds(manifest), accumulating.level(manifest, span)
    whole = accumulating.results_count(apart)
    scores = accumulating.scores(apart.window, apart.quiet, level) if whole else None
    return Found(of_results.zone(apart), of_results.share(apart) * of_results.row, of_results.row, scores=scores)


def is_same(claim: Work, answer: Work) -> bool:
    """Whether two nodes of one class have signed the same output for the same work."""
    return claim.receipt.numeric_class == answer.receipt.numeric_class and agree(claim.receipt, answer.receipt)


def zone(claim: Work, answer: Work, manifest: Manifest, top_k: int, counts: bool) -> Zone | None:
    """What a third node's answer says of a claim: the same bits are clear; others are guilty where the two are of one
    class, and that `counts`; else sketches say it. None: nothing, for there are none."""
    if is_same(claim, answer):
        return Zone.CLEAR
    if counts and claim.receipt.numeric_class == answer.receipt.numeric_class:
        return Zone.GUILTY
    if claim.sketches is None or answer.sketches is None or not same_work(claim.receipt, answer.receipt):
        return None
    return across(claim, answer, manifest, top_k).zone
