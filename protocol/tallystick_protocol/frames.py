"""The frame: a fixed header, a bounded msgpack body, raw little-endian tensor bytes. One strict decoder for everybody.

offset  bytes  what
0       4      magic "TALY"
4       1      version, 1
5       1      kind (`Kind`)
6       1      dtype of the tensor (`DType`), 0 for none
7       1      zero
8       12     shape: 3 x u32 little-endian (sessions, rows, values per row); zeros for none
20      4      position of the first row, u32 little-endian
24      4      body bytes, u32 little-endian, at most 64 KiB
28      4      tensor bytes, u32 little-endian, at most 2 MiB, the product of shape and dtype exactly
32             body: one msgpack map with string keys
               tensor
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import msgpack

from tallystick_protocol.errors import BadFrame

MAGIC = b"TALY"
VERSION = 1
HEADER = struct.Struct("<4sBBBxIIIIII")
MAX_BODY = 64 * 1024
MAX_TENSOR = 2 << 20
MAX_FRAME = HEADER.size + MAX_BODY + MAX_TENSOR
MAX_POSITION = 1 << 22
MAX_BODY_DEPTH = 4


class Kind(IntEnum):
    """What a frame is; `docs/protocol.md` has one section for each."""

    OPEN = 1
    OPENED = 2
    PUSH_OPEN = 3
    PUSH_OPENED = 4
    STEP = 5
    RESULT = 6
    RECEIPT = 7
    VOUCHER = 8
    FLUSH = 9
    CROP = 10
    ROUTE = 11
    REPLAY = 12
    CLOSE = 13
    DONE = 14
    ERROR = 15
    MEMORY = 16
    FORK = 17
    PING = 18
    PONG = 19
    FORWARD = 20
    BACKWARD = 21
    TENSOR = 22
    RESUME = 23
    RESUMED = 24
    REGISTER = 25
    REGISTERED = 26
    CALL = 27
    RING = 28
    CHALLENGE = 29
    SKETCHES = 30
    FETCH = 33
    KEPT = 34


class DType(IntEnum):
    """What the tensor's values are: u32 token ids, f32 values, (u32 id, f32 value) pairs, rounded rows (`wire`)."""

    NONE = 0
    IDS = 1
    F32 = 2
    TOP_K = 3
    BF16 = 4
    INT8 = 5


_KINDS, _DTYPES = frozenset(Kind), frozenset(DType)
VALUE_BYTES: dict[int, int] = {DType.NONE: 0, DType.IDS: 4, DType.F32: 4, DType.TOP_K: 8, DType.BF16: 2, DType.INT8: 1}


@dataclass(frozen=True, slots=True)
class Frame:
    kind: Kind
    body: dict[str, Any] = field(default_factory=dict)
    position: int = 0
    dtype: DType = DType.NONE
    shape: tuple[int, int, int] = (0, 0, 0)
    tensor: bytes | memoryview = b""

    @property
    def num_rows(self) -> int:
        return self.shape[1]

    def encode(self) -> bytes:
        """The frame's bytes. Raises BadFrame when a bound does not hold."""
        body = msgpack.packb(self.body, use_bin_type=True)
        _check(self.kind, self.dtype, self.shape, self.position, len(body), len(self.tensor))
        header = HEADER.pack(
            MAGIC, VERSION, self.kind, self.dtype, *self.shape, self.position, len(body), len(self.tensor)
        )
        return b"".join((header, body, self.tensor))

    @staticmethod
    def decode(data: bytes) -> Frame:
        """Parse and bound a frame; the tensor is a view into `data`. Raises BadFrame."""
        if len(data) < HEADER.size:
            raise BadFrame(f"a frame has at least {HEADER.size} bytes, got {len(data)}")
        magic, version, kind, dtype, a, b, c, position, body_len, tensor_len = HEADER.unpack_from(data)
        if magic != MAGIC or version != VERSION:
            raise BadFrame("not a frame of this protocol version", version=VERSION)
        if data[7] != 0:
            raise BadFrame("byte 7 of the header is zero")
        _check(kind, dtype, (a, b, c), position, body_len, tensor_len)
        if len(data) != HEADER.size + body_len + tensor_len:
            raise BadFrame("the frame's length is not what its header says")
        body = _unpack(data[HEADER.size : HEADER.size + body_len])
        tensor = memoryview(data)[HEADER.size + body_len :]
        return Frame(Kind(kind), body, position, DType(dtype), (a, b, c), tensor)

    def rows(self) -> list[bytes]:
        """The bytes of each row."""
        size = self.shape[2] * VALUE_BYTES[self.dtype]
        return [bytes(self.tensor[i * size : (i + 1) * size]) for i in range(self.num_rows)]


def rows_frame(kind: Kind, dtype: DType, rows: list[bytes], position: int, body: dict[str, Any]) -> Frame:
    """A frame that carries rows of equal size from `position` on."""
    width = len(rows[0]) // VALUE_BYTES[dtype] if rows else 0
    return Frame(kind, body, position, dtype, (1, len(rows), width), b"".join(rows))


def rows_per_frame(row_bytes: int) -> int:
    """How many rows fit into one frame; a row larger than a frame raises BadFrame."""
    if row_bytes > MAX_TENSOR:
        raise BadFrame(f"a row of {row_bytes} bytes does not fit into a frame of {MAX_TENSOR}")
    return MAX_TENSOR // max(row_bytes, 1)


def _check(kind: int, dtype: int, shape: tuple[int, int, int], position: int, body: int, tensor: int) -> None:
    if kind not in _KINDS:
        raise BadFrame(f"unknown frame kind {kind}")
    if dtype not in _DTYPES:
        raise BadFrame(f"unknown dtype {dtype}")
    if body > MAX_BODY or tensor > MAX_TENSOR:
        raise BadFrame(f"body {body} and tensor {tensor} bytes; the limits are {MAX_BODY} and {MAX_TENSOR}")
    if not 0 <= position <= MAX_POSITION:
        raise BadFrame(f"position {position} is beyond {MAX_POSITION}")
    if shape[0] * shape[1] * shape[2] * VALUE_BYTES[dtype] != tensor or (dtype == 0 and any(shape)):
        raise BadFrame(f"{tensor} tensor bytes are not shape {shape} of dtype {DType(dtype).name}")
    if dtype != 0 and (shape[0] != 1 or min(shape) < 1):
        raise BadFrame(f"shape {shape} is not (1, rows, values)")


def _pairs(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if any(not isinstance(key, str) for key in keys) or len(set(keys)) != len(keys):
        raise BadFrame("the body's keys are distinct strings")
    return dict(pairs)


def _unpack(body: bytes) -> dict[str, Any]:
    try:
        value = msgpack.unpackb(
            body, raw=False, object_pairs_hook=_pairs, max_map_len=64, max_array_len=4096, max_ext_len=0
        )
    except BadFrame:
        raise
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        raise BadFrame(f"the body is not msgpack within bounds: {type(error).__name__}") from None
    if not isinstance(value, dict):
        raise BadFrame("the body is a map")
    _bound(value, MAX_BODY_DEPTH)
    return value


def _bound(value: Any, depth: int) -> None:
    if depth == 0 or isinstance(value, msgpack.ExtType):
        raise BadFrame("the body holds maps and lists nested too deeply, or extension types")
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            _bound(inner, depth - 1)


def take(body: dict[str, Any], key: str, kind: type, default: Any = None) -> Any:
    """A field of a body with exactly this type. Raises BadFrame when it is missing (and no default) or another."""
    value = body.get(key, default)
    if type(value) is not kind:
        raise BadFrame(f"field {key!r} is {kind.__name__}")
    return value
