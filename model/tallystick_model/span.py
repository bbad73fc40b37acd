"""A span of layers, loaded: the seam between a model and whoever serves it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch

from tallystick_model.anatomy import Anatomy
from tallystick_model.attention import Batch, R
from tallystick_model.cache import CacheShape, KvCache
from tallystick_model.ghosts import Leave, Passage
from tallystick_model.kernels import MIN_ROWS, BlockwiseOperators, flushing_denormals
from tallystick_model.packing import Part, pack
from tallystick_model.segments import Cache, Segment, cut, offset_rows, place, token_types_of, wanted_in
from tallystick_model.skeleton import Skeleton
from tallystick_model.stock import StockCache
from tallystick_protocol.errors import BadPosition, BadTensor, ContextLengthExceeded
from tallystick_protocol.manifest import Manifest
from tallystick_protocol.types import Span

Execution = Literal["canonical", "stock"]


@dataclass(slots=True)
class Spliced:
    """A skeleton with a span spliced in and its weights in place. `selection` picks the rows that reach the head."""

    skeleton: Skeleton
    anatomy: Anatomy
    passage: Passage
    batch: Batch
    selection: list[torch.Tensor]
    selects: bool


class SpanModel:
    """Layers [start, end) of a model, with embedding and head at its ends. Not for several threads at once."""

    def __init__(self, manifest: Manifest, span: Span, spliced: Spliced, execution: Execution) -> None:
        self.manifest = manifest
        self.span = span
        self.execution: Execution = execution
        self.is_first = span.start == 0
        self.is_last = span.end == manifest.layers
        self._spliced = spliced
        self._returns_logits = self.is_last and manifest.output == "logits"
        self._scoped = "" in spliced.anatomy.blockwise
        shapes = {index: spliced.anatomy.layers[index].attention for index in range(span.start, span.end)}
        self._cache_shapes = {
            index: CacheShape(plan.groups, plan.key_dim, plan.value_dim) for index, plan in shapes.items() if plan
        }

    @property
    def row_bytes(self) -> int:
        """Cache bytes that one position of a session takes in this span (fp32)."""
        return sum(shape.row_bytes for shape in self._cache_shapes.values()) if self.manifest.causal else 0

    def new_cache(self, max_length: int) -> Cache | None:
        """An empty cache for a session of at most that many positions; None for bidirectional models.

        Raises ContextLengthExceeded beyond the manifest's max_length.
        """
        if not 0 < max_length <= self.manifest.max_length:
            raise ContextLengthExceeded(
                f"{max_length} positions; {self.manifest.name} takes 1 to {self.manifest.max_length}",
                max_length=self.manifest.max_length,
            )
        if not self.manifest.causal:
            return None
        if self.execution == "stock":
            return StockCache(self._spliced.skeleton.config, self.span, max_length)
        return KvCache(self._cache_shapes, max_length)

    def forward(self, segments: Sequence[Segment]) -> list[torch.Tensor]:
        """Extend sessions by their segments' rows, all packed in one call.

        Returns for each segment the hidden rows (n, width) fp32 that leave the span, or on the last span of a model
        with output "logits" the fp32 logits (len(wanted), vocab). Canonical rows are the same bits however the rows
        were cut or packed. Raises BadTensor, BadPosition, ContextLengthExceeded before anything is changed; on any
        error the caches are as they were.
        """
        for segment in segments:
            self._check(segment)
        if len({id(segment.cache) for segment in segments if segment.cache}) < sum(bool(s.cache) for s in segments):
            raise BadPosition("two segments of one session in one call")
        before = [segment.cache.length if segment.cache else 0 for segment in segments]
        try:
            with flushing_denormals():
                return self._run(segments, logits=self._returns_logits)
        except BaseException:
            for segment, length in zip(segments, before, strict=True):
                if segment.cache is not None:
                    segment.cache.commit(max(length, segment.cache.length))
                    segment.cache.crop(length)
            raise

    def rows_between(self, segment: Segment) -> tuple[torch.Tensor, torch.Tensor]:
        """The hidden rows that enter the span's first layer and those that leave its last one, before any head.

        For publishing and the canary. The segment must fit one call; its cache is extended.
        """
        self._check(segment)
        with flushing_denormals():
            leaving = self._run([segment], logits=False, stop=True)[0]
        entered = self._spliced.passage.entered
        assert entered is not None
        return entered[0, : len(segment)] + 0.0, leaving

    def _check(self, segment: Segment) -> None:
        rows, manifest = segment.rows, self.manifest
        if self.is_first:
            if rows.dtype != torch.int64 or rows.ndim != 1:
                raise BadTensor("the first span takes token ids: one dimension, int64")
            if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < manifest.vocab:
                raise BadTensor(f"token ids run from 0 to {manifest.vocab - 1}", vocab=manifest.vocab)
        elif rows.dtype != torch.float32 or rows.ndim != 2 or rows.shape[1] != manifest.width:
            raise BadTensor(f"span {self.span} takes fp32 rows of width {manifest.width}", width=manifest.width)
        elif not bool(torch.isfinite(rows).all()):
            raise BadTensor("a hidden row holds NaN or infinity")
        if not len(segment):
            raise BadTensor("a segment without rows")
        wanted = list(segment.wanted or ())
        if wanted != sorted(set(wanted)) or (wanted and not 0 <= wanted[0] <= wanted[-1] < len(segment)):
            raise BadPosition(f"wanted are some of {len(segment)} rows, in ascending order")
        self._check_position(segment)

    def _check_position(self, segment: Segment) -> None:
        cache = segment.cache
        limit = self.manifest.max_length if cache is None else cache.max_length
        if self.manifest.causal != (cache is not None):
            raise BadPosition("causal models take a cache, bidirectional ones none")
        if segment.first != (cache.length if cache else 0):
            raise BadPosition(f"rows from {segment.first}; next is {cache.length if cache else 0}")
        if segment.first + len(segment) > limit:
            raise ContextLengthExceeded(f"{segment.first + len(segment)} positions; {limit} were agreed", limit=limit)
        types = segment.token_types
        if types is not None and (types.dtype != torch.int64 or types.shape != (len(segment),)):
            raise BadTensor("token types: one int64 for each row")
        if types is not None and len(types) and not 0 <= int(types.min()) <= int(types.max()) < self._num_types():
            raise BadTensor(f"token types run from 0 to {self._num_types() - 1}")

    def _num_types(self) -> int:
        return int(self.manifest.config.get("type_vocab_size") or 1)

    def _run(self, segments: Sequence[Segment], *, logits: bool, stop: bool = False) -> list[torch.Tensor]:
        outs: list[list[torch.Tensor]] = [[] for _ in segments]
        with torch.inference_mode():
            for parts in self._calls(segments):
                wanted = [wanted_in(segments[part.segment], part) for part in parts] if logits else None
                done = self._call(segments, parts, wanted, stop or not self.is_last)
                for part, out in zip(parts, done, strict=True):
                    outs[part.segment].append(out)
                    cache = segments[part.segment].cache
                    if cache is not None:
                        cache.commit(segments[part.segment].first + part.last)
        return [torch.cat(out) + 0.0 for out in outs]  # -0.0 + 0.0 is +0.0

    def _calls(self, segments: Sequence[Segment]) -> list[list[Part]]:
        if self.execution == "stock":
            return [[Part(index, 0, len(segment))] for index, segment in enumerate(segments)]
        for segment in segments:
            if isinstance(segment.cache, KvCache):
                segment.cache.reserve(segment.first + len(segment) + R - 1)
        return pack([len(segment) for segment in segments], divisible=self.manifest.causal)

    def _call(
        self, segments: Sequence[Segment], parts: list[Part], wanted: list[list[int]] | None, stop: bool
    ) -> list[torch.Tensor]:
        """One forward over the rows of `parts`; hidden rows, or the wanted rows' logits, of each."""
        spliced, passage = self._spliced, self._spliced.passage
        inputs, num_rows = self._inputs(segments, parts)
        passage.num_rows, passage.entered = num_rows, None
        flat = [] if wanted is None else offset_rows(parts, wanted)
        passage.stop = stop or (wanted is not None and not flat)
        if self.execution == "stock":
            self._prepare_stock(segments[parts[0].segment].cache, num_rows)
        else:
            spliced.batch.placed = place(segments, parts)
            spliced.batch.window_masks.clear()
            spliced.selection[:] = [torch.tensor(flat)] if flat else []
        try:
            with BlockwiseOperators() if self._scoped and self.execution == "canonical" else nullcontext():
                output = spliced.skeleton.model(**inputs)
        except Leave as leave:
            self._pass_rest(segments[parts[0].segment].cache, num_rows)
            if wanted is not None:
                return [leave.hidden.new_zeros(0, self.manifest.vocab) for _ in parts]
            return cut(leave.hidden[0], parts)
        if wanted is None:
            return cut(output.last_hidden_state[0], parts)
        rows = output.logits[0] if flat and spliced.selects else output.logits[0, flat]
        return list(rows.split([len(rows_of_part) for rows_of_part in wanted]))

    def _inputs(self, segments: Sequence[Segment], parts: list[Part]) -> tuple[dict[str, Any], int]:
        """The model's arguments for packed rows, and how many: few canonical rows travel with copies of themselves."""
        arguments = self._spliced.skeleton.arguments
        rows = torch.cat([segments[part.segment].rows[part.first : part.last] for part in parts])
        positions = torch.cat([torch.arange(part.first, part.last) + segments[part.segment].first for part in parts])
        types = token_types_of(segments, parts)
        if self.execution == "canonical" and len(rows) < MIN_ROWS:
            again = torch.arange(MIN_ROWS) % len(rows)
            rows, positions = rows[again], positions[again]
            types = None if types is None else types[again]
        num_rows = len(rows)
        self._spliced.passage.received = None if self.is_first else rows[None]
        inputs: dict[str, Any] = {
            "input_ids": rows[None] if self.is_first else torch.zeros(1, num_rows, dtype=torch.int64),
            "use_cache": False,
        }
        if "position_ids" in arguments:
            inputs["position_ids"] = positions[None]
        if types is not None and "token_type_ids" in arguments:
            inputs["token_type_ids"] = types[None]
        cache = segments[parts[0].segment].cache
        if isinstance(cache, StockCache):
            inputs |= {"past_key_values": cache.inner, "use_cache": True}
        return {name: value for name, value in inputs.items() if name in arguments}, num_rows

    def _prepare_stock(self, cache: Cache | None, num_rows: int) -> None:
        self._spliced.passage.passing = (
            (lambda index: cache.pass_layer(index, num_rows)) if isinstance(cache, StockCache) else None
        )

    def _pass_rest(self, cache: Cache | None, num_rows: int) -> None:
        if isinstance(cache, StockCache):
            cache.pass_rest(num_rows)
