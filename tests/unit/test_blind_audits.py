"""An auditor is never shown what it should find out: whoever signs without computing has nothing to copy."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness import one_loop, samples
from harness.small_models import Models, fast
from harness.small_world import Node, World, generate
from tallystick.routing.choice import strangers_first
from tallystick.session.session import Session
from tallystick_node.session import registry
from tallystick_node.session.hop import Hop
from tallystick_protocol.receipts import Receipt
from tallystick_protocol.signing import digest
from tallystick_protocol.types import Address

PROMPT = [5 + 7 * i % 90 for i in range(60)]
TOKENS = 12
DRAWS = 24
"""Of two: all but once in 16 million one of them is never first."""


@pytest.mark.parametrize("sketches", ["auto", "on"])
def test_nothing_that_a_hop_answered_reaches_its_auditor(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sketches: Any
) -> None:
    """Rows, roots, receipts and sketches of a hop, looked for in every byte that its auditor gets."""
    told: dict[int, list[bytes]] = {}  # by the end that got it
    hops: list[Hop] = []
    post, made = one_loop.End._post, Hop.__init__

    def note(end: one_loop.End, what: Any) -> None:
        if isinstance(what, bytes):
            told.setdefault(id(end), []).append(what)
        post(end, what)

    def keep(hop: Hop, *given: Any) -> None:
        made(hop, *given)
        hops.append(hop)

    monkeypatch.setattr(one_loop.End, "_post", note)
    monkeypatch.setattr(registry.Hop, "__init__", keep)

    async def work() -> None:
        world = models.world(tmp_path, 3)
        world.sketches = sketches
        async with living(world):
            session = await world.session("full")
            await generate(session, PROMPT, TOKENS)
            assert session.sketching.is_on is (sketches == "on")
            assert session.verdict.checked and not session.verdict.accusations
            for audit in session.audits:
                node = world.nodes[audit.remote.node]
                heard = b"".join(frame for end in node.ends for frame in told.get(id(end), ()))
                claimed = session.hops[audit.index]
                record = next(hop.record for hop in hops if hop.shop.node == claimed.node)
                receipts = claimed.standing.receipts
                assert receipts[0].input in heard or not audit.index  # what the hop before has signed is found there
                found = secrets_of(session, record, receipts)
                assert not [one for one in found if one in heard]
                everything = b"".join(frame for frames in told.values() for frame in frames)
                assert all(one in everything for one in found[:3])  # others did hear it
            await session.close()

    fast(work)


def secrets_of(session: Session, record: Any, receipts: list[Receipt]) -> list[bytes]:
    """What a hop answered."""
    found = [row for receipt in receipts for row in record.outputs(receipt.positions)[0] if row]
    for receipt in receipts:
        found += [receipt.output, digest(session.setting.domain, receipt)]
        found += [receipt.sketches] if any(receipt.sketches) else []
    return found


@asynccontextmanager
async def living(world: World) -> AsyncIterator[None]:
    try:
        yield
    finally:
        for node in world.nodes.values():
            await node.kill()


def named(world: World, index: int, copy: int) -> Node:
    """A node of the span of hop `index`; copy 0 is on the route."""
    return world.nodes[samples.address(f"{world.spans[index]}#{copy}")]


def test_who_was_shown_the_answer_is_asked_last_within_its_class() -> None:
    def one(name: str, operator: str = "", of: str = "a") -> Any:
        return samples.candidate(name, 0, 2, operator=operator, numeric_class=samples.digest(of))

    hop, shown = one("hop"), {samples.address("next")}
    drawn = [one("next"), one("foreign", of="b"), one("hers", "next"), one("free"), one("other")]
    drawn[2] = replace(drawn[2], operator=samples.address("x"), payee=samples.address("next"))
    assert [c.node for c in strangers_first(drawn, hop, shown)] == [
        samples.address(name) for name in ("free", "other", "next", "hers", "foreign")
    ]


def test_the_next_hops_operator_audits_only_where_nobody_else_can(models: Models, tmp_path: Path) -> None:
    world = models.world(tmp_path, 3)
    following, acquainted, stranger = (named(world, *place) for place in ((2, 0), (1, 1), (1, 2)))
    acquainted.candidate = replace(acquainted.candidate, operator=following.address)

    async def work() -> list[Address]:
        session = await world.prepare("full", 60.0)
        first = [session.openings.draw_auditors(1)[0].node for _ in range(DRAWS)]
        session.lost.add(stranger.address)
        return [*first, session.openings.draw_auditors(1)[0].node]

    drawn = fast(work)
    assert set(drawn[:-1]) == {stranger.address}
    assert drawn[-1] == acquainted.address


@pytest.mark.parametrize(("audited", "other"), [(1, 2), (2, 1)])
def test_neighbouring_hops_are_audited_by_two_operators(
    models: Models, tmp_path: Path, audited: int, other: int
) -> None:
    """Who checks the later hop is shown what the earlier one answered, whichever was drawn first."""

    async def work() -> set[Address]:
        world = models.world(tmp_path, 3)
        async with living(world):
            for index in (audited, other):
                node = named(world, index, 1)
                node.candidate = replace(node.candidate, operator=samples.address("operator"))
            session = await world.prepare("full", 60.0)
            session.lost.add(named(world, audited, 2).address)
            await session.open([audited])
            assert session.audits[0].remote.candidate.operator == samples.address("operator")
            drawn = {session.openings.draw_auditors(other)[0].operator for _ in range(DRAWS)}
            await session.close()
            return drawn

    assert samples.address("operator") not in fast(work)
