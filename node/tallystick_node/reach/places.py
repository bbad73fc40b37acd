"""Which addresses are a server's own, and what it may dial for having them."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Sequence

from tallystick_protocol.errors import BadMessage, ConfigError
from tallystick_protocol.signing import address_bytes, checksum_address
from tallystick_protocol.transport.contact import Addr, Contact, parse_addr
from tallystick_protocol.transport.scopes import MayDial, like, scope_of
from tallystick_protocol.types import Address


def direct_addrs(listening: socket.socket | None, announce: Sequence[str]) -> tuple[Addr, ...]:
    """The addresses that others dial: those of the settings, or the one that is listened on. Raises ConfigError."""
    if announce:
        return tuple(parse_addr(text) for text in announce)
    if listening is None:
        return ()
    host, port = listening.getsockname()[:2]
    if scope_of(str(host)) == "none":
        raise ConfigError(f"host = {str(host)!r} is every address of this machine: set announce to what others dial")
    return (Addr("tcp", str(host), int(port)),)


def dial_policy(host: str, own: Iterable[Addr]) -> MayDial:
    """Global addresses, and others of a kind that this machine is configured with itself. own: addresses of it."""
    return like([host, *(addr.host for addr in own)])


def parse_relay(text: str) -> Contact:
    """A relay of the settings, `0xRELAY@HOST:PORT`. Raises ConfigError."""
    relay, at, place = text.partition("@")
    if not at:
        raise ConfigError(f"{text!a} is no relay: write it as 0xRELAY@HOST:PORT, as `tallystick-node relay` prints it")
    try:
        return Contact(checksum_address(address_bytes(Address(relay))), (parse_addr(place),))
    except BadMessage:
        raise ConfigError(f"{text!a} is no relay: {relay!a} is not an address") from None
