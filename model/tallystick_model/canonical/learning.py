"""One run of a recording, step by step, and what it tells of every value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.utils._pytree import tree_unflatten

from tallystick_model.canonical.recording import Step, Value, taken_by

Values = dict[int, torch.Tensor]


@dataclass(slots=True)
class Learnt:
    """What one run told of every value.

    forms: its shape, strides and dtype, as a tensor without memory; offsets: where it begins in its memory; owners: the
    value whose memory it lies in (itself, or one that was made before; None for an input's); known: those that depend
    on no input; varying: those of another size from call to call.
    """

    forms: Values = field(default_factory=dict)
    offsets: dict[int, int] = field(default_factory=dict)
    owners: dict[int, int | None] = field(default_factory=dict)
    known: Values = field(default_factory=dict)
    varying: set[int] = field(default_factory=set)

    def note(self, number: int, value: torch.Tensor, owner: int | None) -> None:
        form = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        self.forms[number], self.offsets[number], self.owners[number] = form, value.storage_offset(), owner

    def begins_its_memory(self, number: int) -> bool:
        """Whether cuts of its memory are cuts of it, at every call."""
        return self.forms[number].is_contiguous() and self.offsets[number] == 0 and number not in self.varying


class _Memory:
    """Whose memory values lie in, while they are alive."""

    def __init__(self) -> None:
        self._owners: dict[int, int | None] = {}
        self._users: Counter[int] = Counter()

    def add(self, value: torch.Tensor, owner: int | None) -> int | None:
        """The owner of its memory: the given one, unless it lies in another's."""
        pointer = value.untyped_storage().data_ptr()
        self._users[pointer] += 1
        return self._owners.setdefault(pointer, owner)

    def drop(self, value: torch.Tensor) -> None:
        pointer = value.untyped_storage().data_ptr()
        self._users[pointer] -= 1
        if not self._users[pointer]:
            del self._owners[pointer]


def run_through(steps: Sequence[Step], inputs: Values, results: list[int]) -> tuple[list[torch.Tensor], Learnt]:
    """Run steps as they were written down, letting go of values after their last use; the results, and what was learnt.

    Raises nothing of its own; a step's error leaves nothing behind.
    """
    learnt, memory, values = Learnt(), _Memory(), dict(inputs)
    last = dict.fromkeys(results, len(steps)) | dict.fromkeys(inputs, len(steps))
    for at in reversed(range(len(steps))):
        for number in [*taken_by(steps[at].leaves), *steps[at].outs]:
            last.setdefault(number, at)
    for number, value in inputs.items():
        learnt.note(number, value, memory.add(value, None))
    for at, step in enumerate(steps):
        leaves = [values[leaf.number] if isinstance(leaf, Value) else leaf for leaf in step.leaves]
        args, kwargs = tree_unflatten(leaves, step.spec)
        out = step.function(*args, **kwargs)
        taken, traits = taken_by(step.leaves), step.traits
        varies = (traits is not None and traits.varies) or any(number in learnt.varying for number in taken)
        fixed = all(number in learnt.known for number in taken) and not varies and not (traits and traits.effect)
        for number, made in zip(step.outs, out if step.many else [out], strict=True):
            if number in values:
                continue  # it returned what it was given
            values[number] = made
            learnt.note(number, made, memory.add(made, number))
            if varies:
                learnt.varying.add(number)
            if fixed:
                learnt.known[number] = made
        for number in {*taken, *step.outs}:
            if last[number] == at:
                value = values.pop(number)
                if number not in learnt.known:
                    memory.drop(value)
    return [values[number] for number in results], learnt
