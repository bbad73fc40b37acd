"""Hidden rows on the wire, next to torch's own bfloat16 and to the definition of int8."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tallystick_protocol.errors import BadMessage
from tallystick_protocol.frames import VALUE_BYTES
from tallystick_protocol.wire import DTYPES, WIRES, Wire, decode, encode, values_per_row, wire_of

ROWS = np.random.default_rng(3).normal(size=(7, 24)).astype(np.float32) * np.float32(30)
ROWS[0, :4] = [0.0, 1.0, -1.0, 2.0**-120]
ROWS[1] = 0.0


@pytest.mark.parametrize("wire", WIRES)
def test_rows_have_the_size_that_frames_say_and_rounding_twice_changes_nothing(wire: Wire) -> None:
    sent = encode(ROWS, wire)
    assert {len(row) for row in sent} == {values_per_row(wire, 24) * VALUE_BYTES[DTYPES[wire]]}
    got = decode(b"".join(sent), wire, 24)
    assert got.dtype == np.float32 and got.shape == ROWS.shape
    assert decode(b"".join(encode(got, wire)), wire, 24).tobytes() == got.tobytes() or wire == "int8"


def test_f32_is_the_row_itself() -> None:
    assert decode(b"".join(encode(ROWS, "f32")), "f32", 24).tobytes() == ROWS.tobytes()


def test_bf16_rounds_as_torch_does() -> None:
    bits = np.random.default_rng(4).integers(0x00800000, 0x7F000000, size=4096, dtype=np.uint32)
    bits[::3] = bits[::3] & 0xFFFF0000 | 0x8000  # halfway between two
    values = bits.view(np.float32).reshape(-1, 64)
    expected = torch.from_numpy(values.copy()).to(torch.bfloat16).to(torch.float32).numpy()
    assert decode(b"".join(encode(values, "bf16")), "bf16", 64).tobytes() == expected.tobytes()


def test_int8_is_within_half_a_step_of_each_value_and_has_no_denormals() -> None:
    got = decode(b"".join(encode(ROWS, "int8")), "int8", 24)
    steps = np.abs(ROWS).max(axis=1, keepdims=True) / 127
    assert bool((np.abs(got - ROWS) <= steps * 0.5001).all())
    assert not got[1].any()
    least = np.array([[1.2e-37, 1.18e-38]], dtype=np.float32)  # twelve and a half steps, of which twelve are denormal
    assert decode(b"".join(encode(least, "int8")), "int8", 2)[0, 1] == 0


@pytest.mark.parametrize("name", ["", "f16", None, 4, ["f32"]])
def test_other_names_are_refused(name: object) -> None:
    with pytest.raises(BadMessage, match="f32, bf16, int8"):
        wire_of(name)
