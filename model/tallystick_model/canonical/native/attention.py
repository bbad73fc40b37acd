"""Attention in machine code that is made for this processor when it is first needed.

One rule decides every bit. A row sees keys low .. high - 1 of its session. Keys stand in chunks of 16, at multiples of
16. The score of a key is the product of query and key, added up in 16 parts (part i of the values i, i + 16, ... in
their order, one fused multiply-add each), which are then added in halves (i and i + 8, then i + 4, i + 2, i + 1), times
the scale. Shares are exp(score - the largest one), as `attention_code.exponential` says. Their sum has 16 parts by the
key's place in its chunk, in the order of chunks, added in halves; a sink comes last. Values are added up within a
chunk, from zero in the order of keys, then chunk by chunk; the result is divided by the sum. Nothing else of a session
counts, nor who else is computed.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import numpy as np
import torch

from tallystick_model.canonical.native.compiling import Compiled, address_of, if_possible, shared_from

CHUNK = 16
"""Keys and values lie in memory of a multiple of so many; behind the last one they are finite."""

TOGETHER = 8
"""Rows of a unit at most: they read the same keys while these are in the cache."""

(
    QUERY, QUERY_HEAD, QUERY_ROW, OUT, SEGMENTS, ROWS, UNITS, NUM_UNITS, HEADS, GROUPS, SCALE, SINKS,
    KEY, KEY_GROUP, KEY_ROW, VALUE, VALUE_GROUP, VALUE_ROW, WRITTEN, WORK, KEYS, FIELDS,
) = range(22)  # fmt: skip
"""Fields of a task: where things are in memory, and how many floats apart."""

_SHARED_WORK = 1 << 20


@dataclass(frozen=True, slots=True)
class Table:
    """Which rows see what, for all layers with one mask.

    rows: (n, 4) int64: session, position, low, high. units: (u, 2) int64: rows [begin, end) of one session, in their
    order, TOGETHER at most. written: the first so many rows are put into caches, and are not copies of others.
    """

    rows: Any
    units: Any
    written: int
    keys: int = field(init=False)
    seen: int = field(init=False)

    def __post_init__(self) -> None:
        begins, ends = self.rows[self.units[:, 0], 2], self.rows[self.units[:, 1] - 1, 3]
        width = int((ends - begins // CHUNK * CHUNK).max()) if len(self.units) else 0
        object.__setattr__(self, "keys", -(-width // CHUNK) * CHUNK)
        object.__setattr__(self, "seen", int((self.rows[:, 3] - self.rows[:, 2]).sum()))


@dataclass(frozen=True, slots=True, eq=False)
class Attention:
    """Attention over keys of one length and values of one length."""

    key_dim: int
    value_dim: int
    _run: Callable[[int], None]

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        segments: Any,
        table: Table,
        scale: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """query (1, heads, n, key_dim), key and value (1, groups, n, ...), float32 -> (1, n, heads, value_dim).

        segments: (s, 4) int64: where a session's keys and values are (groups, capacity, ...), and how many floats after
        each other two groups stand. scale: of the scores, None for 1 / sqrt(key_dim). sinks: (heads,) float32.
        """
        query, key, value = (one if one.stride(-1) == 1 else one.contiguous() for one in (query, key, value))
        out = query.new_empty(1, query.shape[2], query.shape[1], self.value_dim)
        task = self.task(
            (query.shape[1], query.stride(1), query.stride(2)),
            (key.shape[1], key.stride(1), key.stride(2)),
            (value.stride(1), value.stride(2)),
            scale,
            sinks,
        )
        task[[QUERY, OUT, KEY, VALUE]] = query.data_ptr(), out.data_ptr(), key.data_ptr(), value.data_ptr()
        self.place(task, segments, table)
        self._run(task.ctypes.data)
        return out

    def task(
        self,
        query: tuple[int, int, int],
        key: tuple[int, int, int],
        value: tuple[int, int],
        scale: float | None,
        sinks: torch.Tensor | None,
    ) -> Any:
        """What does not change from call to call, (FIELDS,) int64. query and key: heads, and how many floats apart two
        of them and two rows are; value: the same without heads. sinks must live as long as the task."""
        task = np.zeros(FIELDS, dtype=np.int64)
        task[[HEADS, QUERY_HEAD, QUERY_ROW]], task[[GROUPS, KEY_GROUP, KEY_ROW]] = query, key
        task[[VALUE_GROUP, VALUE_ROW]] = value
        task[SCALE] = _bits(self.key_dim**-0.5 if scale is None else scale)
        task[SINKS] = 0 if sinks is None else sinks.data_ptr()
        return task

    def place(self, task: Any, segments: Any, table: Table) -> None:
        """Whose rows a call's are. Both must live as long as it runs."""
        work = table.seen * int(task[HEADS]) * (self.key_dim + self.value_dim)
        task[SEGMENTS], task[ROWS], task[UNITS] = segments.ctypes.data, table.rows.ctypes.data, table.units.ctypes.data
        task[NUM_UNITS], task[WRITTEN], task[WORK], task[KEYS] = len(table.units), table.written, work, table.keys

    @property
    def address(self) -> int:
        """Of `attend(task*)`."""
        return address_of(self._run)


@cache
def _bits(value: float) -> int:
    bits: int = struct.unpack("<I", struct.pack("<f", value))[0]
    return bits


@cache
def attention(key_dim: int, value_dim: int) -> Attention | None:
    """Of this processor; None where there is none (`lanes`)."""
    return if_possible(partial(compiled, key_dim, value_dim))


def compiled(key_dim: int, value_dim: int, width: int) -> Attention:
    """width: float32 in the vectors of the processor that it is for. Raises RuntimeError."""

    def make() -> Any:
        from tallystick_model.canonical.native.attention_code import attention_module

        return attention_module(key_dim, value_dim, shared_from(_SHARED_WORK))

    code = Compiled(f"attention of {key_dim} and {value_dim}, {width} lanes", make, width)
    return Attention(key_dim, value_dim, code.function("attend", 1, 0))
