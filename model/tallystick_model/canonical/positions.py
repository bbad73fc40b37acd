"""Which position ids a model makes for itself: some begin behind the padding's id, not at zero."""

from __future__ import annotations

from typing import Any

import torch

from tallystick_model.probe import PROBE_ROWS, ordinary_id
from tallystick_model.skeleton import BUILD_ERRORS, Skeleton, arguments_of
from tallystick_model.taint import Taint


class _Reached(Exception):
    """The first layer was reached."""


class _Lookups(Taint):
    """Follows a forward and keeps what is looked up in tables, in order."""

    def __init__(self) -> None:
        super().__init__({}, skip=())
        self.found: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name == "aten::embedding" and args[1].device.type != "meta":
            self.found.append(args[1].reshape(-1).clone())
        return super().__torch_dispatch__(func, types, args, kwargs)


def position_offset(skeleton: Skeleton) -> int | None:
    """What must be added to positions 0.. so that the model, given them, does what it does by itself.

    None where the two differ by something else, or the forward takes no position ids.
    """
    if "position_ids" not in arguments_of(skeleton.runner(0)):
        return None
    given = _lookups(skeleton, {"position_ids": torch.arange(PROBE_ROWS)[None]})
    own = _lookups(skeleton, {})
    if given is None or own is None:
        return 0  # one of the two is no way to call it
    if [len(one) for one in given] != [len(other) for other in own]:
        return None
    differences = {int(value) for one, other in zip(given, own, strict=True) for value in (other - one)[: len(one)]}
    moved = differences - {0}
    if not moved:
        return 0
    constant = all(len((other - one).unique()) == 1 for one, other in zip(given, own, strict=True))
    return moved.pop() if constant and len(moved) == 1 else None


def _lookups(skeleton: Skeleton, positions: dict[str, torch.Tensor]) -> list[torch.Tensor] | None:
    """What is looked up before the first layer; None when the forward does not get there."""

    def stop(module: Any, args: Any, kwargs: Any) -> None:
        raise _Reached

    follower = _Lookups()
    handles = [layer.register_forward_pre_hook(stop, with_kwargs=True) for layer in skeleton.stack(0)]
    ids = torch.full((1, PROBE_ROWS), ordinary_id(skeleton.config))
    try:
        with torch.no_grad(), follower:
            skeleton.runner(0)(input_ids=ids, use_cache=False, **positions)
    except _Reached:
        return follower.found
    except BUILD_ERRORS:
        return None
    finally:
        for handle in handles:
            handle.remove()
    return None
