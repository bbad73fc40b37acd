"""Choosing a token from the largest logits: greedy, temperature, top-k, top-p, min-p, with a seed. Pure.

Clients and last hops choose alike. The network returns the k largest logits of a position; sampling with top_p near 1
is therefore over those k, not over the whole vocabulary. A choice is a function of the row, the settings and the
position alone, by NumPy's Philox: a seed gives the same tokens on every machine, over failovers, and however many rows
come at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from tallystick_protocol.errors import ConfigError, CorruptResult

_PAIR = np.dtype([("id", "<u4"), ("value", "<f4")])


@dataclass(frozen=True, slots=True)
class Sampling:
    """temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off. Raises ConfigError outside these ranges.

    min_p: tokens less likely than min_p times the likeliest one are left out (https://arxiv.org/abs/2407.01082).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature <= 100.0:
            raise ConfigError(f"temperature {self.temperature} is not from 0 to 100")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p {self.top_p} is not above 0 and at most 1")
        if not 0.0 <= self.min_p <= 1.0:
            raise ConfigError(f"min_p {self.min_p} is not from 0 to 1")
        if not 0 <= self.top_k <= 1 << 20 or not 0 <= self.seed < 1 << 64:
            raise ConfigError("top_k and seed are not negative (seed below 2^64)")


@lru_cache(maxsize=256)
def parse_top_k(row: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Ids (k,) u32 and logits (k,) f32 of a top-k row, by value descending, then id ascending.

    Raises CorruptResult for a row that is not that: it comes from a stranger.
    """
    if not row or len(row) % _PAIR.itemsize:
        raise CorruptResult(f"a row of {len(row)} bytes is no top-k row")
    pairs = np.frombuffer(row, dtype=_PAIR)
    ids, values = pairs["id"], pairs["value"]
    in_order = (values[:-1] > values[1:]) | ((values[:-1] == values[1:]) & (ids[:-1] < ids[1:]))
    if not bool(np.isfinite(values).all() and in_order.all()) or _has_twice(ids):
        raise CorruptResult("a top-k row holds values that are not finite or not in order, or an id twice")
    return ids, values


def _has_twice(ids: np.ndarray) -> bool:
    ordered = np.sort(ids)
    return bool((ordered[1:] == ordered[:-1]).any())


def pick(row: bytes, sampling: Sampling, position: int) -> int:
    """The token id at `position`, chosen from the row before it. Raises CorruptResult for a malformed row."""
    return draw(*parse_top_k(row), sampling, position)


def draw(ids: np.ndarray, logits: np.ndarray, sampling: Sampling, position: int) -> int:
    """One of `ids` (k,), whose logits (k,) descend, for `position`.

    Each position draws from a generator of its own, (seed, position): what was drawn before does not matter, so a
    position that is decided again after a failover is decided alike.
    """
    if sampling.temperature == 0.0:
        return int(ids[0])
    probabilities = distribution(logits, sampling)
    point = np.random.Generator(np.random.Philox(key=np.array([sampling.seed, position], dtype=np.uint64))).random()
    chosen = int(np.searchsorted(np.cumsum(probabilities), point, side="right"))
    return int(ids[min(chosen, len(probabilities) - 1)])


def distribution(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Probabilities (n,) f64 of the n first logits that top_k, top_p and min_p leave; logits descend."""
    kept = logits[: sampling.top_k or None].astype(np.float64)
    with np.errstate(over="ignore"):  # a tiny temperature: everything below the largest logit is exp(-inf) = 0
        weights = np.exp((kept - kept[0]) / sampling.temperature)
    probabilities = weights / weights.sum()
    if sampling.top_p < 1.0:
        before = np.cumsum(probabilities) - probabilities
        probabilities = probabilities[before < sampling.top_p]
        probabilities /= probabilities.sum()
    if sampling.min_p > 0.0:
        probabilities = probabilities[probabilities >= sampling.min_p * probabilities[0]]
        probabilities /= probabilities.sum()
    result: np.ndarray = probabilities
    return result
