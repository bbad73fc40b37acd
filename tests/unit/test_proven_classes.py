"""A numeric class counts for a client once two operators of it agreed bit for bit; until then bits accuse nobody."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness import samples
from harness.agreeing import agreement
from harness.small_models import Models, fast
from harness.small_world import Node, World, audit_at_end, audited, generate
from tallystick.routing.proven import FORGOTTEN_AFTER_S, MAX_CLASSES, Proven
from tallystick.session.coins import draw
from tallystick.session.proving import note_unproven, unproven
from tallystick.session.session import Session
from tallystick.verdict import Policy, Verdict
from tallystick_protocol.errors import TallystickError
from tallystick_protocol.types import Address, Digest

PROMPT = [7 + 3 * i % 90 for i in range(40)]
TOKENS = 24
CLASS = samples.digest("class")
A, B, C = (samples.address(name) for name in "ABC")


def copies(world: World, copy: int) -> list[Node]:
    """The nodes of every span with this number, in the order of layers."""
    return [node for node in world.nodes.values() if node.name.endswith(f"#{copy}")]


def owned(node: Node, operator: Address, payee: Address | None = None) -> None:
    node.candidate = replace(node.candidate, operator=operator, payee=payee or operator)


def play(
    models: Models, folder: Path, work: Callable[[World, Session], Awaitable[Any]], policy: Policy = "audit",
    prepare: Callable[[World], None] = lambda _: None, count: int = 2,
) -> tuple[World, Session, Any]:  # fmt: skip
    """A session, what was done in it, and no more than an answer's failure."""

    async def run() -> tuple[World, Session, Any]:
        world = models.world(folder, count)
        prepare(world)
        session, result = await world.prepare(policy, 5.0), None
        try:
            with suppress(TallystickError):
                await session.open(audited(session))
                result = await work(world, session)
            return world, session, result
        finally:
            await session.close()
            for node in world.nodes.values():
                await node.kill()

    return fast(run)


async def answer(world: World, session: Session) -> list[int]:
    return await generate(session, PROMPT, TOKENS)


def audit_of(index: int) -> Callable[[World, Session], Awaitable[list[int]]]:
    async def work(world: World, session: Session) -> list[int]:
        return await audit_at_end(session, index, PROMPT, await generate(session, PROMPT, TOKENS))

    return work


# -- what is remembered


def test_one_operator_with_two_addresses_is_one_voice() -> None:
    proven = Proven()
    proven.note(CLASS, {A}, {A})
    proven.note(CLASS, {A, C}, {B, C})  # two operators, one payee
    proven.note(bytes(32), {A}, {B})
    proven.note(CLASS, {A}, set())
    assert not proven.counts(CLASS) and not proven.counts(bytes(32)) and len(proven) == 0
    proven.note(CLASS, {A}, {B})
    assert proven.counts(CLASS) and not proven.counts(samples.digest("other")) and not proven.counts(bytes(32))


def test_it_is_kept_merged_and_forgotten(tmp_path: Path) -> None:
    now, path, other = [1_000.0], tmp_path / "classes.json", samples.digest("other")
    first, second = Proven(path, lambda: now[0]), Proven(path, lambda: now[0])
    first.note(CLASS, {A}, {B})
    second.note(other, {B}, {C})
    first.save()
    second.save()
    third = Proven(path, lambda: now[0])
    assert third.counts(CLASS) and third.counts(other)
    now[0] += FORGOTTEN_AFTER_S - 1
    third.note(other, {A}, {B})
    now[0] += 2
    assert not third.counts(CLASS) and third.counts(other), "the last agreement counts"
    third.save()
    assert len(Proven(path, lambda: now[0])) == 1


def test_strangers_classes_do_not_fill_the_memory() -> None:
    now = [0.0]
    proven = Proven(clock=lambda: now[0])
    for number in range(MAX_CLASSES + 10):
        now[0] += 1
        proven.note(Digest((1 + number).to_bytes(32, "big")), {A}, {B})
    assert len(proven) <= MAX_CLASSES and proven.counts((MAX_CLASSES + 10).to_bytes(32, "big"))


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", '{"version": 1}', '{"version": 1, "classes": {"00": 1}}',
        f'{{"version": 1, "classes": {{"{CLASS.hex()}": {{"owners": ["{A}", "{A}"], "at": 1}}}}}}',
        f'{{"version": 1, "classes": {{"{CLASS.hex()}": {{"owners": ["{A}", "{B}"], "at": Infinity}}}}}}',
    ],
)  # fmt: skip
def test_what_is_not_ours_is_started_anew(tmp_path: Path, text: str) -> None:
    path = tmp_path / "classes.json"
    path.write_text(text)
    assert len(Proven(path)) == 0


# -- what proves a class


def test_an_audit_proves_a_class_and_the_verdict_says_what_is_not_proven(models: Models, tmp_path: Path) -> None:
    def other_class_at_the_end(world: World) -> None:
        for copy in (0, 1):
            copies(world, copy)[2].become("another class")

    world, session, _ = play(models, tmp_path, audit_of(1), prepare=other_class_at_the_end)
    assert world.proven.counts(CLASS) and not world.proven.counts(samples.digest("another class"))
    note_unproven(session.verdict, session.route, world.proven)
    assert session.verdict.unproven == [(session.route[2].node, session.route[2].span)]
    told = session.verdict.to_json()["unproven"]
    assert told == [{"node": session.route[2].node, "layers": [2, 3]}]


def test_rows_that_nobody_asked_for_prove_nothing(models: Models, tmp_path: Path) -> None:
    """The last hop's root over a prompt's first window is the same whatever it computed."""

    async def work(world: World, session: Session) -> list[bool]:
        await session.feed(PROMPT[:32], [False] * 32)
        await session.finish()
        await session.audit_at_end(2)
        found = [world.proven.counts(CLASS)]
        await session.audit_at_end(1)
        return [*found, world.proven.counts(CLASS)]

    _, session, found = play(models, tmp_path, work)
    assert session.verdict.passed == 2 and found == [False, True]


@pytest.mark.parametrize("owners", [("one", "one"), ("one", "two")])
def test_a_stand_in_of_another_operator_that_signs_the_same_proves_a_class(
    models: Models, tmp_path: Path, owners: tuple[str, str]
) -> None:
    """Every span is owned alike, for a busy machine may have other hops replaced, too."""

    def own(world: World) -> None:
        for copy, owner in enumerate(owners):
            for index, node in enumerate(copies(world, copy)):
                owned(node, samples.address(f"{owner} of span {index}"))

    async def work(world: World, session: Session) -> list[int]:
        killed: list[Any] = []

        def on_token(count: int) -> None:
            if count >= 8 and not killed:
                killed.append(asyncio.ensure_future(copies(world, 0)[1].kill()))

        return await generate(session, PROMPT, TOKENS, on_token=on_token)

    world, session, ids = play(models, tmp_path, work, "off", own)
    lost = {node for node, _, _ in session.verdict.replaced}
    assert len(ids) == TOKENS and copies(world, 0)[1].address in lost
    assert world.proven.counts(CLASS) == (owners == ("one", "two"))


def test_routes_that_agree_prove_a_class(models: Models, tmp_path: Path) -> None:
    async def run() -> World:
        world = models.world(tmp_path, 2)
        agreed = await agreement(world, "agree=2")
        try:
            await generate(agreed, PROMPT, TOKENS)  # type: ignore[arg-type]
        finally:
            await agreed.close()
            for node in world.nodes.values():
                await node.kill()
        return world

    assert fast(run).proven.counts(CLASS)


# -- what it is for


def test_audits_look_first_where_a_class_may_be_proven(models: Models, tmp_path: Path) -> None:
    """Every other time, and only where another operator could: else one odd node would draw all audits."""

    def strange(world: World) -> None:
        world.proven.note(CLASS, {A}, {B})
        for copy in (0, 1):
            copies(world, copy)[1].become("new class")
        copies(world, 0)[2].become("a class of its own")

    async def look(world: World, session: Session) -> tuple[list[int], Counter[int]]:
        found = unproven(session), Counter(draw(session) for _ in range(1200))
        owned(copies(world, 1)[1], copies(world, 0)[1].address)
        session.setting.candidates[:] = await world.look()
        assert unproven(session) == [], "an operator's own other node proves nothing"
        return found

    _, _, (first, drawn) = play(models, tmp_path, look, prepare=strange)
    assert first == [1]
    assert 700 < drawn[1] < 900 and all(120 < drawn[other] < 280 for other in (0, 2)), drawn


def test_auditors_of_another_class_are_of_one_that_counts_if_there_are_such(models: Models, tmp_path: Path) -> None:
    def classes(world: World) -> None:
        world.proven.note(samples.digest("class 2"), {A}, {B})
        for copy in range(1, 4):
            copies(world, copy)[1].become(f"class {copy}", 3e-7)
        world.sketches = "on"

    async def look(world: World, session: Session) -> list[list[Address]]:
        return [[c.node for c in session.openings.draw_auditors(1)] for _ in range(20)]

    world, _, drawn = play(models, tmp_path, look, prepare=classes, count=4)
    assert {first for first, *_ in drawn} == {copies(world, 2)[1].address}
    assert {len(set(others)) for others in drawn} == {3}


def test_one_operator_does_not_outvote_an_honest_hop_by_two_addresses(models: Models, tmp_path: Path) -> None:
    """The auditor and the third node are of one operator, and have the same wrong rows."""

    def lie(world: World) -> None:
        for copy in (1, 2):
            owned(copies(world, copy)[1], A)
            copies(world, copy)[1].device.noise = 1e-3

    _, alone, _ = play(models, tmp_path / "alone", answer, "full", lie, count=3)
    assert alone.verdict.failed and not alone.verdict.accusations, "nobody of a third operator is there"
    world, session, ids = play(models, tmp_path, answer, "full", lie, count=4)
    liars = {copies(world, copy)[1].address for copy in (1, 2)}
    assert {one.node for one in session.verdict.accusations} <= liars and len(ids) == TOKENS


@pytest.mark.parametrize(
    ("counts", "noise", "accused"),
    [
        (True, 3e-7, False),  # clear by the third one's sketches: a flipped bit, perhaps of the auditor's
        (False, 3e-7, False),
        (True, 3e-5, True),
        (False, 3e-5, False),  # between the zones: that is how classes differ that are not one
        (False, 1e-2, True),
    ],
)
def test_where_a_class_does_not_count_only_an_error_that_convicts_accuses(
    models: Models, tmp_path: Path, counts: bool, noise: float, accused: bool
) -> None:
    """Hop and auditor of one class sign other bits; the third one is of another class."""

    def differ(world: World) -> None:
        world.sketches = "on"
        if counts:
            world.proven.note(samples.digest("odd class"), {A}, {B})
        for copy, (name, off) in enumerate([("odd class", noise), ("odd class", 0.0), *[("another class", 1e-7)] * 3]):
            copies(world, copy)[1].become(name, off)

    world, session, _ = play(models, tmp_path, answer, "full", differ, count=5)
    verdict, hop = session.verdict, copies(world, 0)[1].address
    assert {one.node for one in verdict.accusations} == ({hop} if accused else set())
    assert any(check.node == hop and check.passed is not True for check in verdict.checks), "not paid either way"
    assert verdict.paid.get(hop, 0) == 0


def test_who_agrees_with_two_others_proves_the_class_on_the_way(models: Models, tmp_path: Path) -> None:
    """Two against one of a class is what the ruling asks for: the two have agreed."""

    def lie(world: World) -> None:
        copies(world, 0)[1].device.noise = 1e-6

    world, session, ids = play(models, tmp_path, answer, "full", lie, count=4)
    assert {one.node for one in session.verdict.accusations} == {copies(world, 0)[1].address}
    assert world.proven.counts(CLASS) and len(ids) == TOKENS
    note_unproven(verdict := Verdict("full"), session.route, world.proven)
    assert not verdict.unproven
