"""A node from its settings to serving and back: the order in which things happen, and what runs beside."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from tallystick_model.canary import check_canary
from tallystick_model.loader import load_span
from tallystick_model.numeric_class import numeric_class
from tallystick_node.config import NodeConfig
from tallystick_node.engine import Engine
from tallystick_node.hop import Shop
from tallystick_node.journal import Journal
from tallystick_node.links import Dialler
from tallystick_node.listener import Listener, bind_loopback
from tallystick_node.pieces import Pieces
from tallystick_node.server import create_app
from tallystick_node.sessions import Sessions
from tallystick_node.stake import Lookups, Redeemer, Registration, join
from tallystick_node.till import Till
from tallystick_protocol.chain.book import load_book
from tallystick_protocol.chain.reads import Chain
from tallystick_protocol.chain.writes import Wallet
from tallystick_protocol.content.serving import BlockRequest, PinnedBlocks, Reply, answer
from tallystick_protocol.content.store import LocalStore
from tallystick_protocol.errors import ChainError, ConfigError, UnknownModel
from tallystick_protocol.manifest import Manifest
from tallystick_protocol.messages import Endpoint, Offer
from tallystick_protocol.peer import Peers
from tallystick_protocol.signing import Key, digest, seal
from tallystick_protocol.types import Address, Digest, ModelId, Wei
from tallystick_protocol.vouchers import charge

log = logging.getLogger(__name__)

VERSION = "0.1.0"
MakeEngine = Callable[[Any], Engine]


@dataclass(frozen=True, slots=True)
class Keys:
    """hot signs receipts; cold owns stake and registration and need not be there to serve."""

    hot: Key
    cold: Key | None
    node: Address


def lock_state(folder: Path) -> IO[str]:
    """Hold the node's folder: two processes with one key would contradict each other. Raises ConfigError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / "lock").open("w")
    except OSError as error:
        raise ConfigError(
            f"state = {str(folder)!r} cannot be written ({error.strerror}); choose another folder"
        ) from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ConfigError(
            f"another tallystick-node runs in {folder}; stop it, or give this one a folder of its own"
        ) from None
    return handle


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
        """make_engine(span model): the engine; tests pass a faulty one. joins: stake and register with the cold key."""
        self.config = config
        self.keys = keys
        self._make_engine = make_engine
        self._joins = joins
        self._ready = False
        self._offers: dict[Digest, Offer] = {}
        self._current: bytes = b""

    async def run(self, announce: Callable[[str], None]) -> None:
        """Serve until cancelled. announce(url) is called once the node serves. Raises TallystickErrors on the way."""
        config = self.config
        state = config.state.expanduser()
        async with contextlib.AsyncExitStack() as stack:
            lock = lock_state(state)
            stack.callback(lock.close)
            listening = bind_loopback(config.host, config.port)
            stack.callback(listening.close)
            chain = Chain(config.rpc, load_book(config.book))
            await asyncio.to_thread(chain.check)
            peers = Peers()
            stack.push_async_callback(peers.close)
            store = LocalStore(state / "store")
            model_id, manifest, engine, measured = await self._prepare(chain, store, state)
            stack.callback(engine.close)
            endpoint = _endpoint(listening)
            if self._joins:
                await asyncio.to_thread(self._join, chain, model_id, endpoint)
            await asyncio.to_thread(self._check_registered, chain, model_id)
            lookups = Lookups(chain, self.keys.node)
            till = self._till(chain, state, manifest)
            stack.callback(till.close)
            journal = Journal(state / "journal.db", self.keys.hot, chain.book.staking_domain)
            stack.callback(journal.close)
            shop = Shop(
                node=self.keys.node,
                model=model_id,
                numeric_class=measured,
                price=Wei(config.price),
                domain=chain.book.staking_domain,
                engine=engine,
                journal=journal,
                till=till,
                dialler=Dialler(
                    peers, self.keys.node, self.keys.hot, chain.book.staking_domain, chain.locate, time.time
                ),
                escrow_domain=chain.book.escrow_domain,
                lookups=lookups,
                clock=time.time,
            )
            sessions = Sessions(shop, self.keys.hot, self._offers, config.cache_bytes, config.max_sessions)
            self._renew_offer(shop, manifest)
            listener = Listener(
                create_app(sessions, lambda: self._info(sessions), lambda: self._ready, _block_answers(store))
            )
            redeemer = Redeemer(Wallet(chain, self.keys.cold or self.keys.hot), self.keys.node, till)
            await self._serve(listener, listening, shop, manifest, redeemer, lambda: announce(endpoint.url))

    async def _serve(
        self,
        listener: Listener,
        listening: socket.socket,
        shop: Shop,
        manifest: Manifest,
        redeemer: Redeemer,
        announce: Callable[[], None],
    ) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(listener.serve(listening))
                tasks.create_task(self._renew_offers(shop, manifest))
                tasks.create_task(self._redeem_now_and_then(redeemer))
                self._ready = True
                announce()
        finally:
            self._ready = False
            await listener.close()
            try:
                await asyncio.to_thread(redeemer.redeem)
            except ChainError as error:
                log.warning("vouchers stay unredeemed until the next start: %s", error)

    async def _prepare(self, chain: Chain, store: LocalStore, state: Path) -> tuple[ModelId, Manifest, Engine, Digest]:
        """Fetch, verify, load, reproduce the canary, measure the class."""
        config = self.config
        span = config.layers
        model_id = await asyncio.to_thread(find_model, chain, config.model)
        record = await asyncio.to_thread(chain.model, model_id)
        others = await asyncio.to_thread(chain.serving, model_id)
        urls = [e.url for other in others if other.record.node != self.keys.node for e in other.endpoints]
        pieces = Pieces(store, state / "pieces", [*config.sources, *urls])
        manifest = await pieces.manifest(record)
        manifest.span_pieces(span)
        await pieces.fetch(manifest, span)
        torch.set_num_threads(config.threads)
        model = await asyncio.to_thread(load_span, manifest, span, pieces.path)
        error = await asyncio.to_thread(check_canary, model, manifest, store.get_block)
        log.info("layers %s loaded; the canary is reproduced to %.1e", span, error)
        measured = await asyncio.to_thread(numeric_class, manifest)
        if not any(measured):
            raise ConfigError(
                f"this machine is not canonical for {manifest.name}: its own chunkings disagree, and the model is"
                " served in canonical fp32 only; try other settings for threads, or another machine"
            )
        log.info("numeric class %s", measured.hex()[:16])
        return model_id, manifest, self._make_engine(model), measured

    def _join(self, chain: Chain, model: ModelId, endpoint: Endpoint) -> None:
        if self.keys.cold is None:
            raise ConfigError("joining takes the cold key: set cold_key")
        config, node = self.config, self.keys.node
        registration = Registration(
            model,
            config.layers,
            Wei(config.price),
            (endpoint,),
            Address(config.operator or node),
            Address(config.payee or node),
            Wei(config.stake),
        )
        join(Wallet(chain, self.keys.cold), self.keys.hot, registration)

    def _check_registered(self, chain: Chain, model: ModelId) -> None:
        """Raises ConfigError unless the chain knows this node as it is about to serve."""
        node = self.keys.node
        record = chain.node(node)
        if chain.node_of(self.keys.hot.address) != node:
            raise ConfigError(f"the hot key is not bound to node {node}; run: tallystick-node run --join")
        if record.active == 0 or record.model != model or record.span != self.config.layers:
            raise ConfigError(
                f"the chain has node {node} with stake {record.active} for layers {record.span}, these settings say"
                f" {self.config.layers}; run: tallystick-node run --join"
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
        one_shot = not manifest.is_causal(config.layers)
        positions = max(config.credit_positions, manifest.max_length) if one_shot else config.credit_positions
        return charge(config.layers, manifest.layers, Wei(config.price), positions)

    def _renew_offer(self, shop: Shop, manifest: Manifest) -> None:
        now = int(time.time())
        offer = Offer(
            node=self.keys.node,
            model=shop.model,
            numeric_class=shop.numeric_class,
            start=self.config.layers.start,
            end=self.config.layers.end,
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

    def _info(self, sessions: Sessions) -> dict[str, Any]:
        """The signed offer, and what nobody signs: load, clock, version."""
        return {
            "offer": self._current.hex(),
            "status": {
                "version": VERSION,
                "clock": int(time.time()),
                "sessions": len(sessions),
                "reserved_bytes": sessions.reserved_bytes,
                "draining": sessions.draining,
            },
        }


def _endpoint(listening: socket.socket) -> Endpoint:
    host, port = listening.getsockname()[:2]
    return Endpoint("tcp", str(host), int(port))


def _block_answers(store: LocalStore) -> Callable[[BlockRequest], Reply]:
    pinned = PinnedBlocks(store)
    return lambda request: answer(store, request, pinned)
