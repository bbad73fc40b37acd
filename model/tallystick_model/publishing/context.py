"""How many positions a model takes."""

from __future__ import annotations

from typing import Any

from torch import nn

from tallystick_model.publishing.checkpoint import TensorSource
from tallystick_model.skeleton import Skeleton

_FIELDS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length", "context_length",
)  # fmt: skip
MAX_LENGTH = 1 << 22
DEFAULT_LENGTH = 2048


def max_length(skeleton: Skeleton, source: TensorSource) -> int:
    """The longest session: what the config says, less the rows of a position table that stand for padding.

    A config without such a field (relative positions, ALiBi, recurrence) takes the tokenizer's `model_max_length`, and
    DEFAULT_LENGTH when that says nothing either.
    """
    config: Any = skeleton.config.get_text_config()
    for field in _FIELDS:
        length = getattr(config, field, None)
        if type(length) is int and length > 0:
            return min(length - _padding_rows(skeleton.model, length), MAX_LENGTH)
    settings = source.read_json("tokenizer_config.json")
    length = settings.get("model_max_length") if isinstance(settings, dict) else None
    if type(length) is int and 0 < length <= MAX_LENGTH:
        return length
    return DEFAULT_LENGTH


def _padding_rows(model: Any, length: int) -> int:
    """Rows of a position table up to its padding row: positions begin behind it."""
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.num_embeddings == length and module.padding_idx is not None:
            return int(module.padding_idx) + 1
    return 0
