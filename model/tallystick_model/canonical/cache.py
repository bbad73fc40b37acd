"""One session's keys and values for the layers of a span, canonical execution."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tallystick_model.devices import CPU

ROWS = 16
"""Capacities are multiples of this: every head's rows then start at a multiple of 64 bytes, whatever its length."""


@dataclass(frozen=True, slots=True)
class CacheShape:
    """Of one layer: groups of key-value heads, lengths of a key and a value."""

    groups: int
    key_dim: int
    value_dim: int

    @property
    def row_bytes(self) -> int:
        return 4 * self.groups * (self.key_dim + self.value_dim)


Views = dict[int, tuple[torch.Tensor, torch.Tensor]]
"""{layer: keys and values of some rows, (1, groups, n, dim) each}."""


class KvCache:
    """Grows as it is written, up to `max_length` rows. Rows at or beyond `length` are zero between steps.

    A step writes rows at `length`.. in every layer and then calls `commit`; one that fails calls `crop(length)`.
    Keys and values of one shape and device lie in one tensor: one cut gives a view of some rows in all layers.
    """

    def __init__(
        self, shapes: Mapping[int, CacheShape], max_length: int, devices: Mapping[int, torch.device] | None = None
    ) -> None:
        """devices: where each layer's rows lie; None for the CPU."""
        self.max_length = max_length
        self.length = 0
        self._shapes = dict(shapes)
        self._capacity = 0
        self._written = 0
        pools: dict[tuple[int, int, torch.device], list[tuple[int, bool]]] = {}
        for layer, shape in self._shapes.items():
            device = (devices or {}).get(layer, CPU)
            pools.setdefault((shape.groups, shape.key_dim, device), []).append((layer, True))
            pools.setdefault((shape.groups, shape.value_dim, device), []).append((layer, False))
        self._places = list(pools.items())
        self._pools: list[torch.Tensor] = []
        self._located = 0
        self._located_at: Any = None

    @property
    def size_bytes(self) -> int:
        """What is allocated now."""
        return self._capacity * self.row_bytes

    @property
    def row_bytes(self) -> int:
        """What one position takes in all layers of the span."""
        return sum(shape.row_bytes for shape in self._shapes.values())

    def reserve(self, length: int) -> None:
        """Make room for `length` rows (and the rest of their tile)."""
        if length <= self._capacity:
            return
        limit = _round_up(self.max_length)
        capacity = min(max(_round_up(length), 2 * self._capacity, 4 * ROWS), max(limit, _round_up(length)))
        pools = []
        for index, ((groups, dim, device), holders) in enumerate(self._places):
            pool = torch.zeros(len(holders), 1, groups, capacity, dim, device=device)
            if self._written:
                pool[..., : self._written, :] = self._pools[index][..., : self._written, :]
            pools.append(pool)
        self._pools, self._capacity, self._located = pools, capacity, 0

    @property
    def layers(self) -> list[int]:
        """In the order of `places`."""
        return list(self._shapes)

    def places(self) -> Any:
        """Where each layer's keys and values are in memory, and how many floats apart two groups' are, (layers, 4)
        int64."""
        begin = self._pools[0].data_ptr()
        if begin != self._located:  # they have grown, or this is a copy
            held = self.rows(0, self._capacity)
            pairs = [held[layer] for layer in self._shapes]
            found = [(key.data_ptr(), value.data_ptr(), key.stride(1), value.stride(1)) for key, value in pairs]
            self._located, self._located_at = begin, np.array(found, dtype=np.int64)
        return self._located_at

    def rows(self, first: int, last: int) -> Views:
        """Rows [first, last) of every layer, as views: what is written to them is in the cache."""
        keys: dict[int, torch.Tensor] = {}
        values: dict[int, torch.Tensor] = {}
        for pool, (_, holders) in zip(self._pools, self._places, strict=True):
            for view, (layer, is_key) in zip(pool.narrow(3, first, last - first).unbind(0), holders, strict=True):
                (keys if is_key else values)[layer] = view
        return {layer: (held, values[layer]) for layer, held in keys.items()}

    def expect(self, last: int) -> None:
        """Rows up to `last` are about to be written."""
        self._written = max(self._written, last)

    @torch.inference_mode()
    def take(self, other: KvCache, first: int, last: int) -> None:
        """Copy rows [first, last) of another session of the same span behind our `first` rows."""
        self.reserve(last)
        self.expect(last)
        for mine, theirs in zip(self._pools, other._pools, strict=True):
            mine[..., first:last, :] = theirs[..., first:last, :]
        self.commit(last)

    def commit(self, length: int) -> None:
        """The step that wrote up to `length` is done."""
        self.length = length

    @torch.inference_mode()
    def crop(self, length: int) -> None:
        """Forget rows from `length` on; what they held is overwritten with zeros."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot crop {self.length} rows to {length}")
        for pool in self._pools:
            pool[..., length : self._written, :] = 0
        self.length = self._written = length


def _round_up(length: int) -> int:
    return -(-length // ROWS) * ROWS
