"""Examining a tokenizer.json before anything else reads it: the inner side runs in the worker.

The tokenizers library panics over some files and takes minutes or all memory over others (regular expressions that
backtrack, added tokens by the million), so a file is read and tried out in a limited process first.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tallystick_model.sandbox.limited import Limits, ask
from tallystick_protocol.errors import ManifestError

MAX_TOKENIZER_BYTES = 64 << 20
LIMITS = Limits(cpu_s=20, wall_s=60.0, memory_bytes=3 << 30, output_bytes=1 << 20)
MAX_VOCAB = 1 << 22
_TRIALS = ("a" * 4000 + "!", " " * 4000 + "x", "1" * 4000, "é" * 2000, "\n\t " * 1000, "ab " * 1500)
"""Texts that a regular expression with nested repetition does not finish."""


@dataclass(frozen=True, slots=True)
class Examined:
    """highest: the largest id it makes. size: tokens it knows. ids: of the text that was asked, without specials."""

    highest: int
    size: int
    ids: tuple[int, ...]


def examine_tokenizer(path: Path, text: str = "") -> Examined:
    """Read a tokenizer.json in a limited process. Raises ManifestError when it cannot be read, or not in the limits."""
    size = path.stat().st_size
    if size > MAX_TOKENIZER_BYTES:
        raise ManifestError(f"{path.name} has {size} bytes; {MAX_TOKENIZER_BYTES} is the limit")
    found = ask("tokenizer.json", {"path": str(path.resolve()), "text": text}, LIMITS)
    return Examined(found["highest"], found["size"], tuple(found["ids"]))


def examine(request: dict[str, Any]) -> dict[str, Any]:
    """The inner side. Raises whatever the library raises."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(request["path"])
    tokenizer.no_truncation()
    tokenizer.no_padding()
    vocab = tokenizer.get_vocab()
    if len(vocab) > MAX_VOCAB:
        raise ValueError(f"it has {len(vocab)} tokens, {MAX_VOCAB} is the limit")
    for trial in _TRIALS:
        tokenizer.decode(tokenizer.encode(trial).ids)
    ids = tokenizer.encode(request["text"], add_special_tokens=False).ids if request["text"] else []
    return {"highest": max(vocab.values(), default=-1), "size": len(vocab), "ids": ids[:4096]}
