"""Random schedules of faults against a whole network on one event loop: nobody may notice, and nothing may be left."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from harness.schedules import Moments, Schedule, draw, suffer
from harness.small_models import Models, fast
from harness.small_world import PRICE, World, audited, generate
from tallystick.session.ring import Ring
from tallystick.session.session import Session
from tallystick.session.setting import Sketches
from tallystick.speculation.steps import Speculation, Steps
from tallystick_protocol.errors import NoAuditor, NoRoute, TallystickError
from tallystick_protocol.receipts import leaf, merkle_root
from tallystick_protocol.sampling import Sampling

PROMPT = [7 + 3 * i % 90 for i in range(75)]
TOKENS = 24
SAMPLINGS = (Sampling(), Sampling(temperature=1.0, top_p=0.95, seed=11))
WAIT_S = 120.0
RETRY_S = 0.5
NOTICED_S = {"hang": 11.0, "stall": 11.0, "stand": 21.0}
"""How long a fault may hold up who reads, besides its own duration: what limits are capped at. Others 3 s."""


@dataclass(slots=True)
class Run:
    """What came of one schedule. wrong: whatever is not as it should be, in words."""

    ids: list[int] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    worst_gap_s: float = 0.0
    seconds: float = 0.0


async def open_session(world: World, schedule: Schedule, moments: Moments) -> Session:
    """Tried again, as people do, where somebody is missing in this very moment."""
    while True:
        try:
            session = await world.prepare(schedule.policy, WAIT_S, schedule.wire)
        except NoRoute:
            await asyncio.sleep(RETRY_S)
            continue
        moments.begin(session)
        try:
            await session.open(audited(session))
            moments.reach(0)
            return session
        except (NoRoute, NoAuditor):
            await session.close()
            await asyncio.sleep(RETRY_S)
        except BaseException:
            await session.close()
            raise


def decider(session: Session, schedule: Schedule) -> Steps | Ring:
    sampling, last = SAMPLINGS[schedule.sampling], len(PROMPT) + TOKENS
    if schedule.way == "ring":
        return Ring(session, sampling, [], last)
    speculation = Speculation.of("lookup" if schedule.way == "lookup" else "off", sampling)
    return Steps(session, sampling, speculation, last, session.setting.manifest.vocab)


async def one_run(models: Models, schedule: Schedule, folder: Path, sketches: Sketches = "auto") -> Run:
    world = models.world(folder, 3 if schedule.policy == "full" else 2, schedule.numerics)
    world.sketches = sketches
    moments, run = Moments(), Run()
    faults = [asyncio.create_task(suffer(world, moments, fault)) for fault in schedule.faults]
    session = await open_session(world, schedule, moments)
    steps, at = decider(session, schedule), [time.monotonic()]

    def on_token(count: int) -> None:
        at.append(time.monotonic())
        moments.reach(count)

    try:
        run.ids = await generate(session, PROMPT, TOKENS, steps=steps, on_token=on_token)
        run.wrong += [*linked(session), *answered(session)]
        await session.take_leave()
    except BaseException:
        for fault in faults:
            fault.cancel()  # it may wait for a token that never comes
        raise
    finally:
        await session.close()
    await asyncio.gather(*faults)
    run.worst_gap_s = max(later - earlier for earlier, later in itertools.pairwise(at))
    run.wrong += [*paid(world, session, schedule), *bounded(world, session, steps.drafted)]
    for node in world.nodes.values():
        node.go_on()
    run.wrong += await world.leftovers()
    for node in world.nodes.values():
        await node.kill()
        node.till.close()
        node.journal.close()
    run.seconds = time.monotonic()
    return run


def linked(session: Session) -> list[str]:
    """Each hop's receipts are a chain over all rows, and begin where those of the hop before end."""
    wrong, rows = [], [leaf(token.to_bytes(4, "little")) for token in session.ids]
    for index, hop in enumerate(session.hops):
        above = session.hops[index - 1].standing.receipts if index else None
        at, previous = 0, bytes(32)
        for window, receipt in enumerate(hop.standing.receipts):
            source = merkle_root(rows[receipt.first : receipt.last]) if above is None else above[window].output
            if (receipt.first, receipt.previous, receipt.input) != (at, previous, source):
                wrong.append(f"hop {index}, window {window}: the receipt does not link")
            at, previous = receipt.last, hop.standing.digests[window]
        if at != len(session.ids):
            wrong.append(f"hop {index} has signed {at} of {len(session.ids)} rows")
    return wrong


def answered(session: Session) -> list[str]:
    """Where sketches are in use, every hop has answered for every window, and closed."""
    wrong = []
    for index, hop in enumerate(session.hops if session.sketching.is_on else []):
        book, digests = hop.sketchbook, hop.standing.digests
        if not set(digests) <= set(book.answers) or book.closed != digests[-1]:
            wrong.append(f"hop {index} owes an answer")
    return wrong


def paid(world: World, session: Session, schedule: Schedule) -> list[str]:
    """Nobody has more vouchers than it has computed rows for, nor less by more than its credit; who served to the end
    has one for every row; where nobody was replaced or filled, every row was computed once."""
    wrong = []
    for node in world.nodes.values():
        account, units = node.till.account(world.key.address), node.engine.model.span.units(world.manifest.layers)
        if not account.signed <= account.owed <= account.signed + node.credit + 64 * units * PRICE:
            wrong.append(f"{node.name}: {account.signed} signed of {account.owed}")
    for hop in session.hops:
        account = world.nodes[hop.node].till.account(world.key.address)
        if hop.rows_paid != hop.rows_due or hop.rows_due < len(session.ids):
            wrong.append(f"{world.nodes[hop.node].name}: {hop.rows_paid} rows paid, {hop.rows_due} due")
        if hop.failure is None and account.signed != world.purse.promised(hop.node):
            wrong.append(f"{world.nodes[hop.node].name} has not got the last voucher")
        units = hop.candidate.span.units(world.manifest.layers)
        rows, is_alone = len(session.ids), not session.verdict.replaced and not session.attempt
        if is_alone and schedule.way != "lookup" and account.owed != rows * units * PRICE:
            wrong.append(f"{world.nodes[hop.node].name}: {account.owed / units / PRICE} rows charged, not {rows}")
    return wrong


def bounded(world: World, session: Session, drafted: int) -> list[str]:
    """No session at a node is paid for more than every row once, and the drafts; and there is one for each hop, each
    replacement, each filling and each auditor."""
    wrong, rows = [], len(session.ids) + drafted
    total, once = 0, 0
    for node in world.nodes.values():
        signed = node.till.account(world.key.address).signed
        price = node.engine.model.span.units(world.manifest.layers) * PRICE
        total, once = total + signed // price, once + rows
        if signed > node.opened * rows * price:
            wrong.append(f"{node.name}: paid for {signed / price} rows, {node.opened} sessions of {rows}")
    auditors = len(audited(session)) * (1 + session.attempt)
    most = len(session.route) + session.attempt + auditors
    if total > most * rows:
        wrong.append(f"{total} rows paid, in all: more than {most} times {rows}")
    return wrong


def longest_gap_s(schedule: Schedule) -> float:
    return 1.0 + sum(fault.for_s + NOTICED_S.get(fault.kind, 3.0) for fault in schedule.faults)


def check(
    models: Models, truths: dict[Schedule, list[int]], seeds: Iterator[int], root: Path, sketches: Sketches = "auto"
) -> None:
    for seed in seeds:
        schedule = draw(seed, TOKENS)
        truth = schedule.truth
        if truth not in truths:
            undisturbed = fast(lambda truth=truth: one_run(models, truth, root / f"true {len(truths)}"))  # type: ignore[misc]
            assert not undisturbed.wrong
            truths[truth] = undisturbed.ids
        try:
            run = fast(lambda: one_run(models, schedule, root / f"{seed}", sketches))  # noqa: B023
        except TallystickError as error:
            raise AssertionError(f"seed {seed}, {schedule}: {error!r}") from error
        assert run.ids == truths[truth], f"seed {seed}, {schedule}"
        assert not run.wrong, f"seed {seed}, {schedule}: {run.wrong}"
        assert run.worst_gap_s <= longest_gap_s(schedule), f"seed {seed}, {schedule}: {run.worst_gap_s:.1f} s"


def test_whatever_fails_the_answer_is_the_same_and_nothing_is_left(models: Models, tmp_path: Path) -> None:
    check(models, {}, iter(range(15)), tmp_path)


def test_schedules_that_were_lost_once(models: Models, tmp_path: Path) -> None:
    """Ids that the ring brought and whose confirmation was cut off; debts of an interrupted session beside another."""
    check(models, {}, iter((1253, 1266, 5008, 5096, 5154)), tmp_path)


def test_with_sketches_in_use_it_is_no_different(models: Models, tmp_path: Path) -> None:
    check(models, {}, iter(range(100, 108)), tmp_path, "on")


@pytest.mark.nightly
def test_whatever_fails_for_long(models: Models, tmp_path: Path) -> None:
    check(models, {}, itertools.islice(itertools.count(1000), 2000), tmp_path)


@pytest.mark.nightly
def test_with_sketches_in_use_for_long(models: Models, tmp_path: Path) -> None:
    check(models, {}, itertools.islice(itertools.count(5000), 500), tmp_path, "on")
