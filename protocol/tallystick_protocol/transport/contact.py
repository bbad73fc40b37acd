"""Where a node can be dialled, and which TLS keys it may show there."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from tallystick_protocol import canonical_json
from tallystick_protocol.errors import BadMessage, ConfigError, ManifestError
from tallystick_protocol.transport.scopes import is_loopback
from tallystick_protocol.types import ZERO_ADDRESS, Address

MAX_ADDRS = 8
MAX_PINS = 2
MAX_ENDPOINT = 256
"""Bytes that `Staking.serve` takes."""

_KNOWN = ("tcp", "relay")
_HOST = re.compile(r"[A-Za-z0-9.-]{1,253}|[0-9A-Fa-f:.]{2,45}")


@dataclass(frozen=True, slots=True)
class Addr:
    """One way to reach a node; kinds that are not known are skipped, never an error.

    kind: `tcp` (the node itself, or whatever forwards raw TCP to it) or `relay`. sni: the name to ask for in the TLS
    handshake, empty for the node's label. via: the relay's node, zero for others.
    """

    kind: str
    host: str
    port: int
    sni: str = ""
    via: Address = ZERO_ADDRESS

    TYPE: ClassVar[str] = "Addr(string kind,string host,uint16 port,string sni,address via)"

    @property
    def usable(self) -> bool:
        """Whether this version can dial it."""
        named = self.sni == "" or _HOST.fullmatch(self.sni) is not None
        return self.kind in _KNOWN and _HOST.fullmatch(self.host) is not None and 0 < self.port < 65536 and named

    @property
    def authority(self) -> str:
        """host:port as a URL has it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Contact:
    """How to dial a node. addrs: usable ones, in order of preference. seq: of two contacts the higher one is newer.

    pins: SHA-256 of the SubjectPublicKeyInfo of each TLS key that the node may show; none: plain sockets, which exist
    on loopback only.
    """

    node: Address
    addrs: tuple[Addr, ...]
    pins: tuple[bytes, ...] = ()
    seq: int = 0

    @property
    def label(self) -> str:
        return label(self.node)

    @property
    def url(self) -> str:
        """The first address, for a person or a log."""
        return f"{'https' if self.pins else 'http'}://{self.addrs[0].authority}" if self.addrs else "nowhere"

    @property
    def sources(self) -> list[str]:
        """Its addresses as sources of content (`content.gateway`), whose bytes are checked by hash alone."""
        if not self.pins:
            return [f"http://{addr.authority}" for addr in self.addrs if is_loopback(addr.host)]
        return [f"https://{addr.sni or self.label}@{addr.authority}" for addr in self.addrs]


def label(node: Address) -> str:
    """The name under which a node is asked for in every TLS handshake: `<40 hex>.node`."""
    return f"{node[2:].lower()}.node"


def parse_addr(text: str) -> Addr:
    """An address from a setting: HOST:PORT, [IPV6]:PORT, or HOST:PORT/SNI. Raises ConfigError."""
    place, _, sni = text.partition("/")
    host, colon, port = place.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        colon = ""  # an IPv6 address without brackets: where does its port begin?
    digits = colon == ":" and port.isascii() and port.isdigit() and len(port) <= 5
    addr = Addr("tcp", host, int(port) if digits else 0, sni)
    if not addr.usable:
        raise ConfigError(f"{text!a} is not an address: write it as HOST:PORT, or [IPV6]:PORT")
    return addr


def encode_endpoint(contact: Contact) -> bytes:
    """The `endpoint` bytes of `Staking.serve`: canonical dag-json {"addrs": [{"host", "kind", "port"}], "seq", "spki"}.

    Without pins `seq` and `spki` are left out. What does not fit 256 bytes goes: the second key first, then the last
    addresses. Raises ConfigError when not even one address fits.
    """
    addrs = [
        {"host": a.host, "kind": a.kind, "port": a.port, **({"sni": a.sni} if a.sni else {})} for a in contact.addrs
    ]
    pins = [pin.hex() for pin in contact.pins]
    while True:
        value: dict[str, Any] = {"addrs": addrs, **({"seq": contact.seq, "spki": pins} if pins else {})}
        data = canonical_json.encode(value)
        if len(data) <= MAX_ENDPOINT:
            return data
        if len(pins) > 1:
            pins.pop()
        elif len(addrs) > 1:
            addrs.pop()
        else:
            raise ConfigError(f"the address takes {len(data)} bytes on chain, {MAX_ENDPOINT} at most: a shorter name")


def decode_endpoint(node: Address, data: bytes) -> Contact:
    """A node's first contact, as it stands on chain: nothing in it is signed but by the transaction.

    Raises BadMessage for what is malformed. Addresses that cannot be dialled are left out.
    """
    try:
        value: Any = canonical_json.decode(data[: 16 * MAX_ENDPOINT])
        found = [read_addr(entry) for entry in value["addrs"] if entry["kind"] in _KNOWN]
        pins = tuple(bytes.fromhex(pin) for pin in value.get("spki", []))
        seq = value.get("seq", 0)
        if (
            any(len(pin) != 32 for pin in pins)
            or len(pins) > MAX_PINS
            or type(seq) is not int
            or not 0 <= seq < 1 << 64
        ):
            raise BadMessage("the node's keys on chain are malformed")
        return Contact(node, tuple(addr for addr in found if addr.usable)[:MAX_ADDRS], pins, seq)
    except (ManifestError, KeyError, TypeError, ValueError, AttributeError):
        raise BadMessage("the node's endpoint on chain is malformed") from None


def read_addr(entry: Any) -> Addr:
    """An address out of JSON. Raises KeyError, TypeError. One that is no address becomes one that is not usable."""
    port = entry["port"] if type(entry["port"]) is int else 0
    kind, host, sni, via = entry["kind"], entry["host"], entry.get("sni", ""), entry.get("via", ZERO_ADDRESS)
    if not all(isinstance(text, str) for text in (kind, host, sni, via)):
        raise TypeError("kind, host, sni and via are text")
    return Addr(kind, host, port, sni, Address(via))
