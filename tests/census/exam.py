"""The exam of one model type: spans against the whole model in transformers, in every way sessions are run."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import torch
import transformers
from torch import nn

from census.configs import NO_TEXT, Entry, tiny_config
from census.publishing import agrees, publishing_error
from census.whole import Whole
from tallystick_model.anatomy import Anatomy, dissect
from tallystick_model.canonical.kernels import flushing_denormals
from tallystick_model.config import checkpoint_config
from tallystick_model.ghosts import Leave
from tallystick_model.loader import assemble, vocabulary
from tallystick_model.publishing.rehearsal import random_model, rehearse
from tallystick_model.publishing.trial import trial_manifest
from tallystick_model.segments import Segment
from tallystick_model.skeleton import build_skeleton, named_weights
from tallystick_model.span import Execution, SpanModel
from tallystick_model.stock import StockCache
from tallystick_protocol.errors import TallystickError
from tallystick_protocol.types import Span

CLOSE = 2e-2
"""Relative difference, of the output's standard deviation, up to which a result counts as close and not as wrong."""

RUNS = {torch.float32: ((2, 5), (3, 20)), torch.bfloat16: ((2, 20),)}
"""How often, and how: {dtype: (spans, cached decode steps)...}."""

QUICK = {torch.float32: ((2, 2),)}
"""The same for a test that has little time."""

MEMORY_ROWS = 11


@dataclass(slots=True)
class Result:
    """result: "bitwise", "close", "wrong", "refused" or "unbuildable"; why: of all but the first.
    published: whether a saved checkpoint of it was published and served in spans.
    worst: {run: relative difference}, where it is not zero; crop: whether sessions can be rolled back.
    packs: whether rows of several sessions share calls, in canonical execution."""

    type: str
    task: str
    architecture: str
    result: str = "bitwise"
    why: str = ""
    layers: int = 0
    crop: bool = True
    canonical: bool = False
    canonical_why: str = ""
    packs: bool = False
    published: bool = False
    worst: dict[str, float] = field(default_factory=dict)


def examine(
    entry: Entry, runs: dict[torch.dtype, tuple[tuple[int, int], ...]] | None = None, *, publishing: bool = True
) -> dict[str, Any]:
    """Run the exam, all of it by default; never raises for a model that fails it."""
    found = _examine(entry, runs, publishing=publishing)
    if found.result in ("refused", "unbuildable") and entry.type in NO_TEXT:
        found.why = f"{NO_TEXT[entry.type]} ({found.why})"
    return asdict(found)


def _examine(entry: Entry, runs: dict[torch.dtype, tuple[tuple[int, int], ...]] | None, *, publishing: bool) -> Result:
    runs = runs or RUNS
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    result = Result(entry.type, entry.task, entry.architecture)
    try:
        config = tiny_config(entry)
        model = lively_model(config, entry)
    except Exception as error:
        result.result, result.why = "unbuildable", _short(error)
        return result
    try:
        values = checkpoint_config(config.to_dict())
        rehearse(values, entry.architecture)
        anatomy = _examine_stock(entry, values, model, torch.float32, result, runs)
        if torch.bfloat16 not in runs:
            pass
        elif _runs_in_bf16(entry, model):
            _examine_stock(entry, values, model, torch.bfloat16, result, runs)
        else:
            result.why = "transformers cannot run it in bf16: fp32 only"
        if publishing:
            distance = publishing_error(model, entry)
            result.published = agrees(distance)
            if not result.published:
                result.worst["published"] = distance
    except TallystickError as error:
        result.result, result.why = "refused", _short(error)
        return result
    except Exception as error:
        result.result, result.why = "wrong", f"{type(error).__name__}: {_short(error)}"
        return result
    differences = result.worst.values()
    if any(not value <= CLOSE for value in differences):
        result.result, result.why = "wrong", f"differs: {result.worst}"
    elif differences:
        result.result, result.why = "close", f"differs by {max(differences):.0e}: {', '.join(result.worst)}"
    if anatomy.replayed and anatomy.causal:
        result.why = f"no cache: each step computes all rows again. {result.why}".strip()
    try:
        _examine_canonical(entry, values, model, result, anatomy)
    except TallystickError as error:
        result.canonical_why = _short(error)
    except Exception as error:
        result.canonical_why = f"{type(error).__name__}: {_short(error)}"
    return result


def lively_model(config: Any, entry: Entry) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        return random_model(config, entry.architecture)


class Spans:
    """Spans of one model that cover it, cut at the given layers, and their sessions."""

    def __init__(
        self,
        values: dict[str, Any],
        entry: Entry,
        weights: dict[str, torch.Tensor],
        pieces: int,
        dtype: torch.dtype = torch.float32,
        execution: Execution = "stock",
        anatomy: Anatomy | None = None,
    ) -> None:
        skeleton = build_skeleton(values, entry.architecture, (), dtype)
        self.anatomy = anatomy or dissect(skeleton)
        self.vocab = vocabulary(skeleton.config)
        self.manifest = trial_manifest(values, entry.architecture, (), self.anatomy, self.vocab)
        self.spans: list[SpanModel] = []
        stacks = [self.anatomy.stack_span(stack) for stack in range(len(self.anatomy.streams))]
        for stack in stacks:
            for span in cut_evenly(stack, pieces):
                fresh = build_skeleton(values, entry.architecture, (), dtype)
                source = lambda piece, names: {name: weights[name].clone() for name in names}  # noqa: E731
                spliced = assemble(fresh, self.anatomy, span, source, execution)
                self.spans.append(SpanModel(self.manifest, span, spliced, execution))
        cut = stacks[0].end if len(stacks) > 1 else 0
        self.encoder = [span for span in self.spans if span.span.end <= cut]
        self.route = [span for span in self.spans if span.span.start >= cut]
        self.caches: list[Any] = []
        self.length = 0
        self.memory: torch.Tensor | None = None

    def encode(self, ids: torch.Tensor) -> torch.Tensor:
        rows = ids
        for span in self.encoder:
            rows = span.forward([Segment(None, 0, rows)])[0]
        self.memory = rows
        return rows[:, : self.anatomy.memory_width]

    def open(self) -> None:
        self.length = 0
        self.caches = [span.new_cache(512, self.memory) for span in self.route]

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        rows = ids
        for span, cache in zip(self.route, self.caches, strict=True):
            rows = span.forward([Segment(cache, self.length, rows)])[0]
        self.length += len(ids)
        return rows

    def crop(self, length: int) -> None:
        for cache in self.caches:
            cache.crop(length)
        self.length = length

    def batch(self, whole: Whole, ids: torch.Tensor, mask: torch.Tensor, memory_mask: Any) -> torch.Tensor:
        """A padded batch through every span's own forward, with the inputs that the whole model is given."""
        received = None
        for span, cache in zip(self.route, self.caches, strict=True):
            inputs = whole.inputs(ids, mask, memory_mask)
            if isinstance(cache, StockCache):
                inputs |= {name: cache.inner for name in ("past_key_values", "cache_params") if name in inputs}
            try:
                output = span.run_batch(inputs, ids.shape, received, cache)
            except Leave as leave:
                received = leave.streams
        if self.caches[0] is not None:
            for cache in self.caches:
                cache.commit(cache.length + ids.shape[1])
        logits = getattr(output, "logits", None)
        return output.last_hidden_state if logits is None else logits


def cut_evenly(stack: Span, pieces: int) -> list[Span]:
    count = min(pieces, len(stack))
    cuts = [stack.start + round(index * len(stack) / count) for index in range(count + 1)]
    return [Span(start, end) for start, end in pairwise(cuts)]


def _examine_stock(
    entry: Entry, values: dict[str, Any], model: Any, dtype: torch.dtype, result: Result, runs: dict[torch.dtype, Any]
) -> Any:
    reference = model
    weights = {name: tensor.detach() for name, tensor in named_weights(model).items()}
    if dtype is not torch.float32:
        reference = in_dtype(entry, model, dtype)
    anatomy = None
    for pieces, steps in runs[dtype]:
        spans = Spans(values, entry, weights, pieces, dtype, anatomy=anatomy)
        anatomy = spans.anatomy
        result.layers = len(spans.anatomy.layers)
        seq2seq = bool(spans.encoder)
        whole = Whole(reference, seq2seq=seq2seq, causal=spans.route[0].causal,
                      offset=spans.anatomy.position_offset, replayed=spans.anatomy.replayed)  # fmt: skip
        check = _Comparison(result, f"{'fp32' if dtype is torch.float32 else 'bf16'} {pieces} spans")
        with torch.inference_mode(), flushing_denormals():
            _run(spans, whole, check, result, steps)
    return anatomy


def _runs_in_bf16(entry: Entry, model: Any) -> bool:
    """Whether the whole model runs in bf16 at all."""
    ids = torch.arange(8, 31)[None]
    inputs = {"input_ids": ids, "decoder_input_ids": ids} if model.config.is_encoder_decoder else {"input_ids": ids}
    try:
        with torch.inference_mode():
            in_dtype(entry, model, torch.bfloat16)(**inputs)
    except (RuntimeError, ValueError):
        return False
    return True


def in_dtype(entry: Entry, model: Any, dtype: torch.dtype) -> Any:
    """The model as transformers would load it in another dtype: buffers made in it, some weights kept in fp32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        other = getattr(transformers, entry.architecture)(tiny_config(entry)).eval()
    finally:
        torch.set_default_dtype(before)
    source = named_weights(model)
    kept = other._keep_in_fp32_modules_strict or ()
    with torch.no_grad():
        for name, tensor in named_weights(other).items():
            fp32 = any(re.search(rf"(^|\.){part}(\.|$)", name) for part in kept)
            value = source[name].to(torch.float32 if fp32 else (dtype if tensor.is_floating_point() else tensor.dtype))
            owner, _, leaf = name.rpartition(".")
            module = other.get_submodule(owner)
            if leaf in module._parameters:
                module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
            else:
                module._buffers[leaf] = value
    return other


class _Comparison:
    def __init__(self, result: Result, prefix: str) -> None:
        self._result, self._prefix = result, prefix

    def __call__(self, what: str, found: torch.Tensor, expected: torch.Tensor, rows: Any = None) -> None:
        found, expected = found.float() + 0.0, expected.float() + 0.0
        if rows is not None:
            found, expected = found[rows], expected[rows]
        if found.shape != expected.shape:
            raise ValueError(f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
        if not torch.equal(found, expected):
            scale = float(expected.std()) or 1.0
            self._result.worst[f"{self._prefix} {what}"] = float((found - expected).abs().max()) / scale


def _run(spans: Spans, whole: Whole, check: Callable[..., None], result: Result, steps: int) -> None:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(8, min(spans.vocab, 300), (80,), generator=generator)
    if whole.seq2seq:
        check("encoder", spans.encode(ids[:MEMORY_ROWS]), whole.encode(ids[None, :MEMORY_ROWS])[0])
    spans.open()
    whole.open()
    check("plain", spans.step(ids[:23]), whole.step(ids[None, :23])[0])
    if whole.causal:
        _run_session(spans, whole, check, result, ids, steps)
    _run_batch(spans, whole, check, ids)


def _run_session(
    spans: Spans, whole: Whole, check: Callable[..., None], result: Result, ids: torch.Tensor, steps: int
) -> None:
    spans.open()
    whole.open()
    at = 0
    for length in (7, 12, 4):
        check("chunks", spans.step(ids[at : at + length]), whole.step(ids[None, at : at + length])[0])
        at += length
    for _ in range(steps):
        check("decode", spans.step(ids[at : at + 1]), whole.step(ids[None, at : at + 1])[0])
        at += 1
    spans.open()
    whole.open()
    if hasattr(whole.cache, "activate_past_recording"):
        _record_past(whole.cache)
    spans.step(ids[:15])
    whole.step(ids[None, :15])
    try:
        spans.crop(9)
    except RuntimeError:
        result.crop = False
        return
    whole.crop(9)
    check("crop", spans.step(ids[40:46]), whole.step(ids[None, 40:46])[0])
    check("crop", spans.step(ids[46:47]), whole.step(ids[None, 46:47])[0])


def _record_past(cache: Any) -> None:
    for layer in getattr(cache, "self_attention_cache", cache).layers:
        if hasattr(layer, "activate_past_recording"):
            layer.activate_past_recording()


def _run_batch(spans: Spans, whole: Whole, check: Callable[..., None], ids: torch.Tensor) -> None:
    length, padding = 13, 4
    rows = torch.stack([ids[:length], ids[20 : 20 + length]])
    mask = torch.ones(2, length + 2, dtype=torch.int64)
    if whole.causal and not whole.seq2seq:
        mask[1, :padding] = 0
        rows[1, :padding] = getattr(whole.model.config, "pad_token_id", None) or 0
    elif not whole.seq2seq:
        mask = mask[:, :length].clone()
        mask[1, -padding:] = 0
    memory_mask = None
    if whole.seq2seq:
        memory_mask = torch.ones(2, MEMORY_ROWS, dtype=torch.int64)
        memory_mask[1, -padding:] = 0
        whole.encode(torch.stack([ids[:MEMORY_ROWS], ids[50 : 50 + MEMORY_ROWS]]), memory_mask)
    spans.open()
    whole.open()
    kept = mask[:, :length].bool()
    check("batch", spans.batch(whole, rows, mask, memory_mask), whole.step(rows, mask, memory_mask), kept)
    if whole.causal and not whole.replayed:
        for at in range(length, length + 2):
            one = ids[at : at + 1].expand(2, 1)
            check("batch", spans.batch(whole, one, mask, memory_mask), whole.step(one, mask, memory_mask))


def _examine_canonical(entry: Entry, values: dict[str, Any], model: Any, result: Result, anatomy: Anatomy) -> None:
    """Decode, chunks and one prefill: the same bits; and those of the whole model up to noise."""
    weights = {name: tensor.detach() for name, tensor in named_weights(model).items()}
    spans = Spans(values, entry, weights, 2, execution="canonical", anatomy=anatomy)
    whole = Whole(model, seq2seq=bool(spans.encoder), causal=spans.route[0].causal,
                      offset=spans.anatomy.position_offset, replayed=spans.anatomy.replayed)  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(8, min(spans.vocab, 300), (30,), generator=generator)
    with torch.inference_mode(), flushing_denormals():
        if spans.encoder:
            spans.encode(ids[:MEMORY_ROWS])
            whole.encode(ids[None, :MEMORY_ROWS])
        spans.open()
        whole.open()
        prefill = spans.step(ids)
        expected = whole.step(ids[None])[0].float()
        error = float((prefill - expected).abs().max()) / (float(expected.std()) or 1.0)
        if not error <= 1e-3:
            result.canonical_why = f"differs from transformers by {error:.0e}"
            return
        if whole.causal:
            spans.open()
            chunks = torch.cat([spans.step(chunk) for chunk in ids.split([7, 1, 1, 12, 1, 8])])
            if not torch.equal(chunks, prefill):
                result.canonical_why = "chunks and prefill differ"
                return
    result.canonical = True
    result.packs = not anatomy.obstacles


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]
