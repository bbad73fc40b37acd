"""Chat templates: a conversation as the text that its model was trained on.

The template is a stranger's program: it is rendered in a process of its own, with limits, and without torch.
"""

from __future__ import annotations

from tallystick_model.sandbox.templates import render_chat

__all__ = ["render_chat"]
