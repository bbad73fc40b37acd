"""What a session can be built from: nodes with their offers, and what money weighs against time."""

from __future__ import annotations

from dataclasses import dataclass

from tallystick_protocol.messages import Offer
from tallystick_protocol.types import Address, Digest, Span, Wei


@dataclass(frozen=True, slots=True)
class Candidate:
    """A node that could serve: its signed offer, who runs it, how far away it is."""

    offer: Offer
    offer_digest: Digest
    operator: Address
    payee: Address
    signer: Address
    stake: Wei
    url: str
    rtt_s: float

    @property
    def node(self) -> Address:
        return self.offer.node

    @property
    def span(self) -> Span:
        return self.offer.span


@dataclass(frozen=True, slots=True)
class Weights:
    """How the planner weighs money against time: seconds that one token base unit per position is worth."""

    seconds_per_wei: float = 1e-18


DEFAULT_WEIGHTS = Weights()
