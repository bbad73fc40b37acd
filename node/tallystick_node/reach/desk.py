"""Reach records of others: given out, taken in, and dialled on request, so that nobody announces what nobody tried.

A request to dial names only addresses that a staked node has signed, each is tried once by a TLS handshake with that
node's keys pinned, nothing is sent over it, and the answer is yes or no.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from tallystick_protocol.errors import BadMessage, Overloaded, Unauthorized, Unreachable
from tallystick_protocol.peer import Peers
from tallystick_protocol.signing import address_bytes, checksum_address
from tallystick_protocol.transport.contact import Addr, Contact
from tallystick_protocol.transport.directory import Directory
from tallystick_protocol.transport.reach import MAX_REACH, Reach
from tallystick_protocol.types import Address

log = logging.getLogger(__name__)

DIALS_AT_ONCE = 8
ADDRS_DIALLED = 4
NODE_PAUSE_S = 2.0
"""Between two requests of one node."""

BODY_TIMEOUT_S = 10.0
REMEMBERED = 4096


class ReachDesk:
    """Answers `/v1/reach`. For one event loop."""

    def __init__(
        self,
        node: Address,
        directory: Directory,
        peers: Peers,
        own: Callable[[], bytes | None],
        is_staked: Callable[[Address], bool],
    ) -> None:
        """own(): this node's record, once it is announced. is_staked(node): from the chain; blocking."""
        self._node = node
        self._directory = directory
        self._peers = peers
        self._own = own
        self._is_staked = is_staked
        self._running = 0
        self._asked: dict[Address, float] = {}

    def give(self, node: str) -> bytes | None:
        """The newest record of a node that is known here."""
        try:
            address = checksum_address(address_bytes(Address(node)))
        except BadMessage:
            return None
        return self._own() if address == self._node else self._directory.sealed(address)

    async def take(self, data: bytes) -> list[bool]:
        """Dial a node's addresses, in their order; keep its record if one of them answers.

        Raises BadMessage, BadSignature, Unauthorized (not staked), Overloaded, ChainError.
        """
        if self._running >= DIALS_AT_ONCE:
            raise Overloaded("others are being dialled; ask again", retry_after_s=2)
        self._running += 1
        try:
            reach = await self._directory.verify(data)
            self._hold_back(reach.node)
            if not await asyncio.to_thread(self._is_staked, reach.node):
                raise Unauthorized(f"{reach.node} has no stake: only staked nodes are dialled on request")
            dialled = list(await asyncio.gather(*(self._dial(reach, addr) for addr in reach.addrs[:ADDRS_DIALLED])))
            if any(dialled):
                await self._directory.learn(data)
            return dialled
        finally:
            self._running -= 1

    def _hold_back(self, node: Address) -> None:
        now = time.monotonic()
        if now - self._asked.get(node, -NODE_PAUSE_S) < NODE_PAUSE_S:
            raise Overloaded("this node was dialled a moment ago; ask again", retry_after_s=NODE_PAUSE_S)
        self._asked.pop(node, None)
        self._asked[node] = now
        while len(self._asked) > REMEMBERED:
            del self._asked[next(iter(self._asked))]

    async def _dial(self, reach: Reach, addr: Addr) -> bool:
        if not addr.usable:
            return False
        try:
            await self._peers.handshake(Contact(reach.node, (addr,), reach.spki))
        except Unreachable as error:
            log.debug("%s", error)
            return False
        return True


def add_reach_routes(app: FastAPI, desk: ReachDesk) -> None:
    """`GET /v1/reach/{node}` and `POST /v1/reach`."""

    @app.get("/v1/reach/{node}")
    async def give(node: str) -> Response:
        data = desk.give(node)
        if data is None:
            error = Unreachable("no Reach of that node is known here")
            return JSONResponse({"error": error.to_wire()}, status_code=404)
        return Response(data, media_type="application/json")

    @app.post("/v1/reach")
    async def take(request: Request) -> JSONResponse:
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                data = await _body(request)
        except TimeoutError:
            raise BadMessage(f"no whole Reach within {BODY_TIMEOUT_S:g} s") from None
        return JSONResponse({"dialled": await desk.take(data)})


async def _body(request: Request) -> bytes:
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > MAX_REACH:
            raise BadMessage(f"a Reach takes at most {MAX_REACH} bytes")
    return bytes(data)
