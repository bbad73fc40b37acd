"""What a session can be built from: nodes with their offers, and what is expected of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from tallystick_protocol.messages import Offer
from tallystick_protocol.transport.contact import Contact
from tallystick_protocol.types import Address, Digest, Span, Wei

LAYER_S = 1e-3
"""Seconds per row and layer that are expected of a node that says nothing and was never used."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What a node is expected to deliver, from what it says of itself and from what was measured (`reputation`).

    layer_s: seconds per row and layer of a decode step. prefill_s: the same in a prompt's chunks. wait_s: seconds that
    a step waits before its turn. failure: the chance that it is lost within a session, 0 to 1.
    """

    layer_s: float = LAYER_S
    prefill_s: float = LAYER_S / 8
    wait_s: float = 0.0
    failure: float = 0.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """A node that could serve: its signed offer, who runs it, how far away it is.

    part: the layers that are used of those it offers; None for all. serves_parts: whether it may be entered late and
    left early. links: seconds there and back to other nodes, as it says itself. url: where it is, for a
    person; contact: how to dial it.
    """

    offer: Offer
    offer_digest: Digest
    operator: Address
    payee: Address
    signer: Address
    stake: Wei
    url: str
    rtt_s: float
    part: Span | None = None
    serves_parts: bool = False
    claimed: Expected = field(default=Expected(), compare=False)
    expected: Expected = field(default=Expected(), compare=False)
    links: Mapping[Address, float] = field(default_factory=dict, compare=False)
    contact: Contact | None = field(default=None, compare=False)

    @property
    def door(self) -> Contact | str:
        """What `Peers` dials."""
        return self.contact or self.url

    @property
    def node(self) -> Address:
        return self.offer.node

    @property
    def span(self) -> Span:
        """The layers that it serves, or would."""
        return self.part or self.offer.span

    def covers(self, span: Span) -> bool:
        """Whether it can serve exactly these layers."""
        if not self.serves_parts:
            return self.offer.span == span
        return self.offer.start <= span.start and span.end <= self.offer.end

    def over(self, span: Span) -> Candidate:
        """The same node, used for these layers only, which it covers."""
        return replace(self, part=None if span == self.offer.span else span)


@dataclass(frozen=True, slots=True)
class Weights:
    """How the planner weighs money against time: seconds that one token base unit per position is worth."""

    seconds_per_wei: float = 1e-18


DEFAULT_WEIGHTS = Weights()
