"""One session's keys and values for the layers of a span, canonical execution."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

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


class KvCache:
    """Grows as it is written, up to `max_length` rows. Rows at or beyond `length` are zero between steps.

    A step writes rows at `length`.. in every layer and then calls `commit`; one that fails calls `crop(length)`.
    """

    def __init__(
        self, shapes: Mapping[int, CacheShape], max_length: int, devices: Mapping[int, torch.device] | None = None
    ) -> None:
        """devices: where each layer's rows lie; None for the CPU."""
        self.max_length = max_length
        self.length = 0
        self._shapes = dict(shapes)
        self._devices = dict(devices or {})
        self._capacity = 0
        self._written = 0
        self._keys: dict[int, torch.Tensor] = {}
        self._values: dict[int, torch.Tensor] = {}

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
        for layer, shape in self._shapes.items():
            for held, dim in ((self._keys, shape.key_dim), (self._values, shape.value_dim)):
                grown = torch.zeros(1, shape.groups, capacity, dim, device=self._devices.get(layer))
                if layer in held:
                    grown[:, :, : self._capacity] = held[layer]
                held[layer] = grown
        self._capacity = capacity

    def write(
        self, layer: int, first: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put rows first.. of a layer, (groups, n, dim) each; returns all it holds, (1, groups, capacity, dim) each."""
        last = first + keys.shape[1]
        self._written = max(self._written, last)
        self._keys[layer][0, :, first:last] = keys
        self._values[layer][0, :, first:last] = values
        return self._keys[layer], self._values[layer]

    @torch.inference_mode()
    def take(self, other: KvCache, first: int, last: int) -> None:
        """Copy rows [first, last) of another session of the same span behind our `first` rows."""
        self.reserve(last)
        for mine, theirs in ((self._keys, other._keys), (self._values, other._values)):
            for layer, held in mine.items():
                held[:, :, first:last] = theirs[layer][:, :, first:last]
        self._written = max(self._written, last)
        self.commit(last)

    def commit(self, length: int) -> None:
        """The step that wrote up to `length` is done."""
        self.length = length

    @torch.inference_mode()
    def crop(self, length: int) -> None:
        """Forget rows from `length` on; what they held is overwritten with zeros."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot crop {self.length} rows to {length}")
        for held in (self._keys, self._values):
            for tensor in held.values():
                tensor[:, :, length : self._written] = 0
        self.length = self._written = length


def _round_up(length: int) -> int:
    return -(-length // ROWS) * ROWS
