"""The typed stub of a node's API: what clients and other nodes call, over HTTP and WebSocket.

Only bytes that were bounded come back: bodies are read raw up to a cap, compression and redirects are refused. A node
is dialled by its `Contact`, under TLS with its keys pinned, or by a URL over a plain socket, on loopback only.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import aiohttp

from tallystick_protocol import canonical_json
from tallystick_protocol.errors import BadFrame, BadMessage, Departed, Unreachable, from_wire
from tallystick_protocol.frames import MAX_FRAME, Frame, Kind, take
from tallystick_protocol.transport.contact import Addr, Contact
from tallystick_protocol.transport.pins import any_key_context, pinned_context, shown_key
from tallystick_protocol.transport.scopes import MayDial, anywhere, is_loopback, resolve
from tallystick_protocol.types import ZERO32, Digest

T = TypeVar("T")
INFO_BYTES = 64 * 1024
CONNECT_TIMEOUT_S = 5.0
HEARTBEAT_S = 10.0
CLOSE_TIMEOUT_S = 1.0
"""How long a peer has to answer that it closes, too."""



class Channel(Protocol):
    """An ordered stream of frames to one peer."""

    @property
    def spki(self) -> Digest:
        """The server's TLS key in use on this connection, as SHA-256 of its SubjectPublicKeyInfo; zero on loopback."""

    async def send(self, frame: Frame) -> None:
        """Raises Unreachable when the connection is gone."""

    async def receive(self) -> Frame:
        """The next frame. Raises Unreachable when the connection is gone, BadFrame when it is malformed."""

    async def close(self) -> None: ...


class WebSocketChannel:
    """A channel over a WebSocket that this side dialled."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, peer: str, spki: Digest = ZERO32) -> None:
        self._socket = socket
        self.peer = peer
        self._spki = spki

    @property
    def spki(self) -> Digest:
        return self._spki

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
        if message.type is aiohttp.WSMsgType.CLOSE:
            raise Departed(f"{self.peer} closed the connection", hop=self.peer)
        raise Unreachable(f"{self.peer} closed the connection", hop=self.peer)

    async def close(self) -> None:
        await self._socket.close()


class Peers:
    """Connections to nodes. One per process; close it."""

    def __init__(self, may_dial: MayDial = anywhere) -> None:
        """may_dial(numeric address): the policy (`transport.scopes`)."""
        self._session: aiohttp.ClientSession | None = None
        self._may_dial = may_dial
        self.on_unreachable: Callable[[Contact], None] = lambda _: None

    async def info(self, to: str | Contact, timeout_s: float = 2.0) -> dict[str, Any]:
        """`GET /v1/info`. Raises Unreachable, BadMessage."""
        url = to if isinstance(to, str) else to.url
        try:
            value = canonical_json.parse(await self.ask(to, "/v1/info", INFO_BYTES, timeout_s))
        except ValueError:
            raise BadMessage(f"{url} answered /v1/info with something else than JSON") from None
        if not isinstance(value, dict):
            raise BadMessage(f"{url} answered /v1/info with something else than an object")
        return value

    async def get(self, url: str, max_bytes: int, timeout_s: float) -> bytes:
        """The raw body of a 200 at a loopback URL, at most `max_bytes`. Raises Unreachable, BadMessage."""
        parts = urlsplit(url)
        path = url[len(f"{parts.scheme}://{parts.netloc}") :]
        return await self.ask(url[: len(url) - len(path)], path, max_bytes, timeout_s)

    async def ask(
        self, to: str | Contact, path: str, max_bytes: int, timeout_s: float, body: bytes = b"", any_key: bool = False
    ) -> bytes:
        """The raw body of a 200 to GET, or to POST where there is a `body`. Raises Unreachable, BadMessage.

        any_key: whoever answers may show any TLS key; for what proves itself by its signature.
        """

        async def request(url: str, tls: dict[str, Any]) -> bytes:
            method, headers = "POST" if body else "GET", {"Accept-Encoding": "identity"}
            asked = self._client().request(
                method, url + path, data=body or None, allow_redirects=False, headers=headers, **tls
            )
            async with asked as response:
                data = await response.content.read(max_bytes + 1)
                while len(data) <= max_bytes and not response.content.at_eof():
                    data += await response.content.read(max_bytes + 1 - len(data))
                if response.status != 200 or response.headers.get("Content-Encoding"):
                    raise BadMessage(f"{url} answered with status {response.status}")
            if len(data) > max_bytes:
                raise BadMessage(f"{url} answered with more than {max_bytes} bytes")
            return data

        return await self._try(to, "" if isinstance(to, str) else to.node, request, timeout_s, any_key)

    async def connect(self, to: str | Contact, peer: str, path: str = "/v1/sessions") -> WebSocketChannel:
        """A channel to a node. Raises Unreachable."""

        async def dial(url: str, tls: dict[str, Any]) -> WebSocketChannel:
            waits = aiohttp.ClientWSTimeout(ws_close=CLOSE_TIMEOUT_S)
            socket = await self._client().ws_connect(
                url + path, max_msg_size=MAX_FRAME, compress=0, heartbeat=HEARTBEAT_S, timeout=waits, **tls
            )
            return WebSocketChannel(socket, peer, shown_key(socket.get_extra_info("ssl_object")))

        return await self._try(to, peer, dial, CONNECT_TIMEOUT_S)

    async def handshake(self, contact: Contact, timeout_s: float = CONNECT_TIMEOUT_S) -> None:
        """A TLS handshake with the node's keys pinned, and nothing else. Raises Unreachable."""

        async def shake(url: str, tls: dict[str, Any]) -> None:
            parts = urlsplit(url)
            _, writer = await asyncio.open_connection(parts.hostname, parts.port, **tls)
            writer.transport.abort()

        await self._try(contact, contact.node, shake, timeout_s)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _try(
        self,
        to: str | Contact,
        peer: str,
        use: Callable[[str, dict[str, Any]], Awaitable[T]],
        timeout_s: float,
        any_key: bool = False,
    ) -> T:
        """What `use` makes of the first place that answers; `timeout_s` for each. Raises Unreachable."""
        fields: dict[str, Any] = {"hop": peer} if peer else {}
        why = f"{peer or 'the peer'} has no address that may be dialled"
        async for url, tls in self._places(to, any_key):
            try:
                async with asyncio.timeout(timeout_s):
                    return await use(url, tls)
            except (aiohttp.ClientConnectorCertificateError, ssl.SSLCertVerificationError):
                why = f"{peer} at {url} shows another TLS key than its Reach names"
                fields["wrong_key"] = 1
            except (TimeoutError, aiohttp.ClientError, OSError) as error:
                why = f"{peer or 'the peer'} at {url} does not answer ({type(error).__name__})"
        if isinstance(to, Contact):
            self.on_unreachable(to)
        raise Unreachable(why, **fields) from None

    async def _places(self, to: str | Contact, any_key: bool) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        """(URL with a numeric address, TLS arguments) for each place where a node may be dialled."""
        if isinstance(to, str):
            if is_loopback(urlsplit(to).hostname or ""):
                yield to, {}
            return
        if not to.pins and not any_key:
            for addr in to.addrs:
                if addr.kind == "tcp" and is_loopback(addr.host):
                    yield f"http://{addr.authority}", {}
            return
        context = any_key_context() if any_key else pinned_context(frozenset(to.pins))
        for addr in to.addrs:
            try:
                async with asyncio.timeout(CONNECT_TIMEOUT_S):
                    numeric = await resolve(addr.host, addr.port)
            except (TimeoutError, OSError):
                continue
            for ip in filter(self._may_dial, numeric):
                tls = {"ssl": context, "server_hostname": addr.sni or to.label}
                yield f"https://{Addr('tcp', ip, addr.port).authority}", tls

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
