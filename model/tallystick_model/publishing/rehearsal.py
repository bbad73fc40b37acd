"""What guarantees that a model is never served wrong: before it is published, a small random copy of it is run whole,
by transformers alone, and in spans, cut at its layers, and the two must agree.

The copy has the config's architecture, layers and switches; only sizes are cut down (`shrinking.py`). What it does not
show, by its nature, is a difference that needs the sizes.
"""

from __future__ import annotations

import json
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache

from tallystick_model.anatomy import Anatomy, dissect
from tallystick_model.architectures import model_class
from tallystick_model.canonical.kernels import flushing_denormals
from tallystick_model.config import build_config
from tallystick_model.loader import assemble, vocabulary
from tallystick_model.probe import ordinary_id
from tallystick_model.publishing.shrinking import shrink
from tallystick_model.publishing.trial import trial_manifest
from tallystick_model.segments import Segment
from tallystick_model.skeleton import BUILD_ERRORS, arguments_of, build_skeleton, named_weights
from tallystick_model.span import SpanModel
from tallystick_model.stock import is_recurrent
from tallystick_protocol.errors import ManifestError, TallystickError
from tallystick_protocol.types import Span

TOLERANCE = 1e-3
"""Difference allowed, relative to the output's standard deviation; rounding shows as 1e-5, a wrong cut as 1e-1."""

MAX_WEIGHTS = 1 << 26
MAX_CUTS = 12
CHUNKS = (9, 4, 1, 1)


def rehearse(config: dict[str, Any], architecture: str, labels: tuple[str, ...] = ()) -> None:
    """Raises ManifestError, naming what differs, for a model whose spans do not compute what the whole does."""
    _rehearse(json.dumps(config, sort_keys=True), architecture, labels)


@lru_cache(maxsize=64)
def _rehearse(config: str, architecture: str, labels: tuple[str, ...]) -> None:
    small, anatomy = _small_copy(json.loads(config), architecture, labels)
    with torch.random.fork_rng(devices=[]), torch.inference_mode(), flushing_denormals():
        torch.manual_seed(0)
        model = random_model(build_config(small), architecture, labels)
        ids = torch.randint(0, vocabulary(model.config), (sum(CHUNKS),))
        ids[ids == getattr(model.config, "pad_token_id", None)] = ordinary_id(model.config)
        try:
            expected = _whole(model, anatomy, ids)
            alone = _without_cache(model, anatomy, ids)
        except BUILD_ERRORS as error:
            raise ManifestError(f"{architecture} cannot be rehearsed: it fails with {_short(error)}") from None
        if not all(bool(torch.isfinite(rows).all()) for rows in expected):
            raise ManifestError(f"{architecture} cannot be rehearsed: random weights make it compute NaN")
        differs = float((torch.cat(expected) - alone).abs().max()) / _scale(alone)
        if not differs <= TOLERANCE:
            raise ManifestError(
                f"{architecture} cannot be served in sessions: in transformers itself rows behind cached ones differ "
                f"by {differs:.0e} from those of one run over all rows"
            )
        try:
            found = _in_spans(small, architecture, labels, anatomy, named_weights(model), ids)
        except (*BUILD_ERRORS, TallystickError) as error:
            raise ManifestError(f"{architecture} cannot be cut into spans: one fails with {_short(error)}") from None
    for step, (one, other) in enumerate(zip(found, expected, strict=True)):
        if one.shape != other.shape:
            raise ManifestError(f"{architecture} cannot be cut into spans: they return another shape than the whole")
        difference = float((one - other).abs().max()) / _scale(other)
        if not difference <= TOLERANCE:
            what = "the first rows" if step == 0 else "rows behind cached ones"
            raise ManifestError(
                f"{architecture} cannot be cut into spans: {what} differ from the whole model's by {difference:.0e}; "
                "its layers share more than what passes from one to the next"
            )


def _scale(rows: torch.Tensor) -> float:
    """The standard deviation of a model's output; the size of one that is a single number."""
    return float(rows.std() if rows.numel() > 1 else rows.abs()) or 1.0


def random_model(config: Any, architecture: str, labels: tuple[str, ...] = ()) -> Any:
    """A model of this config with random weights, livelier than at initialisation, so that every part shows."""
    if labels:
        config.num_labels = len(labels)
    model = model_class(config, architecture)(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if not bool(torch.isfinite(parameter).all()) or bool((parameter.abs() > 1e3).any()):
            parameter.normal_(0, 0.05)
        if parameter.ndim > 1:
            parameter.mul_(2.0)
        else:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def _small_copy(config: dict[str, Any], architecture: str, labels: tuple[str, ...]) -> tuple[dict[str, Any], Anatomy]:
    """A config that is small enough to be run whole, and its anatomy: the config itself if it is."""
    why = "too large"
    for values in (config, shrink(config, vocab=512), shrink(config)):
        try:
            skeleton = build_skeleton(values, architecture, labels)
            if sum(tensor.numel() for tensor in skeleton.weights().values()) <= MAX_WEIGHTS:
                return values, dissect(skeleton)
        except ManifestError as error:
            why = str(error)
    raise ManifestError(f"{architecture} cannot be rehearsed, since no small copy of it can be made: {why[:120]}")


def _whole(model: Any, anatomy: Anatomy, ids: torch.Tensor) -> list[torch.Tensor]:
    """The whole model's output rows for each step."""
    inputs: dict[str, Any] = {}
    first = ""
    if len(anatomy.streams) > 1:
        encoder = model.get_encoder()
        inputs["encoder_outputs"] = encoder(**_known(encoder, {"input_ids": ids[None, : CHUNKS[0]]}))
        first = "decoder_"
    if not anatomy.causal:
        return [_rows(model(**_known(model, {"input_ids": ids[None]})))]
    if anatomy.replayed:
        rows = _rows(model(**_known(model, {f"{first}input_ids": ids[None], "use_cache": False, **inputs})))
        return list(rows.split(list(CHUNKS)))
    cache: Any = DynamicCache(config=model.config)
    if first:
        cache = EncoderDecoderCache(cache, DynamicCache(config=model.config))
    found, at = [], 0
    names = arguments_of(model)
    cached = next(name for name in ("past_key_values", "cache_params") if name in names)
    rows_alone = is_recurrent(cache)
    for length in (CHUNKS[0], *([1] * sum(CHUNKS[1:]))) if rows_alone else CHUNKS:
        step = {
            f"{first}input_ids": ids[None, at : at + length],
            cached: cache,
            "use_cache": True,
            **inputs,
        }
        if at and anatomy.position_offset is not None:  # behind cached rows some models count from 0 unless told
            offset = 0 if first else anatomy.position_offset
            step[f"{first}position_ids"] = torch.arange(at, at + length)[None] + offset
        found.append(_rows(model(**_known(model, step))))
        at += length
    if rows_alone and anatomy.output != "label":
        found = list(torch.cat(found).split(list(CHUNKS)))
    elif rows_alone:
        found = [found[end - CHUNKS[0]] for end in accumulate(CHUNKS)]
    return found


def _without_cache(model: Any, anatomy: Anatomy, ids: torch.Tensor) -> torch.Tensor:
    """The whole model's output rows over all ids at once; a label's, which is of the last row alone, for each step."""
    first = "decoder_" if len(anatomy.streams) > 1 else ""
    inputs: dict[str, Any] = {"use_cache": False}
    if first:
        encoder = model.get_encoder()
        inputs["encoder_outputs"] = encoder(**_known(encoder, {"input_ids": ids[None, : CHUNKS[0]]}))
    ends = list(accumulate(CHUNKS)) if anatomy.output == "label" and anatomy.causal else [len(ids)]
    runs = [{f"{first}input_ids": ids[None, :end], **inputs} for end in ends]
    return torch.cat([_rows(model(**_known(model, run))) for run in runs])


def _known(module: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    names = arguments_of(module)
    return {name: value for name, value in inputs.items() if name in names}


def _rows(output: Any) -> torch.Tensor:
    if getattr(output, "start_logits", None) is not None:
        return torch.stack([output.start_logits[0], output.end_logits[0]], dim=1).float()
    logits = getattr(output, "logits", None)
    rows = output.last_hidden_state if logits is None else logits
    return (rows[0] if rows.ndim == 3 else rows).float()


def _in_spans(
    small: dict[str, Any],
    architecture: str,
    labels: tuple[str, ...],
    anatomy: Anatomy,
    weights: dict[str, torch.Tensor],
    ids: torch.Tensor,
) -> list[torch.Tensor]:
    spans: list[SpanModel] = []
    for stack in range(len(anatomy.streams)):
        for span in _cuts(anatomy.stack_span(stack)):
            skeleton = build_skeleton(small, architecture, labels)
            manifest = trial_manifest(small, architecture, labels, anatomy, vocabulary(skeleton.config))
            source = lambda piece, names: {name: weights[name] for name in names}  # noqa: E731
            spans.append(SpanModel(manifest, span, assemble(skeleton, anatomy, span, source, "stock"), "stock"))
    memory = None
    if anatomy.encoder_layers:
        memory = ids[: CHUNKS[0]]
        for model in spans[:]:
            if model.span.end <= anatomy.encoder_layers:
                memory = model.forward([Segment(None, 0, memory)])[0]
                spans.remove(model)
    caches = [model.new_cache(len(ids), memory) for model in spans]
    found, at = [], 0
    for length in CHUNKS if anatomy.causal else (len(ids),):
        rows = ids[at : at + length]
        for model, cache in zip(spans, caches, strict=True):
            rows = model.forward([Segment(cache, at, rows)])[0]
        found.append(rows)
        at += length
    return found


def _cuts(stack: Span) -> list[Span]:
    """A span for each layer, or MAX_CUTS of them."""
    count = min(MAX_CUTS, len(stack))
    bounds = [stack.start + index * len(stack) // count for index in range(count + 1)]
    return [Span(start, end) for start, end in pairwise(bounds)]


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
