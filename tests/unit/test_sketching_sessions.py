"""Whole sessions whose hops only nodes of other classes can check: clients and nodes on one event loop."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from harness.small_models import Models, fast
from harness.small_world import PRICE, Node, World, generate
from harness.small_world import audited as audited_hops
from tallystick.routing.suspicions import Suspicions
from tallystick.session.repair import RolledBack
from tallystick.session.ring import Ring
from tallystick.session.session import Session
from tallystick.speculation.steps import Speculation, Steps
from tallystick_protocol.errors import NoAuditor, TallystickError
from tallystick_protocol.frames import Frame, Kind
from tallystick_protocol.receipts import Receipt
from tallystick_protocol.sampling import Sampling
from tallystick_protocol.signing import digest, unseal
from tallystick_protocol.types import ZERO32, Address, SessionId

PROMPT = [7 + 3 * i % 90 for i in range(40)]
COUNT = 45
ROUNDING = 3e-7
Play = Callable[[World, Session], Awaitable[Any]]


def copies_of(world: World, copy: int) -> list[Node]:
    """The nodes of every span with this number, in the order of layers."""
    return [node for node in world.nodes.values() if node.name.endswith(f"#{copy}")]


def mixed(models: Models, folder: Path, classes: int = 2, same: int = 1, numerics: str = "fp32") -> World:
    """A network in which each span is served by so many classes; hops are of the first one, by `same` nodes."""
    world = models.world(folder, classes + same - 1, numerics)  # type: ignore[arg-type]
    for copy in range(same, classes + same - 1):
        for node in copies_of(world, copy):
            node.become(f"class {copy}", ROUNDING)
    return world


def play(
    models: Models, folder: Path, work: Play, policy: str = "full", prepare: Callable[[World], None] = lambda _: None,
    **options: Any,
) -> tuple[World, Session, Any]:  # fmt: skip
    """A session of a mixed network, what was done in it, and that nothing is left of it."""

    async def run() -> tuple[World, Session, Any]:
        world = mixed(models, folder, **options)
        prepare(world)
        try:
            session = await world.prepare(policy, 60.0)  # type: ignore[arg-type]
            try:
                await session.open(audited_hops(session))
                result = await work(world, session)
            finally:
                await session.close()
            assert await world.leftovers() == []
            return world, session, result
        finally:
            for node in world.nodes.values():
                await node.kill()

    return fast(run)


def instead(node: Node, change: Callable[[Frame], Frame | None]) -> None:
    """Have a node send something else in place of its sketches, or nothing."""
    before = node.accept

    def accept(end: Any) -> None:
        send = end.send

        async def other(frame: Frame) -> None:
            changed = change(frame) if frame.kind is Kind.SKETCHES else frame
            if changed is not None:
                await send(changed)

        end.send = other
        before(end)

    node.accept = accept  # type: ignore[method-assign]


async def answer(world: World, session: Session) -> list[int]:
    return await generate(session, PROMPT, COUNT)


def signed(node: Node, session: SessionId) -> list[Receipt]:
    return [unseal(node.shop.domain, Receipt, sealed)[0] for sealed in node.journal.receipts(session)]


@pytest.fixture(scope="module")
def expected(models: Models, tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    _, _, ids = play(models, tmp_path_factory.mktemp("plain"), answer, "off")
    return ids


def test_hops_that_only_another_class_can_check_are_checked_by_sketches(
    models: Models, tmp_path: Path, expected: list[int]
) -> None:
    world, session, ids = play(models, tmp_path, answer)
    verdict = session.verdict
    assert ids == expected and session.sketching.is_on
    assert {check.how for check in verdict.checks} == {"sketch"} and verdict.failed == 0
    assert verdict.passed == 3 * 3, "three windows of three spans"
    assert 0 < verdict.worst_error < verdict.tolerance <= 5e-6
    assert not any(verdict.withheld.values()) and all(verdict.paid[node.address] for node in copies_of(world, 0))


def test_every_receipt_carries_the_sketches_of_the_one_before_and_the_closing_one_the_last(
    models: Models, tmp_path: Path
) -> None:
    world, session, _ = play(models, tmp_path, answer)
    challenges = []
    for node in copies_of(world, 0):
        receipts = signed(node, session.id)
        chain = sorted(receipts, key=lambda one: (one.revision, one.first))
        assert [(one.first, one.last) for one in chain] == [(0, 32), (32, 64), (64, 84), (64, 84)]
        assert (chain[0].challenge, chain[0].sketches) == (ZERO32, ZERO32)
        for before, after in itertools.pairwise(chain):
            assert after.previous == digest(node.shop.domain, before)
            assert ZERO32 not in (after.challenge, after.sketches)
        assert chain[3].output == chain[2].output and chain[3].revision == chain[2].revision + 1
        challenges.append([one.challenge for one in chain])
    assert challenges[0] == challenges[1] == challenges[2], "one for all hops"
    assert len(set(challenges[0])) == 4, "a fresh one for each window"


def test_where_a_class_has_two_operators_nothing_is_sketched(models: Models, tmp_path: Path) -> None:
    world, session, _ = play(models, tmp_path, answer, same=2)
    assert not session.sketching.is_on and {check.how for check in session.verdict.checks} == {"hash"}
    for node in copies_of(world, 0):
        assert {receipt.challenge for receipt in signed(node, session.id)} == {ZERO32}


def test_without_another_class_there_is_no_auditor(models: Models, tmp_path: Path) -> None:
    with pytest.raises(NoAuditor):
        play(models, tmp_path, answer, classes=1)


def test_an_audit_at_the_end_compares_with_the_challenges_of_the_session(
    models: Models, tmp_path: Path, expected: list[int]
) -> None:
    async def audited(world: World, session: Session) -> list[int]:
        ids = await answer(world, session)
        for index in range(3):
            await session.audit_at_end(index)
        return ids

    _, session, ids = play(models, tmp_path, audited, "audit")
    assert ids == expected
    assert [check.how for check in session.verdict.checks] == ["sketch"] * 9 and session.verdict.failed == 0


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_cheater_is_named_by_two_other_classes_and_one_of_them_takes_its_place(
    models: Models, tmp_path: Path, expected: list[int], index: int
) -> None:
    def cheat(world: World) -> None:
        copies_of(world, 0)[index].device.noise = 1e-2

    world, session, ids = play(models, tmp_path, answer, prepare=cheat, classes=3)
    verdict, cheater = session.verdict, copies_of(world, 0)[index].address
    assert [accusation.node for accusation in verdict.accusations] == [cheater]
    assert len(set(verdict.accusations[0].witnesses)) == 2
    assert verdict.moved == [cheater] and not verdict.exact
    unwanted = 32 * 2 * PRICE if index == 2 else 0  # of the first window no result was wanted
    assert verdict.paid.get(cheater, 0) == unwanted
    failed = [check for check in verdict.checks if check.passed is False]
    assert [check.node for check in failed] == [cheater] and failed[0].error > 20 * failed[0].tolerance
    assert ids == expected


def test_a_cheating_auditor_of_another_class_is_named_and_the_hop_is_kept(
    models: Models, tmp_path: Path, expected: list[int]
) -> None:
    def cheat(world: World) -> None:
        copies_of(world, 1)[1].device.noise = 1e-2

    for attempt in range(12):  # one of two is drawn each time: until it is the liar
        world, session, ids = play(models, tmp_path / str(attempt), answer, prepare=cheat, classes=3)
        assert ids == expected and not session.verdict.moved
        if session.verdict.accusations:
            break
    assert [accusation.node for accusation in session.verdict.accusations] == [copies_of(world, 1)[1].address]
    assert session.nodes == {node.address for node in copies_of(world, 0)}


def test_between_the_zones_another_auditor_is_asked_and_nobody_is_blamed(models: Models, tmp_path: Path) -> None:
    def drift(world: World) -> None:
        copies_of(world, 0)[1].device.noise = 3e-5

    world, session, ids = play(models, tmp_path, answer, prepare=drift, classes=4)
    verdict = session.verdict
    undecided = [check for check in verdict.checks if check.passed is None]
    drifter = copies_of(world, 0)[1].address
    assert verdict.accusations == [] and {check.node for check in undecided} == {drifter}
    assert len({check.auditor for check in undecided}) == 2
    assert verdict.paid.get(drifter, 0) == 0 and drifter not in session.nodes
    assert len(ids) == COUNT


def test_bf16w_spans_of_other_classes_pass_within_their_own_tolerance(models: Models, tmp_path: Path) -> None:
    def round_more(world: World) -> None:
        for node in copies_of(world, 1):
            node.device.noise = 5e-5

    _, session, _ = play(models, tmp_path, answer, prepare=round_more, numerics="bf16w")
    assert session.verdict.failed == 0 and session.verdict.passed == 9
    assert 1e-5 < session.verdict.worst_error < session.verdict.tolerance


# -- whatever else sessions do


def sketched(session: Session) -> bool:
    """Whether all hops have answered for everything they signed, and closed."""
    return all(
        set(hop.standing.digests) <= set(hop.sketchbook.answers) and hop.sketchbook.closed == hop.standing.digests[-1]
        for hop in session.hops
    )


def test_rows_taken_back_are_challenged_anew(models: Models, tmp_path: Path) -> None:
    async def crop(world: World, session: Session) -> None:
        await session.feed(PROMPT)
        await session.finish()
        before = dict(session.sketching._challenges)
        await session.rewinding.crop(36)
        await session.feed([5, 6, 7, 8])
        await session.finish()
        assert sketched(session)
        after = session.sketching._challenges
        assert before[0] == after[0] and before[1].positions == after[1].positions
        assert before[1].value != after[1].value, "whoever knows it could hide behind it"

    _, session, _ = play(models, tmp_path, crop)
    assert session.verdict.failed == 0


def test_a_window_that_grows_after_a_flush_is_challenged_again(models: Models, tmp_path: Path) -> None:
    async def grow(world: World, session: Session) -> None:
        for count in (5, 20, 15):
            await session.feed(PROMPT[:count])
            await session.finish()
            assert sketched(session)

    world, session, _ = play(models, tmp_path, grow)
    receipts = signed(copies_of(world, 0)[1], session.id)
    assert len({(one.first // 32, one.revision) for one in receipts}) == len(receipts)
    answered = [one.challenge for one in receipts if one.challenge != ZERO32]
    assert len(set(answered)) == 4, "three partial windows and a whole one"


def test_drafts_and_the_ring_give_the_same_tokens(models: Models, tmp_path: Path, expected: list[int]) -> None:
    async def draft(world: World, session: Session) -> list[int]:
        last, vocab = len(PROMPT) + COUNT, session.setting.manifest.vocab
        steps = Steps(session, Sampling(), Speculation.of("lookup", Sampling()), last, vocab)
        return await generate(session, PROMPT, COUNT, steps=steps)

    async def ring(world: World, session: Session) -> list[int]:
        return await generate(session, PROMPT, COUNT, steps=Ring(session, Sampling(), (), len(PROMPT) + COUNT))

    for name, work in (("drafts", draft), ("ring", ring)):
        _, session, ids = play(models, tmp_path / name, work)
        assert ids == expected and session.verdict.failed == 0 and session.verdict.passed >= 9


def of_one_operator(world: World) -> None:
    """Two nodes of the first class, of one operator: it can replace itself, and not check itself."""
    for one, other in zip(copies_of(world, 0), copies_of(world, 1), strict=True):
        other.become("class")
        other.candidate = dataclasses.replace(other.candidate, operator=one.address, payee=one.address)


@pytest.mark.parametrize("what", ["kill", "cut", "auditor"])
def test_hops_and_auditors_may_be_lost_and_come_back(
    models: Models, tmp_path: Path, expected: list[int], what: str
) -> None:
    async def lose(world: World, session: Session) -> list[int]:
        async def harm() -> None:
            if what == "kill":
                await copies_of(world, 0)[1].kill()
            else:
                copies_of(world, 0 if what == "cut" else 2)[1].cut()

        going: list[Any] = []

        def on_token(reached: int) -> None:
            if reached in (3, 20):
                going.append(asyncio.ensure_future(harm()))

        ids = await generate(session, PROMPT, COUNT, on_token=on_token)
        await asyncio.gather(*going)
        assert sketched(session)
        return ids

    _, session, ids = play(models, tmp_path, lose, prepare=of_one_operator, classes=3)
    assert ids == expected and session.verdict.accusations == [] and session.sketching.is_on
    assert bool(session.verdict.replaced) == (what == "kill")
    assert {check.how for check in session.verdict.checks} == {"sketch"}


def test_a_hop_that_sketches_other_rows_than_it_sent_is_found_by_its_neighbour(
    models: Models, tmp_path: Path, expected: list[int]
) -> None:
    """Nobody knows which of the two it was: both go, to another class where theirs has no other node."""

    def lie(world: World) -> None:
        def other(frame: Frame) -> Frame:
            tensor = bytearray(frame.tensor)
            tensor[70] ^= 0x40
            return Frame(frame.kind, frame.body, frame.position, frame.dtype, frame.shape, bytes(tensor))

        instead(copies_of(world, 0)[1], other)

    world, session, ids = play(models, tmp_path, answer, "audit", prepare=lie)
    pair = {node.address for node in copies_of(world, 0)[1:]}
    assert ids == expected and set(session.verdict.moved) == pair and session.verdict.accusations == []
    assert not session.verdict.paid.get(copies_of(world, 0)[1].address)


def test_a_hop_that_does_not_answer_is_replaced(models: Models, tmp_path: Path, expected: list[int]) -> None:
    def keep_silent(world: World) -> None:
        of_one_operator(world)
        instead(copies_of(world, 0)[1], lambda frame: None)

    world, session, ids = play(models, tmp_path, answer, prepare=keep_silent, classes=3)
    silent = copies_of(world, 0)[1].address
    assert ids == expected and [lost for lost, _, _ in session.verdict.replaced] == [silent]
    assert session.verdict.paid[silent] == 0 and session.verdict.accusations == []


def test_a_class_with_two_operators_checks_itself_by_hashes_beside_sketched_spans(
    models: Models, tmp_path: Path, expected: list[int]
) -> None:
    _, session, ids = play(models, tmp_path, answer, prepare=lambda world: copies_of(world, 1)[0].become("class"))
    assert ids == expected and session.sketching.is_on and session.verdict.failed == 0
    ways = {(check.span.start, check.how) for check in session.verdict.checks}
    assert ways == {(0, "hash"), (1, "sketch"), (2, "sketch")}


def test_a_second_challenge_to_one_receipt_is_refused(models: Models, tmp_path: Path) -> None:
    async def ask_twice(world: World, session: Session) -> str:
        await session.feed(PROMPT)
        await session.finish()
        hop = session.hops[1]
        body = {"receipt": hop.standing.digests[0], "challenge": bytes(32)}
        await hop.send(Frame(Kind.CHALLENGE, body))
        while hop.failure is None:
            await asyncio.sleep(0.01)
        return hop.failure.code

    _, _, code = play(models, tmp_path, ask_twice)
    assert code == "bad_message"


def test_rounded_wires_go_without_sketches_and_nodes_refuse_them_there(models: Models, tmp_path: Path) -> None:
    async def rounded() -> tuple[bool, str]:
        world = mixed(models, tmp_path)
        session = await world.prepare("audit", 0.0, "bf16")
        session.sketching.decide()
        is_on, session.sketching.is_on = session.sketching.is_on, True
        with pytest.raises(TallystickError) as raised:
            await session.openings.connect(session.route[0], session.openings.opening(0))
        await session.close()
        return is_on, raised.value.code

    assert fast(rounded) == (False, "bad_message")


def test_where_only_one_other_class_is_left_and_cannot_say_the_answer_ends_without_blame(
    models: Models, tmp_path: Path
) -> None:
    def drift(world: World) -> None:
        copies_of(world, 0)[1].device.noise = 3e-5

    with pytest.raises(TallystickError) as raised:
        play(models, tmp_path, answer, prepare=drift)
    assert raised.value.code in ("no_route", "no_auditor")


# -- evidence over several sessions


def test_two_undecided_auditors_leave_the_hop_and_neither_of_them(
    models: Models, tmp_path: Path, expected: list[int]
) -> None:
    """With three nodes for a span, one of the two auditors takes its place and the other one checks it."""

    def drift(world: World) -> None:
        copies_of(world, 0)[1].device.noise = 3e-5

    world, session, ids = play(models, tmp_path, answer, prepare=drift, classes=3)
    drifter = copies_of(world, 0)[1].address
    assert ids == expected and session.verdict.moved == [drifter] and session.verdict.accusations == []
    assert session.verdict.paid.get(drifter, 0) == 0
    assert {check.node for check in session.verdict.checks if check.passed is None} == {drifter}
    assert session.verdict.passed >= 9


def test_an_error_that_is_clear_by_itself_is_found_over_sessions(models: Models, tmp_path: Path) -> None:
    """Less than what another class tolerates; the manifest's publisher has measured what honest nodes stay below."""
    suspicions, sessions = Suspicions(), 0

    async def ask(world: World, session: Session) -> list[int]:
        ids = await generate(session, [(7 * sessions + 3 * i) % 90 for i in range(40)], COUNT)
        with suppress(RolledBack):  # two auditors disagree with it for good: it is replaced there and then
            for index in range(3):
                await session.audit_at_end(index)
        return ids

    def drift(world: World) -> None:
        copies_of(world, 0)[1].device.noise = 3e-6
        world.suspicions = suspicions

    found: set[Address] = set()
    while not found and sessions < 30:
        world, session, _ = play(models, tmp_path / str(sessions), ask, "audit", prepare=drift, classes=3)
        assert session.verdict.accusations == []
        sessions += 1
        found = suspicions.avoided(session.setting.manifest.model_id)
    assert found == {copies_of(world, 0)[1].address}
    assert sessions > 1 and len(suspicions) > 2, "the honest pairs are remembered, too"
