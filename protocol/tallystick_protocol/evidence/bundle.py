"""The evidence about one accused receipt, as bytes that have one spelling and one content id.

Integers are little-endian. The lengths of all parts follow from the header, and the number of output rows from where
the accused receipt's window begins; a bundle of a length that the header does not allow is refused before any part of
it is looked at.

| bytes            | what                                                                               |
|------------------|------------------------------------------------------------------------------------|
| 8                | `TALYEVI1`                                                                         |
| 1                | numerics: 0 `fp32`, 1 `bf16w`                                                      |
| 1                | wire: 0 `f32`, 1 `bf16`, 2 `int8`                                                  |
| 1                | output rows: 0 none, 1 of all the accused window's positions, 2 of the wanted ones |
| 1                | token types: 0 none, 1 one byte for each position                                  |
| 2                | top_k of the SessionOpen                                                           |
| 2                | n, receipts                                                                        |
| 4                | p, positions: `last` of the accused receipt                                        |
| 4                | bytes of an input row                                                              |
| 4                | bytes of an output row; 0 without output rows                                      |
| 4                | m, rows of the encoder's states that a decoder's span was given, or 0              |
| 4                | bytes of such a row, or 0                                                          |
| n x 609          | sealed receipts of the accused, window by window, the accused one last: that of a  |
|                  | window, or one that closes the last window                                         |
| (p + 7) / 8      | `want` of the positions [0, p), least significant bit first                        |
| p                | token types, if any                                                                |
| p x input row    | rows that came in at the positions [0, p)                                          |
| m x memory row   | the encoder's states                                                               |
| ... x output row | rows that left, if any                                                             |
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tallystick_protocol.errors import BadEvidence, ProtocolError
from tallystick_protocol.manifest import Numerics
from tallystick_protocol.receipts import Receipt, pack_flags, unpack_flags
from tallystick_protocol.signing import SIGNATURE_BYTES, from_words
from tallystick_protocol.types import WINDOW
from tallystick_protocol.wire import WIRES, Wire

MAX_BYTES: Final = 64 << 20
MAX_POSITIONS: Final = 4096
MAX_RECEIPTS: Final = MAX_POSITIONS // WINDOW
MAGIC: Final = b"TALYEVI1"
KEPT_S: Final = 14 * 86400
"""How long what speaks against a node is kept, from a receipt's date on: a case is opened within EVIDENCE and ruled
within TRIAL, UNBONDING covers both, and then no stake answers for it."""
NUMERICS: Final[tuple[Numerics, ...]] = ("fp32", "bf16w")
SEALED_BYTES: Final = 32 * len(Receipt.__slots__) + SIGNATURE_BYTES
_HEADER: Final = struct.Struct("<8sBBBBHHIIIII")
_NONE, _ALL, _WANTED = range(3)


def most_positions(row_bytes: int) -> int:
    """Of a session between two hops, in whole windows: what is beyond fits no bundle, so no case can be made of it."""
    one = row_bytes + SEALED_BYTES // WINDOW + 2
    return min(MAX_POSITIONS, (MAX_BYTES - WINDOW * row_bytes) // one) // WINDOW * WINDOW


@dataclass(frozen=True, slots=True)
class Bundle:
    """The parts, not checked against each other: `checking.check` does that.

    sealed: receipts with signatures, window by window. want: one flag per position. inputs: all of one length.
    token_types: one byte per position, or none. memory: the encoder's states, a row each. outputs: rows of the accused
    window, of those positions that have one; None where the accuser has none. all_outputs: whether every position has
    one, wanted or not, as between hops.
    """

    numerics: Numerics
    wire: Wire
    top_k: int
    sealed: tuple[bytes, ...]
    want: tuple[bool, ...]
    inputs: tuple[bytes, ...]
    token_types: bytes = b""
    memory: tuple[bytes, ...] = ()
    outputs: tuple[bytes, ...] | None = None
    all_outputs: bool = False

    @property
    def num_positions(self) -> int:
        return len(self.want)

    @property
    def accused(self) -> Receipt:
        """The last one, which it is about, whoever has signed it. Raises BadEvidence."""
        return _receipt_in(self.sealed[-1])

    def encode(self) -> bytes:
        """Raises BadEvidence for rows of unequal length, and for what is beyond the limits."""
        outputs = self.outputs or ()
        mode = _NONE if self.outputs is None else _ALL if self.all_outputs else _WANTED
        header = _HEADER.pack(
            MAGIC, NUMERICS.index(self.numerics), WIRES.index(self.wire), mode, bool(self.token_types), self.top_k,
            min(len(self.sealed), 0xFFFF), self.num_positions, _row_bytes(self.inputs), _row_bytes(outputs),
            len(self.memory), _row_bytes(self.memory),
        )  # fmt: skip
        parts = (*self.sealed, pack_flags(self.want), self.token_types, *self.inputs, *self.memory, *outputs)
        data = b"".join((header, *parts))
        _Sizes.of(data)
        return data

    @staticmethod
    def decode(data: bytes | memoryview) -> Bundle:
        """Raises BadEvidence for all that `encode` would not have written; allocates no more than `data` holds."""
        sizes, view = _Sizes.of(data), memoryview(data)
        at = _HEADER.size

        def rows(count: int, size: int) -> tuple[bytes, ...]:
            nonlocal at
            begin, at = at, at + count * size
            return tuple(bytes(view[begin + i * size : begin + (i + 1) * size]) for i in range(count))

        positions = sizes.positions
        sealed = rows(sizes.receipts, SEALED_BYTES)
        (packed,) = rows(1, (positions + 7) // 8)
        try:
            want = unpack_flags(packed, positions)
        except ValueError as error:
            raise BadEvidence(str(error)) from None
        types = b"".join(rows(positions * sizes.has_types, 1))
        inputs, memory = rows(positions, sizes.input_bytes), rows(sizes.memory_rows, sizes.memory_bytes)
        outputs = None
        if sizes.outputs:
            first = min(_receipt_in(sealed[-1]).first, positions)
            flags = want[first:] if sizes.outputs == _WANTED else (True,) * (positions - first)
            fits = at + sum(flags) * sizes.output_bytes == len(view) and any(flags) == bool(sizes.output_bytes)
            if not fits:
                raise BadEvidence("output rows are those of the accused window's wanted positions, or of all")
            outputs = rows(sum(flags), sizes.output_bytes)
        return Bundle(
            NUMERICS[sizes.numerics], WIRES[sizes.wire], sizes.top_k, sealed, want, inputs, types, memory, outputs,
            sizes.outputs == _ALL,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Sizes:
    """A header within bounds, of data of the length that it says (with output rows: of a length that it allows)."""

    numerics: int
    wire: int
    outputs: int
    has_types: int
    top_k: int
    receipts: int
    positions: int
    input_bytes: int
    output_bytes: int
    memory_rows: int
    memory_bytes: int

    @staticmethod
    def of(data: bytes | memoryview) -> _Sizes:
        if not _HEADER.size <= len(data) <= MAX_BYTES:
            raise BadEvidence(f"evidence of {len(data)} bytes; from {_HEADER.size} to {MAX_BYTES} are read")
        magic, *fields = _HEADER.unpack_from(data)
        if magic != MAGIC:
            raise BadEvidence("not evidence of a version that is known here")
        sizes = _Sizes(*fields)
        sizes._check()
        is_cut = sizes.receipts > 2  # else it may be one window, and a closing receipt
        most = (WINDOW if is_cut else sizes.positions) * bool(sizes.outputs)
        before = sizes._before_outputs()
        if not before <= len(data) <= before + most * sizes.output_bytes:
            raise BadEvidence("the evidence's length is not what its header says")
        return sizes

    def _check(self) -> None:
        if self.numerics >= len(NUMERICS) or self.wire >= len(WIRES) or self.outputs > _WANTED or self.has_types > 1:
            raise BadEvidence("the evidence's header has a value that means nothing")
        if not 0 < self.positions <= MAX_POSITIONS or self.memory_rows > MAX_POSITIONS:
            raise BadEvidence(f"evidence of {self.positions} positions; from 1 to {MAX_POSITIONS} are tried")
        windows = (self.positions + WINDOW - 1) // WINDOW
        if self.receipts not in (1, 2, windows, windows + 1):
            raise BadEvidence(
                f"{self.receipts} receipts for {self.positions} positions; {windows}, or one window, and a closing one"
            )
        if self.input_bytes < 1 or bool(self.memory_rows) != bool(self.memory_bytes):
            raise BadEvidence("rows that hold nothing")
        if bool(self.outputs) != bool(self.output_bytes) and self.outputs != _WANTED:
            raise BadEvidence("output rows without a length, or a length without rows")

    def _before_outputs(self) -> int:
        rows = self.positions * (self.has_types + self.input_bytes) + self.memory_rows * self.memory_bytes
        return _HEADER.size + self.receipts * SEALED_BYTES + (self.positions + 7) // 8 + rows


def _receipt_in(sealed: bytes) -> Receipt:
    """Raises BadEvidence."""
    try:
        return from_words(Receipt, sealed[:-SIGNATURE_BYTES])
    except ProtocolError as error:
        raise BadEvidence(f"a receipt in it is none: {error.message}") from None


def _row_bytes(rows: Sequence[bytes]) -> int:
    """The length of each row. Raises BadEvidence when they differ."""
    if len({len(row) for row in rows}) > 1:
        raise BadEvidence("rows of one kind have one length")
    return len(rows[0]) if rows else 0
