"""Prompts for drafts: text that repeats itself, and drafts that are never right."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from tallystick_devnet.bench.figures import first_repeat
from tallystick_devnet.bench.plan import Bench
from tallystick_devnet.localchain import repository

_TEXT = "protocol/tallystick_protocol/messages.py"
_CONTINUED = 4
"""So many times the prompt's length a model may go on until it repeats itself."""


class NeverRight:
    """A drafter whose drafts are wrong, as good as always: the worst case of speculation."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench

    def propose(self, ids: Sequence[int], k: int) -> list[int]:
        """As `Drafter.propose`."""
        return self._bench.prompt(k)


def text_ids(checkpoint: Path, vocab: int) -> list[int]:
    """A source file of this repository in the checkpoint's tokens; empty without a tokenizer."""
    path = checkpoint / "tokenizer.json"
    if not path.exists():
        return []
    ids = Tokenizer.from_file(str(path)).encode((repository() / _TEXT).read_text(), add_special_tokens=False).ids
    return [token for token in ids if token < vocab]


async def quotation(bench: Bench) -> list[int]:
    """A prompt behind which the model quotes: a passage twice and its beginning, and what the model makes of that.

    It ends where the model has written eight tokens in a row that were there before. A model that does not do so soon
    is given the quotation alone.
    """
    passage = bench.passage(bench.plan.prompt)
    text = passage * 2 + passage[: len(passage) // 2]
    found = await asyncio.to_thread(bench.reference.generate, text, _CONTINUED * bench.plan.prompt)
    ids: list[int] = text + found["ids"]
    return ids[: first_repeat(ids, len(text)) or len(text)]
