"""Canonical dag-json: one byte string per value, every other spelling refused, no input that ends the process."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tallystick_protocol import canonical_json
from tallystick_protocol.errors import ManifestError

VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(st.characters(exclude_categories=["Cs"])),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=4),
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(VALUES)
def test_values_come_back_as_they_were(value: Any) -> None:
    data = canonical_json.encode(value)
    again = canonical_json.decode(data)
    assert again == value
    assert canonical_json.encode(again) == data


def test_keys_are_in_the_order_of_their_utf8_bytes() -> None:
    keys = ["z", "a", "", "ä", "\U0001f600", "\uffff", "Z", "aa", "\n"]
    decoded = canonical_json.decode(canonical_json.encode(dict.fromkeys(keys, 0)))
    assert list(decoded) == sorted(keys, key=lambda key: key.encode())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b" 1",
        b"1\n",
        b'{"b":1,"a":2}',
        b'{"a":1,"a":1}',
        b'{"a" :1}',
        b"[1, 2]",
        b"01",
        b"1.00",
        b"1e2",
        b"1E+2",
        b"-0",
        b"+1",
        b".5",
        b"NaN",
        b"Infinity",
        b"-Infinity",
        b"1e999",
        b'"\\u0061"',
        b'"\\/"',
        b'"\\ud800"',
        b'"\\ud83d\\ude00"',
        b'{"\\ud800":1}',
        b'"\xff"',
        b"\xef\xbb\xbf1",
        b"1" * 5000,
        b"[1,]",
        b"{1:2}",
        b"'a'",
        b"nul",
        b'"a',
        b'"\\"' * 3,
        b"\0",
        '"\u2028\u0000"'.encode(),
        "1".encode("utf-16"),
    ],
    ids=lambda data: repr(data[:20]),
)
def test_every_other_spelling_is_refused(data: bytes) -> None:
    with pytest.raises(ManifestError, match="canonical"):
        canonical_json.decode(data)


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), {1: 2}, {None: 1}, {"a": {b"k": 1}}, b"bytes", {1, 2}, 1j], ids=repr
)
def test_what_has_no_canonical_form_is_not_encoded(value: Any) -> None:
    with pytest.raises(ValueError):
        canonical_json.encode(value)


def test_nesting_is_bounded_on_both_sides() -> None:
    def nested(depth: int) -> Any:
        return [nested(depth - 1)] if depth > 1 else []

    assert canonical_json.decode(canonical_json.encode(nested(33))) == nested(33)
    with pytest.raises(ValueError, match="nested"):
        canonical_json.encode(nested(34))
    with pytest.raises(ManifestError, match="nested"):
        canonical_json.decode(b"[" * 34 + b"]" * 34)


def test_brackets_in_strings_are_no_nesting() -> None:
    for text in ("[" * 1000, "{" * 1000, '\\"[' * 100, '"' * 99, "\\" * 50 + "[" * 40):
        value = {text: text}
        assert canonical_json.decode(canonical_json.encode(value)) == value


HOSTILE_NESTING = """
import sys
import eth_account  # its dependency py_ecc raises the recursion limit to 100,000
from tallystick_protocol import canonical_json
from tallystick_protocol.errors import ManifestError
from tallystick_protocol.transport.contact import decode_endpoint
assert sys.getrecursionlimit() >= 100_000, "the danger is gone: is the guard still needed?"
for data in (
    b"[" * 1_000_000,
    b'{"a":' * 200_000,
    b"[{" * 500_000,
    b"[" * 500_000 + b"]" * 500_000,
    b'["\\\\\\\\",' * 150_000,
    b'["' + b'\\\\"' * 300_000 + b'",' + b"[" * 300_000,
    b'"' + b'\\\\"' * 500_000,
):
    try:
        canonical_json.decode(data)
    except ManifestError as error:
        print(error)
"""


def test_a_megabyte_of_brackets_is_refused_and_does_not_end_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", HOSTILE_NESTING], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 7
