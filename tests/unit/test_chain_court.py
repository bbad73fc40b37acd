"""Headers, seats and commitments as the Court expects them; integration/test_court.py asks the contract."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tallystick_protocol.chain.court import Vote, case_id, commitment, header_rlp, winning_seats
from tallystick_protocol.errors import ChainError
from tallystick_protocol.signing import keccak
from tallystick_protocol.types import Address, Digest

JUROR = Address("0x" + "00" * 19 + "07")
SEED = Digest(keccak(b"seed"))


def test_a_seat_needs_a_unit_that_wins() -> None:
    seats = winning_seats(SEED, JUROR, 400, 400, 15)
    assert seats == sorted(set(seats))
    assert 4 <= len(seats) <= 35
    assert winning_seats(SEED, JUROR, seats[-1] + 1, 400, 15) == seats
    assert winning_seats(SEED, JUROR, seats[-1], 400, 15) == seats[:-1]


def test_where_units_are_few_all_win() -> None:
    assert winning_seats(SEED, JUROR, 12, 60, 61) == list(range(12))
    assert winning_seats(SEED, JUROR, 12, 60, 60) == list(range(12))


@given(split=st.integers(1, 299))
def test_shares_do_not_grow_by_splitting(split: int) -> None:
    """In expectation: a unit's chance is the same in whichever address it lies."""
    threshold = (2**256 - 1) // 300 * 15
    for who, units in ((JUROR, split), (Address("0x" + "00" * 19 + "08"), 300 - split)):
        for unit in winning_seats(SEED, who, units, 300, 15):
            assert (
                int.from_bytes(keccak(SEED + bytes(12) + bytes.fromhex(who[2:]) + unit.to_bytes(32, "big")), "big")
                < threshold
            )


def test_a_commitment_binds_everything() -> None:
    case = case_id(Digest(keccak(b"receipt")), Digest(keccak(b"evidence")))
    roots, salt = Digest(keccak(b"roots")), keccak(b"salt")
    made = {
        commitment(case, 0, JUROR, Vote.GUILTY, roots, salt),
        commitment(Digest(keccak(case)), 0, JUROR, Vote.GUILTY, roots, salt),
        commitment(case, 1, JUROR, Vote.GUILTY, roots, salt),
        commitment(case, 0, Address("0x" + "00" * 19 + "08"), Vote.GUILTY, roots, salt),
        commitment(case, 0, JUROR, Vote.CLEAR, roots, salt),
        commitment(case, 0, JUROR, Vote.GUILTY, Digest(salt), salt),
        commitment(case, 0, JUROR, Vote.GUILTY, roots, roots),
    }
    assert len(made) == 7


def block(**changes: Any) -> dict[str, Any]:
    """As anvil tells its block 0 (no withdrawals yet, no later fields), with a hash of our own making."""
    word = "0x" + "11" * 32
    fields = {
        "parentHash": word, "sha3Uncles": word, "miner": "0x" + "22" * 20, "stateRoot": word, "transactionsRoot": word,
        "receiptsRoot": word, "logsBloom": "0x" + "00" * 256, "difficulty": 0, "number": 5, "gasLimit": 30_000_000,
        "gasUsed": 0, "timestamp": 1_800_000_000, "extraData": "0x", "mixHash": word, "nonce": "0x" + "00" * 8,
        "baseFeePerGas": 7, "hash": bytes(32),
    }  # fmt: skip
    return fields | changes


def test_another_form_of_header_is_refused() -> None:
    with pytest.raises(ChainError, match="header of block 5"):
        header_rlp(block())
