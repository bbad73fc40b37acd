"""From errors to one of three zones: protocol constants, measured (docs/verification.md). A manifest may tighten
`clear`, nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import numpy as np

from tallystick_protocol.manifest import Manifest
from tallystick_protocol.sketching.logits import Apart
from tallystick_protocol.sketching.statistic import rms
from tallystick_protocol.types import WINDOW, Span

SHORT_LAYERS, MEDIAN_LAYERS = 2, 4
MEDIAN_WINDOWS = 8
GROSS = 10.0
"""Times `guilty`, where there are fewer rows than that threshold is for."""


class Zone(Enum):
    """What an error says. BETWEEN: nothing; look at more windows, then ask another auditor, and blame nobody."""

    CLEAR = "clear"
    BETWEEN = "between"
    GUILTY = "guilty"


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Of the rows' error. guilty: over at least `guilty_rows` rows. median: of eight consecutive whole windows, above
    which it is not noise; None where nobody has measured that."""

    clear: float
    guilty: float
    guilty_rows: int
    median: float | None = None

    def zone(self, windows: Sequence[Any]) -> Zone:
        """Of consecutive windows of one node by one auditor, the last of which is judged: each what `squares` gave."""
        latest = rms(windows[-1])
        if not latest <= GROSS * self.guilty:
            return Zone.GUILTY
        pooled: list[Any] = []
        for window in reversed(windows):
            pooled.append(window)
            if sum(map(len, pooled)) >= self.guilty_rows:
                if not rms(np.concatenate(pooled)) <= self.guilty:
                    return Zone.GUILTY
                break
        whole = [window for window in windows if len(window) >= WINDOW][-MEDIAN_WINDOWS:]
        middle = float(np.median([rms(window) for window in whole])) if len(whole) == MEDIAN_WINDOWS else 0.0
        if self.median is not None and not middle <= self.median:
            return Zone.GUILTY
        return Zone.CLEAR if latest <= self.clear else Zone.BETWEEN


@dataclass(frozen=True, slots=True)
class LogitsThresholds:
    """Of results, in scales. guilty: how many times the tolerance. The window's counts from half a window up."""

    row: float
    window: float
    edge: float
    guilty: float

    def share(self, apart: Apart) -> float:
        """The largest of the three as a share of its tolerance: 1 is still clear."""
        of_window = apart.window / self.window if 2 * apart.num_rows >= WINDOW else 0.0
        return max(apart.row / self.row, of_window, apart.edge / self.edge)

    def zone(self, apart: Apart) -> Zone:
        share = self.share(apart)
        if not share <= self.guilty:
            return Zone.GUILTY
        return Zone.CLEAR if share <= 1.0 else Zone.BETWEEN


_FP32 = Thresholds(clear=5e-6, guilty=1e-4, guilty_rows=1)
_BF16W_SHORT = Thresholds(clear=1e-3, guilty=6e-3, guilty_rows=128, median=1.2e-3)
_BF16W_LONG = Thresholds(clear=2e-3, guilty=6e-3, guilty_rows=128, median=1.4e-3)
_LOGITS = {
    "fp32": LogitsThresholds(row=2e-6, window=5e-7, edge=1e-5, guilty=20.0),
    "bf16w": LogitsThresholds(row=2.5e-2, window=5e-3, edge=5e-2, guilty=4.0),
}


def thresholds(manifest: Manifest, span: Span) -> Thresholds:
    """For the rows of a span; of spans of more than four layers of `bf16w` no median was measured."""
    if manifest.numerics == "fp32":
        found = _FP32
    elif len(span) <= SHORT_LAYERS:
        found = _BF16W_SHORT
    else:
        found = _BF16W_LONG if len(span) <= MEDIAN_LAYERS else replace(_BF16W_LONG, median=None)
    return found if manifest.clear is None else replace(found, clear=min(found.clear, manifest.clear))


def logits_thresholds(manifest: Manifest) -> LogitsThresholds:
    """For what leaves a model's end."""
    return _LOGITS[manifest.numerics]
