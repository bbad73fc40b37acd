"""What a model is given: a text as it is, a conversation by the model's chat template, an instruction for a task."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from tallystick.tasks.backend import Served
from tallystick_protocol.errors import ConfigError

Message = dict[str, Any]


async def prompt_ids(served: Served, inputs: str | Sequence[Message] | list[int]) -> list[int]:
    """Token ids of a text, of a conversation (a list of {"role", "content"}), or of ids as they are.

    Raises ConfigError for an empty prompt, ids beyond the vocabulary, or a conversation without a chat template.
    """
    if isinstance(inputs, str):
        return served.tokens.encode(inputs)
    if inputs and all(isinstance(message, dict) for message in inputs):
        return await chat_ids(served, [message for message in inputs if isinstance(message, dict)])
    ids = [token for token in inputs if type(token) is int and 0 <= token < served.manifest.vocab]
    if not ids or len(ids) != len(inputs):
        raise ConfigError("a prompt is text, messages with role and content, or token ids of the vocabulary")
    return ids


async def chat_ids(served: Served, messages: list[Message], tools: list[dict[str, Any]] | None = None) -> list[int]:
    """A conversation as its model was trained on, up to where the model's answer begins."""
    from tallystick.templates import render_chat  # the only part of the tasks that needs tallystick_model

    template = served.tokens.chat_template
    if template is None:
        raise ConfigError(f"{served.manifest.name} has no chat template: give it a text to continue instead")
    special = served.tokens.special_tokens
    text = await asyncio.to_thread(render_chat, template, messages, special, tools, add_generation_prompt=True)
    return served.tokens.encode(text, special=False)


def summarize_instruction(text: str) -> str:
    """What a causal model is asked for a summary."""
    return f"Summarize the following text in a few sentences. Answer with the summary only.\n\n{text}"


def translate_instruction(text: str, source: str | None, target: str) -> str:
    """What a causal model is asked for a translation. source, target: languages, in words or codes."""
    languages = f"from {source} to {target}" if source else f"to {target}"
    return f"Translate the following text {languages}. Answer with the translation only.\n\n{text}"
