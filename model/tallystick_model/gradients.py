"""A span's forward and backward pass over one whole sequence, for clients that tune prompts or adapters.

The span's own weights stay as they are. What gets gradients is the client's: the rows that enter the span, and
low-rank adapters on its linear modules (Hu et al. 2021): y = W x + B A x, with A (r, in) and B (out, r). Nothing is
kept between calls: a backward pass runs the forward pass again.

Products run through the same kernels as served sessions; attention and masks are transformers' own, so a row's bits
may differ from a session's in the last places.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tallystick_model.canonical.experts import ExpertProducts
from tallystick_model.canonical.kernels import CanonicalLinear, flushing_denormals
from tallystick_model.devices import CPU, moved
from tallystick_model.ghosts import Leave, hidden_of
from tallystick_model.skeleton import configs_of
from tallystick_model.span import SpanModel
from tallystick_model.streams import pack_rows, unpack_rows
from tallystick_protocol.errors import BadTensor, ContextLengthExceeded, Rejected

Hidden = Literal["none", "last", "all"]
"""Hidden states that a forward pass returns besides: none, the rows that enter the head, or every layer's input too."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """A low-rank change of one linear module: a (r, in), b (out, r), fp32; y = W x + b a x."""

    a: torch.Tensor
    b: torch.Tensor


@dataclass(frozen=True, slots=True)
class Passed:
    """What a forward pass returns.

    rows: (n, width) that leave the span, or of the last span the logits (keep or n, vocab). hidden: (k, n, width), the
    inputs of the span's layers ("all") and on the last span what enters the head ("last", "all"); k may be 0.
    """

    rows: torch.Tensor
    hidden: torch.Tensor


@dataclass(frozen=True, slots=True)
class Gradients:
    """rows: (n, width), or None where token ids entered. adapters: the same names and shapes as were given."""

    rows: torch.Tensor | None
    adapters: dict[str, Adapter]


class SpanGradients:
    """Differentiable passes over a loaded span. On the thread that runs the span, never beside it."""

    def __init__(self, model: SpanModel) -> None:
        """Raises Rejected for a span of something else than a causal language model."""
        manifest = model.manifest
        if type(model) is not SpanModel:
            raise Rejected("gradients are not served by spans that are dealt out to ranks")
        if manifest.output != "logits" or not manifest.causal or manifest.encoder_layers:
            raise Rejected(f"gradients are served for causal language models; {manifest.name} is another kind")
        self.model = model
        self.linears = _adaptable(model)

    def forward(
        self, rows: torch.Tensor, adapters: Mapping[str, Adapter], keep: int = 0, hidden: Hidden = "none"
    ) -> Passed:
        """Run the span over a whole sequence.

        rows: (n,) int64 ids or (n, width) fp32 embeddings on the first span, hidden rows (n, width) on others. keep:
        logits of the last so many rows only, 0 for all. Raises BadTensor, ContextLengthExceeded.
        """
        self._check(rows, adapters, keep)
        with flushing_denormals(), torch.no_grad():
            out, states = self._run(rows, adapters, keep, hidden)
        states = [state.detach() for state in states]
        empty = out.new_zeros(0, len(rows), self.model.manifest.width)
        return Passed(_finite(out), _finite(torch.stack(states)) if states else empty)

    def backward(
        self, rows: torch.Tensor, adapters: Mapping[str, Adapter], grad: torch.Tensor, keep: int = 0
    ) -> Gradients:
        """Gradients of sum(grad * forward(...).rows). grad: the shape of those rows. Raises as `forward`."""
        self._check(rows, adapters, keep)
        with flushing_denormals(), torch.enable_grad():
            entering = rows.clone().requires_grad_() if rows.is_floating_point() else rows
            held = {
                name: Adapter(adapter.a.clone().requires_grad_(), adapter.b.clone().requires_grad_())
                for name, adapter in adapters.items()
            }
            out, _ = self._run(entering, held, keep, "none")
            if grad.shape != out.shape or grad.dtype != torch.float32 or not bool(torch.isfinite(grad).all()):
                raise BadTensor(f"the gradient of this pass is a finite fp32 tensor of shape {tuple(out.shape)}")
            sought = [entering] if entering.is_floating_point() else []
            sought += [tensor for adapter in held.values() for tensor in (adapter.a, adapter.b)]
            if not sought:
                raise BadTensor("there is nothing to differentiate by: ids came in, and no adapters")
            found = [_finite(one) for one in torch.autograd.grad(out, sought, grad)]
        entered = found.pop(0) if entering.is_floating_point() else None
        pairs = zip(found[::2], found[1::2], strict=True)
        return Gradients(entered, {name: Adapter(a, b) for name, (a, b) in zip(held, pairs, strict=True)})

    def _check(self, rows: torch.Tensor, adapters: Mapping[str, Adapter], keep: int) -> None:
        manifest, first = self.model.manifest, self.model.is_first
        if first and rows.dtype == torch.int64 and rows.ndim == 1:
            if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < manifest.vocab:
                raise BadTensor(f"token ids run from 0 to {manifest.vocab - 1}", vocab=manifest.vocab)
        elif rows.dtype != torch.float32 or rows.ndim != 2 or rows.shape[1] != manifest.width:
            raise BadTensor(f"this pass takes fp32 rows of width {manifest.width}", width=manifest.width)
        elif not bool(torch.isfinite(rows).all()):
            raise BadTensor("a row holds NaN or infinity")
        if not 0 < len(rows) <= manifest.max_length:
            raise ContextLengthExceeded(f"{len(rows)} rows; 1 to {manifest.max_length}", limit=manifest.max_length)
        if not 0 <= keep <= len(rows):
            raise BadTensor(f"logits of {keep} rows are wanted, there are {len(rows)}")
        for name, adapter in adapters.items():
            check_adapter(self.linears, name, adapter)

    def _run(
        self, rows: torch.Tensor, adapters: Mapping[str, Adapter], keep: int, hidden: Hidden
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        model, spliced = self.model, self.model._spliced
        passage, rules, count = spliced.passage, spliced.rules, len(rows)
        selection = rules.selection if rules is not None and rules.selects else None
        passage.received = None if model.is_first else unpack_rows(model._entering, rows)
        passage.stop = not model.is_last
        states: list[torch.Tensor] = []
        with ExitStack() as stack:
            if selection is not None:
                stack.callback(selection.clear)
                selection[:] = [torch.arange(count - keep, count)] if keep else []
            stack.enter_context(_stock_attention(spliced.skeleton.model))
            stack.enter_context(_differentiable_products(spliced.skeleton.model))
            stack.enter_context(_adapted(spliced.skeleton.model, adapters))
            stack.enter_context(self._watching(states, hidden))
            try:
                logits = model.run_model(self._inputs(rows), count).logits[0].to(CPU)
                out = logits[-keep:] if keep and selection is None else logits
            except Leave as leave:
                out = pack_rows(model._leaving, moved(leave.streams, CPU), model.manifest.width)
        if hidden == "all":
            states.insert(0, passage.entered[0])
        return out, [self._widened(state.reshape(count, -1).to(CPU)) for state in states]

    def _inputs(self, rows: torch.Tensor) -> dict[str, Any]:
        """The model's arguments."""
        model, count = self.model, len(rows)
        embeds = model.is_first and rows.is_floating_point()
        ids = torch.full((count,), model._ordinary_id) if embeds or not model.is_first else rows
        inputs = model.arguments(ids[None], torch.arange(count)[None], None, None)
        if not embeds:
            return inputs
        if "inputs_embeds" not in model._arguments or model._spliced.anatomy.ends[0].width != rows.shape[1]:
            raise BadTensor(f"{model.manifest.name} takes token ids only")
        return {name: given for name, given in inputs.items() if name != "input_ids"} | {"inputs_embeds": rows[None]}

    @contextmanager
    def _watching(self, states: list[torch.Tensor], hidden: Hidden) -> Iterator[None]:
        """Collect what leaves every layer of the span but the last, and what enters the head, as asked for."""
        spliced, span = self.model._spliced, self.model.span
        handles = []
        if hidden == "all":
            for index in range(span.start, span.end - 1):
                shape = spliced.anatomy.layers[index]
                handles.append(
                    spliced.skeleton.stack(shape.stack)[shape.module].register_forward_hook(
                        lambda _, args, output, shape=shape: states.append(hidden_of(output, shape))
                    )
                )
        if hidden != "none" and self.model.is_last:
            head = spliced.skeleton.model.get_output_embeddings()
            handles.append(head.register_forward_pre_hook(lambda _, args: states.append(args[0])))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _widened(self, rows: torch.Tensor) -> torch.Tensor:
        return nn.functional.pad(rows, (0, self.model.manifest.width - rows.shape[1]))


def check_adapter(linears: Mapping[str, tuple[int, int]], name: str, adapter: Adapter) -> None:
    """Raises BadTensor unless the adapter fits a linear module; linears: {module: (in, out)}."""
    shape = linears.get(name)
    if shape is None:
        raise BadTensor(f"there is no linear module {name[:80]!r} in these layers to adapt")
    (rank, inside), (outside, again) = _two(adapter.a), _two(adapter.b)
    if (inside, outside) != shape or rank != again or rank < 1:
        raise BadTensor(f"the adapter of {name} is a (r, {shape[0]}) and b ({shape[1]}, r)")
    for tensor in (adapter.a, adapter.b):
        if tensor.dtype != torch.float32 or not bool(torch.isfinite(tensor).all()):
            raise BadTensor(f"the adapter of {name} is not finite fp32")


def _two(tensor: torch.Tensor) -> tuple[int, int]:
    return (tensor.shape[0], tensor.shape[1]) if tensor.ndim == 2 else (0, 0)


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a module that adapters fit, else None."""
    if isinstance(module, nn.Linear | CanonicalLinear):
        return module.in_features, module.out_features
    return (module.nx, module.nf) if isinstance(module, Conv1D) else None


def _adaptable(model: SpanModel) -> dict[str, tuple[int, int]]:
    """The linear modules within the span's layers, by dotted name; none where layers share their weights."""
    spliced, span = model._spliced, model.span
    found = {}
    for index in range(span.start, span.end):
        layer = spliced.anatomy.layers[index]
        if layer.module != index:
            return {}
        for name, module in spliced.skeleton.stack(layer.stack)[index].named_modules():
            shape = linear_shape(module)
            if shape is not None:
                found[f"{spliced.skeleton.stacks[layer.stack]}.{index}.{name}"] = shape
    return found


@contextmanager
def _stock_attention(model: Any) -> Iterator[None]:
    """While held, the model attends, and builds its masks, as transformers does by itself."""
    before = [(config, config._attn_implementation) for config in configs_of(model)]
    for config, _ in before:
        config._attn_implementation = "sdpa" if type(model)._supports_sdpa else "eager"
    try:
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation


@contextmanager
def _differentiable_products(model: nn.Module) -> Iterator[None]:
    """While held, products over packed weights have a derivative."""
    products = list(_products(model))
    for module in products:
        module.__dict__["forward"] = lambda x, module=module: _Product.apply(x, module)
    try:
        yield
    finally:
        for module in products:
            module.__dict__.pop("forward", None)


def _products(model: nn.Module) -> Iterator[CanonicalLinear]:
    for module in model.modules():
        if isinstance(module, CanonicalLinear):
            yield module
        experts: ExpertProducts | None = module.__dict__.get("tallystick_experts")
        yield from (*experts.up, *experts.down) if experts is not None else ()


class _Product(torch.autograd.Function):
    """CanonicalLinear's own product forward; backward, the gradient times the plain weight, unpacked for the moment."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, module: CanonicalLinear) -> torch.Tensor:
        ctx.module = module
        return CanonicalLinear.forward(module, x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0] @ ctx.module.plain_weight(), None


@contextmanager
def _adapted(model: nn.Module, adapters: Mapping[str, Adapter]) -> Iterator[None]:
    """While held, linear modules add what their adapters make of their input."""

    def hook(adapter: Adapter) -> Any:
        def add(_: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            rows: torch.Tensor = args[0]
            return output + rows @ adapter.a.to(rows.device).T @ adapter.b.to(rows.device).T

        return add

    handles = [model.get_submodule(name).register_forward_hook(hook(adapter)) for name, adapter in adapters.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _finite(tensor: torch.Tensor) -> torch.Tensor:
    if not bool(torch.isfinite(tensor).all()):
        raise BadTensor("the pass overflows: its result holds NaN or infinity; send smaller rows or adapters")
    return tensor.detach()
