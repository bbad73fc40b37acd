"""Tune low-rank adapters (Hu et al. 2021, arXiv:2106.09685) on a model that others serve.

python examples/lora.py [--local] [--steps 40] [--verify off|audit|full]

Adapters on the query and value products of every layer are trained here and travel with each pass; no node keeps
them. With --local the same runs on the whole model in this process: the losses are the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from served import CHECKPOINT, attach_lora, command
from tokenizers import Tokenizer
from topics import Batch, Topics, accuracy, as_batch

BATCH = 8


def run(served: Any, steps: int, say: Callable[[str], None]) -> list[float]:
    """Train the adapters; the loss of every step."""
    topics = Topics(Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")))
    torch.manual_seed(0)
    lora = attach_lora(served, ("q_proj", "v_proj"), rank=8, alpha=16.0)
    optimiser = torch.optim.Adam(lora.parameters(), lr=0.005)
    held_out = as_batch(topics.test)
    say(f"{sum(parameter.numel() for parameter in lora.parameters())} parameters are tuned")
    say(f"held out: {right_share(served, held_out, topics.label_ids):.0%} right before")
    losses = []
    for step in range(steps):
        loss = forward(served, topics.batch(step, BATCH)).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        say(f"step {step + 1:3d}  loss {losses[-1]:.6f}")
    say(f"held out: {right_share(served, held_out, topics.label_ids):.0%} right after")
    return losses


def forward(served: Any, batch: Batch) -> Any:
    positions = (batch.mask.cumsum(dim=1) - 1).clamp(min=0)
    return served(batch.ids, attention_mask=batch.mask, position_ids=positions, labels=batch.labels)


@torch.no_grad()
def right_share(served: Any, batch: Batch, label_ids: list[int]) -> float:
    return accuracy(forward(served, batch).logits, batch, label_ids)


if __name__ == "__main__":
    command(__doc__, run)
