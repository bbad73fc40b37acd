"""EIP-712 structs, domains and signatures: one strict form, the one that the contracts accept.

A struct is a frozen dataclass with a class variable TYPE, its EIP-712 type string; its fields are the type's members in
order (snake_case here, `from_` for from). Every member is one word, so a struct travels as its words, and the very
bytes that travel are hashed:

    bytes            what
    32 x members     the members as EIP-712 words (big-endian, padded to the left)
    65               signature: r 32, s 32 (low half of the order only), v 1 (27 or 28)

Formulas: EIP-712 (digest = keccak(0x1901 || domain separator || keccak(type hash || words))); EIP-2 (low s).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from functools import cache
from keyword import iskeyword
from typing import Any, ClassVar, Protocol, TypeVar

from coincurve import PrivateKey, PublicKey
from Crypto.Hash import keccak as _keccak

from tallystick_protocol.errors import BadMessage, BadSignature, ConfigError
from tallystick_protocol.types import Address, Digest

SIGNATURE_BYTES = 65
_HALF_ORDER = 0x7FFFFFFFFFFFFFFFFFFFFFFFFFFFFFFF5D576E7357A4501DDFE92F46681B20A0


class Struct(Protocol):
    """A frozen dataclass whose fields follow TYPE."""

    TYPE: ClassVar[str]


S = TypeVar("S", bound=Struct)


def keccak(data: bytes) -> Digest:
    return Digest(_keccak.new(digest_bits=256, data=data).digest())


def checksum_address(raw: bytes) -> Address:
    """The EIP-55 spelling of 20 bytes."""
    text = raw.hex()
    mask = keccak(text.encode()).hex()
    return Address("0x" + "".join(c.upper() if int(m, 16) > 7 else c for c, m in zip(text, mask, strict=False)))


def address_bytes(address: Address) -> bytes:
    """The 20 bytes of an address. Raises BadMessage."""
    if not re.fullmatch(r"0x[0-9a-fA-F]{40}", address):
        raise BadMessage(f"not an address: {address[:50]!r}")
    return bytes.fromhex(address[2:])


@dataclass(frozen=True, slots=True)
class Domain:
    """Where a signature counts: EIP712Domain(name, version, chainId, verifyingContract)."""

    name: str
    version: str
    chain_id: int
    contract: Address

    TYPE: ClassVar[str] = "EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)"

    @property
    def separator(self) -> Digest:
        words = [keccak(self.name.encode()), keccak(self.version.encode()), self.chain_id.to_bytes(32, "big")]
        return keccak(keccak(self.TYPE.encode()) + b"".join(words) + address_bytes(self.contract).rjust(32, b"\0"))


def staking_domain(chain_id: int, staking: Address) -> Domain:
    """The domain of everything but money: receipts, offers, sessions, keys."""
    return Domain("Tallystick", "1", chain_id, staking)


def escrow_domain(chain_id: int, escrow: Address) -> Domain:
    """The domain of vouchers, exits and signers."""
    return Domain("Tallystick Escrow", "1", chain_id, escrow)


def token_domain(chain_id: int, token: Address) -> Domain:
    """The token's own domain (ERC-2612, ERC-3009)."""
    return Domain("Tallystick", "1", chain_id, token)


@cache
def _members(cls: type[Struct]) -> tuple[tuple[str, str], ...]:
    """(solidity type, field name) for each member of a struct class, checked against the dataclass once."""
    inner = cls.TYPE[cls.TYPE.index("(") + 1 : -1]
    pairs = [member.split(" ") for member in inner.split(",")]
    names = [re.sub(r"[A-Z]", lambda m: "_" + m.group().lower(), name) for _, name in pairs]
    names = [name + "_" if iskeyword(name) else name for name in names]
    assert names == [field.name for field in fields(cls)], (cls, names)  # type: ignore[arg-type]
    return tuple((kind, name) for (kind, _), name in zip(pairs, names, strict=True))


def to_words(value: Struct) -> bytes:
    """The members of a struct as EIP-712 words. Raises BadMessage when one does not fit its type."""
    return b"".join(_word(kind, name, getattr(value, name)) for kind, name in _members(type(value)))


def from_words(cls: type[S], data: bytes) -> S:
    """The struct that words stand for. Raises BadMessage for any other length or padding, or what the class refuses."""
    members = _members(cls)
    if len(data) != 32 * len(members):
        raise BadMessage(f"{cls.__name__} takes {32 * len(members)} bytes, got {len(data)}")
    words = [data[i : i + 32] for i in range(0, len(data), 32)]
    values = {name: _value(kind, name, word) for (kind, name), word in zip(members, words, strict=True)}
    try:
        return cls(**values)
    except ValueError as error:
        raise BadMessage(f"{cls.__name__}: {error}") from None


def digest(domain: Domain, value: Struct) -> Digest:
    """The EIP-712 digest that is signed."""
    struct_hash = keccak(keccak(type(value).TYPE.encode()) + to_words(value))
    return keccak(b"\x19\x01" + domain.separator + struct_hash)


class Key:
    """A secp256k1 private key that never prints itself."""

    def __init__(self, secret: bytes) -> None:
        if len(secret) != 32:
            raise ConfigError("a private key is 32 bytes")
        try:
            self._key = PrivateKey(secret)
        except ValueError:
            raise ConfigError("a private key is a number from 1 to the order of secp256k1") from None
        self.address = _address_of(self._key.public_key)

    def __repr__(self) -> str:
        return f"Key({self.address})"

    @property
    def secret(self) -> bytes:
        """The 32 bytes, for the one caller that signs transactions."""
        return bytes(self._key.secret)

    def sign(self, message: Digest) -> bytes:
        """65 bytes: r, s (low), v (27 or 28)."""
        signature = self._key.sign_recoverable(message, hasher=None)
        return bytes(signature[:64]) + bytes([27 + signature[64]])

    def sign_struct(self, domain: Domain, value: Struct) -> bytes:
        return self.sign(digest(domain, value))


def recover(message: Digest, signature: bytes) -> Address:
    """Who signed. Raises BadSignature for every form that the contracts refuse: 65 bytes, low s, v 27 or 28."""
    if len(signature) != SIGNATURE_BYTES:
        raise BadSignature(f"a signature is {SIGNATURE_BYTES} bytes, got {len(signature)}")
    if signature[64] not in (27, 28):
        raise BadSignature("the signature's v is 27 or 28")
    if not 0 < int.from_bytes(signature[32:64], "big") <= _HALF_ORDER:
        raise BadSignature("the signature's s is not in the lower half of the order")
    try:
        key = PublicKey.from_signature_and_message(signature[:64] + bytes([signature[64] - 27]), message, hasher=None)
    except Exception as error:
        raise BadSignature("the signature is no point on the curve") from error
    return _address_of(key)


def seal(domain: Domain, value: Struct, key: Key) -> bytes:
    """Words and signature, as they travel."""
    return to_words(value) + key.sign_struct(domain, value)


def unseal(domain: Domain, cls: type[S], data: bytes) -> tuple[S, Address]:
    """A struct and its signer. Raises BadMessage, BadSignature. The caller checks who the signer should be."""
    value = from_words(cls, data[:-SIGNATURE_BYTES])
    return value, recover(digest(domain, value), data[-SIGNATURE_BYTES:])


def _address_of(key: PublicKey) -> Address:
    return checksum_address(keccak(key.format(compressed=False)[1:])[12:])


def _word(kind: str, name: str, value: Any) -> bytes:
    if kind == "address":
        return address_bytes(value).rjust(32, b"\0")
    if kind == "bytes32":
        if not isinstance(value, bytes) or len(value) != 32:
            raise BadMessage(f"{name} is 32 bytes")
        return value
    if kind == "bool":
        kind, value = "uint1", int(value) if type(value) is bool else -1
    bits = int(kind.removeprefix("uint"))
    if type(value) is not int or not 0 <= value < 1 << bits:
        raise BadMessage(f"{name} does not fit {kind}")
    return value.to_bytes(32, "big")


def _value(kind: str, name: str, word: bytes) -> Any:
    if kind == "bytes32":
        return word
    number = int.from_bytes(word, "big")
    bits = {"address": 160, "bool": 1}.get(kind) or int(kind.removeprefix("uint"))
    if number >> bits:
        raise BadMessage(f"{name} does not fit {kind}")
    if kind == "address":
        return checksum_address(word[12:])
    return bool(number) if kind == "bool" else number
