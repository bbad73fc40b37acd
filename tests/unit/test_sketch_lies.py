"""Lies told in sketches alone, over rows that were sent and signed, by a hop that only another class checks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from faults.breaking import Bend, bending
from harness.small_models import Models, fast
from harness.small_world import Node, World, audited, generate
from tallystick.session.session import Session
from tallystick_node.session.hop import Hop
from tallystick_node.session.sketcher import Sketcher
from tallystick_protocol.errors import TallystickError
from tallystick_protocol.frames import Frame, Kind
from tallystick_protocol.sketching.rows import Sketches, sketch
from tallystick_protocol.types import Positions

PROMPT = [7 + 3 * i % 90 for i in range(40)]
TOKENS = 30
ROUNDING = 3e-7
ERROR = 1e-2


def three_classes(models: Models, folder: Path) -> World:
    """Each span is served by three nodes, no two of one class."""
    folder.mkdir()
    world = models.world(folder, 3)
    for node in world.nodes.values():
        if not node.name.endswith("#0"):
            node.become(f"class {node.name[-1]}", ROUNDING)
    return world


def first_of(world: World, span: int) -> Node:
    return next(node for node in world.nodes.values() if node.name == f"{world.spans[span]}#0")


async def end(world: World) -> None:
    for node in world.nodes.values():
        await node.kill()
        node.till.close()
        node.journal.close()


async def answer(world: World, choose: Callable[[Hop], Bend | None]) -> tuple[Session, list[int] | str]:
    """A session, and its tokens, or the code that it ended with."""
    with bending(choose):
        session = await world.prepare("full", 5.0)
        try:
            await session.open(audited(session))
            return session, await generate(session, PROMPT, TOKENS)
        except TallystickError as error:
            return session, error.code
        finally:
            await session.close()
            await end(world)


def corrupt(hop: Hop) -> None:
    """Sends and signs altered rows."""
    outputs = hop.rows.outputs
    hop.rows.outputs = lambda result, want: outputs(result * (1 + ERROR), want)  # type: ignore[method-assign]


def sketching(hop: Hop, lie: Callable[[bytes, Positions, Any, Any], Sketches]) -> None:
    """Have a session sketch what `lie` says of (challenge, positions, rows in, rows out)."""

    async def other(challenge: bytes, positions: Positions) -> Sketches:
        given, _ = hop.record.inputs(positions)
        outputs, _ = hop.record.outputs(positions)
        entered = (
            await hop.sketcher._embedded(positions) if hop.rows.is_first
            else np.frombuffer(b"".join(given), dtype="<f4").reshape(len(positions), -1)
        )  # fmt: skip
        return lie(challenge, positions, entered, hop.rows.hidden(outputs))

    assert isinstance(hop.sketcher, Sketcher)
    hop.sketcher._sketch = other  # type: ignore[method-assign]


def shifted_input(hop: Hop) -> None:
    """y + D is sent and signed, S (x + D) and S (y - x) are answered: the sum fits the next hop, the difference the
    auditor; nobody comes before the first hop who would know its S x."""
    corrupt(hop)

    def lie(challenge: bytes, positions: Positions, x: Any, sent: Any) -> Sketches:
        y = sent / np.float32(1 + ERROR)
        return sketch(challenge, positions, (x + (sent - y)).astype(np.float32), sent)

    sketching(hop, lie)


def clean_sketches(hop: Hop) -> None:
    """y + D is sent and signed, the sketches are those of y."""
    corrupt(hop)
    sketching(hop, lambda challenge, positions, x, sent: sketch(challenge, positions, x, sent / np.float32(1 + ERROR)))


@pytest.fixture(scope="module")
def truth(models: Models, tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    folder = tmp_path_factory.mktemp("truth") / "honest"
    return fast(lambda: answer(three_classes(models, folder), lambda _: None))[1]  # type: ignore[return-value]


def test_the_first_hop_cannot_hide_an_error_in_what_entered_it(
    models: Models, truth: list[int], tmp_path: Path
) -> None:
    async def run() -> None:
        world = three_classes(models, tmp_path / "world")
        liar = first_of(world, 0).address
        session, ids = await answer(world, lambda hop: shifted_input if hop.shop.node == liar else None)
        assert [one.node for one in session.verdict.accusations] == [liar]
        failed = [check for check in session.verdict.checks if check.passed is False]
        assert failed[0].node == liar and failed[0].tolerance == 1e-5, "it was S x that did not fit"
        assert session.verdict.paid.get(liar, 0) == 0 and ids == truth

    fast(run)


@pytest.mark.parametrize("span", [0, 1])
def test_clean_sketches_of_rows_that_were_sent_otherwise_do_not_fit_the_next_hops(
    models: Models, truth: list[int], tmp_path: Path, span: int
) -> None:
    async def run() -> None:
        world = three_classes(models, tmp_path / "world")
        liar, neighbour = first_of(world, span).address, first_of(world, span + 1).address
        session, ids = await answer(world, lambda hop: clean_sketches if hop.shop.node == liar else None)
        assert ids == truth and set(session.verdict.moved) == {liar, neighbour}, "of its class there was no other"
        assert {liar, neighbour} <= session.avoid, "one of the two: nobody knows which"
        assert {one.cause for one in session.verdict.attributions} == {"link"} and not session.verdict.accusations
        assert not session.verdict.paid.get(liar, 0) and not session.verdict.paid.get(neighbour, 0)

    fast(run)


def test_nobody_is_challenged_before_every_hop_has_signed(models: Models, tmp_path: Path) -> None:
    """Else the first to learn the matrix could tell it to a hop that has not committed itself."""
    asked: list[str] = []
    held: list[Frame] = []
    late = asyncio.Event()

    async def run() -> None:
        world = three_classes(models, tmp_path / "world")
        last = first_of(world, 2).address

        def bend(hop: Hop) -> None:
            put, send = hop.sketcher.put, hop.control.send

            async def note(frame: Frame) -> None:
                asked.append(hop.shop.node)
                await put(frame)

            async def hold(frame: Frame) -> None:
                if frame.kind is Kind.RECEIPT and hop.shop.node == last and not late.is_set():
                    held.append(frame)
                    return
                await send(frame)

            hop.sketcher.put = note  # type: ignore[method-assign]
            hop.control.send = hold  # type: ignore[method-assign]

        with bending(lambda _: bend):
            session = await world.prepare("audit", 60.0)
            await session.open(audited(session))
            assert session.sketching.is_on
            await session.feed(PROMPT)
            finishing = asyncio.ensure_future(session.finish())
            others = session.hops[:2]
            for _ in range(300):
                await asyncio.sleep(0.01)
                if held and all(hop.standing.receipts for hop in others):
                    break
            assert held and all(hop.standing.receipts for hop in others)
            assert not asked and not session.sketching._challenges
            late.set()
            first_of(world, 2).cut()  # the client comes back, and is sent the receipts that it lacks
            await finishing
            assert set(asked) >= session.nodes
            await session.close()
            await end(world)

    fast(run)
