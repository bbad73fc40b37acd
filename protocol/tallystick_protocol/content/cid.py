"""Content ids: the sha2-256 of one block, written as IPFS writes it.

Binary form, 36 bytes:

| bytes | value         | meaning                                     |
|-------|---------------|---------------------------------------------|
| 0     | 0x01          | CID version 1                               |
| 1     | 0x55 or 0x70  | codec: raw bytes, or a dag-pb node          |
| 2     | 0x12          | sha2-256                                    |
| 3     | 0x20          | 32 bytes of digest follow                   |
| 4..36 | digest        | SHA-256 of the block                        |

Text form: `b` and the 36 bytes in RFC 4648 base32, lower case, unpadded: 59 characters. CIDv0 (`Qm...`, bytes 2..36,
always dag-pb) and base58btc (`z...`) are understood on input and never written.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from tallystick_protocol.errors import BadBlock, BadCid

PROBE: Final = "bafkqaaa"
"""The empty identity CID that gateways answer to show that they are one. It names no block, so it is no `Cid`."""

DIGEST_BYTES: Final = 32
_MULTIHASH: Final = bytes((0x12, DIGEST_BYTES))
_BINARY_V0_BYTES: Final = len(_MULTIHASH) + DIGEST_BYTES
_BINARY_V1_BYTES: Final = 2 + _BINARY_V0_BYTES
_MAX_TEXT: Final = 64
_BASE58: Final = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


class Codec(IntEnum):
    """How the bytes of a block are read."""

    RAW = 0x55
    DAG_PB = 0x70


@dataclass(frozen=True, slots=True, order=True)
class Cid:
    """The name of one block; `str(cid)` is its only text form and is safe as a file name."""

    codec: Codec
    digest: bytes

    def __post_init__(self) -> None:
        if len(self.digest) != DIGEST_BYTES:
            raise BadCid(f"a digest has {DIGEST_BYTES} bytes, not {len(self.digest)}")

    @classmethod
    def of(cls, block: bytes, codec: Codec) -> Cid:
        """The CID of a block's bytes."""
        return cls(codec, hashlib.sha256(block).digest())

    @classmethod
    def of_raw(cls, block: bytes) -> Cid:
        """The CID of bytes kept as they are."""
        return cls.of(block, Codec.RAW)

    @classmethod
    def parse(cls, text: str) -> Cid:
        """The CID that `text` writes. Raises BadCid for anything but its one canonical spelling per base."""
        if len(text) > _MAX_TEXT:
            raise BadCid(f"a CID of {len(text)} characters is too long; at most {_MAX_TEXT} are read")
        shown = ascii(text)
        if text == PROBE:
            raise BadCid("the probe bafkqaaa names no block; only a gateway's self-test asks for it")
        if text.startswith("Qm"):
            cid = cls.from_bytes(_base58_decode(text, shown))
            spelled = _base58_encode(_MULTIHASH + cid.digest)
        elif text.startswith("z"):
            cid = cls.from_bytes(_base58_decode(text[1:], shown))
            spelled = "z" + _base58_encode(cid.to_bytes())
        elif text.startswith("b"):
            cid = cls.from_bytes(_base32_decode(text[1:], shown))
            spelled = str(cid)
        else:
            raise BadCid(f"{shown} is not a CID: write it in base32, starting with b")
        if spelled != text:
            raise BadCid(f"{shown} is not the canonical spelling of {cid}")
        return cid

    @classmethod
    def from_bytes(cls, binary: bytes) -> Cid:
        """Read the binary form, or the 34 bytes of a CIDv0. Raises BadCid; nothing may follow."""
        if len(binary) == _BINARY_V0_BYTES and binary.startswith(_MULTIHASH):
            return cls(Codec.DAG_PB, bytes(binary[2:]))
        if len(binary) < 4 or binary[0] != 1:
            raise BadCid("not a CID: it starts with no version this network reads")
        if binary[1] not in (Codec.RAW, Codec.DAG_PB):
            raise BadCid(f"codec 0x{binary[1]:02x} is neither raw nor dag-pb")
        if binary[2] == 0:
            raise BadCid("identity CIDs are refused: they carry data instead of naming it")
        if binary[2:4] != _MULTIHASH:
            raise BadCid("the hash is not a 32-byte sha2-256")
        if len(binary) != _BINARY_V1_BYTES:
            raise BadCid(f"a CID has {_BINARY_V1_BYTES} bytes, not {len(binary)}")
        return cls(Codec(binary[1]), bytes(binary[4:]))

    def to_bytes(self) -> bytes:
        """The binary form of the table above."""
        return bytes((1, self.codec)) + _MULTIHASH + self.digest

    def check(self, block: bytes) -> None:
        """Raises BadBlock unless these are the bytes this CID names."""
        if hashlib.sha256(block).digest() != self.digest:
            raise BadBlock(f"{len(block)} bytes that are not block {self}", cid=str(self))

    def __str__(self) -> str:
        return "b" + base64.b32encode(self.to_bytes()).decode().rstrip("=").lower()


def _base32_decode(text: str, shown: str) -> bytes:
    padded = text.upper() + "=" * (-len(text) % 8)
    try:
        return base64.b32decode(padded)
    except (binascii.Error, ValueError) as error:
        raise BadCid(f"{shown} is not base32") from error


def _base58_decode(text: str, shown: str) -> bytes:
    number = 0
    for letter in text:
        value = _BASE58.find(letter)
        if value < 0:
            raise BadCid(f"{shown} is not base58")
        number = number * 58 + value
    return number.to_bytes((number.bit_length() + 7) // 8, "big")


def _base58_encode(binary: bytes) -> str:
    # Both binary forms start with a byte other than zero, so there are no leading ones to write.
    number, letters = int.from_bytes(binary, "big"), ""
    while number:
        number, value = divmod(number, 58)
        letters = _BASE58[value] + letters
    return letters
