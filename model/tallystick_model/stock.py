"""The cache of a stock session: transformers' own, with an entry for every layer of the model.

Entries of layers that are elsewhere are mirrors: the same class, fed with meta tensors, one row for every token that
passes. So they answer questions about lengths and masks exactly as the real ones would, and hold no data.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from tallystick_protocol.types import Span


class StockCache:
    """One session's transformers cache for a span; `length` is the clock."""

    def __init__(self, config: Any, span: Span, max_length: int) -> None:
        self.max_length = max_length
        self.length = 0
        self._span = span
        self.inner = DynamicCache(config=config)
        for layer in self.inner.layers:
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()

    def pass_layer(self, index: int, num_rows: int) -> None:
        """A layer that is elsewhere was passed by that many tokens."""
        row = torch.empty(1, 1, num_rows, 1, device="meta")
        self.inner.layers[index].update(row, row)

    def pass_rest(self, num_rows: int) -> None:
        """The forward ended with this span; the layers behind it have been passed, too."""
        for index in range(self._span.end, len(self.inner.layers)):
            self.pass_layer(index, num_rows)

    def commit(self, length: int) -> None:
        self.length = length

    @torch.inference_mode()
    def crop(self, length: int) -> None:
        """Forget rows from `length` on, also those of a step that failed halfway.

        Raises RuntimeError where the architecture cannot.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot crop {self.length} rows to {length}")
        for layer in self.inner.layers:
            surplus = layer.get_seq_length() - length
            if surplus > 0:
                layer.crop(-surplus)
        self.length = length

    @property
    def size_bytes(self) -> int:
        own = self.inner.layers[self._span.start : self._span.end]
        held = [tensor for layer in own if layer.is_initialized for tensor in (layer.keys, layer.values)]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)
