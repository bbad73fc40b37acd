"""A channel of frames over a WebSocket that a peer dialled."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

from fastapi import WebSocket
from starlette.websockets import WebSocketDisconnect, WebSocketState

from tallystick_node.lobby import Guest
from tallystick_protocol.errors import BadFrame, Departed, InternalError, TallystickError, Unreachable
from tallystick_protocol.frames import Frame, Kind
from tallystick_protocol.peer import error_frame
from tallystick_protocol.types import ZERO32, Digest

log = logging.getLogger(__name__)

FIRST_FRAME_TIMEOUT_S = 10.0
SEND_TIMEOUT_S = 20.0
CLOSED_IN_ORDER = 1000


class ServerChannel:
    """A channel over a WebSocket that a peer dialled."""

    def __init__(self, socket: WebSocket) -> None:
        self._socket = socket
        state = socket.scope.get("state", {})
        self._spki: Digest = state.get("spki", ZERO32)
        self._guest: Guest | None = state.get("guest")

    @property
    def spki(self) -> Digest:
        return self._spki

    def serves(self, is_served: bool) -> None:
        """Whether what its first frame began is being served: until then, and afterwards, it may lose its place."""
        if self._guest is not None:
            self._guest.has_session = is_served

    async def send(self, frame: Frame) -> None:
        try:
            async with asyncio.timeout(SEND_TIMEOUT_S):
                await self._socket.send_bytes(frame.encode())
        except (RuntimeError, WebSocketDisconnect, ConnectionError, TimeoutError):
            raise Unreachable("the peer closed the connection, or reads nothing") from None

    async def receive(self) -> Frame:
        try:
            message = await self._socket.receive()
        except (RuntimeError, WebSocketDisconnect):
            raise Unreachable("the peer closed the connection") from None
        if message["type"] == "websocket.disconnect":
            if message.get("code") == CLOSED_IN_ORDER:
                raise Departed("the peer closed the connection")
            raise Unreachable("the connection to the peer is lost")
        data = message.get("bytes")
        if data is None:
            raise BadFrame("text where frames are spoken")
        return Frame.decode(data)

    async def close(self) -> None:
        if self._socket.application_state is WebSocketState.CONNECTED:
            try:
                await self._socket.close()
            except (RuntimeError, WebSocketDisconnect):
                log.debug("the peer was gone before we closed")


Handler = Callable[[ServerChannel, Frame], Awaitable[None]]


async def serve_channel(channel: ServerChannel, firsts: Mapping[Kind, Handler]) -> None:
    """One connection: its first frame says what it is. Errors are told before the connection is closed."""
    try:
        async with asyncio.timeout(FIRST_FRAME_TIMEOUT_S):
            first = await channel.receive()
        handler = firsts.get(first.kind)
        if handler is None:
            raise BadFrame(f"a connection begins with {' or '.join(kind.name for kind in firsts)}")
        channel.serves(True)
        try:
            await handler(channel, first)
        finally:
            channel.serves(False)
    except Unreachable:
        pass
    except TimeoutError:
        await _refuse(channel, BadFrame(f"no first frame within {FIRST_FRAME_TIMEOUT_S:g} s"))
    except TallystickError as error:
        await _refuse(channel, error)
    except Exception:
        log.exception("a session failed")
        await _refuse(channel, InternalError("the node failed; its operator's log has the reason"))
    finally:
        await channel.close()


async def _refuse(channel: ServerChannel, error: TallystickError) -> None:
    """Tell the peer what is wrong, if it still listens."""
    try:
        await channel.send(error_frame(error.code, error.message, error.fields))
    except Unreachable:
        log.debug("the peer did not wait for %s", error.code)
