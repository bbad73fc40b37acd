"""A node from its settings to serving and back: the order in which things happen, and what runs beside."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tallystick_model.parallel import ParallelSpan, close_model
from tallystick_node.alone import alone, set_threads
from tallystick_node.config import NodeConfig
from tallystick_node.heartbeat import Heartbeat
from tallystick_node.journal import Journal, forget_now_and_then
from tallystick_node.jury.juror import Juror
from tallystick_node.listener import Listener, bind
from tallystick_node.loading import Loading, self_check, write_plans
from tallystick_node.locks import lock_state
from tallystick_node.moving import drain, look_around, relocation_in, watch_class, watch_ranks
from tallystick_node.reach.presence import Presence
from tallystick_node.scheduling.engine import Engine
from tallystick_node.server import create_app
from tallystick_node.session.links import Dialler
from tallystick_node.session.registry import Limits, Sessions
from tallystick_node.session.shop import Shop
from tallystick_node.stake import Lookups, Redeemer, Registration, enroll, register
from tallystick_node.status import pace
from tallystick_node.till import Till
from tallystick_protocol.chain.book import load_book
from tallystick_protocol.chain.reads import Chain
from tallystick_protocol.chain.writes import Wallet
from tallystick_protocol.content.serving import BlockRequest, PinnedBlocks, Reply, answer
from tallystick_protocol.content.store import LocalStore
from tallystick_protocol.errors import ChainError, ConfigError, UnknownModel
from tallystick_protocol.manifest import Manifest
from tallystick_protocol.messages import Offer
from tallystick_protocol.signing import Key, digest, seal
from tallystick_protocol.transport.contact import Contact
from tallystick_protocol.types import Address, Digest, ModelId, Span, Wei
from tallystick_protocol.vouchers import charge

log = logging.getLogger(__name__)

VERSION = "0.1.0"
MakeEngine = Callable[[Any, int], Engine]


@dataclass(frozen=True, slots=True)
class Keys:
    """hot signs receipts; cold owns stake and registration and need not be there to serve."""

    hot: Key
    cold: Key | None
    node: Address


def find_model(chain: Chain, text: str) -> ModelId:
    """The model id of a setting; empty means the only model on chain. Raises UnknownModel, ConfigError."""
    if text:
        try:
            model = ModelId(bytes.fromhex(text.removeprefix("0x")))
        except ValueError:
            model = ModelId(b"")
        if len(model) != 32:
            raise ConfigError(
                f"model = {text!r} is not a model id (0x and 64 hex digits); list them: tallystick models"
            )
        chain.model(model)
        return model
    models = chain.all_models()
    if len(models) != 1:
        raise UnknownModel(f'there are {len(models)} models on chain; say which: model = "0x…" (`tallystick models`)')
    return models[0].id


class Node:
    """One node process."""

    def __init__(self, config: NodeConfig, keys: Keys, make_engine: MakeEngine = Engine, joins: bool = False) -> None:
        """make_engine(span model, rows of a forward): tests pass a faulty one. joins: with the cold key, on chain."""
        self.config = config
        self.keys = keys
        self._make_engine = make_engine
        self._joins = joins
        self._ready = False
        self._offers: dict[Digest, Offer] = {}
        self._current: bytes = b""
        self._span = Span(0, 1)  # until the first one is loaded
        self._rows_per_s: float | None = None

    async def run(self, announce: Callable[[str], None]) -> None:
        """Serve until cancelled. announce(url) is called once the node serves. Raises TallystickErrors on the way."""
        gc.freeze()  # what was imported stays; a collection that looks at it takes 0.3 s, in the midst of a start
        config = self.config
        state = config.state.expanduser()
        async with contextlib.AsyncExitStack() as stack:
            lock = lock_state(state)
            stack.callback(lock.close)
            listening = None
            if config.host != "none":
                listening = bind(config.host, config.port, config.is_encrypted)
                stack.callback(listening.close)
            chain = Chain(config.rpc, load_book(config.book))
            await asyncio.to_thread(chain.check)
            presence = Presence(config, self.keys.node, self.keys.hot, chain, state, listening)
            stack.push_async_callback(presence.close)
            model_id = await asyncio.to_thread(find_model, chain, config.model)
            loading = Loading(config, chain, presence.directory, model_id, self.keys.node)
            span: Span | None = await self._first_span(chain, loading, model_id)
            while span is not None:
                span = await self._serve_span(span, chain, presence, loading, model_id, announce)

    async def _first_span(self, chain: Chain, loading: Loading, model: ModelId) -> Span:
        """The span of the settings; with "auto" the registered one, or the best one where the node may register."""
        if self.config.layers is not None:
            return self.config.layers
        record = await asyncio.to_thread(chain.node, self.keys.node)
        if record.active and record.model == model and record.span is not None:
            return record.span
        if not self._joins:
            raise ConfigError(f"node {self.keys.node} serves nothing yet; run: tallystick-node run --join")
        return await loading.choose_span()

    async def _serve_span(
        self,
        span: Span,
        chain: Chain,
        presence: Presence,
        loading: Loading,
        model_id: ModelId,
        announce: Callable[[str], None],
    ) -> Span | None:
        """Load and serve a span until cancelled. Returns the span to serve next when the node is to move."""
        config = self.config
        state = config.state.expanduser()
        async with contextlib.AsyncExitStack() as stack:
            loaded = await loading.load(span)
            manifest = loaded.manifest
            stack.callback(close_model, loaded.model)
            set_threads(1)  # on the event loop
            make = self._make_engine
            engine = await alone(make, loaded.model, config.step_rows, threads=config.num_threads)
            stack.callback(engine.close)
            self._span = span
            if self._joins:
                await asyncio.to_thread(self._enroll, chain)
            lookups = Lookups(chain, self.keys.node)
            till = self._till(chain, state, manifest)
            stack.callback(till.close)
            journal = Journal(state / "journal.db", self.keys.hot, chain.book.staking_domain)
            stack.callback(journal.close)
            shop = Shop(
                node=self.keys.node,
                model=model_id,
                numeric_class=loaded.numeric_class,
                price=Wei(config.price),
                domain=chain.book.staking_domain,
                engine=engine,
                journal=journal,
                till=till,
                dialler=Dialler(
                    presence.peers,
                    self.keys.node,
                    self.keys.hot,
                    chain.book.staking_domain,
                    presence.directory.find,
                    time.time,
                ),
                escrow_domain=chain.book.escrow_domain,
                lookups=lookups,
                clock=time.time,
            )
            limits = Limits(config.cache_bytes, config.max_sessions, config.lease_s, config.keep_prefix_s)
            sessions = Sessions(shop, self.keys.hot, self._offers, limits)
            self._rows_per_s = loading.rate(span)
            self._offers.clear()
            self._renew_offer(shop, manifest)
            wallet = Wallet(chain, self.keys.cold or self.keys.hot)
            heartbeat = Heartbeat(wallet, self.keys.node)
            juror = None
            if config.jury == "on":
                juror = Juror(config, self.keys.node, wallet, loading.store, presence.may_dial, state)
                stack.callback(juror.close)
            blocks = _block_answers(loading.store, *([juror.holding.store] if juror else []))
            info = partial(self._info, sessions, shop, heartbeat)
            app = create_app(sessions, info, lambda: self._ready, blocks, presence.desk)
            listener = Listener(app, presence.keys)
            redeemer = Redeemer(wallet, self.keys.node, till)
            check = self_check(loading, loaded)
            beside = [
                write_plans(engine),
                forget_now_and_then(journal),
                self._renew_offers(shop, manifest),
                self._redeem_now_and_then(redeemer),
                heartbeat.run(lambda: self._ready),
                watch_class(
                    engine, sessions, check, loaded.numeric_class, span, config.check_class_s, loaded.class_age_s
                ),
            ]
            if juror is not None:
                beside.append(juror.run())
            if isinstance(loaded.model, ParallelSpan):
                beside.append(watch_ranks(loaded.model))
            if config.layers is None:
                beside.append(look_around(loading, sessions, span, config.look_around_s, moves=self._joins))

            async def prepare() -> str:
                contact = await presence.announce(model_id)
                if self._joins:
                    await asyncio.to_thread(self._register, chain, model_id, contact)
                await asyncio.to_thread(self._check_registered, chain, model_id)
                await asyncio.to_thread(heartbeat.leave_jail)
                return contact.url

            try:
                await self._serve(listener, presence, prepare, sessions, redeemer, beside, announce)
            except ExceptionGroup as group:
                if (there := relocation_in(group)) is None:
                    raise
                return there
        return None

    async def _serve(
        self,
        listener: Listener,
        presence: Presence,
        prepare: Callable[[], Awaitable[str]],
        sessions: Sessions,
        redeemer: Redeemer,
        beside: Sequence[Coroutine[Any, Any, None]],
        announce: Callable[[str], None],
    ) -> None:
        """prepare(): makes the node known once it can be dialled; returns where it is."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for task in (*presence.tasks(listener), *beside):
                    tasks.create_task(task)
                url = await prepare()
                for task in presence.upkeep():
                    tasks.create_task(task)
                self._ready = True
                announce(url)
        finally:
            self._ready = False
            await drain(sessions, self.config.drain_s)
            await listener.close()
            try:
                await asyncio.to_thread(redeemer.redeem)
            except ChainError as error:
                log.warning("vouchers stay unredeemed until the next start: %s", error)

    def _cold_wallet(self, chain: Chain) -> Wallet:
        if self.keys.cold is None:
            raise ConfigError("joining takes the cold key: set cold_key")
        return Wallet(chain, self.keys.cold)

    def _enroll(self, chain: Chain) -> None:
        payee = Address(self.config.payee or self.keys.node)
        enroll(self._cold_wallet(chain), self.keys.hot, Wei(self.config.stake), payee)

    def _register(self, chain: Chain, model: ModelId, contact: Contact) -> None:
        config, node = self.config, self.keys.node
        registration = Registration(
            model,
            self._span,
            Wei(config.price),
            contact,
            Address(config.operator or node),
        )
        register(self._cold_wallet(chain), registration)

    def _check_registered(self, chain: Chain, model: ModelId) -> None:
        """Raises ConfigError unless the chain knows this node as it is about to serve."""
        node = self.keys.node
        record = chain.node(node)
        if chain.node_of(self.keys.hot.address) != node:
            raise ConfigError(f"the hot key is not bound to node {node}; run: tallystick-node run --join")
        if record.active == 0 or record.model != model or record.span != self._span:
            raise ConfigError(
                f"the chain has node {node} with stake {record.active} for layers {record.span}, these settings say"
                f" {self._span}; run: tallystick-node run --join"
            )

    def _till(self, chain: Chain, state: Path, manifest: Manifest) -> Till:
        return Till(
            state / "till.db",
            self.keys.node,
            chain.book.escrow_domain,
            self._credit(manifest),
            Wei(self.config.unconfirmed_pool),
            chain.may_sign,
        )

    def _credit(self, manifest: Manifest) -> Wei:
        config = self.config
        one_shot = not manifest.is_causal(self._span)
        positions = max(config.credit_positions, manifest.max_length) if one_shot else config.credit_positions
        return charge(self._span, manifest.layers, Wei(config.price), positions)

    def _renew_offer(self, shop: Shop, manifest: Manifest) -> None:
        now = int(time.time())
        offer = Offer(
            node=self.keys.node,
            model=shop.model,
            numeric_class=shop.numeric_class,
            start=self._span.start,
            end=self._span.end,
            price=self.config.price,
            credit=self._credit(manifest),
            max_length=min(self.config.max_length, manifest.max_length),
            seq=now,
            expires=now + self.config.offer_lifetime_s,
        )
        for old in [key for key, value in self._offers.items() if value.expires < now]:
            del self._offers[old]
        self._offers[digest(shop.domain, offer)] = offer
        self._current = seal(shop.domain, offer, self.keys.hot)

    async def _renew_offers(self, shop: Shop, manifest: Manifest) -> None:
        while True:
            await asyncio.sleep(self.config.offer_lifetime_s / 3)
            self._renew_offer(shop, manifest)

    async def _redeem_now_and_then(self, redeemer: Redeemer) -> None:
        while True:
            await asyncio.sleep(self.config.redeem_after_s)
            try:
                await asyncio.to_thread(redeemer.redeem)
            except ChainError as error:
                log.warning("vouchers stay unredeemed for now: %s", error)

    def _info(self, sessions: Sessions, shop: Shop, heartbeat: Heartbeat) -> dict[str, Any]:
        """The signed offer, and what nobody signs: load, clock, version."""
        return {
            "offer": self._current.hex(),
            "status": {
                "version": VERSION,
                "clock": int(time.time()),
                "sessions": len(sessions),
                "reserved_bytes": sessions.reserved_bytes,
                "draining": sessions.draining,
                "seen_at": heartbeat.seen_at,
                **pace(shop, self._rows_per_s),
            },
        }


def _block_answers(*stores: LocalStore) -> Callable[[BlockRequest], Reply]:
    """From the first store that has pinned what is asked for."""
    pinned = [(store, PinnedBlocks(store)) for store in stores]

    def reply(request: BlockRequest) -> Reply:
        for store, allowed in pinned:
            found = answer(store, request, allowed)
            if found.status not in (404, 412):
                break
        return found

    return reply
