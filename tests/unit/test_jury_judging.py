"""A juror's vote follows from what it found: every zone, and both sides of every bound."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from harness import samples
from tallystick_node.jury.judging import GROSS, SPREAD, Finding, judge, needs_spread
from tallystick_node.jury.measuring import dense_error, logits_error, rows_error
from tallystick_protocol.chain.court import Vote
from tallystick_protocol.sketching.thresholds import logits_thresholds, thresholds
from tallystick_protocol.types import Span

OWN = Finding(same_class=True, clear=1e-5, guilty=1e-3)
OTHER = replace(OWN, same_class=False)
ABOVE = math.nextafter(1e-3, 1)


@pytest.mark.parametrize(
    ("finding", "vote"),
    [
        (replace(OWN, equal=True, error=0.0), Vote.CLEAR),
        (replace(OWN, error=ABOVE), Vote.GUILTY),
        (replace(OWN, error=math.inf), Vote.GUILTY),
        (replace(OWN, error=1e-3), Vote.FAULT),
        (replace(OWN, error=1e-9), Vote.FAULT),
        (OWN, Vote.FAULT),
        (replace(OTHER, equal=True, error=0.0), Vote.CLEAR),
        (replace(OTHER, error=9e-6), Vote.CLEAR),
        (replace(OTHER, error=1e-5), Vote.ABSTAIN),
        (replace(OTHER, error=GROSS * 1e-3, spread=0.0), Vote.ABSTAIN),
        (replace(OTHER, error=0.04, spread=SPREAD * 0.04), Vote.GUILTY),
        (replace(OTHER, error=0.04, spread=SPREAD * 0.0401), Vote.ABSTAIN),
        (replace(OTHER, error=0.04), Vote.ABSTAIN),
        (replace(OTHER, error=math.inf, spread=1e-6), Vote.GUILTY),
        (OTHER, Vote.ABSTAIN),
        (Finding("unreadable"), Vote.UNREADABLE),
        (Finding("unable", same_class=True, equal=True), Vote.ABSTAIN),
    ],
)
def test_the_vote_follows_from_the_finding(finding: Finding, vote: Vote) -> None:
    assert judge(finding) == vote
    assert judge(Finding.from_json(finding.to_json())) == vote
    assert Finding.from_json(finding.to_json()) == finding


def test_a_second_kernel_has_a_say_only_before_another_class_is_convicted() -> None:
    assert needs_spread(replace(OTHER, error=0.04))
    assert not needs_spread(replace(OTHER, error=0.02))
    assert not needs_spread(replace(OWN, error=0.04))
    assert not needs_spread(OTHER)


def test_an_error_is_measured_against_what_the_span_adds() -> None:
    x = np.full((2, 4), 100.0)
    own = x + 1.0
    assert rows_error(own, own, x) == 0.0
    assert rows_error(own + 0.01, own, x) == pytest.approx(0.01)
    assert rows_error(np.vstack([own[:1] + 0.02, own[1:]]), own, x) == pytest.approx(0.02 / math.sqrt(2))
    assert rows_error(np.where(own == own[0, 0], np.nan, own), own, x) == math.inf
    assert rows_error(x, x, x) == 0.0  # nothing was added, and nothing is said to have been
    assert rows_error(x + 1e-9, x, x) == math.inf


def test_logits_are_compared_in_standard_deviations_of_the_recomputed_ones() -> None:
    tolerance = logits_thresholds(samples.manifest())
    own = np.random.default_rng(0).normal(size=(3, 50))
    ids = np.argsort(-own, axis=1)[:, :5].astype(np.uint32)
    values = np.take_along_axis(own, ids.astype(int), 1)
    assert logits_error(ids, values, own, tolerance) == 0.0
    shifted = values + tolerance.row * own.std(axis=1, keepdims=True)
    assert logits_error(ids, shifted, own, tolerance) == pytest.approx(tolerance.row / tolerance.window)
    swapped = ids.copy()
    swapped[0, 0] = np.argsort(own[0])[0]  # the best id left out for the worst
    honest = np.take_along_axis(own, swapped.astype(int), 1)
    edge = (own[0].max() - honest[0].min()) / own[0].std() / tolerance.edge
    assert logits_error(swapped, honest, own, tolerance) == pytest.approx(edge)
    for other in (np.full_like(ids, 50), np.full_like(ids, 7)):
        assert logits_error(other, values, own, tolerance) == math.inf
    assert logits_error(ids, np.full_like(values, np.nan), own, tolerance) == math.inf
    assert dense_error(own, own, tolerance) == 0.0
    assert dense_error(own + 1e-3, own, tolerance) > 100


def test_the_limits_are_the_protocols() -> None:
    assert thresholds(samples.manifest(), Span(0, 2)).guilty == 1e-4
    rough = samples.manifest(numerics="bf16w")
    assert (thresholds(rough, Span(0, 2)).clear, thresholds(rough, Span(0, 3)).clear) == (1e-3, 2e-3)
    assert (logits_thresholds(samples.manifest()).guilty, logits_thresholds(rough).guilty) == (20.0, 4.0)
