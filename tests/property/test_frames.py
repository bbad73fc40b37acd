"""Frames under structured fuzzing: header-shaped bytes, bodies of every msgpack type, mutated valid frames."""

from __future__ import annotations

from typing import Any

import msgpack
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tallystick_protocol.errors import BadFrame, from_wire
from tallystick_protocol.frames import HEADER, MAX_BODY, MAX_POSITION, VALUE_BYTES, DType, Frame, Kind

U32 = st.one_of(st.integers(0, 5), st.sampled_from([2**16, 2**20, 2**22, 2**31, 2**32 - 1]), st.integers(0, 2**32 - 1))
U8 = st.one_of(st.integers(0, 20), st.integers(0, 255))
MSGPACK_BYTES = st.sampled_from(
    [bytes([b]) for b in (0x80, 0x81, 0x8F, 0x90, 0x91, 0x9F, 0xA0, 0xA1, 0xBF, *range(0xC0, 0xE0), 0xFF)]
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(),
    st.text(max_size=20),
    st.binary(max_size=40),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.text(max_size=5), st.integers(-5, 5), st.binary(max_size=3)), inner, max_size=3),
    ),
    max_leaves=8,
)


@st.composite
def header_shaped(draw: st.DrawFn) -> bytes:
    """A header whose fields are mostly plausible, and a body and tensor that mostly fit it."""
    body = draw(
        st.one_of(
            st.lists(MSGPACK_BYTES, max_size=12).map(b"".join),
            st.dictionaries(st.text(max_size=5), VALUES, max_size=4).map(msgpack.packb),
            VALUES.map(msgpack.packb),
            st.binary(max_size=30),
        )
    )
    dtype = draw(st.one_of(st.sampled_from(list(DType)).map(int), U8))
    shape = draw(st.one_of(st.tuples(st.just(1), st.integers(0, 4), st.integers(0, 4)), st.tuples(U32, U32, U32)))
    size = shape[0] * shape[1] * shape[2] * VALUE_BYTES.get(dtype, 4)  # type: ignore[call-overload]
    tensor = bytes(min(size, 512))
    body_len = draw(st.one_of(st.just(len(body)), U32))
    tensor_len = draw(st.one_of(st.just(len(tensor)), U32))
    magic = draw(st.sampled_from([b"TALY"] * 9 + [b"TALZ"]))
    version = draw(st.sampled_from([1] * 9 + [0]))
    header = bytearray(
        HEADER.pack(magic, version, draw(U8), dtype % 256, *shape, draw(U32), body_len, tensor_len),
    )
    header[7] = draw(st.sampled_from([0] * 9 + [1]))
    return bytes(header) + body + tensor + draw(st.sampled_from([b""] * 9 + [b"\0"]))


@st.composite
def frames(draw: st.DrawFn) -> Frame:
    dtype = draw(st.sampled_from(DType))
    shape = (0, 0, 0) if dtype is DType.NONE else (1, draw(st.integers(1, 6)), draw(st.integers(1, 6)))
    size = shape[0] * shape[1] * shape[2] * VALUE_BYTES[dtype]
    body = draw(st.dictionaries(st.text(max_size=8), st.one_of(SCALARS, st.lists(SCALARS, max_size=4)), max_size=5))
    position = draw(st.integers(0, MAX_POSITION))
    tensor = draw(st.binary(min_size=size, max_size=size))
    return Frame(draw(st.sampled_from(Kind)), body, position, dtype, shape, tensor)


def check(data: bytes) -> None:
    """Decode, or BadFrame; what was decoded is within its bounds and can be handed on."""
    try:
        frame = Frame.decode(data)
    except BadFrame:
        return
    assert len(data) - HEADER.size - len(frame.tensor) <= MAX_BODY
    assert frame.position <= MAX_POSITION
    assert sum(map(len, frame.rows())) == len(frame.tensor)
    assert all(isinstance(key, str) for key in frame.body)
    error = from_wire(frame.body)
    assert len(repr(error.fields)) < 16 * 1200
    assert str(error).isprintable()


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(header_shaped())
def test_header_shaped_bytes_decode_or_are_a_bad_frame(data: bytes) -> None:
    check(data)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=200))
def test_random_bytes_decode_or_are_a_bad_frame(data: bytes) -> None:
    check(b"TALY\x01" + data)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(frames())
def test_frames_come_back_as_they_were(frame: Frame) -> None:
    data = frame.encode()
    again = Frame.decode(data)
    assert repr(again.body) == repr(frame.body)  # repr: NaN equals NaN
    assert bytes(again.tensor) == frame.tensor
    assert (again.kind, again.position, again.dtype, again.shape) == (
        frame.kind,
        frame.position,
        frame.dtype,
        frame.shape,
    )


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(frames(), st.data())
def test_a_mutated_frame_decodes_or_is_a_bad_frame(frame: Frame, data: Any) -> None:
    valid = bytearray(frame.encode())
    for _ in range(data.draw(st.integers(1, 3))):
        index = data.draw(st.integers(0, len(valid) - 1))
        how = data.draw(st.sampled_from(["flip", "delete", "insert"]))
        if how == "flip":
            valid[index] ^= data.draw(st.integers(1, 255))
        elif how == "delete" and len(valid) > 1:
            del valid[index]
        else:
            valid.insert(index, data.draw(st.integers(0, 255)))
    check(bytes(valid))
