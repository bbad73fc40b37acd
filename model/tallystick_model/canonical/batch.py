"""What every layer of one packed call needs to know: whose rows are where, what they see, where they are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from tallystick_model.canonical.cache import KvCache, Views
from tallystick_model.canonical.masks import Mask
from tallystick_model.canonical.native.attention import CHUNK, TOGETHER, Table
from tallystick_model.canonical.tiles import R
from tallystick_model.devices import CPU

ALIGNMENT = 16
"""Keys of a sliding window start at a multiple of this, so that every head's base address is 64-byte aligned."""

_CAUSAL, _OPEN = Mask(True), Mask(False)

Side = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Keys, values, and the mask that is added to the scores."""


@dataclass(slots=True)
class Placed:
    """Rows [begin, end) of a packed call: positions first.. of the session that `cache` belongs to."""

    cache: KvCache | None
    first: int
    begin: int
    end: int

    @property
    def tiles(self) -> range:
        """The first positions of the tiles that hold its rows."""
        return range(self.first - self.first % R, self.first + self.end - self.begin, R)


class Batch:
    """One packed call's `placed` segments; all else is found as layers ask for it, and kept until the next call."""

    def __init__(self) -> None:
        self._placed: list[Placed] = []
        self._staircases: dict[tuple[int, torch.device], torch.Tensor] = {}
        self._masks: dict[tuple[Mask, int, int, int, int, torch.device], torch.Tensor] = {}
        self._at: dict[torch.device, tuple[int, tuple[torch.Tensor, torch.Tensor]]] = {}
        self._targets: list[Views] = []
        self._reach: dict[tuple[Mask, int, torch.device], list[tuple[Views, torch.Tensor]]] = {}
        self._views: dict[Mask, list[tuple[int, int, int, Views]]] = {}
        self._tables: dict[tuple[Mask, int], Table] = {}
        self._places: dict[int, Any] = {}

    def begin(self, placed: Sequence[Placed]) -> None:
        """The rows of the next call, whose caches have room for them and for the rest of their last tiles."""
        self.end()
        self._placed = list(placed)

    def end(self) -> None:
        """Let go of the call's caches."""
        self._placed = []
        self._masks.clear()
        self._at.clear()
        self._targets = []
        self._reach.clear()
        self._views.clear()
        self._tables.clear()
        self._places.clear()

    def table(self, rule: Mask, num_rows: int) -> Table:
        """Who sees what, for attention in machine code. Rows behind the placed ones are copies of the last of them."""
        found = self._tables.get((rule, num_rows))
        if found is not None:
            return found
        rows = np.empty((num_rows, 4), dtype=np.int64)
        units: list[tuple[int, int]] = []
        for number, segment in enumerate(self._placed):
            begin, end = segment.begin, segment.end
            last = segment.first + end - begin
            rows[begin:end, 0], rows[begin:end, 1] = number, np.arange(segment.first, last)
            rows[begin:end, 2], rows[begin:end, 3] = rule.ranges(rows[begin:end, 1], last)
            units += [(at, min(at + TOGETHER, end)) for at in range(begin, end, TOGETHER)]
            if segment.cache is not None:
                segment.cache.expect(last)
        written = self._placed[-1].end
        rows[written:] = rows[written - 1]
        units += [(at, at + 1) for at in range(written, num_rows)]
        found = self._tables[rule, num_rows] = Table(rows, np.array(units, dtype=np.int64), written)
        return found

    def places(self, layer: int) -> Any:
        """Where the sessions keep a layer's keys and values, (segments, 4) int64 (`KvCache.places`)."""
        if not self._places:
            caches = [segment.cache for segment in self._placed if segment.cache is not None]
            by_layer = np.stack([cache.places() for cache in caches], axis=1)
            self._places = dict(zip(caches[0].layers, by_layer, strict=True))
        return self._places[layer]

    def place_in_tile(self, num_rows: int) -> int | None:
        """Where a call's rows begin in their tile, if they are one segment's, without copies, and all in one tile."""
        first = self._placed[0]
        place = first.first % R
        alone = len(self._placed) == 1 and first.end - first.begin == num_rows and place + num_rows <= R
        return place if alone else None

    def tiling(self, num_rows: int, device: torch.device = CPU) -> tuple[int, tuple[torch.Tensor, torch.Tensor]]:
        """How many tiles there are, and each row's tile and place in it, (num_rows,) each.

        Rows behind the placed ones are copies of the last of them, and are put where it is.
        """
        found = self._at.get(device)
        if found is None:
            places: list[int] = []
            count = 0
            for segment in self._placed:
                skipped = count * R + segment.first % R
                places += range(skipped, skipped + segment.end - segment.begin)
                count += len(segment.tiles)
            places += places[-1:] * (num_rows - len(places))
            flat = torch.tensor(places, device=device)
            found = self._at[device] = (count, (flat // R, flat % R))
        return found

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put a layer's new keys and values, (1, groups, n, dim) each, into the sessions' caches."""
        if not self._targets:
            for segment in self._placed:
                assert segment.cache is not None
                last = segment.first + segment.end - segment.begin
                segment.cache.expect(last)
                self._targets.append(segment.cache.rows(segment.first, last))
        lengths = [segment.end - segment.begin for segment in self._placed]
        rest = keys.shape[2] - sum(lengths)
        for side, held in enumerate((keys, values)):
            if len(lengths) == 1:
                self._targets[0][layer][side].copy_(held.narrow(2, 0, lengths[0]) if rest else held)
                continue
            given = torch.split_with_sizes(held, [*lengths, rest] if rest else lengths, 2)
            torch._foreach_copy_([target[layer][side] for target in self._targets], given[: len(lengths)])

    def reach(self, rule: Mask, folds: int, device: torch.device = CPU) -> list[tuple[Views, torch.Tensor]]:
        """For every tile of causal segments the keys and values that it may see, and its mask (folds * R, keys)."""
        found = self._reach.get((rule, folds, device))
        if found is None:
            seen = self._views.get(rule)
            if seen is None:
                seen = self._views[rule] = list(self._seen(rule))
            found = self._reach[rule, folds, device] = [
                (views, self.mask(rule, tile, low, end, folds, device)) for tile, low, end, views in seen
            ]
        return found

    def _seen(self, rule: Mask) -> list[tuple[int, int, int, Views]]:
        found = []
        for segment in self._placed:
            assert segment.cache is not None
            for tile in segment.tiles:
                low = rule.first_key(tile) // ALIGNMENT * ALIGNMENT
                found.append((tile, low, tile + R, segment.cache.rows(low, tile + R)))
        return found

    def own_sides(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[Any, list[torch.Tensor]]:
        """Keys and values of bidirectional segments, each in memory of whole chunks: where they are, as `places` has
        it, and what holds them."""
        held = [
            F.pad(side[0, :, segment.begin : segment.end], (0, 0, 0, -(segment.end - segment.begin) % CHUNK))
            for segment in self._placed
            for side in (keys, values)
        ]
        held = [side.contiguous() for side in held]
        pairs = zip(held[::2], held[1::2], strict=True)
        places = [(own.data_ptr(), its.data_ptr(), own.stride(0), its.stride(0)) for own, its in pairs]
        return np.array(places, dtype=np.int64), held

    def sides(self, rule: Mask, folds: int, keys: torch.Tensor, values: torch.Tensor) -> list[Side]:
        """For every tile of bidirectional segments the keys and values, which are its whole segment's, and its mask."""
        found: list[Side] = []
        for segment in self._placed:
            rows = slice(segment.begin, segment.end)
            own = keys[:, :, rows].contiguous(), values[:, :, rows].contiguous()
            for tile in segment.tiles:
                plain = rule == _OPEN
                mask = None if plain else self.mask(rule, tile, 0, own[0].shape[2], folds, keys.device)
                found.append((*own, mask))
        return found

    def mask(
        self, rule: Mask, tile: int, low: int, high: int, folds: int = 1, device: torch.device = CPU
    ) -> torch.Tensor:
        """(folds * R, high - low): zero where queries tile.. may look, -inf elsewhere; the R rows are repeated."""
        if rule == _CAUSAL:
            return self._staircase(high - low, folds, device)
        key = (rule, tile, low, high, folds, device)
        found = self._masks.get(key)
        if found is None:
            seen = rule.sees(torch.arange(tile, tile + R), torch.arange(low, high))
            seen[:, 0] |= ~seen.any(1)  # a query behind the last row sees something, or its softmax is NaN
            found = torch.zeros(seen.shape).masked_fill(~seen, float("-inf")).repeat(folds, 1).to(device)
            self._masks[key] = found
        return found

    def _staircase(self, keys: int, folds: int, device: torch.device) -> torch.Tensor:
        """-inf above the diagonal of the last R keys: the end of a longer one that is kept."""
        held = self._staircases.get((folds, device))
        if held is None or held.shape[1] < keys:
            held = torch.zeros(R, 2 * keys)
            held[:, -R:] = torch.full((R, R), float("-inf")).triu(1)
            held = self._staircases[folds, device] = held.repeat(folds, 1).to(device)
        return held[:, -keys:]
