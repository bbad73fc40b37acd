"""What makes a running node leave its span: a better place, a changed class, a rank that died."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable

from tallystick_model.parallel import ParallelSpan
from tallystick_node.loading import Loading
from tallystick_node.scheduling.engine import Engine
from tallystick_node.session.registry import Sessions
from tallystick_protocol.errors import ChainError, ConfigError, ContentError, CorruptResult, InternalError
from tallystick_protocol.types import Digest, Span

log = logging.getLogger(__name__)

DRAIN_TIMEOUT_S = 600.0
"""How long sessions may go on once the node has decided to leave; after that they end as unreachable."""

IDLE_WAIT_S = 600.0
_POLL_S = 0.25


class Relocation(Exception):
    """Ends serving: the node is to load `span` (another one, or the same anew) and offer that."""

    def __init__(self, span: Span) -> None:
        super().__init__(f"to {span}")
        self.span = span


def relocation_in(group: BaseExceptionGroup[BaseException]) -> Span | None:
    """Where to go when all that ended serving is a relocation; None when anything else went wrong, too."""
    ours, rest = group.split(Relocation)
    if ours is None or rest is not None:
        return None
    first = ours.exceptions[0]
    return first.span if isinstance(first, Relocation) else None


async def look_around(loading: Loading, sessions: Sessions, span: Span, every_s: float, *, moves: bool) -> None:
    """Look for a better span now and then; drain and leave for it. moves: whether this node may register elsewhere.

    Nodes look at times of their own, and look again after another random while before they go, so that those that saw
    the same gap do not all fill it.
    """
    since = time.monotonic()
    while True:
        await asyncio.sleep(every_s * random.uniform(0.5, 1.5))
        there = await _better(loading, span, since)
        if there is None or there == span:
            continue
        if not moves:
            log.info("layers %s would be a better place; only a node started with --join can move", there)
            continue
        await asyncio.sleep(every_s * random.uniform(0.0, 0.1))
        there = await _better(loading, span, since)
        if there is not None and there != span:
            log.info("moving from layers %s to %s", span, there)
            await drain(sessions, DRAIN_TIMEOUT_S)
            raise Relocation(there)


async def watch_class(
    engine: Engine,
    sessions: Sessions,
    check: Callable[[], Digest],
    offered: Digest,
    span: Span,
    every_s: float,
    age_s: float = 0.0,
) -> None:
    """Reproduce the canary and measure the class again now and then, when the node is idle, or after waiting for that.

    A node that gets other bits than it offered ends its sessions and offers anew what it is.
    age_s: how long ago the class that it offers was measured; the first check comes that much earlier.
    """
    due_s = max(0.0, every_s - age_s)
    while True:
        await asyncio.sleep(due_s)
        due_s = every_s
        await _wait_until(lambda: not len(sessions), IDLE_WAIT_S)
        try:
            found = await engine.run(check)
        except (CorruptResult, ConfigError) as error:
            log.error("the hourly check failed: %s", error)
            sessions.draining = True
            raise
        if found != offered:
            log.warning("the numeric class changed to %s: sessions end, and the span is loaded anew", found.hex()[:16])
            sessions.draining = True
            raise Relocation(span)
        log.debug("canary and class are as they were")


async def watch_ranks(model: ParallelSpan) -> None:
    """Raises InternalError when a rank of this node has ended: no step of it would."""
    while True:
        await asyncio.sleep(_POLL_S)
        if not model.alive:
            raise InternalError("a tensor-parallel rank of this node has ended; its log has the reason")


async def drain(sessions: Sessions, timeout_s: float) -> None:
    """Take no more sessions and wait until the clients of those that are open have moved on, or the time is up."""
    await sessions.drain(timeout_s)
    if len(sessions):
        log.warning("%d sessions end as unreachable: they did not end within %g s", len(sessions), timeout_s)


async def _better(loading: Loading, span: Span, since: float) -> Span | None:
    try:
        plan = await loading.plan(at=span, dwelt_s=time.monotonic() - since)
    except (ChainError, ContentError) as error:
        log.warning("the network could not be surveyed: %s", error)
        return None
    log.info("layers %s: %s", span, plan.why)
    return plan.choice


async def _wait_until(done: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() >= deadline:
            return False
        await asyncio.sleep(_POLL_S)
    return True
