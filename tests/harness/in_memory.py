"""Spans of small random models without publishing: what a checkpoint's folder would give, straight from the model."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import Any

import torch

from tallystick_model.anatomy import dissect
from tallystick_model.config import checkpoint_config
from tallystick_model.loader import assemble, vocabulary
from tallystick_model.publishing.trial import trial_manifest
from tallystick_model.segments import Cache, Segment
from tallystick_model.skeleton import build_skeleton, named_weights
from tallystick_model.span import Execution, SpanModel
from tallystick_protocol.manifest import Numerics
from tallystick_protocol.types import Span

SMALL: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 72, "intermediate_size": 100, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
"""Odd on purpose: heads of 12, a width that is no multiple of a vector."""


class InMemory:
    """A random model of transformers, `whole`, and spans of it."""

    def __init__(self, cls: Any, config: Any, numerics: Numerics = "fp32") -> None:
        torch.manual_seed(0)
        whole = cls(copy.deepcopy(config)).eval()
        with torch.no_grad():
            for parameter in whole.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(2.0)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        self._take(whole, config, numerics)

    @classmethod
    def of(cls, whole: Any, numerics: Numerics = "fp32") -> InMemory:
        """Spans of a model that was loaded, in fp32."""
        found = cls.__new__(cls)
        found._take(whole.eval(), whole.config, numerics)
        return found

    def _take(self, whole: Any, config: Any, numerics: Numerics) -> None:
        self._values = checkpoint_config(config.to_dict())
        self._architecture = type(whole).__name__
        self.whole = whole
        self._weights = {name: tensor.detach() for name, tensor in named_weights(self.whole).items()}
        skeleton = self._skeleton()
        self.anatomy = dissect(skeleton)
        manifest = trial_manifest(self._values, self._architecture, (), self.anatomy, vocabulary(skeleton.config))
        self.manifest = replace(manifest, numerics=numerics)
        self.decoder = self.anatomy.stack_span(len(self.anatomy.streams) - 1)
        """The layers that results come from: the decoder's, or all."""

    def _skeleton(self) -> Any:
        return build_skeleton(self._values, self._architecture)

    def load(self, span: Span, execution: Execution = "canonical") -> SpanModel:
        def source(piece: str, wanted: tuple[str, ...]) -> dict[str, torch.Tensor]:
            return {name: self._weights[name].clone() for name in wanted}

        spliced = assemble(self._skeleton(), self.anatomy, span, source, execution, self.manifest.numerics)
        return SpanModel(self.manifest, span, spliced, execution)

    def cut(self, *cuts: int, stack: int = -1) -> list[SpanModel]:
        """Spans of one stack (the last one), cut behind that many of its layers."""
        whole = self.anatomy.stack_span(stack % len(self.anatomy.streams))
        ends = [whole.start, *(whole.start + cut for cut in cuts), whole.end]
        return [self.load(Span(first, last)) for first, last in itertools.pairwise(ends)]

    def encode(self, ids: torch.Tensor, *cuts: int) -> torch.Tensor:
        """What the encoder's spans return."""
        rows = ids
        for span in self.cut(*cuts, stack=0):
            rows = span.forward([Segment(None, 0, rows)])[0]
        return rows


class Steps:
    """One session through a route of spans."""

    def __init__(self, spans: list[SpanModel], memory: torch.Tensor | None = None) -> None:
        self.spans = spans
        self.caches: list[Cache | None] = [span.new_cache(512, memory) for span in spans]
        self.length = 0

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        rows = ids
        for span, cache in zip(self.spans, self.caches, strict=True):
            rows = span.forward([Segment(cache, self.length, rows)])[0]
        self.length += len(ids)
        return rows

    def steps(self, ids: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        return torch.cat([self.step(chunk) for chunk in ids.split(lengths)])
