"""The Reach record: a node's addresses and TLS keys, signed by its hot key.

EIP-712 under the Staking domain. It is the one signed message with members that are not one word, so it travels as
canonical JSON and is hashed by the formulas of EIP-712 ("Definition of hashStruct": strings by their keccak, arrays by
the keccak of their concatenated members).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from tallystick_protocol import canonical_json
from tallystick_protocol.errors import BadMessage, ManifestError
from tallystick_protocol.signing import SIGNATURE_BYTES, Domain, Key, address_bytes, keccak, recover
from tallystick_protocol.transport.contact import MAX_ADDRS, MAX_PINS, Addr, Contact, read_addr
from tallystick_protocol.types import Address, Digest

MAX_REACH = 4096
"""Bytes of a Reach as it travels."""

REACH_LIFETIME_S = 24 * 3600
_TEXT = {"kind": 16, "host": 253, "sni": 253}
_FIELDS = {"addrs", "expires", "node", "seq", "signature", "spki"}


@dataclass(frozen=True, slots=True)
class Reach:
    """Of two records the one with the higher `seq` counts, until it expires (unix seconds, at most a day ahead).

    spki: SHA-256 of the SubjectPublicKeyInfo of the TLS key in use, and of the next one.
    """

    node: Address
    seq: int
    expires: int
    spki: tuple[bytes, ...]
    addrs: tuple[Addr, ...]

    TYPE: ClassVar[str] = "Reach(address node,uint64 seq,uint64 expires,bytes32[] spki,Addr[] addrs)" + Addr.TYPE

    def __post_init__(self) -> None:
        if not 0 < len(self.spki) <= MAX_PINS or any(len(pin) != 32 for pin in self.spki):
            raise ValueError(f"a Reach names 1 to {MAX_PINS} keys of 32 bytes")
        if len(self.addrs) > MAX_ADDRS:
            raise ValueError(f"a Reach has at most {MAX_ADDRS} addresses")
        if not (0 <= self.seq < 1 << 64 and 0 <= self.expires < 1 << 64):
            raise ValueError("seq and expires fit uint64")
        for addr in self.addrs:
            if any(len(getattr(addr, name)) > size for name, size in _TEXT.items()) or not 0 <= addr.port < 1 << 16:
                raise ValueError("an address does not fit its type")

    @property
    def contact(self) -> Contact:
        """The addresses that this version can dial."""
        return Contact(self.node, tuple(addr for addr in self.addrs if addr.usable), self.spki, self.seq)


def reach_digest(domain: Domain, reach: Reach) -> Digest:
    """The EIP-712 digest that is signed."""
    words = [
        keccak(Reach.TYPE.encode()),
        address_bytes(reach.node).rjust(32, b"\0"),
        reach.seq.to_bytes(32, "big"),
        reach.expires.to_bytes(32, "big"),
        keccak(b"".join(reach.spki)),
        keccak(b"".join(_hash_addr(addr) for addr in reach.addrs)),
    ]
    return keccak(b"\x19\x01" + domain.separator + keccak(b"".join(words)))


def seal_reach(domain: Domain, reach: Reach, key: Key) -> bytes:
    """The record and its signature, as they travel: canonical JSON, at most 4 KiB. Raises BadMessage."""
    addrs = [{"host": a.host, "kind": a.kind, "port": a.port, "sni": a.sni, "via": a.via} for a in reach.addrs]
    value = {
        "addrs": addrs,
        "expires": reach.expires,
        "node": reach.node,
        "seq": reach.seq,
        "signature": key.sign(reach_digest(domain, reach)).hex(),
        "spki": [pin.hex() for pin in reach.spki],
    }
    data = canonical_json.encode(value)
    if len(data) > MAX_REACH:
        raise BadMessage(f"the Reach takes {len(data)} bytes, {MAX_REACH} at most: fewer addresses")
    return data


def unseal_reach(domain: Domain, data: bytes) -> tuple[Reach, Address]:
    """A record and its signer. Raises BadMessage, BadSignature. The caller checks who the signer should be."""
    if len(data) > MAX_REACH:
        raise BadMessage(f"a Reach takes at most {MAX_REACH} bytes, got {len(data)}")
    try:
        value: Any = canonical_json.decode(data)
        if set(value) != _FIELDS or type(value["seq"]) is not int or type(value["expires"]) is not int:
            raise BadMessage("a Reach has other fields")
        addrs = tuple(read_addr(entry) for entry in value["addrs"])
        spki = tuple(bytes.fromhex(pin) for pin in value["spki"])
        signature = bytes.fromhex(value["signature"])
        reach = Reach(Address(str(value["node"])), value["seq"], value["expires"], spki, addrs)
    except (ManifestError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadMessage(f"not a Reach: {str(error)[:120]}") from None
    return reach, recover(reach_digest(domain, reach), signature[: SIGNATURE_BYTES + 1])


def _hash_addr(addr: Addr) -> Digest:
    words = [
        keccak(Addr.TYPE.encode()),
        keccak(addr.kind.encode()),
        keccak(addr.host.encode()),
        addr.port.to_bytes(32, "big"),
        keccak(addr.sni.encode()),
        address_bytes(addr.via).rjust(32, b"\0"),
    ]
    return keccak(b"".join(words))
