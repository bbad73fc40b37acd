"""Choosing among sources, without a network."""

from __future__ import annotations

import asyncio

import pytest

from tallystick_protocol.content.cid import Cid
from tallystick_protocol.content.sources import Patience, Record, Sources, rank
from tallystick_protocol.errors import BadBlock, BlockMissing, SourceFailed

BLOCK = b"a block"
CID = Cid.of_raw(BLOCK)
QUICK = Patience(race_after_s=0.05, deadline_s=0.5)


def test_fast_sources_come_before_slow_ones_and_unknown_ones_first() -> None:
    records = [Record("slow", bytes_per_s=1.0), Record("fast", bytes_per_s=9.0), Record("unknown")]
    assert [record.source for record in rank(records, now=0)] == ["unknown", "fast", "slow"]


def test_offenders_come_last_for_a_time_that_doubles() -> None:
    record = Record("a").failed(now=0)
    assert [r.source for r in rank([record, Record("b", bytes_per_s=0.1)], now=1)] == ["b", "a"]
    assert [r.source for r in rank([record, Record("b", bytes_per_s=0.1)], now=3)] == ["a", "b"]
    assert record.failed(now=0).avoid_until == 2 * record.avoid_until
    assert Record("a").failed(now=0, weight=40).avoid_until == 300


def test_a_success_forgives() -> None:
    record = Record("a").failed(0).failed(0).succeeded(100, 1.0)
    assert (record.offences, record.avoid_until, record.bytes_per_s) == (0, 0.0, 100.0)


async def test_a_liar_is_avoided_and_the_next_one_answers() -> None:
    asked: list[str] = []

    async def ask(source: str, cid: Cid) -> bytes:
        asked.append(source)
        if source == "liar":
            raise BadBlock("7 bytes that are not it")
        return BLOCK

    sources = Sources(["liar", "honest"], ask, QUICK)
    assert await sources.get_block(CID) == BLOCK
    assert await sources.get_block(CID) == BLOCK
    assert asked == ["liar", "honest", "honest"]
    liar, honest = sources.records()
    assert (liar.offences, honest.num_blocks) == (4, 2)


async def test_a_slow_source_is_raced_and_its_rate_noted() -> None:
    cancelled = False

    async def ask(source: str, cid: Cid) -> bytes:
        nonlocal cancelled
        if source == "slow":
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                cancelled = True
                raise
        return BLOCK

    sources = Sources(["slow", "fast"], ask, QUICK)
    assert await asyncio.wait_for(sources.get_block(CID), 0.4) == BLOCK
    slow, fast = sources.records()
    assert cancelled
    assert slow.bytes_per_s is not None and fast.bytes_per_s is not None
    assert slow.bytes_per_s < fast.bytes_per_s


async def test_nobody_in_time_names_everyone_and_why() -> None:
    async def ask(source: str, cid: Cid) -> bytes:
        if source == "silent":
            await asyncio.sleep(30)
        if source == "down":
            raise SourceFailed("connection refused")
        raise BlockMissing(cid, [source])

    sources = Sources(["silent", "down", "without"], ask, Patience(race_after_s=0.01, deadline_s=0.1))
    with pytest.raises(BlockMissing) as missing:
        await sources.get_block(CID)
    assert sorted(missing.value.tried) == [
        "down: connection refused",
        "silent: no answer within 0.1 s",
        "without: does not hold it",
    ]
    assert [record.offences for record in sources.records()] == [1, 1, 0]


async def test_without_sources_the_block_is_missing() -> None:
    async def ask(source: str, cid: Cid) -> bytes:
        raise AssertionError(source)

    with pytest.raises(BlockMissing, match="no source"):
        await Sources([], ask, QUICK).get_block(CID)


async def test_cancelling_the_caller_cancels_the_requests() -> None:
    ended = asyncio.Event()

    async def ask(source: str, cid: Cid) -> bytes:
        try:
            await asyncio.sleep(30)
        finally:
            ended.set()
        return BLOCK

    task = asyncio.ensure_future(Sources(["a"], ask, QUICK).get_block(CID))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()
