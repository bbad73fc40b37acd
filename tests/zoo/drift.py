"""What an error just under the tolerance on every hop buys: how many top tokens it changes, at random and aimed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from faults.computing import UNDER
from harness.in_memory import InMemory
from tallystick_model.span import SpanModel
from tallystick_protocol.manifest import Numerics
from tallystick_protocol.sketching.thresholds import logits_thresholds, thresholds
from zoo.across import entered
from zoo.audits import AtNode, Task, outputs, serve
from zoo.cheaters import spoilt, walk
from zoo.models import demo


@dataclass(frozen=True, slots=True)
class Flips:
    """Shares of the positions whose top token is another one. tokens: positions."""

    random: float
    aimed: float
    tokens: int


def flips(count: int, seed: int, numerics: Numerics) -> Flips:
    """Texts through three hops, each of which errs."""
    model = demo(numerics)
    honest: list[Task] = []
    at_random: list[Task] = []
    aimed: list[Task] = []
    for span, right, tasks in walk(count, seed, numerics):
        if right.is_first:
            honest = at_random = aimed = tasks
        honest = _leave(serve(right, honest), honest)
        at_random = _leave(serve(spoilt(span, "under_tolerance", numerics), at_random), at_random)
        xs = [entered(right, task) for task in aimed]
        aimed = [_aim(model, right, task, x) for task, x in zip(_leave(serve(right, aimed), aimed), xs, strict=True)]
    tops = [[_tops(task) for task in tasks] for tasks in (honest, at_random, aimed)]
    truth, *others = [[top for one in found for top in one] for found in tops]
    shares = [float(np.mean(np.not_equal(truth, other))) for other in others]
    return Flips(*shares, len(truth))


def _leave(sessions: Sequence[AtNode], tasks: Sequence[Task]) -> list[Task]:
    return [outputs(session, task) for session, task in zip(sessions, tasks, strict=True)]


def _tops(task: Task) -> list[int]:
    """The first id of each wanted top-k row."""
    return [int.from_bytes(row[:4], "little") for row in task.rows if row]


def _aim(model: InMemory, span: SpanModel, task: Task, x: Any) -> Task:
    """The rows that leave a hop, moved against the gradient of how far the top token is ahead of the second one."""
    if span.is_last:
        return Task([_swap(row, model) for row in task.rows], task.want, task.prompt)
    y = torch.from_numpy(np.frombuffer(b"".join(task.rows), dtype="<f4").reshape(x.shape).copy())
    h = y.clone().requires_grad_()
    top = _rest(model.whole, h, span.span.end).topk(2).values
    (gradient,) = torch.autograd.grad((top[:, 0] - top[:, 1]).sum(), h)
    size = UNDER * thresholds(span.manifest, span.span).clear * (y - torch.from_numpy(x)).norm(dim=-1, keepdim=True)
    moved = y - size * gradient / gradient.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    return Task([row.tobytes() for row in moved.detach().numpy()], task.want, task.prompt)


def _rest(whole: Any, h: torch.Tensor, first: int) -> torch.Tensor:
    """Logits (n, vocab) of hidden rows (n, width) that enter layer `first`, in transformers."""
    rows, at = h[None], torch.arange(len(h))[None]
    places = whole.model.rotary_emb(rows, at)
    for layer in whole.model.layers[first:]:
        rows = layer(rows, attention_mask=None, position_ids=at, position_embeddings=places)
    logits: torch.Tensor = whole.lm_head(whole.model.norm(rows))[0]
    return logits


def _swap(row: bytes, model: InMemory) -> bytes:
    """A top-k row with the second value ahead, if the tolerance (in deviations of the k values) reaches so far."""
    if not row:
        return row
    pairs = np.frombuffer(row, dtype=[("id", "<u4"), ("value", "<f4")]).copy()
    limits = logits_thresholds(model.manifest)
    reach = UNDER * min(limits.row, limits.window) * pairs["value"].std() * np.sqrt(len(pairs) / 2)
    if pairs["value"][0] - pairs["value"][1] < 2 * reach:
        pairs["id"][:2] = pairs["id"][1::-1]
    return pairs.tobytes()
