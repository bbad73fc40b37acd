"""The node's HTTP and WebSocket face. Default deny: what is not listed here does not exist."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request, Response, WebSocket
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, generate_latest
from starlette.websockets import WebSocketDisconnect, WebSocketState

from tallystick_node.session.registry import Sessions
from tallystick_protocol.content.serving import BlockRequest, Reply
from tallystick_protocol.errors import BadFrame, InternalError, TallystickError, Unreachable
from tallystick_protocol.frames import Frame, Kind
from tallystick_protocol.peer import error_frame

log = logging.getLogger(__name__)

FIRST_FRAME_TIMEOUT_S = 10.0
SEND_TIMEOUT_S = 20.0
AnswerBlock = Callable[[BlockRequest], Reply]


class ServerChannel:
    """A channel over a WebSocket that a peer dialled."""

    def __init__(self, socket: WebSocket) -> None:
        self._socket = socket

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
            raise Unreachable("the peer closed the connection")
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


def create_app(
    sessions: Sessions, info: Callable[[], dict[str, Any]], ready: Callable[[], bool], answer_block: AnswerBlock
) -> FastAPI:
    """The app. info(): the body of /v1/info. answer_block: answers /ipfs/{cid} for the pieces that this node holds."""
    app = FastAPI(title="tallystick-node", docs_url=None, redoc_url=None, openapi_url=None)
    metrics = _metrics(sessions)

    @app.exception_handler(TallystickError)
    async def known(_: Request, error: TallystickError) -> JSONResponse:
        return JSONResponse({"error": error.to_wire()}, status_code=error.status)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready")
    async def readiness() -> JSONResponse:
        serving = ready() and not sessions.draining
        return JSONResponse({"ready": serving}, status_code=200 if serving else 503)

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(generate_latest(metrics), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/info")
    async def about() -> dict[str, Any]:
        return info()

    @app.api_route("/ipfs/{cid}", methods=["GET", "HEAD"])
    async def block(cid: str, request: Request) -> Response:
        asked = BlockRequest(cid, dict(request.query_params), dict(request.headers), request.method)
        reply = await asyncio.to_thread(answer_block, asked)
        return StreamingResponse(reply.body, status_code=reply.status, headers=reply.headers)

    @app.websocket("/v1/sessions")
    async def session(socket: WebSocket) -> None:
        await socket.accept()
        await _serve(sessions, ServerChannel(socket))

    return app


async def _serve(sessions: Sessions, channel: ServerChannel) -> None:
    """One connection: its first frame says what it is. Errors are told before the connection is closed."""
    try:
        async with asyncio.timeout(FIRST_FRAME_TIMEOUT_S):
            first = await channel.receive()
        if first.kind is Kind.OPEN:
            await sessions.serve_client(channel, first)
        elif first.kind is Kind.PUSH_OPEN:
            await sessions.serve_push(channel, first)
        else:
            raise BadFrame("a connection begins with OPEN or PUSH_OPEN")
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
    try:
        await channel.send(error_frame(error.code, error.message, error.fields))
    except Unreachable:
        log.debug("the peer did not wait for %s", error.code)


def _metrics(sessions: Sessions) -> CollectorRegistry:
    """vLLM's names where they exist. No label takes a value that a peer chose."""
    registry = CollectorRegistry()
    gauges: dict[str, tuple[str, Callable[[], float]]] = {
        "num_requests_running": ("sessions open", lambda: len(sessions)),
        "kv_cache_reserved_bytes": ("cache bytes reserved", lambda: sessions.reserved_bytes),
        "sessions_opened_total": ("sessions opened", lambda: sessions.counters.opened),
        "sessions_refused_total": ("sessions refused for lack of room", lambda: sessions.counters.refused),
        "rows_total": ("rows computed in sessions that have ended", lambda: sessions.counters.rows),
    }
    for name, (text, value) in gauges.items():
        Gauge(f"tallystick_{name}", text, registry=registry).set_function(value)
    return registry
