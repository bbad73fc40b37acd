"""The supply as it is found: who is registered on chain, answers, and how fast it says it is."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from tallystick_protocol.chain.reads import Chain, Serving
from tallystick_protocol.errors import BadMessage, Unreachable
from tallystick_protocol.transport.directory import Directory
from tallystick_protocol.types import Address, ModelId, Span

log = logging.getLogger(__name__)

MAX_CLAIM = 4.0
"""A claimed speed counts for at most this many times the median of layers x rows per second: nobody signs it, and a
node that claims much would keep others away from its layers."""

ASKED_AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class Server:
    """A node that serves. rows_per_s: what it says of itself; None when it says nothing of use."""

    node: Address
    span: Span
    rows_per_s: float | None


async def find_servers(chain: Chain, directory: Directory, model: ModelId, without: Address) -> list[Server]:
    """Every other node of a model that answers and takes sessions."""
    serving = await asyncio.to_thread(chain.serving, model)
    gate = asyncio.Semaphore(ASKED_AT_ONCE)
    found = await asyncio.gather(*(_ask(directory, entry, gate) for entry in serving if entry.record.node != without))
    return [server for server in found if server is not None]


def supply_of(servers: Sequence[Server], ours: Callable[[Span], float]) -> dict[Span, float]:
    """Rows per second by span. ours: what this machine would do of a span, for servers that say nothing."""
    said = [server.rows_per_s * len(server.span) for server in servers if server.rows_per_s is not None]
    most = MAX_CLAIM * median(said) if said else 0.0
    supply: dict[Span, float] = {}
    for server in servers:
        span, rate = server.span, server.rows_per_s
        supply[span] = supply.get(span, 0.0) + (ours(span) if rate is None else min(rate, most / len(span)))
    return supply


async def _ask(directory: Directory, entry: Serving, gate: asyncio.Semaphore) -> Server | None:
    try:
        async with gate:
            status = (await directory.info(entry.contact)).get("status")
    except (Unreachable, BadMessage) as error:
        log.debug("%s is not counted: %s", entry.record.node, error)
        return None
    if not isinstance(status, dict) or status.get("draining"):
        return None
    said = status.get("rows_per_s")
    known = isinstance(said, int | float) and not isinstance(said, bool) and math.isfinite(said) and said > 0
    return Server(entry.record.node, entry.span, float(said) if known and said is not None else None)
