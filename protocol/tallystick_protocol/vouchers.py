"""Vouchers: what a client owes a node since the beginning of time, signed; and the price of a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tallystick_protocol.types import Address, Span, Wei


@dataclass(frozen=True, slots=True)
class Voucher:
    """Cumulative, never "used": a replay is worth nothing, a partial redemption loses nothing. `Escrow.sol`'s type."""

    client: Address
    node: Address
    total: int

    TYPE: ClassVar[str] = "Voucher(address client,address node,uint256 total)"


@dataclass(frozen=True, slots=True)
class Bind:
    """A hot key's consent to sign for a node. `Staking.sol`'s type."""

    node: Address
    deadline: int

    TYPE: ClassVar[str] = "Bind(address node,uint256 deadline)"


@dataclass(frozen=True, slots=True)
class Exit:
    """A client's order to begin to take money out of a channel, whoever sends it. `Escrow.sol`'s type."""

    client: Address
    node: Address
    amount: int
    nonce: int
    deadline: int

    TYPE: ClassVar[str] = "Exit(address client,address node,uint128 amount,uint256 nonce,uint256 deadline)"


@dataclass(frozen=True, slots=True)
class SetSigner:
    """A client's order to let a key sign its vouchers, or to stop it. `Escrow.sol`'s type."""

    client: Address
    signer: Address
    on: bool
    nonce: int
    deadline: int

    TYPE: ClassVar[str] = "SetSigner(address client,address signer,bool on,uint256 nonce,uint256 deadline)"


@dataclass(frozen=True, slots=True)
class ReceiveWithAuthorization:
    """A payer's consent that `to` takes `value` of its tokens. ERC-3009's type, in the token's domain."""

    from_: Address
    to: Address
    value: int
    valid_after: int
    valid_before: int
    nonce: bytes

    TYPE: ClassVar[str] = (
        "ReceiveWithAuthorization(address from,address to,uint256 value,uint256 validAfter,uint256 validBefore,"
        "bytes32 nonce)"
    )


def charge(span: Span, num_layers: int, price: Wei, num_rows: int) -> Wei:
    """Price of computing rows: token base units per position and layer; embed and head count as one layer each."""
    return Wei(num_rows * span.units(num_layers) * price)
