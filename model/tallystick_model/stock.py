"""The cache of a stock session: transformers' own, with an entry for every layer of the stack.

Entries of layers that are elsewhere are mirrors: the same class, fed with meta tensors, one row for every token that
passes. So they answer questions about lengths and masks exactly as the real ones would, and hold no data.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin


class CannotForget(RuntimeError):
    """A recurrent state has no rows that could be taken out of it."""

    def __init__(self) -> None:
        super().__init__("this model keeps recurrent states, which cannot be rolled back: open a new session")


def is_recurrent(cache: Any) -> bool:
    """Whether a transformers cache holds states that are not one row for each token.

    Some models take them up only when one row comes at a time, as in generate: several rows behind cached ones would be
    computed as if they were the first.
    """
    layers = getattr(cache, "self_attention_cache", cache).layers
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)


class StockCache:
    """One session's transformers cache for a span; `length` is the clock.

    memory: (m, width) fp32, an encoder's output, for its decoder. skipped: entries that stay empty.
    `lost` is set when a step failed that cannot be taken back.
    """

    def __init__(
        self,
        config: Any,
        max_length: int,
        memory: torch.Tensor | None = None,
        skipped: frozenset[int] = frozenset(),
    ) -> None:
        self.max_length = max_length
        self._skipped = skipped
        self.length = 0
        self.memory = memory
        self.lost = False
        own = DynamicCache(config=config)
        self.inner = own if memory is None else EncoderDecoderCache(own, DynamicCache(config=config))
        self._layers: list[Any] = own.layers
        self._stepping = False
        self.recurrent = is_recurrent(own)
        for layer in self._layers:
            if hasattr(layer, "activate_past_recording") and not isinstance(layer, LinearAttentionCacheLayerMixin):
                layer.activate_past_recording()

    def begin(self) -> None:
        """A step begins; `commit` ends it."""
        self._stepping = True

    def pass_rest(self, num_rows: int) -> None:
        """A forward over that many tokens is done: layers that it did not run have been passed by them."""
        for index, layer in enumerate(self._layers):
            if index in self._skipped:
                continue
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                layer.has_previous_state = dict.fromkeys(layer.has_previous_state, True)
            if isinstance(layer, CacheLayerMixin) and layer.get_seq_length() < self.length + num_rows:
                row = torch.empty(1, 1, num_rows, 1, device="meta")
                layer.update(row, row)

    def commit(self, length: int) -> None:
        self.length = length
        self._stepping = False

    @torch.inference_mode()
    def take(self, other: StockCache, first: int, last: int) -> None:
        """Hold what another session of the same span and memory holds, up to row `last`; our `first` rows are equal.

        Raises CannotForget where the other's rows beyond `last` cannot be left out, and then takes none.
        """
        if not 0 <= first <= last <= other.length:
            raise ValueError(f"cannot take rows [{first}, {last}) of {other.length}")
        if last < other.length and other.is_recurrent:
            raise CannotForget
        self.inner = copy.deepcopy(other.inner)
        own = self.inner.self_attention_cache if isinstance(self.inner, EncoderDecoderCache) else self.inner
        self._layers = own.layers
        self.length = other.length
        self.crop(last)

    @torch.inference_mode()
    def crop(self, length: int) -> None:
        """Forget rows from `length` on, also those of a step that failed halfway.

        Raises CannotForget where the architecture cannot, and then forgets nothing.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot crop {self.length} rows to {length}")
        if self._stepping or length < self.length:
            if self.is_recurrent:
                raise CannotForget
            for layer in self._layers:
                self._crop_layer(layer, length)
        self.length = length
        self._stepping = False

    def _crop_layer(self, layer: Any, length: int) -> None:
        if isinstance(layer, CacheLayerMixin):
            surplus = layer.get_seq_length() - length
            if surplus > 0:
                layer.crop(-surplus)  # type: ignore[attr-defined]

    @property
    def is_recurrent(self) -> bool:
        """Whether a layer keeps a state instead of rows."""
        return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in self._layers)

    @property
    def size_bytes(self) -> int:
        held = [tensor for layer in self._layers for tensor in _tensors(layer) if tensor.device.type != "meta"]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)


def _tensors(layer: Any) -> list[torch.Tensor]:
    states = [*getattr(layer, "conv_states", {}).values(), *getattr(layer, "recurrent_states", {}).values()]
    candidates = [getattr(layer, "keys", None), getattr(layer, "values", None), *states]
    return [tensor for tensor in candidates if isinstance(tensor, torch.Tensor)]
