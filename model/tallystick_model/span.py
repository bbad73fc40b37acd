"""A span of layers, loaded: the seam between a model and whoever serves it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch

from tallystick_model.anatomy import Anatomy
from tallystick_model.canonical.cache import CacheShape, KvCache
from tallystick_model.canonical.execution import Canonical
from tallystick_model.canonical.joining import join, joinable
from tallystick_model.canonical.kernels import CanonicalLinear, flushing_denormals
from tallystick_model.canonical.packing import Part, pack
from tallystick_model.canonical.scopes import CanonicalOperators
from tallystick_model.canonical.tiles import R
from tallystick_model.devices import CPU, Placement, moved
from tallystick_model.ghosts import Leave, Passage
from tallystick_model.memory import all_finite
from tallystick_model.plans import Key, Plan, write_plans
from tallystick_model.probe import ordinary_id
from tallystick_model.replay import ReplayCache
from tallystick_model.segments import (
    Cache,
    Segment,
    cut,
    offset_rows,
    only_last,
    place,
    roll_back,
    token_types_of,
    wanted_in,
    whole_or_rows,
)
from tallystick_model.skeleton import Skeleton, arguments_of
from tallystick_model.stock import StockCache
from tallystick_model.streams import pack_rows, unpack_rows
from tallystick_protocol.errors import BadPosition, BadTensor, ContextLengthExceeded
from tallystick_protocol.manifest import Manifest, Output
from tallystick_protocol.types import Span

Execution = Literal["canonical", "stock"]


@dataclass(slots=True)
class Spliced:
    """A skeleton with a span spliced in and its weights in place.

    rules: the canonical ones, if any; operators: the scope of those that the model's own forward calls.
    plans: for spans of it, how their forwards were written down.
    """

    skeleton: Skeleton
    anatomy: Anatomy
    passage: Passage
    rules: Canonical | None
    operators: CanonicalOperators | None
    plans: dict[Span, dict[Key, Plan]] = field(default_factory=dict)


class SpanModel:
    """Layers [start, end) of a model, with embedding and head at its ends. Not for several threads at once."""

    def __init__(self, manifest: Manifest, span: Span, spliced: Spliced, execution: Execution) -> None:
        self.manifest = manifest
        self.span = span
        self.execution: Execution = execution
        self.is_first = manifest.takes_ids(span)
        self.is_last = manifest.is_result(span)
        self.causal = manifest.is_causal(span)
        self._spliced = spliced
        anatomy = spliced.anatomy
        self._stack_number = anatomy.layers[span.start].stack
        self._stack = anatomy.stack_span(self._stack_number)
        self._output: Output | None = manifest.output_of(span) if self.is_last else None
        self._runner = spliced.skeleton.runner(self._stack_number)
        self._arguments = arguments_of(self._runner)
        self._entering = anatomy.crossing(span.start, self._stack_number)
        self._leaving = anatomy.crossing(span.end, self._stack_number)
        self._ordinary_id = ordinary_id(spliced.skeleton.config)
        self._packs = spliced.rules is not None and spliced.rules.packs
        self._plans = spliced.plans.setdefault(span, {})
        shapes = {index: spliced.anatomy.layers[index].attention for index in range(span.start, span.end)}
        self._cache_shapes = {
            index: CacheShape(plan.groups, plan.key_dim, plan.value_dim) for index, plan in shapes.items() if plan
        }

    @property
    def placement(self) -> Placement:
        """Where the layers are."""
        return self._spliced.passage.placement

    @property
    def packs(self) -> bool:
        """Whether rows of several sessions share calls."""
        return self._packs

    @property
    def cache_shapes(self) -> Mapping[int, CacheShape]:
        """What a position takes in the cache of each layer whose attention there is a rule for."""
        return self._cache_shapes

    @property
    def row_bytes(self) -> int:
        """Cache bytes that one position of a session takes in this span (fp32)."""
        return sum(shape.row_bytes for shape in self._cache_shapes.values()) if self.causal else 0

    def new_cache(self, max_length: int, memory: torch.Tensor | None = None) -> Cache | None:
        """An empty cache for a session of at most that many positions; None for bidirectional models and encoders.

        memory: (m, width) fp32, what the encoder's last span returned, for spans of its decoder.
        Raises ContextLengthExceeded beyond the manifest's max_length, BadTensor for a memory that does not fit.
        """
        if not 0 < max_length <= self.manifest.max_length:
            raise ContextLengthExceeded(
                f"{max_length} positions; {self.manifest.name} takes 1 to {self.manifest.max_length}",
                max_length=self.manifest.max_length,
            )
        remembered = self._check_memory(memory)
        if not self.causal:
            return None
        if self._spliced.anatomy.replayed and not self._packs:
            return ReplayCache(max_length, remembered)
        if not self._packs:
            skipped = self._spliced.anatomy.skipped
            return StockCache(self._spliced.skeleton.config, max_length, remembered, skipped)
        devices = {index: self.placement.of_layer(index) for index in self._cache_shapes}
        return KvCache(self._cache_shapes, max_length, devices)

    def _check_memory(self, memory: torch.Tensor | None) -> torch.Tensor | None:
        """(1, m, the encoder's own width), in the dtype that layers compute in."""
        if (memory is not None) != (self._stack_number > 0):
            raise BadTensor("spans of a decoder take the encoder's output when a session opens, others take none")
        if memory is None:
            return None
        if memory.dtype != torch.float32 or memory.ndim != 2 or memory.shape[1] != self.manifest.width:
            raise BadTensor(f"an encoder's output is fp32 rows of width {self.manifest.width}")
        if not 0 < len(memory) <= self.manifest.max_length or not bool(torch.isfinite(memory).all()):
            raise BadTensor(f"an encoder's output has 1 to {self.manifest.max_length} rows, all finite")
        anatomy = self._spliced.anatomy
        return memory[None, :, : anatomy.memory_width].to(self.placement.first, anatomy.ends[0].dtype)

    def forward(self, segments: Sequence[Segment]) -> list[torch.Tensor]:
        """Extend sessions by their segments' rows, all packed in one call.

        Returns for each segment the hidden rows (n, width) fp32 that leave the span; on the last span what the
        manifest's output says: fp32 logits (len(wanted), vocab), scores (len(wanted), labels), or a label's scores
        (1, labels) where the segment's last row is wanted and (0, labels) where it is not.
        Canonical rows are the same bits however the rows were cut or packed.

        Raises BadTensor, BadPosition, ContextLengthExceeded before anything is changed; on any error the caches are as
        they were, or, where a recurrent state cannot be rolled back, refuse further steps.
        """
        for segment in segments:
            self._check(segment)
        if len({id(segment.cache) for segment in segments if segment.cache}) < sum(bool(s.cache) for s in segments):
            raise BadPosition("two segments of one session in one call")
        before = [segment.cache.length if segment.cache else 0 for segment in segments]
        try:
            with flushing_denormals():
                return self._run(segments, output=self._output)
        except BaseException:
            for segment, length in zip(segments, before, strict=True):
                if segment.cache is not None:
                    roll_back(segment.cache, length)
            raise

    def prepare(self) -> bool:
        """Write the span's forward down as plans (`plans.py`): the same bits with fewer calls. Says whether it can be.

        Computes a few hundred rows. Without plans the model's own forward goes on to run.
        """
        self._plans.clear()
        if self._packs and not self._spliced.passage.spread:
            with flushing_denormals(), torch.inference_mode():
                found = write_plans(self)
            self._plans.clear()
            self._plans |= found
        return bool(self._plans)

    def joins(self) -> list[Callable[[], bool]]:
        """What makes planned calls quicker still, each of one layer at most: products of the same rows become one, with
        the same bits. Each says whether it could be.
        """

        def work(group: list[CanonicalLinear]) -> bool:
            with flushing_denormals():
                done = join(group)
            for plans in self._spliced.plans.values():
                for plan in plans.values():
                    plan.program.forget()
            return done

        groups = joinable(plan.program.steps for plan in self._plans.values())
        return [partial(work, group) for group in groups]

    def rows_between(self, segment: Segment) -> tuple[torch.Tensor, torch.Tensor]:
        """The hidden rows that enter the span's first layer and those that leave its last one, before any head.

        For publishing and the canary. The segment's cache is extended.
        """
        self._check(segment)
        entered: list[torch.Tensor] = []
        with flushing_denormals():
            leaving = self._run([segment], output=None, stop=True, entered=entered)[0]
        return torch.cat(entered) + 0.0, leaving

    def entering(self, ids: torch.Tensor, first: int = 0, token_types: torch.Tensor | None = None) -> torch.Tensor:
        """The embedding's output for token ids from position `first` on, (n, width) fp32, as it enters the first layer.

        Of spans that take ids. No session's cache is touched. Unless sessions share calls (`packs`), first is 0.
        """
        segment, spliced = Segment(None, first, ids, token_types=token_types), self._spliced
        parts = [Part(0, 0, len(ids))]
        rules, passage, anatomy = spliced.rules, spliced.passage, spliced.anatomy
        with flushing_denormals(), torch.inference_mode():
            inputs, num_rows = self._inputs([segment], parts)
            if self._stack_number > 0:  # the encoder's states are for the layers
                blank = torch.zeros(1, 1, anatomy.memory_width, dtype=anatomy.ends[0].dtype)
                inputs["encoder_outputs"] = anatomy.memory_type(last_hidden_state=blank)
            if rules is not None and rules.packs:
                rules.batch.begin(place([segment], parts))
                rules.selection[:] = []
            passage.peeks = True
            try:
                with spliced.operators or nullcontext():
                    self.run_model(inputs, num_rows)
            except Leave as leave:
                rows = pack_rows(self._entering[:1], moved(leave.streams, CPU), self.manifest.width)
                return rows[: len(ids)] + 0.0
            finally:
                passage.peeks = False
        raise BadPosition(f"layers {self.span} were never entered")

    def _check(self, segment: Segment) -> None:
        rows, manifest = segment.rows, self.manifest
        if self.is_first:
            if rows.dtype != torch.int64 or rows.ndim != 1:
                raise BadTensor("the first span takes token ids: one dimension, int64")
            if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < manifest.vocab:
                raise BadTensor(f"token ids run from 0 to {manifest.vocab - 1}", vocab=manifest.vocab)
        elif rows.dtype != torch.float32 or rows.ndim != 2 or rows.shape[1] != manifest.width:
            raise BadTensor(f"span {self.span} takes fp32 rows of width {manifest.width}", width=manifest.width)
        elif not all_finite(rows):
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
        if self.causal != (cache is not None):
            raise BadPosition("causal models take a cache, bidirectional ones none")
        if isinstance(cache, StockCache) and cache.lost:
            raise BadPosition("a step of this session failed halfway and cannot be taken back: open a new session")
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

    def _run(
        self,
        segments: Sequence[Segment],
        *,
        output: Output | None,
        stop: bool = False,
        entered: list[torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        outs: list[list[torch.Tensor]] = [[] for _ in segments]
        with torch.inference_mode():
            for parts in self._calls(segments):
                rowwise = output in ("logits", "scores", "label")
                wanted = [wanted_in(segments[part.segment], part) for part in parts] if rowwise else None
                if wanted is not None and output == "label":
                    wanted = only_last(segments, parts, wanted)
                done = self._call(segments, parts, wanted, stop)
                if entered is not None:
                    seen = moved(self._spliced.passage.entered, CPU)  # behind ids, the hidden state alone
                    rows = pack_rows(self._entering[: len(seen)], seen, self.manifest.width)
                    count = sum(len(part) for part in parts)
                    again = isinstance(segments[parts[0].segment].cache, ReplayCache)
                    entered.append(rows[-count:] if again else rows[:count])
                for part, out in zip(parts, done, strict=True):
                    outs[part.segment].append(out)
                    cache = segments[part.segment].cache
                    if cache is not None:
                        cache.commit(segments[part.segment].first + part.last)
        return [(torch.cat(out) if len(out) > 1 else out[0]) + 0.0 for out in outs]  # -0.0 + 0.0 is +0.0

    def _calls(self, segments: Sequence[Segment]) -> list[list[Part]]:
        numbered = list(enumerate(segments))
        if self.execution == "stock" or (not self._packs and not self.causal):
            return [[part] for index, segment in numbered for part in whole_or_rows(index, segment)]
        if not self._packs:  # a row's call then has the shapes of its position, whoever travels with it
            return [[Part(index, row, row + 1)] for index, segment in numbered for row in range(len(segment))]
        for segment in segments:
            if isinstance(segment.cache, KvCache):
                segment.cache.reserve(segment.first + len(segment) + R - 1)
        lengths = [len(segment) for segment in segments]
        if self._output == "label":  # the head takes one row of a whole call
            alone = [pack([length], divisible=self.causal) for length in lengths]
            calls = [(index, call) for index, own in enumerate(alone) for call in own]
            return [[replace(part, segment=index) for part in call] for index, call in calls]
        return pack(lengths, divisible=self.causal)

    def _call(
        self, segments: Sequence[Segment], parts: list[Part], wanted: list[list[int]] | None, stop: bool
    ) -> list[torch.Tensor]:
        """One forward over the rows of `parts`; hidden rows, or the wanted rows' logits, of each."""
        spliced, passage = self._spliced, self._spliced.passage
        cache = segments[parts[0].segment].cache
        inputs, num_rows = self._inputs(segments, parts)
        flat = [] if wanted is None else offset_rows(parts, wanted)
        passage.stop = stop or (wanted is not None and not flat)
        rules = spliced.rules
        if rules is not None and rules.packs:
            rules.batch.begin(place(segments, parts))
            rules.selection[:] = [torch.tensor(flat)] if flat else []
        plan = None if stop else self._plans.get((passage.stop, *inputs))
        try:
            if plan is not None:
                output = plan.run([*inputs.values(), *(passage.received or ())], num_rows, len(flat))
            else:
                with spliced.operators or nullcontext():
                    output = self.run_model(inputs, num_rows, cache)
        except Leave as leave:
            if wanted is not None:
                return [torch.zeros(0, self._output_width()) for _ in parts]
            rows = pack_rows(self._leaving, moved(leave.streams, CPU), self.manifest.width)
            return cut(rows[num_rows - len(parts[0]) :] if isinstance(cache, ReplayCache) else rows, parts)
        before = num_rows - len(parts[0]) if isinstance(cache, ReplayCache) else 0
        if wanted is None:
            return cut(self._widened(output.last_hidden_state[0, before:].float()).to(CPU), parts)
        if self._output == "label":
            return [output.logits.float().to(CPU)]
        flat = [before + row for row in flat]
        if getattr(output, "start_logits", None) is not None:
            scores = torch.stack([output.start_logits[0], output.end_logits[0]], dim=1)[flat]
        else:
            scores = output.logits[0] if flat and rules is not None and rules.selects else output.logits[0, flat]
        return list(scores.float().to(CPU).split([len(rows_of_part) for rows_of_part in wanted]))

    def run_model(self, inputs: dict[str, Any], num_rows: int, cache: Cache | None = None) -> Any:
        """One forward of the spliced model. Raises `Leave` with the streams where the span ends before the model."""
        passage = self._spliced.passage
        if passage.spread:
            inputs, passage.received = moved((inputs, passage.received), passage.placement.first)
        passage.num_rows, passage.entered = num_rows, []
        passage.begin(self._stack.start, self.span)
        if not isinstance(cache, StockCache):
            return self._runner(**inputs)
        cache.begin()
        try:
            output = self._runner(**inputs)
        except Leave:
            cache.pass_rest(num_rows)
            raise
        cache.pass_rest(num_rows)
        return output

    def run_batch(
        self,
        inputs: dict[str, Any],
        shape: tuple[int, ...],
        received: list[torch.Tensor] | None,
        cache: StockCache | None,
    ) -> Any:
        """One stock forward over a batch of sessions of equal, perhaps padded, length: no rows, no checks.

        inputs: the model's own; shape: (batch, n); received: the streams that the span before left with; cache: of the
        whole batch, to be committed by the caller. Returns the model's output; raises `Leave` where the span ends
        before the model.
        """
        self._spliced.passage.batch, self._spliced.passage.received = shape[0], received
        known = {name: value for name, value in inputs.items() if name in self._arguments}
        try:
            return self.run_model(known, shape[1], cache)
        finally:
            self._spliced.passage.batch = 1

    def _widened(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(rows, (0, self.manifest.width - rows.shape[1]))

    def _output_width(self) -> int:
        return len(self.manifest.labels) or self.manifest.vocab

    def _inputs(self, segments: Sequence[Segment], parts: list[Part]) -> tuple[dict[str, Any], int]:
        """The model's arguments for packed rows, and how many: few canonical rows travel with copies of themselves."""
        given = [segments[part.segment].rows[part.first : part.last] for part in parts]
        places = [segments[part.segment].first + row for part in parts for row in range(part.first, part.last)]
        types = token_types_of(segments, parts)
        rules = self._spliced.rules
        missing = rules.usual_rows(len(places)) - len(places) if rules is not None and rules.packs else 0
        if missing > 0:
            given += [given[-1][-1:]] * missing
            places += places[-1:] * missing
            types = None if types is None else torch.cat([types, *[types[-1:]] * missing])
        rows, positions = torch.cat(given), torch.tensor(places)
        cache = segments[parts[0].segment].cache
        if isinstance(cache, ReplayCache):
            rows = cache.with_rows(segments[parts[0].segment].first + parts[0].first, rows)
            positions = torch.arange(len(rows))
        received = None if self.is_first else unpack_rows(self._entering, rows)
        self._spliced.passage.received = received
        ids = rows[None] if self.is_first else torch.full((1, len(rows)), self._ordinary_id)
        return self.arguments(ids, positions[None], types, None if isinstance(cache, KvCache) else cache), len(rows)

    def arguments(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        types: torch.Tensor | None,
        cache: StockCache | ReplayCache | None,
    ) -> dict[str, Any]:
        """What the model's forward is given: ids and positions (batch, n), of the rows behind those in the cache."""
        first = "decoder_" if self._stack_number > 0 else ""
        inputs: dict[str, Any] = {f"{first}input_ids": ids, "use_cache": False}
        offset = 0 if self._stack_number > 0 else self._spliced.anatomy.position_offset
        if offset is not None:
            inputs[f"{first}position_ids"] = positions + offset
        if types is not None:
            inputs["token_type_ids"] = types[None]
        if self._spliced.anatomy.masked:
            before = cache.length if isinstance(cache, StockCache) else 0
            inputs[f"{first}attention_mask"] = torch.ones(len(ids), before + ids.shape[1], dtype=torch.int64)
        if isinstance(cache, StockCache):
            inputs |= {"past_key_values": cache.inner, "cache_params": cache.inner, "use_cache": True}
        if cache is not None and cache.memory is not None:
            inputs["encoder_outputs"] = self._spliced.anatomy.memory_type(last_hidden_state=cache.memory)
        return {name: value for name, value in inputs.items() if name in self._arguments}
