"""Tune low-rank adapters (Hu et al. 2021, arXiv:2106.09685) on a model that others serve.

python examples/lora.py [--local] [--steps 40] [--verify off|audit|full]

Adapters on the query and value products of every layer are trained here and travel with each pass; no node keeps
them. With --local the same runs on the whole model in this process: the losses are the same numbers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from served import CHECKPOINT, attach_lora, model
from tokenizers import Tokenizer
from topics import Batch, Topics, as_batch

BATCH = 8


def run(served: Any, steps: int, say: Callable[[str], None]) -> list[float]:
    """Train the adapters; the loss of every step."""
    topics = Topics(Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")))
    torch.manual_seed(0)
    lora = attach_lora(served, ("q_proj", "v_proj"), rank=8, alpha=16.0)
    optimiser = torch.optim.Adam(lora.parameters(), lr=0.005)
    held_out = as_batch(topics.test)
    say(f"{sum(parameter.numel() for parameter in lora.parameters())} parameters are tuned")
    say(f"held out: {accuracy(served, held_out, topics.label_ids):.0%} right before")
    losses = []
    for step in range(steps):
        loss = forward(served, topics.batch(step, BATCH)).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        say(f"step {step + 1:3d}  loss {losses[-1]:.6f}")
    say(f"held out: {accuracy(served, held_out, topics.label_ids):.0%} right after")
    return losses


def forward(served: Any, batch: Batch) -> Any:
    positions = (batch.mask.cumsum(dim=1) - 1).clamp(min=0)
    return served(batch.ids, attention_mask=batch.mask, position_ids=positions, labels=batch.labels)


@torch.no_grad()
def accuracy(served: Any, batch: Batch, label_ids: list[int]) -> float:
    """Share of sentences whose right label is the likelier one."""
    logits = forward(served, batch).logits[:, -2, label_ids]
    right = torch.tensor([label_ids.index(int(one)) for one in batch.ids[:, -1]])
    return float((logits.argmax(dim=1) == right).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--local", action="store_true", help="the whole model in this process")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--verify", default="audit", choices=["off", "audit", "full"])
    options = parser.parse_args()
    with model(options.local, options.verify) as served:
        run(served, options.steps, print)


if __name__ == "__main__":
    main()
