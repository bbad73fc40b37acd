"""What may be dialled: addresses that strangers have published must not lead into somebody's own network."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable, Collection
from typing import Literal

Scope = Literal["loopback", "private", "global", "none"]
MayDial = Callable[[str], bool]


def scope_of(ip: str) -> Scope:
    """Where a numeric address leads; `none` for what no peer can be reached at (multicast, unspecified, link-local)."""
    try:
        address = ipaddress.ip_address(ip)
    except ValueError:
        return "none"
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if address.is_loopback:
        return "loopback"
    if address.is_multicast or address.is_unspecified or address.is_link_local or address.is_reserved:
        return "none"
    return "global" if address.is_global else "private"


def is_loopback(host: str) -> bool:
    return host == "localhost" or scope_of(host) == "loopback"


def anywhere(ip: str) -> bool:
    """The policy of a client: its own machine and network are its own business."""
    return scope_of(ip) != "none"


def like(own: Collection[str]) -> MayDial:
    """The policy of a server: global addresses, and those of a scope that one of its own addresses has."""
    scopes = {"global", *(scope_of(ip) for ip in own)} - {"none"}
    return lambda ip: scope_of(ip) in scopes


async def resolve(host: str, port: int) -> list[str]:
    """The numeric addresses of a host, which are then dialled: a name that answers twice cannot lead elsewhere.

    Raises OSError when there is none.
    """
    if scope_of(host) != "none":
        return [host]
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))
