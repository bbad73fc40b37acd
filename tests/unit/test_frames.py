"""Frames: one layout, every bound before anything is allocated."""

from __future__ import annotations

import tracemalloc
from typing import Any

import msgpack
import pytest

from tallystick_protocol.errors import BadFrame, TallystickError
from tallystick_protocol.frames import (
    HEADER,
    MAX_BODY,
    MAX_FRAME,
    MAX_POSITION,
    MAX_TENSOR,
    DType,
    Frame,
    Kind,
    rows_frame,
    rows_per_frame,
    take,
)


def raw(
    body: bytes = b"\x80",
    tensor: bytes = b"",
    *,
    magic: bytes = b"TALY",
    version: int = 1,
    kind: int = 5,
    dtype: int = 0,
    shape: tuple[int, int, int] = (0, 0, 0),
    position: int = 0,
    body_len: int | None = None,
    tensor_len: int | None = None,
    zero: int = 0,
) -> bytes:
    body_len = len(body) if body_len is None else body_len
    tensor_len = len(tensor) if tensor_len is None else tensor_len
    header = bytearray(HEADER.pack(magic, version, kind, dtype, *shape, position, body_len, tensor_len))
    header[7] = zero
    return bytes(header) + body + tensor


def body(value: bytes) -> bytes:
    """A map {"a": value}, the value already in msgpack."""
    return b"\x81\xa1a" + value


def test_the_layout_is_the_byte_table_in_the_docstring() -> None:
    frame = Frame(Kind.STEP, {"k": 1}, 7, DType.F32, (1, 2, 3), bytes(range(24)))
    data = frame.encode()
    assert data[:8] == b"TALY\x01\x05\x02\x00"
    assert data[8:32] == b"".join(number.to_bytes(4, "little") for number in (1, 2, 3, 7, 4, 24))
    assert data[32:36] == msgpack.packb({"k": 1})
    assert data[36:] == bytes(range(24))
    assert Frame.decode(data) == frame


def test_a_tensor_is_a_view_and_no_copy() -> None:
    data = Frame(Kind.STEP, {}, 0, DType.F32, (1, 1, 4), bytes(16)).encode()
    tensor = Frame.decode(data).tensor
    assert isinstance(tensor, memoryview)
    assert tensor.obj is data


@pytest.mark.parametrize(
    "data",
    {
        "nothing": b"",
        "half a header": raw()[:31],
        "another magic": raw(magic=b"TALX"),
        "version 0": raw(version=0),
        "version 2": raw(version=2),
        "byte 7 set": raw(zero=1),
        "kind 0": raw(kind=0),
        "kind 200": raw(kind=200),
        "kind 255": raw(kind=255),
        "dtype 4": raw(dtype=4, shape=(1, 1, 1)),
        "dtype 255": raw(dtype=255, shape=(1, 1, 1)),
        "a body beyond the limit": raw(bytes(MAX_BODY + 1)),
        "a body that says 4 GiB": raw(body_len=0xFFFFFFFF),
        "a tensor that says 4 GiB": raw(dtype=1, shape=(1, 1, 0x3FFFFFFF), tensor_len=0xFFFFFFFC),
        "a tensor beyond the limit": raw(b"\x80", bytes(MAX_TENSOR + 4), dtype=1, shape=(1, MAX_TENSOR // 4 + 1, 1)),
        "a shape beyond 2^64": raw(dtype=2, shape=(0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF)),
        "a shape that wraps to the length": raw(b"\x80", bytes(4), dtype=1, shape=(1, 1 << 31, 2)),
        "a position beyond the limit": raw(position=MAX_POSITION + 1),
        "bytes after the tensor": raw() + b"\0",
        "a tensor cut off": raw(b"\x80", bytes(16), dtype=1, shape=(1, 4, 1))[:-1],
        "a body cut off": raw(body_len=2),
        "a tensor without a dtype": raw(b"\x80", bytes(4)),
        "a shape without a dtype": raw(shape=(1, 0, 0)),
        "a dtype without rows": raw(dtype=1, shape=(1, 0, 1)),
        "a dtype without values": raw(dtype=1, shape=(1, 1, 0)),
        "a dtype without a shape": raw(dtype=2),
        "two sessions": raw(b"\x80", bytes(8), dtype=1, shape=(2, 1, 1)),
        "the shape of another tensor": raw(b"\x80", bytes(8), dtype=1, shape=(1, 3, 1)),
        "f32 for top-k": raw(b"\x80", bytes(4), dtype=3, shape=(1, 1, 1)),
        "no body": raw(b""),
        "a body that is a list": raw(b"\x90"),
        "a body that is nil": raw(b"\xc0"),
        "two bodies": raw(b"\x80\x80"),
        "half a body": raw(b"\x81\xa1a"),
        "a body of text": raw(b"{}"),
        "duplicate keys": raw(b"\x82\xa1a\x01\xa1a\x02"),
        "duplicate keys deeper": raw(body(b"\x82\xa1a\x01\xa1a\x02")),
        "a key of bytes": raw(b"\x81\xc4\x01a\x01"),
        "a key that is a number": raw(b"\x81\x01\x01"),
        "a key that is nil": raw(b"\x81\xc0\x01"),
        "a key that is a list": raw(b"\x81\x90\x01"),
        "a key that is a map": raw(b"\x81\x80\x01"),
        "a key that is an extension": raw(b"\x81\xc7\x00\x05\x01"),
        "a map of 65 keys": raw(b"\xde\x00\x41" + b"".join(bytes([0xA1, i]) + b"\x01" for i in range(65))),
        "a map that says 4 billion keys": raw(b"\xdf\xff\xff\xff\xff"),
        "a list that says 4 billion entries": raw(body(b"\xdd\xff\xff\xff\xff")),
        "a list of 4097 entries": raw(body(b"\xdc\x10\x01" + b"\x01" * 4097)),
        "bytes that say 4 GiB": raw(body(b"\xc6\xff\xff\xff\xff")),
        "text that says 4 GiB": raw(body(b"\xdb\xff\xff\xff\xff")),
        "text that is not UTF-8": raw(body(b"\xa1\xff")),
        "a surrogate": raw(body(b"\xa3\xed\xa0\x80")),
        "an empty extension": raw(body(b"\xc7\x00\x05")),
        "an extension": raw(body(b"\xd4\x05\x00")),
        "a timestamp": raw(body(b"\xd6\xff\x00\x00\x00\x01")),
        "an empty timestamp": raw(body(b"\xc7\x00\xff")),
        "an extension that says 4 GiB": raw(body(b"\xc9\xff\xff\xff\xff\x05")),
        "the byte msgpack never uses": raw(body(b"\xc1")),
        "lists 5 deep": raw(body(b"\x91" * 5 + b"\xc0")),
        "lists 1,000 deep": raw(body(b"\x91" * 1000 + b"\xc0")),
        "lists 60,000 deep": raw(body(b"\x91" * 60000 + b"\xc0")),
        "maps 10,000 deep": raw(b"\x81\xa1a" * 10000 + b"\xc0"),
    }.items(),
    ids=lambda pair: pair[0],
)
def test_every_malformed_frame_is_a_bad_frame_and_nothing_else(data: tuple[str, bytes]) -> None:
    with pytest.raises(BadFrame):
        Frame.decode(data[1])


def test_lengths_are_refused_before_anything_of_their_size_is_allocated() -> None:
    hostile = [
        raw(body_len=0xFFFFFFFF),
        raw(dtype=1, shape=(1, 1, 0x3FFFFFFF), tensor_len=0xFFFFFFFC),
        raw(body(b"\xdd\xff\xff\xff\xff")),
        raw(b"\xdf\xff\xff\xff\xff"),
        raw(body(b"\xc6\xff\xff\xff\xff")),
        raw(body(b"\xc9\xff\xff\xff\xff\x05")),
    ]
    tracemalloc.start()
    for data in hostile:
        with pytest.raises(BadFrame):
            Frame.decode(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_the_largest_frame_is_taken() -> None:
    value = {"a": bytes(MAX_BODY - 6)}
    frame = Frame(Kind.STEP, value, MAX_POSITION, DType.F32, (1, 4, MAX_TENSOR // 16), bytes(MAX_TENSOR))
    data = frame.encode()
    assert len(data) == MAX_FRAME
    assert Frame.decode(data).body == value


@pytest.mark.parametrize(
    "frame",
    [
        Frame(Kind.STEP, {}, -1),
        Frame(Kind.STEP, {}, MAX_POSITION + 1),
        Frame(Kind.STEP, {"a": bytes(MAX_BODY)}),
        Frame(Kind.STEP, {}, 0, DType.F32, (1, 1, 1), bytes(8)),
        Frame(Kind.STEP, {}, 0, DType.F32, (2, 1, 1), bytes(8)),
        Frame(Kind.STEP, {}, 0, DType.F32, (1, -1, -1), bytes(4)),
        Frame(Kind.STEP, {}, 0, DType.NONE, (0, 0, 0), bytes(4)),
        Frame(Kind.STEP, {}, 0, DType.F32, (1, 0, 4), b""),
        Frame(Kind.STEP, {}, 0, DType.F32, (1, 1, MAX_TENSOR), bytes(4 * MAX_TENSOR)),
    ],
    ids=lambda frame: f"{frame.position} {frame.shape}",
)
def test_what_the_decoder_would_refuse_is_not_encoded(frame: Frame) -> None:
    with pytest.raises(BadFrame):
        frame.encode()


def test_rows_come_back_one_by_one() -> None:
    rows = [bytes([i]) * 16 for i in range(5)]
    frame = Frame.decode(rows_frame(Kind.RESULT, DType.TOP_K, rows, 3, {"want": b"\x1f"}).encode())
    assert (frame.shape, frame.num_rows, frame.position) == ((1, 5, 2), 5, 3)
    assert frame.rows() == rows


@pytest.mark.parametrize("row_bytes", [0, 1, 4, 4096, MAX_TENSOR // 2 + 1, MAX_TENSOR])
def test_as_many_rows_as_fit_go_into_a_frame(row_bytes: int) -> None:
    count = rows_per_frame(row_bytes)
    assert count >= 1
    assert count * row_bytes <= MAX_TENSOR < (count + 1) * max(row_bytes, 1)


def test_a_row_larger_than_a_frame_is_refused() -> None:
    with pytest.raises(BadFrame, match="does not fit"):
        rows_per_frame(MAX_TENSOR + 1)


@pytest.mark.parametrize(
    ("value", "kind"),
    [(True, int), (1.0, int), ("1", int), (None, int), (b"x", str), ("x", bytes), (0, bool), ([], bytes), ({}, str)],
    ids=str,
)
def test_a_field_has_exactly_its_type(value: Any, kind: type) -> None:
    with pytest.raises(BadFrame, match="field 'k' is"):
        take({"k": value}, "k", kind)
    with pytest.raises(BadFrame):
        take({}, "k", kind)


def test_a_missing_field_takes_its_default() -> None:
    assert take({}, "more", bool, False) is False
    assert take({"more": True}, "more", bool, False) is True


def test_a_bad_frame_tells_which_version_is_spoken() -> None:
    with pytest.raises(TallystickError) as raised:
        Frame.decode(raw(version=9))
    assert raised.value.fields == {"version": 1}
