"""The signed messages besides receipts, vouchers and addresses: offers, session openings, push connections, relays.

All are EIP-712 structs under the Staking domain (`signing`); `docs/protocol.md` says who sends which when.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

from tallystick_protocol.signing import address_bytes
from tallystick_protocol.types import Address, ModelId, SessionId, Span

CLOCK_SKEW_S = 60
TOP_K_MAX = 1024


@dataclass(frozen=True, slots=True)
class Offer:
    """What a node sells, signed by its hot key. price and credit in token base units; times in unix seconds."""

    node: Address
    model: bytes
    numeric_class: bytes
    start: int
    end: int
    price: int
    credit: int
    max_length: int
    seq: int
    expires: int

    TYPE: ClassVar[str] = (
        "Offer(address node,bytes32 model,bytes32 numericClass,uint16 start,uint16 end,uint256 price,uint256 credit,"
        "uint32 maxLength,uint64 seq,uint64 expires)"
    )

    def __post_init__(self) -> None:
        if self.start >= self.end:
            raise ValueError(f"not a span: [{self.start}, {self.end})")

    @property
    def span(self) -> Span:
        return Span(self.start, self.end)


@dataclass(frozen=True, slots=True)
class SessionOpen:
    """A client's request for a session at one hop. `offer` is the digest of the offer it accepts.

    previous, next: the nodes that push to and are pushed to by this hop; the zero address is the client itself.
    """

    node: Address
    spki: bytes
    offer: bytes
    client: Address
    nonce: bytes
    model: bytes
    start: int
    end: int
    attempt: int
    previous: Address
    next: Address
    max_length: int
    top_k: int
    issued: int
    expires: int

    TYPE: ClassVar[str] = (
        "SessionOpen(address node,bytes32 spki,bytes32 offer,address client,bytes32 nonce,bytes32 model,uint16 start,"
        "uint16 end,uint32 attempt,address previous,address next,uint32 maxLength,uint16 topK,uint64 issued,"
        "uint64 expires)"
    )

    def __post_init__(self) -> None:
        if self.start >= self.end:
            raise ValueError(f"not a span: [{self.start}, {self.end})")

    @property
    def span(self) -> Span:
        return Span(self.start, self.end)


@dataclass(frozen=True, slots=True)
class Opened:
    """A node's answer: its proof that it accepted price and limits. `open` is the SessionOpen's digest."""

    open: bytes
    spki: bytes
    credit: int
    expires: int

    TYPE: ClassVar[str] = "Opened(bytes32 open,bytes32 spki,uint256 credit,uint64 expires)"


@dataclass(frozen=True, slots=True)
class PushOpen:
    """The first frame on a push connection, signed by the previous hop's hot key; `node` is the hop that is dialled."""

    node: Address
    session: bytes
    attempt: int
    previous: Address
    spki: bytes
    nonce: bytes
    issued: int

    TYPE: ClassVar[str] = (
        "PushOpen(address node,bytes32 session,uint32 attempt,address previous,bytes32 spki,bytes32 nonce,"
        "uint64 issued)"
    )


@dataclass(frozen=True, slots=True)
class Resume:
    """A client's claim to a session of its own that has lost its connection. `number` rises with every claim."""

    node: Address
    session: bytes
    number: int
    spki: bytes
    issued: int

    TYPE: ClassVar[str] = "Resume(address node,bytes32 session,uint32 number,bytes32 spki,uint64 issued)"


def session_id(chain_id: int, client: Address, nonce: bytes, model: ModelId) -> SessionId:
    """The same at all hops, computed on both sides: nobody can open another's session."""
    return SessionId(hashlib.sha256(chain_id.to_bytes(32, "big") + address_bytes(client) + nonce + model).digest())


@dataclass(frozen=True, slots=True)
class RelayRegister:
    """The first frame on a relay's control connection, signed by the hot key of the node that wants to be reached.

    spki: the relay's key in use on that connection.
    """

    relay: Address
    spki: bytes
    node: Address
    nonce: bytes
    issued: int

    TYPE: ClassVar[str] = "RelayRegister(address relay,bytes32 spki,address node,bytes32 nonce,uint64 issued)"
