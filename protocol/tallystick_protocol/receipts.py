"""Receipts: "with this model, for this span, these input rows became these output rows", signed once per window.

A row is one position's bytes:

    token ids       4           u32 little-endian
    hidden state    4 x width   f32 little-endian
    top-k logits    8 x k       k times (u32 id, f32 value), by value descending, then id ascending
    dense logits    4 x vocab   f32 little-endian, by id (a session with k = 0)
    scores, label   4 x labels  f32 little-endian

`input` and `output` are Merkle roots over the window's rows: leaf SHA256(0x00 || row), node
SHA256(0x01 || left || right), an odd node is promoted. A row that nobody asked for (logits of a position not wanted) is
the empty string.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from tallystick_protocol import canonical_json
from tallystick_protocol.types import Address, Digest, Positions, Span


@dataclass(frozen=True, slots=True)
class Receipt:
    """One hop's claim for positions [first, last). `docs/protocol.md` defines every field."""

    node: Address
    model: bytes
    numeric_class: bytes
    session: bytes
    attempt: int
    start: int
    end: int
    first: int
    last: int
    revision: int
    context: bytes
    input: bytes
    output: bytes
    previous: bytes
    challenge: bytes
    sketches: bytes
    at: int

    TYPE: ClassVar[str] = (
        "Receipt(address node,bytes32 model,bytes32 numericClass,bytes32 session,uint32 attempt,uint16 start,"
        "uint16 end,uint32 first,uint32 last,uint32 revision,bytes32 context,bytes32 input,bytes32 output,"
        "bytes32 previous,bytes32 challenge,bytes32 sketches,uint48 at)"
    )

    def __post_init__(self) -> None:
        if self.start >= self.end or self.first >= self.last:
            raise ValueError(f"no layers [{self.start}, {self.end}) or no positions [{self.first}, {self.last})")

    @property
    def span(self) -> Span:
        return Span(self.start, self.end)

    @property
    def positions(self) -> Positions:
        return Positions(self.first, self.last)


def leaf(row: bytes) -> Digest:
    """The Merkle leaf of one row."""
    return Digest(hashlib.sha256(b"\0" + row).digest())


def merkle_root(leaves: Sequence[Digest]) -> Digest:
    """The root over leaves. Raises ValueError for none."""
    if not leaves:
        raise ValueError("a root needs a leaf")
    level = list(leaves)
    while len(level) > 1:
        pairs = [level[i : i + 2] for i in range(0, len(level), 2)]
        level = [Digest(hashlib.sha256(b"\x01" + b"".join(p)).digest()) if len(p) == 2 else p[0] for p in pairs]
    return level[0]


@dataclass(frozen=True, slots=True)
class Context:
    """Everything a window's outputs depend on besides its input rows and the session's earlier ones.

    want: one flag per position of the window: was its result asked for. token_types: root over the session's token
    type ids (leaves of one byte each) at a span that takes them, else None. memory: root over the encoder states that
    a decoder's span was given, else None. Fields for further side inputs are added here when a model needs them, so
    that no receipt is silent about an input.
    """

    numerics: str
    wire: str
    top_k: int
    want: tuple[bool, ...]
    token_types: Digest | None = None
    memory: Digest | None = None

    def digest(self) -> Digest:
        """SHA-256 of the canonical dag-json of the fields; `want` as hex, position p in bit p % 8 of byte p // 8."""
        value = {
            "memory": None if self.memory is None else self.memory.hex(),
            "numerics": self.numerics,
            "top_k": self.top_k,
            "token_types": None if self.token_types is None else self.token_types.hex(),
            "want": pack_flags(self.want).hex(),
            "wire": self.wire,
        }
        return Digest(hashlib.sha256(canonical_json.encode(value)).digest())


def rows_root(rows: Iterable[bytes]) -> Digest:
    """The Merkle root over rows. Raises ValueError for none."""
    return merkle_root([leaf(row) for row in rows])


def pack_flags(flags: Sequence[bool]) -> bytes:
    """One bit a flag, least significant first."""
    packed = bytearray((len(flags) + 7) // 8)
    for index, flag in enumerate(flags):
        packed[index // 8] |= flag << (index % 8)
    return bytes(packed)


def unpack_flags(packed: bytes, count: int) -> tuple[bool, ...]:
    """The inverse of pack_flags. Raises ValueError when the length or a padding bit does not fit `count`."""
    flags = tuple(bool(packed[i // 8] >> (i % 8) & 1) for i in range(count)) if len(packed) * 8 >= count else ()
    if len(flags) != count or pack_flags(flags) != packed:
        raise ValueError("the bitmap does not fit the number of positions")
    return flags
