"""What one session works with: the layers it crosses, what enters them beside the rows, and the client's own things."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from typing import Literal, get_args

from tallystick.payments import Need, Purse
from tallystick.prefixes import Form
from tallystick.routing.candidates import Candidate
from tallystick.routing.cost import Workload
from tallystick.routing.proven import Proven
from tallystick.routing.reputation import Reputation
from tallystick.routing.suspicions import Suspicions
from tallystick_protocol.errors import NoRoute
from tallystick_protocol.manifest import Manifest
from tallystick_protocol.peer import Peers
from tallystick_protocol.receipts import Context, Receipt, rows_root
from tallystick_protocol.signing import Domain, Key
from tallystick_protocol.types import Address, Digest, Span, Wei
from tallystick_protocol.vouchers import charge
from tallystick_protocol.wire import Wire

Sketches = Literal["auto", "on", "off"]
"""Whether hops are asked for sketches: "auto" where an answer may be audited and only other classes can do it."""
SKETCHES: tuple[Sketches, ...] = get_args(Sketches)


@dataclass(frozen=True, slots=True)
class Sides:
    """What the outputs depend on besides the session's rows. The digests are what receipts must say of them.

    token_types: one byte per position, for the span that takes the ids of a one-shot session; empty for none.
    memory: the encoder's last hidden states, one fp32 row per source position, for a decoder's spans; None elsewhere.
    """

    token_types: bytes = b""
    memory: tuple[bytes, ...] | None = None
    types_root: Digest | None = field(init=False)
    memory_root: Digest | None = field(init=False)

    def __post_init__(self) -> None:
        types = rows_root(bytes([kind]) for kind in self.token_types) if self.token_types else None
        object.__setattr__(self, "types_root", types)
        object.__setattr__(self, "memory_root", None if self.memory is None else rows_root(self.memory))


async def _nobody() -> list[Candidate]:
    return []


async def _none_of(_: Collection[Address]) -> dict[Address, str]:
    return {}


@dataclass(frozen=True, slots=True)
class Setting:
    """What a session needs of its client. stack: the layers from token ids to a result. top_k 0: dense rows.

    wire: how hidden rows travel between hops (`tallystick_protocol.wire`).
    wait_s: how long to wait for a node when layers are not served any more; look_again: who serves them now;
    unstaked: which of some nodes do not stake for the model any more, and what the chain says of them.
    on_waiting: called with the error that will be raised when nobody comes. work: what the route was planned for;
    reputation: learns what its nodes deliver; suspicions: which pairs of nodes of different classes disagree a little,
    again and again; proven: classes in which equal bits count. numeric_class: the only one that hops may be of.
    keep_evidence: stores a bundle against a hop that was found wrong, and returns its CID; None: none is gathered.
    recompute: from a bundle and the receipt that it is about, the output's root as the client computes it, or
    NoAuditor; None: it does not.
    """

    peers: Peers
    key: Key
    domain: Domain
    purse: Purse
    manifest: Manifest
    stack: Span
    candidates: list[Candidate]
    max_length: int
    top_k: int
    on_replaced: Callable[[], None]
    sides: Sides = field(default_factory=Sides)
    wire: Wire = "f32"
    wait_s: float = 0.0
    look_again: Callable[[], Awaitable[list[Candidate]]] = _nobody
    unstaked: Callable[[Collection[Address]], Awaitable[dict[Address, str]]] = _none_of
    on_waiting: Callable[[NoRoute], None] = lambda _: None
    work: Workload = field(default_factory=lambda: Workload(0))
    reputation: Reputation = field(default_factory=Reputation)
    suspicions: Suspicions = field(default_factory=Suspicions)
    proven: Proven = field(default_factory=Proven)
    sketches: Sketches = "auto"
    numeric_class: Digest | None = None
    keep_evidence: Callable[[bytes], str] | None = None
    recompute: Callable[[bytes, Receipt], Awaitable[Digest]] | None = None

    @property
    def one_shot(self) -> bool:
        """Whether the session takes all its rows in one step: encoders."""
        return not self.manifest.is_causal(self.stack)

    @property
    def form(self) -> Form:
        """What another session must have in common to take over rows of this one."""
        return Form(self.manifest.model_id, self.top_k, self.wire)

    def need(self, candidate: Candidate, sessions: int = 1) -> Need:
        """What so many whole sessions may cost at a node, replays included."""
        price = Wei(candidate.offer.price)
        return Need(candidate.node, charge(candidate.span, self.manifest.layers, price, 2 * sessions * self.max_length))

    def context(self, span: Span, want: tuple[bool, ...]) -> Context:
        """What a receipt of `span` must say about a window."""
        types = self.sides.types_root if span.start == self.stack.start else None
        return Context(self.manifest.numerics, self.wire, self.top_k, want, types, self.sides.memory_root)
