"""All sessions of a node: who may open one, what they may take together, and which push belongs to which."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from tallystick_node.scheduling.load import Load, Meter
from tallystick_node.session.admission import Admission, sketch_bytes
from tallystick_node.session.control import Control
from tallystick_node.session.hop import Hop
from tallystick_node.session.inbox import MAX_EPOCH
from tallystick_node.session.kept import KeptRows, Source
from tallystick_node.session.rows import RowFormat
from tallystick_node.session.shop import Shop
from tallystick_protocol.errors import (
    BadMessage,
    BadSignature,
    ContextLengthExceeded,
    Draining,
    Overloaded,
    Rejected,
    SessionExists,
    SessionUnknown,
    Unauthorized,
    UnknownModel,
)
from tallystick_protocol.frames import MAX_TENSOR, Frame, Kind, take
from tallystick_protocol.messages import (
    CLOCK_SKEW_S,
    TOP_K_MAX,
    Offer,
    Opened,
    PushOpen,
    Resume,
    SessionOpen,
    session_id,
)
from tallystick_protocol.peer import Channel, sealed_field
from tallystick_protocol.signing import Key, digest, seal, unseal
from tallystick_protocol.sketching.rows import ROW_BYTES as SKETCH_ROW
from tallystick_protocol.types import WINDOW, Digest, ModelId, SessionId, Wei
from tallystick_protocol.vouchers import charge
from tallystick_protocol.wire import Wire, wire_of

log = logging.getLogger(__name__)

NONCE_MEMORY_S = 24 * 3600
DRAIN_POLL_S = 0.05


@dataclass(slots=True)
class Counters:
    """What /metrics tells."""

    opened: int = 0
    refused: int = 0
    rows: int = 0
    reused: int = 0


@dataclass(frozen=True, slots=True)
class Limits:
    """cache_bytes: what all caches together may take. lease_s: how long a session waits for a client that lost its
    connection. keep_prefix_s: how long the rows of a session that ended in order are kept."""

    cache_bytes: int
    max_sessions: int
    lease_s: float
    keep_prefix_s: float = 0.0


class Sessions:
    """Opens sessions and finds them again."""

    def __init__(self, shop: Shop, key: Key, offers: dict[Digest, Offer], limits: Limits) -> None:
        """offers: the offers that still hold, by digest."""
        self._shop = shop
        self._key = key
        self._offers = offers
        self._limits = limits
        self._hops: dict[SessionId, Hop] = {}
        engine = shop.engine
        self._admission = Admission(
            engine.model, limits.cache_bytes, limits.max_sessions, lambda: engine.retry_after_s, self._evict
        )
        self._kept = KeptRows(limits.keep_prefix_s, self._admission.close)
        self.counters = Counters()
        self.draining = False

    def __len__(self) -> int:
        return len(self._hops)

    @property
    def reserved_bytes(self) -> int:
        return self._admission.reserved_bytes

    @property
    def cache_usage(self) -> float:
        """The share of `cache_bytes` that is taken, on the fullest device."""
        return self._admission.usage

    @property
    def load(self) -> Load:
        return self._shop.engine.load

    @property
    def meter(self) -> Meter:
        return self._shop.engine.meter

    async def serve_client(self, channel: Channel, first: Frame) -> None:
        """A connection whose first frame is OPEN: check it, answer OPENED, serve the session to its end."""
        opened, session, open_digest = await asyncio.to_thread(self._check_open, first, channel.spki)
        await asyncio.to_thread(self._check_money, opened)
        epoch = take(first.body, "epoch", int, 0)
        if not 0 <= epoch < MAX_EPOCH:
            raise BadMessage("the epoch is out of range")
        wire, sketches = wire_of(first.body.get("wire", "f32")), take(first.body, "sketches", bool, False)
        if sketches:
            self._check_sketches(opened, wire)
        await self._supersede(session, opened.attempt)
        control = Control(self._limits.lease_s)
        hop = self._admit(opened, session, control, epoch, wire, sketches)
        try:
            if not await asyncio.to_thread(
                self._shop.journal.admit, session, opened.attempt, opened.expires + NONCE_MEMORY_S, int(self._now())
            ):
                raise SessionExists("this session was opened here before; use a fresh nonce")
            account = self._shop.till.account(opened.client)
            offer = self._offers[Digest(opened.offer)]
            answer = Opened(open_digest, channel.spki, offer.credit, opened.expires)
            body = {
                "opened": seal(self._shop.domain, answer, self._key),
                "owed": str(account.owed),
                "voucher": account.sealed,
                "lease_s": self._limits.lease_s,
                "rewinds": hop.rewinds,
                "sketches": hop.sketcher.is_on,
            }
            await control.attach(channel, [Frame(Kind.OPENED, body)])
            self.counters.opened += 1
            log.info("session %s opened by %s", session.hex()[:12], opened.client)
            await hop.run()
        finally:
            control.end()
            self._hops.pop(session, None)
            self._shop.sessions[opened.client] -= 1
            if not self._shop.sessions[opened.client]:
                del self._shop.sessions[opened.client]
            self._part_with(hop)
            self.counters.rows += hop.position
            self.counters.reused += hop.reused
            log.info("session %s ended after %d rows", session.hex()[:12], hop.position)

    def _part_with(self, hop: Hop) -> None:
        """A session has ended: keep what it holds for the client's next ones, or free what it took."""
        keeps = hop.has_parted and not self.draining and not hop.sketcher.is_on
        if not keeps or not self._kept.keep(hop.source):
            self._admission.close(hop.id)
            return
        self._admission.spare(hop.id)
        if hop.continues is not None:
            self._kept.drop(hop.continues)
        asyncio.get_running_loop().call_later(self._limits.keep_prefix_s, self._kept.expire)

    def _evict(self) -> bool:
        return self._kept.evict()

    def _find(self, session: SessionId) -> Source | None:
        """What a session holds, or held when it ended."""
        hop = self._hops.get(session)
        return self._kept.find(session) if hop is None else hop.source

    async def _supersede(self, session: SessionId, attempt: int) -> None:
        """A client that opens its session a second time has lost the first one, which may still wait for it."""
        old = self._hops.get(session)
        if old is not None and old.attempt < attempt:
            old.expel(SessionUnknown("the session was opened anew"))
            while self._hops.get(session) is old:
                await asyncio.sleep(DRAIN_POLL_S)

    async def serve_push(self, channel: Channel, first: Frame) -> None:
        """A connection whose first frame is PUSH_OPEN, from the hop that the client named as the previous one."""
        push, signer = unseal(self._shop.domain, PushOpen, sealed_field(first, "push"))
        hop = self._hops.get(SessionId(push.session))
        if hop is None:
            raise SessionUnknown("no such session is open here")
        if push.node != self._shop.node or abs(push.issued - self._now()) > CLOCK_SKEW_S:
            raise Unauthorized("the push opening is for another node or another time")
        if push.spki != channel.spki:
            raise Unauthorized("the push opening is bound to another TLS key than the one of this connection")
        node = await asyncio.to_thread(self._shop.lookups.signer_of, signer)
        if node != push.previous or push.previous not in hop.feeders:
            raise Unauthorized("rows come from the hop that the client has named as the previous one")
        epoch = take(first.body, "epoch", int, 0)
        if not 0 <= epoch < MAX_EPOCH:
            raise BadMessage("the epoch is out of range")
        await hop.serve_push(channel, epoch)

    async def resume(self, channel: Channel, first: Frame) -> None:
        """A connection whose first frame is RESUME: the client of an open session goes on over another connection."""
        claim, signer = unseal(self._shop.domain, Resume, sealed_field(first, "resume"))
        hop = self._hops.get(SessionId(claim.session))
        if hop is None:
            raise SessionUnknown("no such session is open here")
        if claim.node != self._shop.node or abs(claim.issued - self._now()) > CLOCK_SKEW_S:
            raise Unauthorized("the claim is for another node or another time")
        if claim.spki != channel.spki:
            raise Unauthorized("the claim is bound to another TLS key than the one of this connection")
        receipts, results = take(first.body, "receipts", int), take(first.body, "results", int)
        hop.claim(signer, claim.number)
        await hop.resume(channel, receipts, results)

    async def drain(self, timeout_s: float) -> None:
        """Open no more sessions, tell the clients of those that are open to move on, and give them time for it."""
        self.draining = True
        notice = Draining("this node stops soon: put another one in its place", node=self._shop.node)
        deadline = asyncio.get_running_loop().time() + timeout_s
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await asyncio.gather(*(hop.warn(notice) for hop in list(self._hops.values())))
        while self._hops and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(DRAIN_POLL_S)

    def _check_open(self, frame: Frame, spki: Digest) -> tuple[SessionOpen, SessionId, Digest]:
        """Everything about an opening that can be checked without taking anything."""
        shop = self._shop
        opened, signer = unseal(shop.domain, SessionOpen, sealed_field(frame, "open"))
        if signer != opened.client:
            raise BadSignature("the opening is not signed by its client")
        if opened.node != shop.node:
            raise Rejected("the opening names another node", node=shop.node)
        if opened.spki != spki:
            raise Rejected("the opening is bound to another TLS key than the one of this connection")
        now = self._now()
        if not opened.issued - CLOCK_SKEW_S <= now <= opened.expires or opened.expires > opened.issued + NONCE_MEMORY_S:
            raise Rejected("the opening is stale, or this machine's clock and yours differ", time=int(now))
        if opened.model != shop.model:
            raise UnknownModel(f"this node serves model 0x{shop.model.hex()}")
        model = shop.engine.part(opened.span)
        offer = self._offers.get(Digest(opened.offer))
        if offer is None or offer.expires < now:
            raise Rejected("that offer does not hold; ask /v1/info for the current one")
        if not 0 < opened.max_length <= min(offer.max_length, model.manifest.max_length):
            raise ContextLengthExceeded(
                f"sessions here take at most {offer.max_length} positions", limit=offer.max_length
            )
        if not 0 <= opened.top_k <= TOP_K_MAX:
            raise BadMessage(f"top_k is from 1 to {TOP_K_MAX}, or 0 for all logits")
        rows = RowFormat(model.manifest, model.span, opened.top_k)
        if rows.is_last and rows.result_bytes > MAX_TENSOR:
            raise BadMessage("a row of this model's logits does not fit into a frame; use a top_k from 1")
        session = session_id(shop.domain.chain_id, opened.client, opened.nonce, ModelId(opened.model))
        return opened, session, digest(shop.domain, opened)

    def _check_sketches(self, opened: SessionOpen, wire: Wire) -> None:
        """Raises BadMessage where sketches would say nothing, or would not fit."""
        model = self._shop.engine.part(opened.span)
        if wire != "f32" or not any(self._shop.numeric_class):
            raise BadMessage("sketches are of rows that travel whole (f32), of nodes that have a class")
        if not model.causal and opened.max_length * SKETCH_ROW > MAX_TENSOR:
            raise BadMessage(f"a window of {opened.max_length} positions is too long for sketches")

    def _check_money(self, opened: SessionOpen) -> None:
        """A place and a cache are for who can pay a first window, earlier debt included. Raises InsufficientFunds."""
        shop, model = self._shop, self._shop.engine.model
        first = charge(opened.span, model.manifest.layers, shop.price, min(WINDOW, opened.max_length))
        owed = Wei(shop.till.account(opened.client).owed + first)
        shop.till.check_funds(opened.client, first, shop.lookups.funds(opened.client, owed))

    def _admit(
        self, opened: SessionOpen, session: SessionId, control: Control, epoch: int, wire: Wire, sketches: bool
    ) -> Hop:
        """Take a place and cache bytes for a session, or raise Overloaded, SessionExists."""
        if session in self._hops:
            raise SessionExists("this session is open here already")
        if self.draining:
            self.counters.refused += 1
            raise Overloaded("this node stops soon", retry_after_s=60)
        try:
            part = self._shop.engine.part(opened.span)
            self._admission.open(session, opened.client, opened.max_length, len(self._hops), part)
            if sketches:
                self._take_more(session, sketch_bytes(part, opened.max_length))
        except Overloaded:
            self.counters.refused += 1
            raise
        reserve = partial(self._admission.take_more, session)
        hop = Hop(self._shop, opened, session, control, epoch, wire, self._find, reserve, sketches)
        self._hops[session] = hop
        self._shop.sessions[opened.client] += 1
        return hop

    def _take_more(self, session: SessionId, num_bytes: int) -> None:
        """More for a session that is being opened. Raises Overloaded, and then nothing is taken for it."""
        try:
            self._admission.take_more(session, num_bytes)
        except Overloaded:
            self._admission.close(session)
            raise

    def _now(self) -> float:
        return self._shop.clock()
