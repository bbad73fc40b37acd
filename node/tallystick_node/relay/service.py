"""The relay's process: one public port for its own API, for callers of the nodes behind it, and for dial-backs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import FastAPI, Request, Response, WebSocket
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, generate_latest

from tallystick_node.channel import ServerChannel, serve_channel
from tallystick_node.listener import Listener, bind
from tallystick_node.locks import lock_state
from tallystick_node.reach.announcer import Announcer
from tallystick_node.reach.desk import ReachDesk, add_reach_routes
from tallystick_node.reach.places import dial_policy, direct_addrs
from tallystick_node.reach.tls import TlsKeys
from tallystick_node.relay.account import Tariff
from tallystick_node.relay.config import RelayConfig
from tallystick_node.relay.registrar import Registrar
from tallystick_node.relay.switchboard import RelayLimits, Switchboard
from tallystick_node.stake import Lookups, Redeemer
from tallystick_node.till import Till
from tallystick_protocol.chain.book import load_book
from tallystick_protocol.chain.reads import Chain
from tallystick_protocol.chain.writes import Wallet
from tallystick_protocol.errors import ChainError, TallystickError
from tallystick_protocol.frames import Kind
from tallystick_protocol.peer import Peers
from tallystick_protocol.signing import Key
from tallystick_protocol.transport.contact import Contact, label
from tallystick_protocol.transport.directory import Directory
from tallystick_protocol.types import Address, Wei

log = logging.getLogger(__name__)

POOL_CREDITS = 4
"""Credits that are given against funding which is not confirmed yet, over all nodes."""


async def run_relay(config: RelayConfig, key: Key, announce: Callable[[str], None]) -> None:
    """Relay until cancelled. announce(url) is called once it serves. Raises TallystickErrors on the way."""
    state = config.state.expanduser()
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(lock_state(state).close)
        listening = bind(config.host, config.port, encrypted=True)
        stack.callback(listening.close)
        chain = Chain(config.rpc, load_book(config.book))
        await asyncio.to_thread(chain.check)
        direct = direct_addrs(listening, config.announce)
        peers = Peers(dial_policy(config.host, direct))
        stack.push_async_callback(peers.close)
        domain = chain.book.staking_domain
        names = frozenset({label(key.address), *(addr.sni for addr in direct if addr.sni)})
        keys = TlsKeys(state / "tls", names)
        directory = Directory(peers, domain, chain.node_of, chain.locate)
        tariff = Tariff(Wei(config.price), config.credit_bytes, config.bytes_per_s)
        pool = Wei(POOL_CREDITS * tariff.credit)
        till = Till(state / "till.db", key.address, chain.book.escrow_domain, tariff.credit, pool, chain.may_sign)
        stack.callback(till.close)
        limits = RelayLimits(config.max_nodes, config.sockets_per_node, config.max_sockets, config.idle_s)
        switchboard = Switchboard(key.address, limits)
        stack.push_async_callback(switchboard.close)

        async def nobody() -> list[Contact]:
            return []  # a relay is dialled by the nodes that register, and registers nowhere itself

        announcer = Announcer(key.address, key, domain, keys, direct, peers, nobody)
        lookups = Lookups(chain, key.address)

        def is_staked(node: Address) -> bool:
            return chain.node(node).active > 0

        registrar = Registrar(key.address, domain, switchboard, tariff, till, lookups, is_staked)
        desk = ReachDesk(key.address, directory, peers, lambda: announcer.sealed, is_staked)
        listener = Listener(_app(registrar, desk, switchboard), keys, switchboard.divert)
        redeemer = Redeemer(Wallet(chain, key), key.address, till)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(listener.serve(listening))
                contact = await announcer.announce()
                beside: list[Coroutine[Any, Any, None]] = [
                    announcer.keep(config.tls_rotate_s),
                    _redeem_now_and_then(redeemer, config.redeem_after_s),
                ]
                for task in beside:
                    tasks.create_task(task)
                announce(f"{key.address}@{contact.addrs[0].authority}")
        finally:
            await listener.close()
            try:
                await asyncio.to_thread(redeemer.redeem)
            except ChainError as error:
                log.warning("vouchers stay unredeemed until the next start: %s", error)


def _app(registrar: Registrar, desk: ReachDesk, switchboard: Switchboard) -> FastAPI:
    """The relay's own API. Default deny: what is not listed here does not exist."""
    app = FastAPI(title="tallystick-relay", docs_url=None, redoc_url=None, openapi_url=None)
    metrics = CollectorRegistry()
    gauges: dict[str, tuple[str, Callable[[], float]]] = {
        "relay_nodes": ("nodes that are registered", lambda: switchboard.num_nodes),
        "relay_sockets": ("connections to nodes", lambda: switchboard.num_sockets),
        "relay_bytes_total": ("bytes copied in connections that have ended", lambda: switchboard.num_bytes),
    }
    for name, (text, value) in gauges.items():
        Gauge(f"tallystick_{name}", text, registry=metrics).set_function(value)

    @app.exception_handler(TallystickError)
    async def known(_: Request, error: TallystickError) -> JSONResponse:
        return JSONResponse({"error": error.to_wire()}, status_code=error.status)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(generate_latest(metrics), media_type=CONTENT_TYPE_LATEST)

    add_reach_routes(app, desk)

    @app.websocket("/v1/relay")
    async def control(socket: WebSocket) -> None:
        await socket.accept()
        await serve_channel(ServerChannel(socket), {Kind.REGISTER: registrar.serve})

    return app


async def _redeem_now_and_then(redeemer: Redeemer, after_s: float) -> None:
    while True:
        await asyncio.sleep(after_s)
        try:
            await asyncio.to_thread(redeemer.redeem)
        except ChainError as error:
            log.warning("vouchers stay unredeemed for now: %s", error)
