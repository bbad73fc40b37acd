"""Slow evidence: what many windows of one pair of nodes say together, none of which says anything alone.

Each whole window scores between 0 and 1. Two honest nodes of different classes score 0 nearly always: a window of
theirs, whatever came before it, scores at most MEAN on average. That is all that is assumed; windows need not be
independent, errors need not be normal (half of the windows of `bf16w` have none at all).

Under it, for every bet b in [0, 1/MEAN], the product of 1 + b (score - MEAN) does not grow on average: it is a fair
game's capital or worse. So is a mixture over bets, and over the window at which the game begins (who cheats late must
not live on a good past): 1/(k(k+1)) of a unit of capital enters at window k. By Ville's inequality an honest pair's
capital ever reaches 1/ERROR with probability ERROR at most, whenever one looks (Waudby-Smith and Ramdas 2024,
"Estimating means of bounded random variables by betting", section 4; Shafer 2021).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tallystick_protocol.manifest import Manifest
from tallystick_protocol.sketching.logits import Apart
from tallystick_protocol.types import WINDOW, Span

ERROR = 1e-6
"""The chance that a pair of honest nodes is ever found to disagree, over all windows that it will ever have."""

MEAN = 0.01
"""What an honest window scores on average, at most: one in a hundred may reach 1."""

FULL = 1.5
"""A window scores 1 whose error is so many times the level."""

BETS = tuple(part / MEAN for part in (0.03, 0.125, 0.5, 0.9))
SUSPECT = 100.0
"""Capital above which a pair is looked at more often. Of honest pairs one in a hundred ever gets there."""

LIMIT = 1e30

_FP32_LEVEL, _FP32_RESULTS = 5e-6, 1e-6
_BF16W_SHORT, _BF16W_LONG, _BF16W_RESULTS = 3e-3, 4e-3, 5e-3
_SHORT_LAYERS = 2


@dataclass(frozen=True, slots=True)
class Capital:
    """Of one pair of nodes over one span: windows that it had, and what each bet has made of its share."""

    windows: int = 0
    bets: tuple[float, ...] = (0.0,) * len(BETS)

    def after(self, score: float) -> Capital:
        """The capital after one more window."""
        windows = self.windows + 1
        fresh = 1.0 / (windows * (windows + 1))
        grown = ((held + fresh) * (1.0 + bet * (score - MEAN)) for held, bet in zip(self.bets, BETS, strict=True))
        return Capital(windows, tuple(min(value, LIMIT) for value in grown))

    @property
    def total(self) -> float:
        return sum(self.bets) / len(BETS)

    @property
    def is_conclusive(self) -> bool:
        """Whether one of the two computes something else: never so for all but ERROR of honest pairs."""
        return self.total >= 1.0 / ERROR

    @property
    def is_suspect(self) -> bool:
        return self.total >= SUSPECT


def score(error: float, level: float) -> float:
    """0 up to the level, 1 from FULL times it, evenly by the logarithm between; 1 for what is not a number."""
    if error <= level:
        return 0.0
    return min(math.log(error / level) / math.log(FULL), 1.0) if math.isfinite(error) else 1.0


def level(manifest: Manifest, span: Span) -> float:
    """What the errors of honest windows stay below: the protocol's, or less where the manifest has measured less."""
    measured = [one.level for one in manifest.margins if (one.start, one.end) == (span.start, span.end)]
    return min([protocol_level(manifest, span), *measured])


def protocol_level(manifest: Manifest, span: Span) -> float:
    """Set well above what small trained models show (docs/verification.md)."""
    results = manifest.output_of(span) != "hidden"
    if manifest.numerics == "fp32":
        return _FP32_RESULTS if results else _FP32_LEVEL
    if results:
        return _BF16W_RESULTS
    return _BF16W_SHORT if len(span) <= _SHORT_LAYERS else _BF16W_LONG


def counts(num_rows: int) -> bool:
    """Whether a window of hidden rows is whole: errors of a few rows scatter too much."""
    return num_rows >= WINDOW


def results_count(apart: Apart) -> bool:
    """Half a window of results is enough, as for their tolerance."""
    return 2 * apart.num_rows >= WINDOW
