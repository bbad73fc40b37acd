"""What nobody can recompute: under `audit` the answer stands and says so, under `full` it is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from harness.agreeing import corrupt
from harness.small_models import Models, fast
from harness.small_world import World, audit_at_end, audited, generate
from harness.third import recomputing
from tallystick.session.session import Session
from tallystick_protocol.errors import NoAuditor
from tallystick_protocol.evidence import bundle
from tallystick_protocol.types import WINDOW, Span

PROMPT = [7 + 3 * i % 90 for i in range(40)]
TOKENS = 24
HOP = 1


async def audited_at_end(
    world: World, beside: Callable[[World, Session], Awaitable[Any]], recompute: Any = None
) -> tuple[list[int], Session]:
    """An answer under `audit` whose coin falls on one hop. beside: what happens meanwhile."""
    session = await world.session("audit", 5.0)
    object.__setattr__(session.setting, "recompute", recompute)
    task = asyncio.ensure_future(beside(world, session))
    try:
        ids = await generate(session, PROMPT, TOKENS)
        ids = await audit_at_end(session, HOP, PROMPT, ids)
        await session.take_leave()
    finally:
        await session.close()
        await task
        await end(world)
    return ids, session


async def end(world: World) -> None:
    for node in world.nodes.values():
        await node.kill()
        node.till.close()
        node.journal.close()


async def nothing(*_: Any) -> None:
    """All goes well."""


def test_an_answer_that_nobody_can_audit_stands_and_says_so(models: Models, tmp_path: Path) -> None:
    async def run() -> None:
        world = models.world(tmp_path, 1)
        ids, session = await audited_at_end(world, nothing)
        verdict = session.verdict
        assert len(ids) == TOKENS and verdict.unaudited == [(session.route[HOP].node, Span(1, 2))]
        assert not (verdict.checks or verdict.attributions or verdict.replaced)
        assert all(hop.rows_paid == hop.rows_due == len(session.ids) for hop in session.hops)
        assert verdict.to_json()["unaudited"] == [{"node": session.route[HOP].node, "layers": [1, 2]}]

    fast(run)


def test_a_session_too_long_for_a_case_says_what_is_beyond(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is audited all the same."""
    monkeypatch.setattr(bundle, "MAX_POSITIONS", WINDOW)

    async def run() -> None:
        world = models.world(tmp_path)
        _, session = await audited_at_end(world, nothing)
        assert session.verdict.not_slashable == len(session.ids) - WINDOW == session.verdict.to_json()["not_slashable"]
        assert sum(len(check.positions) for check in session.verdict.checks if check.passed) == len(session.ids)

    fast(run)


def test_who_asks_for_all_of_it_is_refused(models: Models, tmp_path: Path) -> None:
    async def run() -> None:
        world = models.world(tmp_path, 1)
        session = await world.prepare("full", 5.0)
        with pytest.raises(NoAuditor):
            await session.open(audited(session))
        await session.close()
        await end(world)

    fast(run)


def test_the_only_auditor_may_be_lost(models: Models, tmp_path: Path) -> None:
    async def kill(world: World, session: Session) -> None:
        while not session.audits:
            await asyncio.sleep(0.001)
        await world.nodes[session.audits[0].remote.node].kill()

    async def run() -> None:
        world = models.world(tmp_path)
        ids, session = await audited_at_end(world, kill)
        assert len(ids) == TOKENS and session.verdict.unaudited == [(session.route[HOP].node, Span(1, 2))]
        assert [one.cause for one in session.verdict.attributions] == ["overload"]

    fast(run)


def test_a_hop_is_paid_nothing_while_its_auditor_is_changed(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an auditor has not approved waits for the next one, however long the old one takes to go."""

    async def run() -> None:
        world = models.world(tmp_path, 3)
        session = await world.session("full", 5.0)
        audit = next(audit for audit in session.audits if audit.index == HOP)
        hop, close, paid = session.hops[HOP], audit.remote.close, []

        async def slowly() -> None:
            for _ in range(10):
                session.wake()
                await asyncio.sleep(0.005)
                paid.append(hop.rows_paid)
            await close()

        monkeypatch.setattr(audit, "compare", lambda _: [])
        monkeypatch.setattr(audit.remote, "close", slowly)
        answer = asyncio.ensure_future(generate(session, PROMPT, TOKENS))
        while hop.standing.covered < WINDOW:
            await asyncio.sleep(0.001)
        await session.repair.change_auditor(audit)
        assert len(await answer) == TOKENS
        await session.close()
        await end(world)
        assert set(paid) == {0} and hop.rows_paid == hop.rows_due == len(session.ids)

    fast(run)


def test_whom_nobody_can_recompute_after_a_liar_was_found(models: Models, tmp_path: Path) -> None:
    """Its auditor takes the liar's place, and nobody is left to audit that one."""

    async def run() -> None:
        world = models.world(tmp_path)
        liar, other = (node for node in world.nodes.values() if node.engine.model.span == Span(1, 2))
        corrupt(liar, 45)
        ids, session = await audited_at_end(world, nothing, recomputing(world, []))
        assert [one.node for one in session.verdict.accusations] == [liar.address]
        assert session.verdict.unaudited == [(other.address, Span(1, 2))] and len(ids) == TOKENS

    fast(run)


def test_a_disagreement_that_nobody_can_settle_is_no_answer(models: Models, tmp_path: Path) -> None:
    async def run() -> None:
        world = models.world(tmp_path)
        liar = next(node for node in world.nodes.values() if node.engine.model.span == Span(1, 2))
        corrupt(liar, 45)
        with pytest.raises(Exception, match="layers"):
            await audited_at_end(world, nothing)

    fast(run)
