"""Slow evidence: what many windows of one pair of nodes say together, none of which says anything alone.

Each whole window has three scores between 0 and 1: how far its error lies above what honest windows seldom have, and
above what they have at times; and how far the errors of its quiet rows, that three quarters of them exceed, lie above
what those of honest windows have at times. Of two honest nodes of different classes, whatever came before it, a window
scores at most MEANS on average. That is all that is assumed; windows need not be independent, errors need not be normal
(half of the rows of `bf16w` have none at all, which is what the third score is for).

Under it, for every bet b in [0, 1/mean], the product of 1 + b (score - mean) does not grow on average: it is a fair
game's capital or worse. So is a mixture over bets, and over the window at which the game begins (who cheats late must
not live on a good past): 1/(k(k+1)) of a unit of capital enters at window k. By Ville's inequality an honest pair's
capital ever reaches 1/ERROR with probability ERROR at most, whenever one looks (Waudby-Smith and Ramdas 2024,
"Estimating means of bounded random variables by betting", section 4; Shafer 2021).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tallystick_protocol.manifest import Manifest
from tallystick_protocol.sketching.logits import Apart
from tallystick_protocol.types import WINDOW, Span

ERROR = 1e-6
"""The chance that a pair of honest nodes is ever found to disagree, over all windows that it will ever have."""

MEANS = (0.01, 0.2, 0.2)
"""What an honest window scores on average, at most: one in a hundred may reach 1 by the rare level, one in five by the
usual one, and by the quiet one. The first finds large errors in few windows, the others small ones that are always
there, or in almost every row."""

FULL = 1.5
"""A window scores 1 whose error is so many times the level."""

BETS = tuple(
    (which, part / MEANS[which])
    for which, parts in enumerate(((0.03, 0.125, 0.5, 0.9), (0.3, 0.9), (0.3, 0.9)))
    for part in parts
)
"""(which score, what is bet on it), equal shares."""

SUSPECT = 100.0
"""Capital above which a pair is looked at more often. Of honest pairs one in a hundred ever gets there."""

LIMIT = 1e30

Scores = tuple[float, float, float]

_FP32, _FP32_RESULTS = 5e-6, 1e-6
_BF16W_SHORT, _BF16W_LONG, _BF16W_RESULTS = 3e-3, 4e-3, 1e-2
_SHORT_LAYERS = 2


@dataclass(frozen=True, slots=True)
class Level:
    """Errors that honest windows have seldom, and at times; and that three quarters of their rows exceed at times."""

    rare: float
    usual: float
    quiet: float


@dataclass(frozen=True, slots=True)
class Capital:
    """Of one pair of nodes over one span: windows that it had, and what each bet has made of its share."""

    windows: int = 0
    bets: tuple[float, ...] = (0.0,) * len(BETS)

    def after(self, scores: Sequence[float]) -> Capital:
        """The capital after one more window. scores: by the three levels."""
        windows = self.windows + 1
        fresh = 1.0 / (windows * (windows + 1))
        grown = (
            (held + fresh) * (1.0 + bet * (scores[which] - MEANS[which]))
            for held, (which, bet) in zip(self.bets, BETS, strict=True)
        )
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


def scores(error: float, quiet: float, level: Level) -> Scores:
    """Of a window with this error, three quarters of whose rows err by more than `quiet`."""
    return _score(error, level.rare), _score(error, level.usual), _score(quiet, level.quiet)


def _score(error: float, level: float) -> float:
    """0 up to the level, 1 from FULL times it, evenly by the logarithm between; 1 for what is not a number."""
    if error <= level:
        return 0.0
    return min(math.log(error / level) / math.log(FULL), 1.0) if math.isfinite(error) else 1.0


def level(manifest: Manifest, span: Span) -> Level:
    """The protocol's, or less where the manifest has measured less."""
    most = protocol_level(manifest, span)
    for one in manifest.margins:
        if (one.start, one.end) == (span.start, span.end):
            rare = min(most, one.rare)
            return Level(rare, min(most, one.usual), rare if one.quiet is None else min(most, one.quiet))
    return Level(most, most, most)


def protocol_level(manifest: Manifest, span: Span) -> float:
    """Set well above what honest windows of small trained models have (docs/verification.md)."""
    results = manifest.output_of(span) != "hidden"
    if manifest.numerics == "fp32":
        return _FP32_RESULTS if results else _FP32
    if results:
        return _BF16W_RESULTS
    return _BF16W_SHORT if len(span) <= _SHORT_LAYERS else _BF16W_LONG


def counts(num_rows: int) -> bool:
    """Whether a window of hidden rows is whole: errors of a few rows scatter too much."""
    return num_rows >= WINDOW


def results_count(apart: Apart) -> bool:
    """Half a window of results is enough, as for their tolerance."""
    return 2 * apart.num_rows >= WINDOW
