"""Tensors that a checkpoint holds and the published class does not have: which of them may be left out, and which not.

A checkpoint often holds more than its `architectures` says: another head, a pooler, masks and position tables that
older releases stored. transformers ignores all that it does not know. Here a tensor is left out only where it is known
what it is.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import transformers

from tallystick_model.skeleton import BUILD_ERRORS, Skeleton, named_weights
from tallystick_model.weightless import weightless
from tallystick_protocol.errors import ManifestError

_COMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|position_ids)$")
_MASK = re.compile(r"(^|\.)(attn|attention|crossattention)\.bias$")
_MASKED = re.compile(r"\.masked_bias$")


class Leftovers:
    """What may be left out of a checkpoint that is published as a skeleton's class."""

    def __init__(self, skeleton: Skeleton) -> None:
        model = skeleton.model
        self._model, self._labels = model, model.config.num_labels
        self._buffers = {name for name, _ in model.named_buffers()}
        self._patterns = tuple(model._keys_to_ignore_on_load_unexpected or ())
        self._relatives: list[dict[str, tuple[int, ...]]] = []
        self._unbuilt = _relatives(type(model))

    def expect(self, stored: str, shape: tuple[int, ...], spellings: Iterable[str]) -> None:
        """Raises ManifestError for a tensor that is neither a table that models compute, nor one that transformers
        itself ignores in checkpoints of this class, nor a weight of another class of the same model type.

        spellings: the names that the tensor would have in the model.
        """
        names = tuple(spellings)
        ignored = any(re.search(pattern, stored) for pattern in self._patterns)
        if ignored or _is_table(stored, shape) or not self._buffers.isdisjoint(names):
            return
        if any(self._holds(weights, names, shape) for weights in self._all_relatives()):
            return
        raise ManifestError(
            f"the checkpoint holds {stored}, which neither {type(self._model).__name__} nor another class of its model "
            f"type has with the shape {shape}: is `architectures` in config.json right?"
        )

    def _all_relatives(self) -> Iterator[dict[str, tuple[int, ...]]]:
        """The shapes of what other classes hold that are made of the same config; each is built when it is needed."""
        yield from self._relatives
        while self._unbuilt:
            try:
                with weightless(torch.float32):
                    model = self._unbuilt.pop(0)(copy.deepcopy(self._model.config))
            except (*BUILD_ERRORS, ManifestError):  # not made for this config: then the tensor is not its own
                continue
            self._relatives.append({name: tuple(tensor.shape) for name, tensor in named_weights(model).items()})
            yield self._relatives[-1]

    def _holds(self, weights: dict[str, tuple[int, ...]], names: Iterable[str], shape: tuple[int, ...]) -> bool:
        """Whether one of the names is there with that shape, but for how many labels a head has: the config of the
        published class does not say that of another one's."""
        made = [weights[name] for name in names if name in weights]
        return any(shape == one or (shape[1:] == one[1:] and one[:1] == (self._labels,)) for one in made)


def _relatives(cls: Any) -> list[Any]:
    """The other classes of a class's own file that are made of the same config."""
    found: list[Any] = [other for other in vars(sys.modules[cls.__module__]).values() if isinstance(other, type)]
    models = [other for other in found if issubclass(other, transformers.PreTrainedModel) and other is not cls]
    return [other for other in models if other.__module__ == cls.__module__ and other.config_class is cls.config_class]


def _is_table(stored: str, shape: tuple[int, ...]) -> bool:
    """Rotary frequencies, positions and causal masks, which were stored once, whatever module they are in today."""
    is_mask = len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]
    if _MASK.search(stored):
        return is_mask
    return bool(_COMPUTED.search(stored)) or (bool(_MASKED.search(stored)) and shape in ((), (1,)))
