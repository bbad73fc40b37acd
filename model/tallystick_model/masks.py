"""What a mask means: transformers hands its rule as a function of (query, key) positions, and we ask it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

_FAR = 1 << 20
"""A query so far on that every window shows."""


@dataclass(frozen=True, slots=True)
class Mask:
    """causal: no query sees later keys; window: the keys a query sees, itself included, or None for all."""

    causal: bool
    window: int | None


def recognise(rule: Callable[..., Any]) -> Mask | None:
    """The mask that a rule draws, or None when it is neither causal, nor in a causal window, nor open to all."""
    try:
        far = _row(rule, _FAR)
        if bool(far.all()):
            mask = Mask(False, None)
        else:
            seen = int(far[: _FAR + 1].long().argmax())
            mask = Mask(True, None if seen == 0 else _FAR - seen + 1)
        window = mask.window or 1000
        asked = {0, 1, 7, 100, window - 1, window, window + 1, 3 * window + 2, _FAR}
        return mask if all(torch.equal(_row(rule, query), _drawn(mask, query)) for query in asked) else None
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None


def _row(rule: Callable[..., Any], query: int) -> torch.Tensor:
    """Which keys 0..query + 8 the rule lets a query see."""
    keys = torch.arange(query + 9)[None]
    zero = torch.zeros(1, 1, dtype=torch.long)
    seen = rule(zero, zero, torch.full((1, 1), query), keys)
    return torch.as_tensor(seen).expand(1, query + 9)[0].bool()


def _drawn(mask: Mask, query: int) -> torch.Tensor:
    age = query - torch.arange(query + 9)
    if not mask.causal:
        return torch.ones_like(age, dtype=torch.bool)
    return (age >= 0) if mask.window is None else (age >= 0) & (age < mask.window)
