"""Putting the canonical rules into a spliced model, while its weights come in.

Products (linear modules, experts) are packed piece by piece as they are filled. Where every operator has a rule, rows
of several sessions share calls ("packed"), attention goes through our tiles, and modules with operators of their own
run in scopes. Where not, every row of a causal model, and every one-shot segment, runs in a call of its own, with
transformers' attention and cache: the shapes of a row's call then depend on its position alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tallystick_model.anatomy import LINEAR_TYPES, Anatomy
from tallystick_model.canonical.attention import TiledSeat, attend_with, use_tallystick_attention
from tallystick_model.canonical.batch import Batch
from tallystick_model.canonical.experts import is_experts, pack_experts, use_tallystick_experts
from tallystick_model.canonical.kernels import BLOCK, BlockwiseActivation, CanonicalLinear
from tallystick_model.canonical.products import ENOUGH_ROWS
from tallystick_model.canonical.recording import Traits, whole
from tallystick_model.canonical.scopes import CanonicalOperators, CanonicalScope
from tallystick_model.skeleton import Skeleton, configs_of
from tallystick_protocol.manifest import Numerics
from tallystick_protocol.types import Span


class Canonical:
    """The rules for one span of a skeleton. batch, selection: what a packed call is told before it runs; fewest_rows:
    how many rows it should have at least.

    stock: only what the numerics asks for (rounded products); attention and operators stay transformers'.
    """

    def __init__(
        self, skeleton: Skeleton, anatomy: Anatomy, span: Span, numerics: Numerics, *, stock: bool = False
    ) -> None:
        self._skeleton, self._anatomy, self._span, self._numerics = skeleton, anatomy, span, numerics
        self.batch = Batch()
        self.selection: list[torch.Tensor] = []
        self.fewest_rows = ENOUGH_ROWS
        self.packs = not stock and not anatomy.obstacles
        one_shot = not anatomy.causal or (anatomy.encoder_layers > 0 and span.end <= anatomy.encoder_layers)
        self._scopes = self.packs or (one_shot and not stock)
        head = skeleton.model.get_output_embeddings()
        self._head = head if self.packs and type(head) in LINEAR_TYPES else None
        self.selects = self._head is not None
        self._filled: set[str] = set()
        for config in configs_of(skeleton.model):
            if self.packs:
                use_tallystick_attention(config)
            use_tallystick_experts(config)

    def fill(self, names: set[str]) -> None:
        """These weights are in place: pack every module that is complete; its plain weights are freed."""
        self._filled |= names
        for name, module in list(self._skeleton.model.named_modules()):
            own = {f"{name}.{leaf}" for leaf, held in module._parameters.items() if held is not None}
            if not own or not own & names or not own <= self._filled:
                continue
            if is_experts(module):
                pack_experts(module, self._numerics)
            elif type(module) in LINEAR_TYPES and not own & self._anatomy.exposed:
                packed: nn.Module = CanonicalLinear.of(module, self._numerics)
                self._replace(module, Selecting(packed, self.selection) if module is self._head else packed)
                module._parameters.clear()
            elif type(module) is nn.Embedding and self._numerics == "bf16w":
                self._replace(module, RoundedEmbedding(module.weight.detach()))

    def finish(self) -> CanonicalOperators | None:
        """All weights are in place. Returns the scope of the operators that the model's own forward calls, if any."""
        if self._scopes:
            self._put_scopes()
        if self.packs:
            products = [module for module in self._skeleton.model.modules() if isinstance(module, CanonicalLinear)]
            if products and self._anatomy.width <= BLOCK:  # one longer row alone is added up by several threads
                self.fewest_rows = max(product.fewest for product in products)
            for index in range(self._span.start, self._span.end):
                layer = self._anatomy.layers[index]
                assert layer.attention is not None
                seat = TiledSeat(index, layer.attention, self.batch)
                attend_with(self._skeleton.stack(layer.stack)[layer.module], seat)
        if not self._scopes or "" not in self._anatomy.scoped:
            return None
        return CanonicalOperators(dict(self._skeleton.model.named_parameters()))

    def usual_rows(self, count: int) -> int:
        """How many rows a call of so many has: few sizes below `ENOUGH_ROWS`, for each has a plan of its own."""
        return self.fewest_rows if count <= self.fewest_rows else max(count, ENOUGH_ROWS)

    def _put_scopes(self) -> None:
        inside = {}
        for layer in self._anatomy.layers:
            inside[f"{self._skeleton.stacks[layer.stack]}.{layer.module}."] = False
        for layer in self._anatomy.layers[self._span.start : self._span.end]:
            inside[f"{self._skeleton.stacks[layer.stack]}.{layer.module}."] = True
        for name in sorted(self._anatomy.scoped - {""}, key=len, reverse=True):
            if not all(here for prefix, here in inside.items() if (name + ".").startswith(prefix)):
                continue
            module = self._skeleton.model.get_submodule(name)
            fits = BlockwiseActivation.fits(module)
            self._replace(module, BlockwiseActivation(module) if fits else CanonicalScope(module))

    def _replace(self, old: nn.Module, new: nn.Module) -> None:
        """Wherever a module stands: grafts and shared activations stand in several places."""
        for owner in list(self._skeleton.model.modules()):
            for leaf, held in owner._modules.items():
                if held is old and owner is not new:
                    owner._modules[leaf] = new


class Selecting(nn.Module):
    """The head, for the rows that are wanted: (1, n, width) -> (1, len(selection), vocab)."""

    def __init__(self, inner: nn.Module, selection: list[torch.Tensor]) -> None:
        super().__init__()
        self.inner = inner
        self.__dict__["selection"] = selection

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(_chosen(self, x))
        return out


@whole(Traits(varies=True))
def _chosen(head: Selecting, x: torch.Tensor) -> torch.Tensor:
    selection: list[torch.Tensor] = head.__dict__["selection"]
    return x[:, selection[0]] if selection else x


class RoundedEmbedding(nn.Module):
    """A table kept in bf16, whose rows are handed out in fp32 (numerics "bf16w")."""

    weight: torch.Tensor

    def __init__(self, weight: torch.Tensor) -> None:
        """weight: (rows, width), as it is stored; it is copied."""
        super().__init__()
        self.register_buffer("weight", weight.to(torch.bfloat16, copy=True), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.weight).float()
