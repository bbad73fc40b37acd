"""Tune a soft prompt (Lester et al. 2021, arXiv:2104.08691) for a model that others serve.

python examples/prompt_tuning.py [--local] [--steps 40] [--verify off|audit|full]

Eight embeddings in front of every sentence are all that is trained; they never leave this process as weights, only
as rows of a pass. With --local the same runs on the whole model in this process: the losses are the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from served import CHECKPOINT, command
from tokenizers import Tokenizer
from topics import Batch, Topics, accuracy, as_batch

NUM_ROWS = 8
BATCH = 8


def run(served: Any, steps: int, say: Callable[[str], None]) -> list[float]:
    """Train the prompt; the loss of every step."""
    topics = Topics(Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")))
    embed = served.get_input_embeddings()
    torch.manual_seed(0)
    soft = torch.nn.Parameter(embed(torch.randint(100, 4000, (NUM_ROWS,))).detach().clone())
    optimiser = torch.optim.Adam([soft], lr=0.1)
    held_out = as_batch(topics.test)
    say(f"held out: {right_share(served, soft, held_out, topics.label_ids):.0%} right before")
    losses = []
    for step in range(steps):
        loss = forward(served, soft, topics.batch(step, BATCH)).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        say(f"step {step + 1:3d}  loss {losses[-1]:.6f}")
    say(f"held out: {right_share(served, soft, held_out, topics.label_ids):.0%} right after")
    return losses


def forward(served: Any, soft: torch.Tensor, batch: Batch) -> Any:
    """The model's output for the batch with the prompt in front of every row; the mask hides the padding behind it."""
    rows, count = len(batch.ids), len(soft)
    mask = torch.cat([batch.mask.new_ones(rows, count), batch.mask], dim=1)
    return served(
        inputs_embeds=torch.cat([soft.expand(rows, -1, -1), served.get_input_embeddings()(batch.ids)], dim=1),
        attention_mask=mask,
        position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
        labels=torch.cat([batch.labels.new_full((rows, count), -100), batch.labels], dim=1),
    )


@torch.no_grad()
def right_share(served: Any, soft: torch.Tensor, batch: Batch, label_ids: list[int]) -> float:
    return accuracy(forward(served, soft, batch).logits, batch, label_ids)


if __name__ == "__main__":
    command(__doc__, run)
