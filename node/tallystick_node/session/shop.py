"""What all sessions of a node share."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from tallystick_node.journal import Journal
from tallystick_node.scheduling.engine import Engine
from tallystick_node.session.links import Dialler
from tallystick_node.stake import Lookups
from tallystick_node.till import Till
from tallystick_protocol.signing import Domain
from tallystick_protocol.types import Address, Digest, ModelId, Wei


@dataclass(frozen=True, slots=True)
class Shop:
    """What all sessions of a node share."""

    node: Address
    model: ModelId
    numeric_class: Digest
    price: Wei
    domain: Domain
    engine: Engine
    journal: Journal
    till: Till
    dialler: Dialler
    escrow_domain: Domain
    lookups: Lookups
    clock: Callable[[], float]
    waiting: dict[Address, set[asyncio.Event]] = field(default_factory=dict)  # sessions that wait for a voucher
    sessions: Counter[Address] = field(default_factory=Counter)  # open ones of each client
