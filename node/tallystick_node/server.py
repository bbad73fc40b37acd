"""The node's HTTP and WebSocket face. Default deny: what is not listed here does not exist."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request, Response, WebSocket
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, generate_latest

from tallystick_node.channel import ServerChannel, serve_channel
from tallystick_node.reach.desk import ReachDesk, add_reach_routes
from tallystick_node.session.registry import Sessions
from tallystick_protocol.content.serving import BlockRequest, Reply
from tallystick_protocol.errors import TallystickError
from tallystick_protocol.frames import Kind

AnswerBlock = Callable[[BlockRequest], Reply]


def create_app(
    sessions: Sessions,
    info: Callable[[], dict[str, Any]],
    ready: Callable[[], bool],
    answer_block: AnswerBlock,
    desk: ReachDesk,
) -> FastAPI:
    """The app. info(): the body of /v1/info. answer_block: answers /ipfs/{cid} for the pieces that this node holds.

    desk: answers /v1/reach.
    """
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

    add_reach_routes(app, desk)

    @app.websocket("/v1/sessions")
    async def session(socket: WebSocket) -> None:
        await socket.accept()
        firsts = {
            Kind.OPEN: sessions.serve_client,
            Kind.PUSH_OPEN: sessions.serve_push,
            Kind.RESUME: sessions.resume,
        }
        await serve_channel(ServerChannel(socket), firsts)

    return app


def _num_tasks() -> int:
    try:
        return len(asyncio.all_tasks())
    except RuntimeError:  # asked without an event loop
        return 0


def _metrics(sessions: Sessions) -> CollectorRegistry:
    """vLLM's names where they exist. No label takes a value that a peer chose."""
    registry = CollectorRegistry()
    gauges: dict[str, tuple[str, Callable[[], float]]] = {
        "num_requests_running": ("sessions open", lambda: len(sessions)),
        "num_requests_waiting": ("steps not computed yet", lambda: sessions.load.waiting_jobs),
        "kv_cache_usage_perc": ("share of the budget that is taken, kept rows too", lambda: sessions.cache_usage),
        "kv_cache_reserved_bytes": ("cache bytes reserved", lambda: sessions.reserved_bytes),
        "sessions_opened_total": ("sessions opened", lambda: sessions.counters.opened),
        "sessions_refused_total": ("sessions refused for lack of room", lambda: sessions.counters.refused),
        "iterations_total": ("forwards", lambda: sessions.meter.forwards),
        "iteration_tokens_total": ("rows computed in forwards", lambda: sessions.meter.rows),
        "iteration_seconds_total": ("time spent in forwards", lambda: sessions.meter.busy_s),
        "prefix_cache_hits_total": ("rows taken over, in sessions that have ended", lambda: sessions.counters.reused),
        "asyncio_tasks": ("tasks of the event loop", _num_tasks),
        "rows_total": ("rows computed in sessions that have ended", lambda: sessions.counters.rows),
    }
    for name, (text, value) in gauges.items():
        Gauge(f"tallystick_{name}", text, registry=registry).set_function(value)
    return registry
