"""Evidence gathered from a whole network on one event loop: what a client can show of every hop, and when it cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harness.small_models import Models, fast
from harness.small_world import World, generate
from tallystick.session.auditing import Disagreement
from tallystick.session.evidence import gather, keep
from tallystick.session.session import Session
from tallystick_protocol.errors import BadEvidence, BadFrame, BadPosition, CorruptResult
from tallystick_protocol.evidence.checking import check_model, read_evidence
from tallystick_protocol.frames import Frame, Kind
from tallystick_protocol.types import ZERO32
from tallystick_protocol.wire import Wire

PROMPT = [7 + 3 * i % 90 for i in range(70)]
TOKENS = 10


def about(session: Session, index: int, window: int = -1) -> Disagreement:
    """A dispute over one of a hop's standing receipts."""
    receipts = session.hops[index].standing.receipts
    window %= len(receipts)
    return Disagreement(window, receipts[window], receipts[window])


async def talked(world: World, wire: Wire = "f32") -> Session:
    session = await world.prepare("off", 60.0, wire)
    await session.open([])
    await generate(session, PROMPT, TOKENS)
    return session


async def stopped(world: World) -> None:
    """Nothing of it is left when the loop ends."""
    for node in world.nodes.values():
        await node.stop()


@pytest.mark.parametrize("wire", ["f32", "bf16", "int8"])
def test_every_hop_can_be_shown_to_a_jury(models: Models, tmp_path: Path, wire: Wire) -> None:
    async def run() -> None:
        world = models.world(tmp_path)
        session = await talked(world, wire)
        for index, hop in enumerate(session.hops):
            for window in range(len(hop.standing.receipts)):
                data = await gather(session, index, about(session, index, window))
                evidence = read_evidence(session.setting.domain, data, hop.standing.digests[window])
                check_model(evidence, world.manifest)
                assert evidence.accused == hop.standing.receipts[window]
                assert evidence.bundle.outputs is not None
                assert evidence.signers == {hop.candidate.signer}
        await session.close()
        await stopped(world)

    fast(run)


def test_a_closing_receipt_can_be_shown_behind_the_one_that_it_closes(models: Models, tmp_path: Path) -> None:
    async def run() -> None:
        world = models.world(tmp_path)
        world.sketches = "on"
        session = await talked(world)
        for index, hop in enumerate(session.hops):
            (closing,) = hop.sealed.keys() - set(hop.standing.receipts)
            window = len(hop.standing.receipts) - 1
            data = await gather(session, index, Disagreement(window, closing, closing))
            evidence = read_evidence(session.setting.domain, data)
            check_model(evidence, world.manifest)
            assert evidence.receipts == (*hop.standing.receipts, closing)
            assert ZERO32 not in (closing.challenge, closing.sketches)
            assert evidence.bundle.outputs is not None
        await session.close()
        await stopped(world)

    fast(run)


def test_an_accused_that_gives_no_rows_or_others_is_shown_without_them(models: Models, tmp_path: Path) -> None:
    async def run() -> None:
        world = models.world(tmp_path)
        session = await talked(world)
        hop = session.hops[1]

        async def other(first: int, last: int) -> list[bytes]:
            return [bytes(4 * session.setting.manifest.width)] * (last - first)

        async def refused(first: int, last: int) -> Any:
            raise CorruptResult("no")

        for answer in (other, refused):
            hop.fetch_kept = answer  # type: ignore[method-assign]
            data = await gather(session, 1, about(session, 1))
            assert read_evidence(session.setting.domain, data).bundle.outputs is None
        session.hops[0].fetch_kept = other  # type: ignore[method-assign]
        object.__setattr__(session.setting, "keep_evidence", lambda data: "cid")
        assert await keep(session, 1, about(session, 1)) == ""  # the hop before gave other rows: nothing to show
        assert await keep(session, 0, about(session, 0)) == "cid"
        await session.close()
        await stopped(world)

    fast(run)


def test_a_receipt_that_a_crop_has_replaced_is_true_by_itself_and_the_standing_one_is_shown(
    models: Models, tmp_path: Path
) -> None:
    async def run() -> None:
        world = models.world(tmp_path)
        session = await talked(world)
        old = about(session, 0)
        await session.drop(40)
        await session.feed([5] * 20)
        await session.result(len(session.ids) - 1)
        await session.finish()
        for index in range(len(session.hops)):
            evidence = read_evidence(session.setting.domain, await gather(session, index, about(session, index)))
            assert evidence.accused.last == 60
            assert evidence.accused.revision > 0
        with pytest.raises((BadEvidence, KeyError)):
            await gather(session, 0, old)  # the ids that it was about are not this session's any more
        await session.close()
        await stopped(world)

    fast(run)


def test_a_node_sends_kept_rows_within_bounds_and_only_between_hops(models: Models, tmp_path: Path) -> None:
    async def run() -> None:
        world = models.world(tmp_path)
        session = await talked(world)
        covered = session.hops[0].standing.covered
        assert len(await session.hops[0].fetch_kept(3, covered)) == covered - 3
        for first, last, error in ((0, 0, BadFrame), (5, 3, BadFrame), (-1, 3, BadFrame), (0, 10**6, BadPosition)):
            with pytest.raises(error):
                await session.hops[0].command(Frame(Kind.FETCH, {"first": first, "last": last}))
        with pytest.raises(BadFrame, match="leave for another hop"):
            await session.hops[-1].fetch_kept(0, 3)
        await session.close()
        await stopped(world)

    fast(run)
