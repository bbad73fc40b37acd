"""Rows that were taken back before an audit could look at them: unpaid, unless the session could not go on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from harness.small_models import Models, fast
from harness.small_world import CREDIT_ROWS
from tallystick.session.repair import RolledBack
from tallystick.session.session import Session
from tallystick_protocol.types import WINDOW

IDS = [7 + 3 * i % 90 for i in range(CREDIT_ROWS + WINDOW - 1)]


@asynccontextmanager
async def rolled_back(models: Models, folder: Path) -> AsyncIterator[Session]:
    """A session under `full`, all of whose rows were taken back before its auditors had come to anything."""
    world = models.world(folder)
    session = await world.session("full")
    auditors = [world.nodes[audit.remote.node] for audit in session.audits]
    for node in auditors:
        node.device.row_s = 0.1
    try:
        await session.feed(IDS)
        await session.result(len(IDS) - 1)
        with pytest.raises(RolledBack):
            await session.repair.roll_back(0)
        for node in auditors:
            node.device.row_s = 0.0
        yield session
    finally:
        await session.close()
        for node in world.nodes.values():
            await node.stop()


def test_hops_whose_credit_they_use_up_go_on(models: Models, tmp_path: Path) -> None:
    async def run() -> None:
        async with rolled_back(models, tmp_path) as session:
            assert all(hop.rows_due == len(IDS) and hop.rows_paid == 0 for hop in session.hops)
            began = asyncio.get_running_loop().time()
            await session.feed(IDS)
            await session.result(len(IDS) - 1)
            assert asyncio.get_running_loop().time() - began < 10.0, "somebody waited for money that did not come"
            await session.finish()
            assert not session.verdict.replaced and not session.verdict.attributions
            assert all(hop.rows_paid == hop.rows_due == 2 * len(IDS) for hop in session.hops)

    fast(run)


def test_they_are_paid_with_the_next_window_that_passes_where_credit_suffices(models: Models, tmp_path: Path) -> None:
    async def run() -> None:
        async with rolled_back(models, tmp_path) as session:
            await session.feed(IDS[:1])
            await session.result(0)
            assert not any(hop.rows_paid for hop in session.hops)
            await session.finish()
            assert all(hop.rows_paid == hop.rows_due == len(IDS) + 1 for hop in session.hops)

    fast(run)
