"""A node that cheats: after its canary has passed, one row of one weight gets 1 % of noise.

Arguments as `tallystick-node`.

Its pieces, its class and its signatures are all in order; only the numbers that it computes are wrong.
"""

from __future__ import annotations

import sys

import torch

from tallystick_model.canonical.kernels import CanonicalLinear
from tallystick_model.span import SpanModel
from tallystick_node.cli import main
from tallystick_node.scheduling.engine import Engine


class NoisyEngine(Engine):
    """An engine over a span whose first linear layer has one wrong row."""

    def __init__(self, model: SpanModel, step_rows: int) -> None:
        spoil(model)
        super().__init__(model, step_rows)


def spoil(model: SpanModel, row: int = 0, scale: float = 0.01) -> None:
    """Add noise of `scale` times its own size to one row of the span's first linear layer; tell that it was done."""
    linear = next(module for module in model._spliced.skeleton.model.modules() if isinstance(module, CanonicalLinear))
    dense = linear.weight.to_dense().clone() if linear.weight.is_mkldnn else linear.weight.clone()
    noise = torch.randn(dense.shape[1], generator=torch.Generator().manual_seed(0))
    dense[row] += scale * dense[row].norm() / noise.norm() * noise
    linear.weight = CanonicalLinear(dense, linear.bias).weight
    print(f"fault: row {row} of a weight of {tuple(dense.shape)} is wrong", flush=True)


if __name__ == "__main__":
    sys.exit(main(make_engine=NoisyEngine))
