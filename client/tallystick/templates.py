"""Chat templates: a conversation as the text that its model was trained on.

The template is a stranger's program: it is rendered in a process of its own, with limits, and without torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tallystick_model.sandbox.templates import render_chat
from tallystick_protocol.errors import ManifestError

__all__ = ["render_chat", "special_tokens"]

_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def special_tokens(tokenizer_config: Path) -> dict[str, str]:
    """The special tokens that a tokenizer_config.json names, for `render_chat`. Raises ManifestError."""
    try:
        settings: Any = json.loads(tokenizer_config.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ManifestError(f"{tokenizer_config.name} cannot be read: {str(error)[:80]}") from None
    found = {}
    for name in _NAMES:
        value = settings.get(name) if isinstance(settings, dict) else None
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found[name] = text[:200]
    return found
