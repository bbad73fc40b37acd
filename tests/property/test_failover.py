"""Random schedules of faults against a whole network on one event loop: nobody may notice, and nothing may be left."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from harness import samples
from harness.in_memory import InMemory
from harness.one_loop import FastLoop
from harness.small_world import PRICE, Inline, Node, World, generate
from tallystick.session import Session
from tallystick.verdict import Policy
from tallystick_protocol.errors import TallystickError
from tallystick_protocol.manifest import Numerics
from tallystick_protocol.receipts import leaf, merkle_root
from tallystick_protocol.sampling import Sampling
from tallystick_protocol.types import Span

PROMPT = [7 + 3 * i % 90 for i in range(75)]
TOKENS = 24
SAMPLINGS = (Sampling(), Sampling(temperature=1.0, top_p=0.95, seed=11))
KINDS = ("kill", "hang", "cut", "cut client", "cut pushes", "flap", "late", "drain")
WAIT_S = 60.0
SPAN_OF_TIME_S = 0.5
"""What an answer takes here when nothing happens, about."""


@dataclass(frozen=True)
class Fault:
    """at: seconds after the session has opened. hop: where in the route of that moment. for_s: until it is over."""

    kind: str
    hop: int
    at: float
    for_s: float


@dataclass(frozen=True)
class Schedule:
    faults: tuple[Fault, ...]
    sampling: int
    policy: Policy
    numerics: Numerics


def draw(seed: int) -> Schedule:
    dice = random.Random(seed)
    faults = []
    for _ in range(dice.choice((1, 1, 2, 2, 3, 5))):
        kind = dice.choice(KINDS)
        longest = {"kill": 4.0, "hang": 12.0, "flap": 3.0, "late": 2.0}.get(kind, 1.0)
        at = dice.uniform(0.0, SPAN_OF_TIME_S)
        faults.append(Fault(kind, dice.randrange(3), at, dice.uniform(0.01, longest)))
    if dice.random() < 0.3:  # several at once
        faults = [Fault(fault.kind, fault.hop, faults[0].at, fault.for_s) for fault in faults]
    policy, numerics = dice.choice(("off", "off", "full")), dice.choice(("fp32", "bf16w"))
    return Schedule(tuple(faults), dice.randrange(2), policy, numerics)


class Models:
    """A random model of three layers, in both numerics, each span of it loaded once."""

    def __init__(self) -> None:
        config = LlamaConfig(
            vocab_size=97, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=256, pad_token_id=None,
        )  # fmt: skip
        self.found: dict[Numerics, tuple[InMemory, dict[Span, Inline]]] = {}
        kinds: tuple[Numerics, ...] = ("fp32", "bf16w")
        for numerics in kinds:
            model = InMemory(LlamaForCausalLM, config, numerics)
            pieces, anything = samples.manifest().pieces, ((0.0, 1e9),) * 4  # a model without them has no id
            model.manifest = replace(model.manifest, pieces=pieces, norms=anything)
            self.found[numerics] = model, {span.span: Inline(span) for span in model.cut(1, 2)}
        self.truth: dict[tuple[Numerics, int], list[int]] = {}


@pytest.fixture(scope="module")
def models() -> Iterator[Models]:
    found = Models()
    yield found
    for _, engines in found.found.values():
        for engine in engines.values():
            engine.close()


async def suffer(world: World, session: Session, fault: Fault) -> None:
    await asyncio.sleep(fault.at)
    node = world.nodes[session.route[fault.hop % len(session.route)].node]
    if node.sessions is None:
        return
    if fault.kind == "kill":
        await node.kill()
        await asyncio.sleep(fault.for_s)
        restart(node)
    elif fault.kind == "drain":
        await node.stop()
        restart(node)
    elif fault.kind == "hang":
        node.hang()
        await asyncio.sleep(fault.for_s)
        node.go_on()
    elif fault.kind == "cut":
        node.cut()
    elif fault.kind == "cut client":
        node.cut(lambda end: end.far in world.client_ends)
    elif fault.kind == "cut pushes":
        node.cut(lambda end: end.far not in world.client_ends)
    elif fault.kind == "flap":
        node.is_down = True
        node.cut()
        await asyncio.sleep(fault.for_s)
        node.is_down = False
    else:
        node.delay_s = 0.3
        await asyncio.sleep(fault.for_s)
        node.delay_s = 0.0005


def restart(node: Node) -> None:
    if node.sessions is None:
        node.start()


async def one_run(models: Models, schedule: Schedule, folder: Path) -> tuple[list[int], list[str]]:
    """The tokens, and everything that is not as it should be."""
    model, engines = models.found[schedule.numerics]
    world = World(model, dict(engines), 3 if schedule.policy == "full" else 2, folder)
    session = await world.session(schedule.policy, WAIT_S)
    faults = [asyncio.create_task(suffer(world, session, fault)) for fault in schedule.faults]
    wrong: list[str] = []
    try:
        ids = await generate(session, PROMPT, TOKENS, SAMPLINGS[schedule.sampling])
        wrong += linked(session)
        await session.take_leave()
    finally:
        await session.close()
        await asyncio.gather(*faults)
    wrong += paid(world, session)
    for node in world.nodes.values():
        node.go_on()
    wrong += await world.leftovers()
    for node in world.nodes.values():
        await node.kill()
        node.till.close()
        node.journal.close()
    return ids, wrong


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


def paid(world: World, session: Session) -> list[str]:
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
        rows = len(session.ids)
        if not session.verdict.replaced and not session.attempt and account.owed != rows * units * PRICE:
            wrong.append(f"{world.nodes[hop.node].name}: {account.owed / units / PRICE} rows charged, not {rows}")
    return wrong


def run(models: Models, schedule: Schedule, folder: Path) -> tuple[list[int], list[str], float]:
    loop, real = FastLoop(), time.monotonic
    time.monotonic = loop.time  # type: ignore[assignment]  # what waits looks at this clock, too
    try:
        ids, wrong = loop.run_until_complete(one_run(models, schedule, folder))
        return ids, wrong, loop.time()
    finally:
        time.monotonic = real  # type: ignore[assignment]
        loop.close()


def check(models: Models, seeds: Iterator[int], root: Path) -> None:
    for seed in seeds:
        schedule = draw(seed)
        key = schedule.numerics, schedule.sampling
        if key not in models.truth:
            undisturbed = Schedule((), schedule.sampling, "off", schedule.numerics)
            models.truth[key], wrong, _ = run(models, undisturbed, root / f"{key}")
            assert not wrong
        try:
            ids, wrong, _ = run(models, schedule, root / f"{seed}")
        except TallystickError as error:
            raise AssertionError(f"seed {seed}, {schedule}: {error!r}") from error
        assert ids == models.truth[key], f"seed {seed}, {schedule}"
        assert not wrong, f"seed {seed}, {schedule}: {wrong}"


def test_whatever_fails_the_answer_is_the_same_and_nothing_is_left(models: Models, tmp_path: Path) -> None:
    check(models, iter(range(15)), tmp_path)


@pytest.mark.nightly
def test_whatever_fails_for_long(models: Models, tmp_path: Path) -> None:
    check(models, itertools.islice(itertools.count(1000), 2000), tmp_path)
