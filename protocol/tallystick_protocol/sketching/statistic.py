"""What sketches say of two nodes: how far apart their rows are, and whether neighbours tell one story."""

from __future__ import annotations

from typing import Any

import numpy as np

from tallystick_protocol.sketching.rows import Sketches

INPUT_TOLERANCE = 1e-5
"""How far S x of two nodes over the same bytes may lie apart, relative to the sketch: float32 rounds by 6e-8; the
outputs of two classes' embeddings differ a little more."""

QUIET_PART = 0.25
"""Of a window's rows: honest ones of `bf16w` seldom err at all in so many, for rounding makes them equal again."""

SCALE_SLACK = 3.0
"""How many times the stated |y - x| the sketch of y - x may be: its expectation is one, and three is never seen."""


def squares(claim: Sketches, answer: Sketches) -> Any:
    """For each row |S(y-x) - S(y'-x)|^2 / |y'-x|^2, the denominator as the answer states it, (n,) float64.

    Rows where both added nothing are left out. Infinite where only one says so, or where a value is not finite.
    """
    away = np.square(claim.added.astype(np.float64) - answer.added.astype(np.float64)).sum(axis=1)
    scale = np.square(answer.scales.astype(np.float64))
    used = (scale != 0) | (away != 0)  # NaN is neither
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = away[used] / scale[used]
    return np.where(np.isfinite(ratio) & np.isfinite(scale[used]), ratio, np.inf)


def rms(parts: Any) -> float:
    """The root mean square of what `squares` gave; 0 for no rows."""
    return float(np.sqrt(np.mean(parts))) if len(parts) else 0.0


def quiet(parts: Any) -> float:
    """Of what `squares` gave, the root of that which three quarters exceed: the error of the rows that err least. 0 for
    no rows."""
    return float(np.sqrt(np.quantile(parts, QUIET_PART, method="lower"))) if len(parts) else 0.0


def error(claim: Sketches, answer: Sketches) -> float:
    """The error of a window: the root mean square over its rows. Never NaN."""
    return rms(squares(claim, answer))


def errors(claim: Sketches, answer: Sketches) -> tuple[float, float]:
    """Of a window: its error, and `quiet`. Never NaN."""
    found = squares(claim, answer)
    return rms(found), quiet(found)


def input_error(claim: Sketches, answer: Sketches) -> float:
    """The largest |S x - S x'| relative to |S x'|, over the rows; infinite where a value is not finite."""
    return _largest(claim.entered.astype(np.float64) - answer.entered, answer.entered)


def states_its_scale(sketches: Sketches) -> bool:
    """Whether the stated |y - x| are not too small for the sketches: who understates them makes errors look large."""
    norms = np.sqrt(np.square(sketches.added.astype(np.float64)).sum(axis=1))
    return bool((norms <= SCALE_SLACK * sketches.scales).all())


def is_linked(before: Sketches, after: Sketches) -> bool:
    """Whether S x + S (y - x) of one hop is S x of the next one, to what rounding to float32 explains.

    Each of the three numbers is within 2^-24 of its own size, and sums in float64 are within 1e-14 of the row; so
    |a + b - c| <= 2^-23 (|a| + |b| + |c|) + 2^-40 |row of sketches|, twice what can be.
    """
    a, b, c = (part.astype(np.float64) for part in (before.entered, before.added, after.entered))
    sizes = np.abs(a) + np.abs(b) + np.abs(c)
    bound = 2.0**-23 * sizes + 2.0**-40 * sizes.max(axis=1, keepdims=True) + 1e-37
    return bool((np.abs(a + b - c) <= bound).all())  # not where one of them is NaN


def _largest(away: Any, of: Any) -> float:
    norms = np.sqrt(np.square(np.asarray(of, dtype=np.float64)).sum(axis=1))
    apart = np.sqrt(np.square(away).sum(axis=1))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(apart == 0, 0.0, apart / norms)
    return float(np.where(np.isnan(ratio), np.inf, ratio).max(initial=0.0))
