"""The typed stub of a node's API: what clients and other nodes call, over HTTP and WebSocket.

Only bytes that were bounded come back: bodies are read raw up to a cap, compression and redirects are refused.
"""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

import aiohttp

from tallystick_protocol import canonical_json
from tallystick_protocol.errors import BadFrame, BadMessage, Unreachable, from_wire
from tallystick_protocol.frames import MAX_FRAME, Frame, Kind, take

INFO_BYTES = 64 * 1024
CONNECT_TIMEOUT_S = 5.0
HEARTBEAT_S = 10.0


class Channel(Protocol):
    """An ordered stream of frames to one peer."""

    async def send(self, frame: Frame) -> None:
        """Raises Unreachable when the connection is gone."""

    async def receive(self) -> Frame:
        """The next frame. Raises Unreachable when the connection is gone, BadFrame when it is malformed."""

    async def close(self) -> None: ...


class WebSocketChannel:
    """A channel over a WebSocket that this side dialled."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, peer: str) -> None:
        self._socket = socket
        self.peer = peer

    async def send(self, frame: Frame) -> None:
        try:
            await self._socket.send_bytes(frame.encode())
        except (ConnectionError, RuntimeError, aiohttp.ClientError):
            raise Unreachable(f"{self.peer} closed the connection", hop=self.peer) from None

    async def receive(self) -> Frame:
        message = await self._socket.receive()
        if message.type is aiohttp.WSMsgType.BINARY:
            return Frame.decode(message.data)
        if message.type is aiohttp.WSMsgType.TEXT:
            raise BadFrame(f"{self.peer} sent text where frames are spoken")
        raise Unreachable(f"{self.peer} closed the connection", hop=self.peer)

    async def close(self) -> None:
        await self._socket.close()


class Peers:
    """Connections to nodes. One per process; close it."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    async def info(self, url: str, timeout_s: float = 2.0) -> dict[str, Any]:
        """`GET /v1/info`. Raises Unreachable, BadMessage."""
        body = await self.get(f"{url}/v1/info", INFO_BYTES, timeout_s)
        try:
            value = canonical_json.parse(body)
        except ValueError:
            raise BadMessage(f"{url} answered /v1/info with something else than JSON") from None
        if not isinstance(value, dict):
            raise BadMessage(f"{url} answered /v1/info with something else than an object")
        return value

    async def get(self, url: str, max_bytes: int, timeout_s: float) -> bytes:
        """The raw body of a 200, at most `max_bytes`. Raises Unreachable, BadMessage."""
        try:
            async with asyncio.timeout(timeout_s):
                request = self._client().get(url, allow_redirects=False, headers={"Accept-Encoding": "identity"})
                async with request as response:
                    body = await response.content.read(max_bytes + 1)
                    while len(body) <= max_bytes and not response.content.at_eof():
                        body += await response.content.read(max_bytes + 1 - len(body))
                    if response.status != 200 or response.headers.get("Content-Encoding"):
                        raise BadMessage(f"{url} answered with status {response.status}")
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise Unreachable(f"{url} does not answer ({type(error).__name__})") from None
        if len(body) > max_bytes:
            raise BadMessage(f"{url} answered with more than {max_bytes} bytes")
        return body

    async def connect(self, url: str, peer: str) -> WebSocketChannel:
        """A channel to the node at `url`. Raises Unreachable."""
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                socket = await self._client().ws_connect(
                    f"{url}/v1/sessions", max_msg_size=MAX_FRAME, compress=0, heartbeat=HEARTBEAT_S, autoping=True
                )
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise Unreachable(f"{peer} at {url} does not answer ({type(error).__name__})", hop=peer) from None
        return WebSocketChannel(socket, peer)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=0, force_close=False)
            self._session = aiohttp.ClientSession(connector=connector, auto_decompress=False, trust_env=False)
        return self._session


async def expect(channel: Channel, kind: Kind, timeout_s: float) -> Frame:
    """The next frame, which must be of this kind. An ERROR frame is raised as the error it stands for."""
    try:
        async with asyncio.timeout(timeout_s):
            frame = await channel.receive()
    except TimeoutError:
        raise Unreachable(f"no {kind.name} within {timeout_s:g} s") from None
    if frame.kind is Kind.ERROR:
        raise from_wire(frame.body)
    if frame.kind is not kind:
        raise BadFrame(f"expected {kind.name}, got {frame.kind.name}")
    return frame


def error_frame(code: str, message: str, fields: dict[str, Any]) -> Frame:
    """An ERROR frame; big integers, and what is no scalar, travel as text."""
    plain = {
        k: v if isinstance(v, str | float) or (isinstance(v, int) and abs(v) < 1 << 62) else str(v)
        for k, v in fields.items()
    }
    return Frame(Kind.ERROR, {"code": code, "message": message[:500], **plain})


def sealed_field(frame: Frame, key: str) -> bytes:
    """A sealed struct out of a frame's body. Raises BadFrame."""
    return bytes(take(frame.body, key, bytes))
