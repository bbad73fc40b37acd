"""Our attention function, as transformers' AttentionInterface calls it, and what the probing run learns through it.

Rows of several sessions come packed as one sequence; every segment attends to its own session only, in tiles of R = 4
query rows aligned to absolute positions. Row p is always computed in a call of the same shape, at the same place in it:
(R queries) x (keys up to the tile's end), whoever travels with it. A one-shot bidirectional segment of n rows is
computed in tiles of R queries x exactly n keys. Where this processor has attention in machine code (`native`), which
computes every row by itself, all rows of a call go there at once; soft caps have no rule there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from tallystick_model.canonical.batch import Batch
from tallystick_model.canonical.masks import Mask, recognise
from tallystick_model.canonical.native.attention import Attention, attention
from tallystick_model.canonical.recording import Traits, whole
from tallystick_model.canonical.tiles import R, Scores, attend, folded

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


class TiledSeat:
    """Canonical attention of one layer."""

    def __init__(self, layer: int, plan: AttentionPlan, batch: Batch) -> None:
        self._layer, self._plan, self._batch = layer, plan, batch
        self._code = attention(plan.key_dim, plan.value_dim)

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, arguments: dict[str, Any]
    ) -> torch.Tensor:
        form = arguments.get("scaling"), arguments.get("softcap"), arguments.get("s_aux")
        out: torch.Tensor = self._attend(query, key, value, *form)
        return out

    @whole(Traits(effect=True, once=False))
    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        if self._code is not None and softcap is None and query.device.type == "cpu":
            return self._in_machine_code(self._code, query, key, value, scale, sinks)
        form = Scores(scale, softcap, sinks)
        heads, groups, dim, value_dim = query.shape[1], key.shape[1], query.shape[3], value.shape[3]
        folds = folded(heads, groups, dim, value_dim, form)
        batch, num_rows = self._batch, query.shape[2]
        place = batch.place_in_tile(num_rows)
        if place is None:
            count, at = batch.tiling(num_rows, query.device)
            tiles = query.new_zeros(count, heads, R, dim)
            tiles.transpose(1, 2).index_put_(at, query[0].transpose(0, 1))
        else:  # the same values moved with fewer calls
            count, at = 1, None
            tiles = query.new_zeros(1, heads, R, dim)
            tiles.narrow(2, place, num_rows).copy_(query)
        queries = tiles.view(count, 1, heads // folds, folds * R, dim).unbind(0)
        if self._plan.causal:
            batch.write(self._layer, key, value)
            reach = batch.reach(self._plan.mask, folds, query.device)
            outs = [
                attend(rows, *views[self._layer], seen, form)
                for rows, (views, seen) in zip(queries, reach, strict=True)
            ]
        else:
            sides = batch.sides(self._plan.mask, folds, key, value)
            outs = [attend(rows, *side, form) for rows, side in zip(queries, sides, strict=True)]
        whole = torch.cat(outs) if count > 1 else outs[0]  # (count, heads // folds, folds * R, value_dim)
        if at is None:
            return whole.view(1, heads, R, value_dim).narrow(2, place, num_rows).transpose(1, 2).contiguous()
        rows = whole.view(count, heads // folds, folds, R, value_dim).permute(0, 3, 1, 2, 4)[at]
        return rows.reshape(1, num_rows, heads, value_dim)

    def code_at_once(self, softcap: float | None) -> Attention | None:
        """The machine code by which sessions' rows are computed, if it is."""
        return self._code if softcap is None and self._plan.causal else None

    def place(self, task: Any, num_rows: int) -> None:
        """Write down whose rows the call's are, in a task of that code."""
        assert self._code is not None
        table = self._batch.table(self._plan.mask, num_rows)
        self._code.place(task, self._batch.places(self._layer), table)

    def _in_machine_code(
        self,
        code: Attention,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        table = self._batch.table(self._plan.mask, query.shape[2])
        if self._plan.causal:
            return code.attend(query, key, value, self._batch.places(self._layer), table, scale, sinks)
        places, held = self._batch.own_sides(key, value)
        out = code.attend(query, key, value, places, replace(table, written=0), scale, sinks)
        del held  # until now
        return out
