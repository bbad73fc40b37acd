"""Canonical dag-json: one byte string for one value, so that a hash names it.

Keys sorted by their UTF-8 bytes, no white space, UTF-8 unescaped, links as {"/": "<cid>"}; integers and finite
doubles in Python's shortest form; no NaN, no duplicate keys. Decoding refuses every other spelling of the same value.
"""

from __future__ import annotations

import json
import re
from typing import Any

from tallystick_protocol.errors import ManifestError

MAX_DEPTH = 32
_STRINGS = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def encode(value: Any) -> bytes:
    """The canonical bytes of a value of dicts with string keys, lists, strings, ints, finite floats, bools, None."""
    _check(value, MAX_DEPTH)
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def decode(data: bytes) -> Any:
    """The value of canonical bytes. Raises ManifestError for anything that `encode` would not have written."""
    try:
        value = parse(data)
        again = encode(value)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"not canonical dag-json: {str(error)[:120]}") from None
    if again != data:
        raise ManifestError("not canonical dag-json: keys unsorted or doubled, white space, or another number form")
    return value


def parse(data: bytes) -> Any:
    """Any JSON, canonical or not, from a peer. Raises ValueError, for what is nested beyond MAX_DEPTH, too.

    json.loads alone relies on the interpreter's recursion limit, which eth-account (py_ecc) sets to 100,000 on import:
    a hundred kilobytes of "[" would then overflow the C stack and end the process.
    """
    depth = 0
    for bracket in _STRINGS.sub(b"", data).translate(None, delete=_NO_BRACKETS):
        depth += 1 if bracket in b"[{" else -1
        if depth > MAX_DEPTH + 1:
            raise ValueError("nested too deeply")
    return json.loads(data.decode("utf-8"))


def _check(value: Any, depth: int) -> None:
    if depth < 0:
        raise ValueError("nested too deeply")
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise ValueError("a key is not a string")
            _check(inner, depth - 1)
    elif isinstance(value, list | tuple):
        for inner in value:
            _check(inner, depth - 1)
    elif not isinstance(value, str | int | float | bool | None):
        raise ValueError(f"cannot be written: {type(value).__name__}")
