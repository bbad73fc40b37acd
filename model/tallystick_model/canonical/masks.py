"""What a mask means: transformers hands its rule as a function of (query, key) positions, and we ask it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

_FAR = 1 << 20
"""A query so far on that every window shows."""

_BEYOND = 4096
"""Keys behind the far query that a bidirectional window may reach."""


@dataclass(frozen=True, slots=True)
class Mask:
    """causal: no query sees later keys; window: a query sees the keys at a distance below it (itself included), or None
    for any; chunk: a query sees keys of its own chunk of that many positions only, or None."""

    causal: bool
    window: int | None = None
    chunk: int | None = None

    def sees(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Positions (n,) and (m,) -> bool (n, m)."""
        age = queries[:, None] - keys
        seen = age >= 0 if self.causal else torch.ones_like(age, dtype=torch.bool)
        if self.window is not None:
            seen &= age.abs() < self.window
        if self.chunk is not None:
            seen &= queries[:, None] // self.chunk == keys // self.chunk
        return seen

    def ranges(self, queries: Any, count: int) -> tuple[Any, Any]:
        """Which of keys 0 .. count - 1 queries (n,) see: begins and ends, (n,) each."""
        reach = count if self.window is None else self.window
        low, high = np.maximum(queries - reach + 1, 0), np.minimum(queries + reach, count)
        if self.chunk is not None:
            begin = queries // self.chunk * self.chunk
            low, high = np.maximum(low, begin), np.minimum(high, begin + self.chunk)
        return low, np.minimum(high, queries + 1) if self.causal else high

    def first_key(self, query: int) -> int:
        """The earliest key that a query, and no later one, sees."""
        first = 0 if self.window is None else max(0, query - self.window + 1)
        return first if self.chunk is None else max(first, query - query % self.chunk)


def recognise(rule: Callable[..., Any]) -> Mask | None:
    """The mask that a rule draws; None when it is not causal or open to all, in a window, in chunks, or in neither."""
    try:
        mask = _supposed(rule)
        step = mask.window or mask.chunk or 1000
        asked = {0, 1, 7, 100, step - 1, step, step + 1, 3 * step + 2, _FAR}
        return mask if all(torch.equal(_row(rule, query), _drawn(mask, query)) for query in asked) else None
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None


def _supposed(rule: Callable[..., Any]) -> Mask:
    """The mask that the rule's answers for a few far queries suggest."""
    far = _row(rule, _FAR)
    causal = not bool(far[_FAR + 1])
    first = int(far[: _FAR + 1].long().argmax())
    if first == 0:
        return Mask(causal)
    before = _row(rule, _FAR - 1)
    if int(before[:_FAR].long().argmax()) == first - 1:
        return Mask(causal, window=_FAR - first + 1)
    return Mask(causal, chunk=first - int(_row(rule, first - 1)[:first].long().argmax()))


def _row(rule: Callable[..., Any], query: int) -> torch.Tensor:
    """Which keys 0..query + _BEYOND the rule lets a query see."""
    keys = torch.arange(query + 1 + _BEYOND)[None]
    zero = torch.zeros(1, 1, dtype=torch.long)
    seen = rule(zero, zero, torch.full((1, 1), query), keys)
    return torch.as_tensor(seen).expand(1, keys.shape[1])[0].bool()


def _drawn(mask: Mask, query: int) -> torch.Tensor:
    return mask.sees(torch.tensor([query]), torch.arange(query + 1 + _BEYOND))[0]
