"""Why the rows of several sessions cannot share calls: what the probing run saw that there is no rule for."""

from __future__ import annotations

from collections.abc import Sequence

from tallystick_model.canonical.attention import AttentionPlan
from tallystick_model.canonical.operators import COVERED
from tallystick_model.skeleton import Skeleton
from tallystick_model.streams import Stream
from tallystick_model.taint import Taint


def find_obstacles(
    skeleton: Skeleton,
    taint: Taint,
    plans: list[tuple[AttentionPlan | None, str]],
    streams: Sequence[Sequence[Stream]],
    calls: Sequence[int],
) -> list[str]:
    """Reasons, the first ones first; empty when everything has a rule.

    plans: how each layer attends, or why it has no rule; streams: of each stack; calls: of layers, in each stack.
    """
    found = [f"layer {index}: {why}" for index, (plan, why) in enumerate(plans) if plan is None]
    if len(skeleton.stacks) > 1:
        found.append("cross-attention has no rule")
    if sum(calls) != len(plans):
        found.append("its layers run more than once")
    if any(len(stack) > 1 for stack in streams):
        found.append("more than the hidden state passes between its layers")
    if len({plan.causal for plan, _ in plans if plan}) > 1:
        found.append("some layers are causal, others not")
    if "position_ids" not in skeleton.arguments:
        found.append("its forward takes no position_ids")
    without_rule = sorted({name for _, name in taint.operators} - COVERED)
    if without_rule:
        found.append(f"no rule for the operators {', '.join(without_rule[:8])}")
    return found
