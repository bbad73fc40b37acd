"""The longest session that a checkpoint's files allow."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from tallystick_model.publishing.context import DEFAULT_LENGTH, MAX_LENGTH, max_length


def length_of(settings: dict[str, Any] | None, **config: Any) -> int:
    text = SimpleNamespace(**config)
    skeleton = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text), model=nn.Embedding(514, 4, 1))
    source = SimpleNamespace(read_json=lambda name: settings)
    return max_length(skeleton, source)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "settings", "length"),
    [
        ({"max_position_embeddings": 4096}, {"model_max_length": 77}, 4096),
        ({"max_position_embeddings": 514}, None, 512),  # two rows of the table stand for padding
        ({"max_position_embeddings": 10_485_760}, {"model_max_length": 77}, MAX_LENGTH),
        ({"n_positions": 1024}, None, 1024),
        ({"max_position_embeddings": None}, {"model_max_length": 77}, 77),
        ({"max_position_embeddings": -1}, {"model_max_length": int(1e30)}, DEFAULT_LENGTH),
        ({}, None, DEFAULT_LENGTH),
        ({"max_position_embeddings": True}, ["model_max_length"], DEFAULT_LENGTH),
    ],
)
def test_the_config_says_it_then_the_tokenizer(config: dict[str, Any], settings: Any, length: int) -> None:
    assert length_of(settings, **config) == length
