"""How large anything in a config may be: plain, finite and within these bounds before anything is built of it.

Counts are bounded by the words of their names, for config classes call the same thing by many names. What a bound on
single values cannot see, such as layers times experts, is bounded while the model is built (`skeleton.py`).
"""

from __future__ import annotations

import math
import re
from typing import Any

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tallystick_protocol.errors import ManifestError

BOUNDS: dict[str, tuple[float, float]] = {
    "hidden_size": (1, 1 << 17),
    "intermediate_size": (1, 1 << 20),
    "num_hidden_layers": (1, 512),
    "num_attention_heads": (1, 1 << 12),
    "num_key_value_heads": (1, 1 << 12),
    "head_dim": (1, 1 << 12),
    "vocab_size": (1, 1 << 22),
    "type_vocab_size": (0, 1 << 16),
    "max_position_embeddings": (1, 1 << 24),
    "attention_types": (0, 512),  # GPT-Neo's [[kinds, times], …]
    "block_sizes": (0, 512),  # Funnel's numbers of layers
    "rope_theta": (1e-3, 1e12),
    "rms_norm_eps": (0, 1),
    "layer_norm_eps": (0, 1),
    "layer_norm_epsilon": (0, 1),
}

_WORDS = (
    ("layers", 512),
    ("experts", 1 << 14),  # Doge has 16,384 of one row each
    ("heads groups blocks stages hashes codebooks", 1 << 12),
    ("vocab", 1 << 25),
    ("position positions seq length ctx", 1 << 24),
    ("size sizes dim dims ff dff ffn inner rank width channels embd embed", 1 << 22),
)
WORDS = {word: limit for words, limit in _WORDS for word in words.split()}
"""The largest whole number, either way, for names that hold the word; of several words the first in the list counts."""

MAX_POSITION_TABLE = 1 << 36
"""max_position_embeddings x hidden_size."""

ROPE_TYPES = frozenset(ROPE_INIT_FUNCTIONS) | {"default", "axial"}
"""How rotary tables are made; "axial" is what vision towers say of theirs."""

MAX_DEPTH = 5
_MAX_INT, _MAX_FLOAT, _MAX_ITEMS = 1 << 31, 1e30, 8192
_MAX_LISTED = 1 << 25
"""Of whole numbers in lists, which may say how often something is repeated."""


def check_value(name: str, value: Any, depth: int = MAX_DEPTH) -> None:
    """Plain, finite and small: what a config may hold at all. Raises ManifestError naming the key."""
    if depth < 0:
        raise ManifestError(f"{name} is nested too deeply")
    if isinstance(value, dict | list | tuple):
        if len(value) > _MAX_ITEMS:
            raise ManifestError(f"{name} has {len(value)} entries, {_MAX_ITEMS} is the limit")
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            check_bounds(str(key), inner)
            check_value(f"{name}.{str(key)[:60]}", inner, depth - 1)
    elif isinstance(value, str):
        if name.endswith(".rope_type") and value not in ROPE_TYPES:
            raise ManifestError(f"{name} is {value[:40]!r}, not one of {sorted(ROPE_TYPES)}")
        if len(value) > 200 or not value.isprintable():
            raise ManifestError(f"{name} is not printable text of at most 200 characters")
    elif isinstance(value, float):
        if not math.isfinite(value) or abs(value) > _MAX_FLOAT:
            raise ManifestError(f"{name} is {value}, not a finite number")
    elif isinstance(value, int):
        limit = _MAX_LISTED if re.search(r"\.\d+$", name) else _MAX_INT
        if abs(value) > limit:
            raise ManifestError(f"{name} is {value}, beyond {limit}")
    elif value is not None:
        raise ManifestError(f"{name} is a {type(value).__name__}, which no config holds")


def check_bounds(name: str, value: Any) -> None:
    """Raises ManifestError for a number, or numbers in lists, outside of what a key of that name may be."""
    if isinstance(value, list | tuple):  # one for each layer
        for inner in value:
            if not isinstance(inner, str):
                check_bounds(name, inner)
    elif name in BOUNDS:
        if value is not None:
            _check_range(name, value)
    elif isinstance(value, int) and (limit := _limit(name)) is not None and abs(value) > limit:
        raise ManifestError(f"config {name} is {str(value)[:40]}, beyond {limit}", key=name)


def _check_range(name: str, value: Any) -> None:
    low, high = BOUNDS[name]
    whole = isinstance(low, int) and not name.endswith(("eps", "epsilon"))
    fits = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    if not fits or (whole and value != int(value)):
        raise ManifestError(f"config {name} is {str(value)[:40]!r}, not a number from {low} to {high}", key=name)


def _limit(name: str) -> int | None:
    words = set(re.sub(r"^(n|num)_(layer|expert|head|group|block|stage)(?=_|$)", r"\1_\2s", name).split("_"))
    return next((limit for word, limit in WORDS.items() if word in words), None)


def check_made(made: dict[str, Any], names: dict[str, str]) -> None:
    """What a config class made of its arguments: bounds on its own defaults too, and on how numbers go together.

    names: {standard name: the class's own}. Raises ManifestError.
    """

    def of(name: str) -> Any:
        return made.get(name, made.get(names.get(name, name)))

    for name in BOUNDS:
        check_bounds(name, of(name))
    length, width = of("max_position_embeddings"), of("hidden_size")
    if isinstance(length, int) and isinstance(width, int) and length * width > MAX_POSITION_TABLE:
        raise ManifestError(f"config: {length} positions of width {width} are more than {MAX_POSITION_TABLE}")
    heads, groups = of("num_attention_heads"), of("num_key_value_heads")
    if isinstance(heads, int) and isinstance(groups, int) and groups > 0 and heads % groups:
        raise ManifestError(f"config: {heads} attention heads cannot share {groups} key-value heads")
