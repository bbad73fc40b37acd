"""Passes over the network as one differentiable function of tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tallystick.passes import Adapters, Hidden, Trace
from tallystick.torch.backend import Backend, Passing, side_by_side


@dataclass(frozen=True, slots=True)
class Call:
    """A batch of passes. keep: per sequence, how many last rows' logits. names: the adapted modules."""

    backend: Backend
    passing: Passing
    keep: list[int]
    hidden: Hidden
    names: list[str]


def run(
    call: Call, rows: list[torch.Tensor], adapters: list[torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(logits, hidden states) of each sequence: (keep, vocab) and (k, n, width).

    rows: ids (n,) or embeddings (n, width), one tensor per sequence. adapters: a, b of each name in turn. Logits have
    gradients by embeddings and adapters; hidden states have none.
    """
    traces: list[Trace] = []
    logits = _Passes.apply(call, traces, *rows, *adapters)
    return list(logits), [torch.from_numpy(trace.hidden) for trace in traces]


class _Passes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, traces: list[Trace], *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows, adapters = tensors[: len(call.keep)], _adapters(call.names, tensors[len(call.keep) :])
        work = [
            call.passing.forward(_array(row), adapters, keep, call.hidden)
            for row, keep in zip(rows, call.keep, strict=True)
        ]
        traces += call.backend.wait(side_by_side(work))
        ctx.call, ctx.traces = call, list(traces)
        return tuple(torch.from_numpy(np.ascontiguousarray(trace.rows)) for trace in traces)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        call: Call = ctx.call
        work = [call.passing.backward(trace, _array(grad)) for trace, grad in zip(ctx.traces, grads, strict=True)]
        found = call.backend.wait(side_by_side(work))
        rows = [None if row is None else torch.from_numpy(row) for row, _ in found]
        halves = [
            torch.from_numpy(np.sum([adapters[name][half] for _, adapters in found], axis=0))
            for name in call.names
            for half in (0, 1)
        ]
        return (None, None, *rows, *halves)


def _adapters(names: list[str], tensors: tuple[torch.Tensor, ...]) -> Adapters:
    arrays = [_array(tensor) for tensor in tensors]
    return dict(zip(names, zip(arrays[::2], arrays[1::2], strict=True), strict=True))


def _array(tensor: torch.Tensor) -> np.ndarray:
    plain = tensor.detach().cpu()
    array: np.ndarray = (plain.float() if plain.is_floating_point() else plain).contiguous().numpy()
    return array
