"""Evidence: one spelling, parts that fit each other, and nothing else passes for readable."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import samples
from harness.claims import claim
from tallystick_protocol.errors import BadEvidence
from tallystick_protocol.evidence.bundle import MAX_BYTES, MAX_POSITIONS, SEALED_BYTES, Bundle, most_positions
from tallystick_protocol.evidence.checking import check_model, read_evidence
from tallystick_protocol.receipts import Context, Receipt, leaf, merkle_root
from tallystick_protocol.signing import digest, from_words, seal
from tallystick_protocol.types import WINDOW

KEY = samples.key("hot")
MANIFEST = samples.manifest()
CONTEXT = Context("fp32", "f32", 2, ())
HEADER_BYTES = 36


def bundle(positions: int = 40, **changes: Any) -> Bundle:
    """A first and last span of a model of four ids, two results of a position; the last ten positions are wanted."""
    ids = [(at % 4).to_bytes(4, "little") for at in range(positions)]
    want = [at >= positions - 10 for at in range(positions)]
    outputs = [struct.pack("<IfIf", at % 4, 1.0, (at + 1) % 4, 0.5) if want[at] else b"" for at in range(positions)]
    return claim(samples.receipt(), ids, outputs, want, context=CONTEXT, key=KEY, **changes)


def resealed(found: Bundle, index: int, **changes: Any) -> Bundle:
    """The bundle with one receipt signed again, other than it was."""
    signed = from_words(Receipt, found.sealed[index][:-65])
    sealed = list(found.sealed)
    sealed[index] = seal(samples.STAKING, replace(signed, **changes), KEY)
    return replace(found, sealed=tuple(sealed))


GOOD = bundle()


def refused(found: Bundle, why: str) -> None:
    with pytest.raises(BadEvidence, match=why):
        check_model(read_evidence(samples.STAKING, found.encode()), MANIFEST)


def test_what_was_packed_is_read_back() -> None:
    for found in (GOOD, replace(GOOD, outputs=None), bundle(10), bundle(64), bundle(1)):
        assert Bundle.decode(found.encode()) == found
        evidence = read_evidence(samples.STAKING, found.encode())
        check_model(evidence, MANIFEST)
        assert evidence.signers == {KEY.address}
        assert evidence.accused.last == found.num_positions
        assert evidence.digest == digest(samples.STAKING, evidence.accused)


def test_hidden_rows_between_hops_and_side_inputs_are_bound() -> None:
    hidden = [struct.pack("<3f", at, 1, 1) for at in range(5)]
    inner = samples.receipt(start=1, end=2)
    deep = samples.manifest(layers=3)
    found = claim(inner, hidden, hidden, [False] * 5, context=CONTEXT, key=KEY, between=True)
    check_model(read_evidence(samples.STAKING, found.encode()), deep)
    types, memory = bytes([0, 1, 0]), (struct.pack("<3f", 1, 2, 3),) * 7
    roots = merkle_root([leaf(bytes([one])) for one in types]), merkle_root([leaf(row) for row in memory])
    context = replace(CONTEXT, token_types=roots[0], memory=roots[1])
    ids = [bytes(4)] * 3
    found = claim(
        samples.receipt(),
        ids,
        ids,
        [True] * 3,
        context=context,
        key=KEY,
        one_shot=True,
        token_types=types,
        memory=memory,
    )
    assert Bundle.decode(found.encode()) == found
    read_evidence(samples.STAKING, found.encode())
    for other in ({"token_types": bytes([0, 1, 1])}, {"memory": memory[:6]}, {"memory": ()}, {"token_types": b""}):
        with pytest.raises(BadEvidence, match="side inputs"):
            read_evidence(samples.STAKING, replace(found, **other).encode())


def test_it_is_about_the_accused_receipt() -> None:
    read_evidence(samples.STAKING, GOOD.encode(), read_evidence(samples.STAKING, GOOD.encode()).digest)
    with pytest.raises(BadEvidence, match="another receipt"):
        read_evidence(samples.STAKING, GOOD.encode(), samples.digest("other"))


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (replace(GOOD, inputs=(*GOOD.inputs[:-1], bytes([9, 0, 0, 0]))), r"input rows of positions \[32, 40\)"),
        (replace(GOOD, inputs=(bytes([9, 0, 0, 0]), *GOOD.inputs[1:])), r"input rows of positions \[0, 32\)"),
        (replace(GOOD, want=(*GOOD.want[:-11], True, *GOOD.want[-10:])), "side inputs"),
        (replace(GOOD, top_k=3), "side inputs"),
        (replace(GOOD, wire="bf16"), "side inputs"),
        (replace(GOOD, numerics="bf16w"), "side inputs"),
        (replace(GOOD, outputs=(GOOD.outputs or ())[::-1]), "output rows do not hash"),
        (replace(GOOD, all_outputs=True), "output rows"),
        (replace(GOOD, sealed=GOOD.sealed[::-1]), "positions"),
        (replace(GOOD, sealed=GOOD.sealed[:1] * 2), "positions"),
        (resealed(GOOD, 0, revision=1), "does not name"),
        (resealed(GOOD, 1, first=33), "positions"),
        (resealed(GOOD, 1, last=41), "positions"),
        (resealed(GOOD, 0, node=samples.address("x")), "not of one node"),
        (resealed(GOOD, 0, model=samples.digest("x")), "not of one node"),
        (resealed(GOOD, 0, numeric_class=samples.digest("x")), "not of one node"),
        (resealed(GOOD, 0, session=samples.digest("x")), "not of one node"),
        (resealed(GOOD, 0, attempt=1), "not of one node"),
        (resealed(GOOD, 0, end=1), "not of one node"),
        (replace(bundle(32), sealed=(seal(samples.STAKING, samples.receipt(previous=samples.digest("x")), KEY),)),
         "does not name"),
        (replace(GOOD, sealed=(GOOD.sealed[0], GOOD.sealed[1][:-1] + b"\x1d")), "a receipt in it is none"),
        (replace(GOOD, sealed=(b"\xff" * SEALED_BYTES, GOOD.sealed[1])), "a receipt in it is none"),
    ],
)  # fmt: skip
def test_a_part_that_does_not_fit_is_named(found: Bundle, why: str) -> None:
    refused(found, why)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"layers": 1, "norms": ((0.0, 1.5), (0.25, 2.0))}, "no span of the model"),
        ({"numerics": "bf16w"}, "other numerics"),
        ({"max_length": 39}, "more positions"),
        ({"causal": False}, "one window"),
        ({"vocab": 1}, "output rows of another length"),
        ({"output": "hidden"}, "output rows of another length"),
        ({"layers": 3}, "output rows are the wanted ones"),
    ],
)
def test_another_model_is_refused(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(BadEvidence, match=why):
        check_model(read_evidence(samples.STAKING, GOOD.encode()), replace(MANIFEST, **changes))


def test_one_window_of_many_positions_is_for_spans_that_are_not_causal() -> None:
    ids = [bytes(4)] * 40
    found = claim(samples.receipt(), ids, ids, [True] * 40, context=CONTEXT, key=KEY, one_shot=True)
    refused(found, "windows of 32")


@pytest.mark.parametrize("positions", [10, 32, 40, 64])
def test_a_closing_receipt_is_tried_behind_the_one_that_it_closes(positions: int) -> None:
    found = bundle(positions, closing={})
    evidence = read_evidence(samples.STAKING, found.encode())
    check_model(evidence, MANIFEST)
    standing, accused = evidence.receipts[-2:]
    assert evidence.digest == digest(samples.STAKING, accused) != digest(samples.STAKING, standing)
    assert (accused.positions, accused.previous) == (standing.positions, digest(samples.STAKING, standing))
    assert evidence.num_windows == (positions + 31) // 32
    lie = bundle(positions, closing={"output": samples.digest("lie")})
    evidence = read_evidence(samples.STAKING, replace(lie, outputs=None).encode())  # readable, and judged by itself
    assert evidence.accused.output == samples.digest("lie")
    refused(lie, "output rows do not hash")  # which are the right ones


@pytest.mark.parametrize("positions", [10, 40, 64, 70])
def test_one_shot_sessions_are_closed_too(positions: int) -> None:
    ids, wanted = [bytes(4)] * positions, [True] * positions
    found = claim(samples.receipt(), ids, ids, wanted, context=CONTEXT, key=KEY, one_shot=True, closing={})
    assert Bundle.decode(found.encode()) == found
    assert read_evidence(samples.STAKING, found.encode()).num_windows == 1


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (bundle(closing={"previous": samples.digest("x")}), "does not name"),
        (bundle(closing={"last": 39}), "positions"),
        (bundle(closing={"last": 41}), "positions"),
        (bundle(closing={"attempt": 1}), "not of one node"),
        (bundle(closing={"input": samples.digest("x")}), "input rows"),
        (bundle(closing={"context": samples.digest("x")}), "side inputs"),
        (replace(bundle(closing={}), sealed=(*bundle(closing={}).sealed, bundle(closing={}).sealed[-1])), "positions"),
        (replace(bundle(closing={}), sealed=(bundle().sealed[0], bundle(closing={}).sealed[-1])), "does not name"),
    ],
)
def test_what_closes_nothing_is_refused(found: Bundle, why: str) -> None:
    refused(found, why)


def header(**changes: int) -> bytes:
    """A header alone, of the good bundle but for some fields."""
    names = (
        "numerics",
        "wire",
        "outputs",
        "types",
        "top_k",
        "receipts",
        "positions",
        "input",
        "output",
        "memory",
        "row",
    )
    values = dict(zip(names, struct.unpack_from("<8sBBBBHHIIIII", GOOD.encode())[1:], strict=True))
    return struct.pack("<8sBBBBHHIIIII", b"TALYEVI1", *{**values, **changes}.values())


@pytest.mark.parametrize(
    "changes",
    [{"positions": 0}, {"positions": MAX_POSITIONS + 1, "receipts": 129}, {"positions": 2**32 - 1, "receipts": 1},
     {"receipts": 0}, {"receipts": 3}, {"receipts": 65535}, {"input": 0}, {"input": 2**32 - 1}, {"numerics": 2},
     {"wire": 3}, {"outputs": 3}, {"types": 2}, {"memory": 1}, {"row": 4}, {"memory": 4097, "row": 1},
     {"memory": 4096, "row": 2**32 - 1}, {"output": 0}, {"outputs": 0}, {"output": 2**32 - 1}],
    ids=str,
)  # fmt: skip
def test_a_header_out_of_bounds_is_refused_before_its_rows_are_read(changes: dict[str, int]) -> None:
    with pytest.raises(BadEvidence):
        Bundle.decode(header(**changes) + GOOD.encode()[HEADER_BYTES:])
    with pytest.raises(BadEvidence):
        Bundle.decode(header(**changes))


def test_too_many_bytes_are_refused_unread() -> None:
    class Huge(bytes):
        def __len__(self) -> int:
            return MAX_BYTES + 1

    with pytest.raises(BadEvidence, match="bytes"):
        Bundle.decode(Huge(GOOD.encode()))


def test_a_session_fits_a_bundle_as_far_as_is_said() -> None:
    size = 1 << 15
    row, inner, most = bytes(size), samples.receipt(start=1, end=2), most_positions(size)
    assert most % WINDOW == 0 and most_positions(256) == MAX_POSITIONS

    def length(positions: int) -> int:
        rows = [row] * positions
        found = claim(inner, rows, rows, [False] * positions, context=CONTEXT, key=KEY, between=True)
        return len(found.encode())

    assert MAX_BYTES - WINDOW * (size + 100) < length(most) <= MAX_BYTES
    with pytest.raises(BadEvidence, match=f"to {MAX_BYTES} are read"):
        length(most + WINDOW)


def test_there_is_no_second_spelling() -> None:
    data = GOOD.encode()
    for other in (data + b"\0", data[:-1], data[:-16], b"TALYEVI2" + data[8:], b""):
        with pytest.raises(BadEvidence):
            Bundle.decode(other)
    flags = HEADER_BYTES + 2 * SEALED_BYTES + 4
    padded = bundle(38).encode()
    with pytest.raises(BadEvidence, match="bitmap"):
        Bundle.decode(padded[:flags] + bytes([padded[flags] | 0x80]) + padded[flags + 1 :])
    nothing = claim(samples.receipt(), [bytes(4)], [b""], [False], context=CONTEXT, key=KEY)
    assert Bundle.decode(nothing.encode()) == nothing
    with pytest.raises(BadEvidence):  # rows of 16 bytes, of which there are none
        encoded = nothing.encode()
        Bundle.decode(encoded[:24] + struct.pack("<I", 16) + encoded[28:])


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_byte_of_it_can_be_changed(data: st.DataObject) -> None:
    """Whatever is flipped, cut or put in: it is refused as what it is, or it was no change."""
    good = GOOD.encode()
    kind = data.draw(st.sampled_from(["flip", "flip header", "cut", "insert", "duplicate"]))
    at = data.draw(st.integers(0, HEADER_BYTES - 1 if kind == "flip header" else len(good) - 1))
    length = data.draw(st.integers(1, 700))
    other = {
        "flip": good[:at] + bytes([good[at] ^ data.draw(st.integers(1, 255))]) + good[at + 1 :],
        "flip header": good[:at] + bytes([good[at] ^ data.draw(st.integers(1, 255))]) + good[at + 1 :],
        "cut": good[:at] + good[at + length :],
        "insert": good[:at] + data.draw(st.binary(min_size=1, max_size=20)) + good[at:],
        "duplicate": good[:at] + good[at : at + length] + good[at:],
    }[kind]
    try:
        found = read_evidence(samples.STAKING, other)
    except BadEvidence:
        return
    assert found.bundle.encode() == other
    assert (
        found.digest != read_evidence(samples.STAKING, good).digest
        or found.signers != {KEY.address}
        or (found.bundle.outputs is None)
    )
