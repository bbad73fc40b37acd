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


def charge(span: Span, num_layers: int, price: Wei, num_rows: int) -> Wei:
    """Price of computing rows: token base units per position and layer; embed and head count as one layer each."""
    return Wei(num_rows * span.units(num_layers) * price)
