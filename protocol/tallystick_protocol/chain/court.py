"""The Court's arithmetic off chain: case ids, seats, commitments, and the header that a draw asks for.

`docs/court.md` says what they are for; `contracts/interfaces/ICourt.sol` is the reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Any

from eth_abi.abi import encode

from tallystick_protocol.errors import ChainError
from tallystick_protocol.signing import address_bytes, keccak
from tallystick_protocol.types import Address, Digest

MAX_HASH = 2**256 - 1
# A header's fields in their order; those from baseFeePerGas on came with later forks and may be absent.
_HEADER = (
    "parentHash", "sha3Uncles", "miner", "stateRoot", "transactionsRoot", "receiptsRoot", "logsBloom", "difficulty",
    "number", "gasLimit", "gasUsed", "timestamp", "extraData", "mixHash", "nonce", "baseFeePerGas", "withdrawalsRoot",
    "blobGasUsed", "excessBlobGas", "parentBeaconBlockRoot", "requestsHash",
)  # fmt: skip
_LATER = frozenset(_HEADER[15:])


class State(IntEnum):
    NONE = 0
    OPEN = 1
    DRAWN = 2
    RULED = 3
    ENFORCED = 4


class Vote(IntEnum):
    GUILTY = 1
    CLEAR = 2
    FAULT = 3
    UNREADABLE = 4
    ABSTAIN = 5


class Verdict(IntEnum):
    MISSED = 0
    VOID = 1
    GUILTY = 2
    CLEAR = 3
    FAULT = 4
    UNREADABLE = 5


def case_id(receipt: Digest, evidence: Digest) -> Digest:
    """receipt: its EIP-712 digest; evidence: the SHA-256 in the CID of what the accuser pinned."""
    return keccak(encode(["bytes32", "bytes32"], [receipt, evidence]))


def commitment(case: Digest, round_: int, juror: Address, vote: Vote, roots: Digest, salt: bytes) -> Digest:
    """What a juror commits to. roots: digest over what it recomputed; salt: 32 random bytes, kept until the reveal."""
    kinds = ["bytes32", "uint256", "address", "uint8", "bytes32", "bytes32"]
    return keccak(encode(kinds, [case, round_, juror, int(vote), roots, salt]))


def winning_seats(seed: Digest, juror: Address, own_units: int, units: int, seats: int) -> list[int]:
    """The juror's units that win a seat, ascending, as `commit` wants them.

    own_units: the juror's at the case's epoch, `Staking.unitsAt`; units: all outside the accused's; seats: expected in
    the round.
    """
    threshold = MAX_HASH // units * seats if seats < units else MAX_HASH
    stem = seed + b"\0" * 12 + address_bytes(juror)
    return [
        unit for unit in range(own_units) if int.from_bytes(keccak(stem + unit.to_bytes(32, "big")), "big") < threshold
    ]


def header_rlp(block: Mapping[str, Any]) -> bytes:
    """The header of a block as `eth_getBlockByNumber` tells it. Raises ChainError if it is not what the hash is of."""
    fields = [block[name] for name in _HEADER if not (name in _LATER and block.get(name) is None)]
    header = _rlp_list([_rlp_item(value) for value in fields])
    if keccak(header) != bytes(block["hash"]):
        raise ChainError(f"the header of block {block['number']} is of a form that this version does not know")
    return header


def _rlp_item(value: Any) -> bytes:
    if isinstance(value, int):
        raw = value.to_bytes((value.bit_length() + 7) // 8, "big")
    else:
        raw = bytes.fromhex(value[2:]) if isinstance(value, str) else bytes(value)
    return raw if len(raw) == 1 and raw[0] < 0x80 else _rlp_prefix(0x80, len(raw)) + raw


def _rlp_list(items: list[bytes]) -> bytes:
    body = b"".join(items)
    return _rlp_prefix(0xC0, len(body)) + body


def _rlp_prefix(base: int, length: int) -> bytes:
    if length < 56:
        return bytes([base + length])
    size = length.to_bytes((length.bit_length() + 7) // 8, "big")
    return bytes([base + 55 + len(size)]) + size
