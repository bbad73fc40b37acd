"""Our attention function, as transformers' AttentionInterface calls it, and what the probing run learns through it.

Rows of several sessions come packed as one sequence; every segment attends to its own session only, in tiles of R = 4
query rows aligned to absolute positions. Row p is always computed in a call of the same shape, at the same place in it:
(R queries) x (keys up to the tile's end), whoever travels with it. A one-shot bidirectional segment of n rows is
computed in tiles of R queries x exactly n keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from tallystick_model.canonical.cache import KvCache
from tallystick_model.canonical.masks import Mask, recognise
from tallystick_model.canonical.tiles import R, Scores, attend
from tallystick_model.devices import CPU

ALIGNMENT = 16
"""Keys of a sliding window start at a multiple of this, so that every head's base address is 64-byte aligned."""

NAME = "tallystick"
_PROBE = "tallystick_probe"

_HARMLESS = frozenset({"position_ids", "cache_position", "use_cache", "sliding_window", "is_causal"})
"""Arguments that say what the mask says, or nothing."""

_KNOWN = _HARMLESS | {"scaling", "dropout", "softcap", "s_aux"}
"""Arguments there is a rule for. Every other argument must be absent, None, False or zero."""


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """How one layer attends. groups: heads of keys and values; key_dim, value_dim: their lengths."""

    mask: Mask
    groups: int
    key_dim: int
    value_dim: int

    @property
    def causal(self) -> bool:
        return self.mask.causal


class Seat(Protocol):
    """What stands behind the attention of one layer."""

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, arguments: dict[str, Any]
    ) -> torch.Tensor:
        """query (1, heads, n, key_dim), key and value (1, groups, n, ...); returns (1, n, heads, value_dim)."""


def attend_with(layer: Any, seat: Seat) -> None:
    """Let all of a layer's modules attend through `seat`."""
    for module in layer.modules():
        module.tallystick_seat = seat


def use_tallystick_attention(config: Any) -> None:
    """Make the models of this config object call our attention; transformers then builds no masks of its own."""
    AttentionInterface.register(NAME, _attention)
    config._attn_implementation = NAME


@contextmanager
def probing(config: Any) -> Iterator[None]:
    """While held, models of this config call our attention with masks that say what they mean."""
    AttentionInterface.register(_PROBE, _attention)
    AttentionMaskInterface.register(_PROBE, _describe_mask)
    before = config._attn_implementation
    config._attn_implementation = _PROBE
    try:
        yield
    finally:
        config._attn_implementation = before


def _attention(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **arguments: Any) -> Any:
    seat: Seat = module.tallystick_seat
    return seat(query, key, value, attention_mask, arguments), None


def _describe_mask(*, mask_function: Callable[..., Any], **sizes: Any) -> torch.Tensor:
    marker = torch.zeros(1, 1, sizes.get("q_length", 1), sizes.get("kv_length", 1), dtype=torch.bool)
    marker.tallystick_mask = recognise(mask_function)  # type: ignore[attr-defined]
    return marker


class ProbeSeat:
    """Notes how a layer attends during the probing run and answers with an empty tensor."""

    def __init__(self) -> None:
        self._calls: list[tuple[AttentionPlan | None, str]] = []

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, arguments: dict[str, Any]
    ) -> torch.Tensor:
        said: Mask | None = getattr(mask, "tallystick_mask", None)
        strange = [name for name, given in arguments.items() if name not in _KNOWN and not _absent(given)]
        if strange:
            self._calls.append((None, f"attention takes {', '.join(sorted(strange))}, for which there is no rule"))
        elif said is None:
            self._calls.append((None, "its mask is none we can read"))
        else:
            self._calls.append((AttentionPlan(said, key.shape[1], key.shape[-1], value.shape[-1]), ""))
        return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])

    def plan(self) -> tuple[AttentionPlan | None, str]:
        """How the layer attends; None and the reason when there is no canonical rule for it."""
        if len(self._calls) != 1:
            return None, f"it went {len(self._calls)} times through the attention interface, not once"
        return self._calls[0]


def _absent(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, int | float) and value == 0)


@dataclass(slots=True)
class Placed:
    """Rows [begin, end) of a packed call: positions first.. of the session that `cache` belongs to."""

    cache: KvCache | None
    first: int
    begin: int
    end: int


@dataclass(slots=True)
class Batch:
    """What every layer of one packed call needs to know."""

    placed: list[Placed] = field(default_factory=list)
    masks: dict[tuple[Mask, int, int, int, torch.device], torch.Tensor] = field(default_factory=dict)
    staircases: dict[torch.device, torch.Tensor] = field(default_factory=dict)

    def causal_mask(self, keys: int, device: torch.device = CPU) -> torch.Tensor:
        """(R, keys), zero where the tile's query may look and -inf above the diagonal of its last R keys."""
        held = self.staircases.get(device)
        if held is None or held.shape[1] < keys:
            held = torch.zeros(R, 2 * keys)
            held[:, -R:] = torch.full((R, R), float("-inf")).triu(1)
            held = self.staircases[device] = held.to(device)
        return held[:, -keys:]

    def mask(self, mask: Mask, tile: int, low: int, high: int, device: torch.device = CPU) -> torch.Tensor:
        """The same for queries tile.. and the keys low..high of any mask."""
        found = self.masks.get((mask, tile, low, high, device))
        if found is None:
            seen = mask.sees(torch.arange(tile, tile + R), torch.arange(low, high))
            seen[:, 0] |= ~seen.any(1)  # a query behind the last row sees something, or its softmax is NaN
            found = torch.zeros(seen.shape).masked_fill(~seen, float("-inf")).to(device)
            self.masks[mask, tile, low, high, device] = found
        return found


class TiledSeat:
    """Canonical attention of one layer."""

    def __init__(self, layer: int, plan: AttentionPlan, batch: Batch) -> None:
        self._layer, self._plan, self._batch = layer, plan, batch
        self._plain = plan.mask == Mask(plan.causal)

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, arguments: dict[str, Any]
    ) -> torch.Tensor:
        form = Scores(arguments.get("scaling"), arguments.get("softcap"), arguments.get("s_aux"))
        out = query.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1])
        for segment in self._batch.placed:
            rows = slice(segment.begin, segment.end)
            attend = self._causal if self._plan.causal else self._bidirectional
            out[0, rows] = attend(segment, query[:, :, rows], key[:, :, rows], value[:, :, rows], form)
        return out

    def _causal(self, segment: Placed, query: Any, key: Any, value: Any, form: Scores) -> torch.Tensor:
        assert segment.cache is not None
        keys, values = segment.cache.write(self._layer, segment.first, key[0], value[0])
        rule, batch = self._plan.mask, self._batch
        tile = segment.first - segment.first % R
        tiles, skipped = _in_tiles(query[0], segment.first - tile)
        outs = []
        for rows in tiles:
            end = tile + R
            low = rule.first_key(tile) // ALIGNMENT * ALIGNMENT
            mask = (
                batch.causal_mask(end, rows.device) if self._plain else batch.mask(rule, tile, low, end, rows.device)
            )
            outs.append(attend(rows, keys[:, :, low:end], values[:, :, low:end], mask, form))
            tile = end
        return _from_tiles(outs)[skipped : skipped + query.shape[2]]

    def _bidirectional(self, segment: Placed, query: Any, key: Any, value: Any, form: Scores) -> torch.Tensor:
        tiles, _ = _in_tiles(query[0], 0)
        keys, values = key.contiguous(), value.contiguous()
        count = keys.shape[2]
        outs = []
        for index, rows in enumerate(tiles):
            mask = None if self._plain else self._batch.mask(self._plan.mask, index * R, 0, count, rows.device)
            outs.append(attend(rows, keys, values, mask, form))
        return _from_tiles(outs)[: query.shape[2]]


def _in_tiles(query: torch.Tensor, skipped: int) -> tuple[torch.Tensor, int]:
    """(heads, n, dim) with `skipped` rows of zeros before it, as contiguous tiles (count, 1, heads, R, dim)."""
    heads, length, dim = query.shape
    count = -(-(skipped + length) // R)
    padded = query.new_zeros(heads, count * R, dim)
    padded[:, skipped : skipped + length] = query
    return padded.view(heads, count, R, dim).transpose(0, 1).contiguous().unsqueeze(1), skipped


def _from_tiles(outs: list[torch.Tensor]) -> torch.Tensor:
    """Tiles (1, heads, R, dim) as rows (tiles * R, heads, dim)."""
    return torch.cat([out[0].transpose(0, 1) for out in outs])
