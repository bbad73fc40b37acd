"""What a session at a node is made of, piece by piece: the inbox, an encoder's states, kept rows, recurrent caches."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from transformers import DynamicCache, MambaConfig

from harness import samples
from tallystick_model.stock import CannotForget, StockCache
from tallystick_node.session.inbox import Inbox
from tallystick_node.session.memory import Memory
from tallystick_node.session.record import Record
from tallystick_protocol.errors import BadFrame, BadPosition, ContextLengthExceeded, Overloaded, Unreachable
from tallystick_protocol.frames import DType, Frame, Kind, rows_frame
from tallystick_protocol.receipts import rows_root

ROW = torch.tensor([0.5, 0.5, 0.5]).numpy().tobytes()


def states(count: int, position: int) -> Frame:
    return rows_frame(Kind.MEMORY, DType.F32, [ROW] * count, position, {})


def test_states_are_reserved_before_they_are_kept_and_none_is_kept_where_there_is_no_room() -> None:
    reserved: list[int] = []

    def reserve(num_bytes: int) -> None:
        if sum(reserved) + num_bytes > 1000:
            raise Overloaded("full", retry_after_s=1)
        reserved.append(num_bytes)

    memory = Memory(samples.manifest(encoder_layers=1), 100, reserve)
    memory.take(states(5, 0))
    assert reserved == [5 * (100 + len(ROW))]
    for _ in range(3):
        with pytest.raises(Overloaded):
            memory.take(states(5, 5))
    with pytest.raises(BadPosition) as raised:
        memory.take(states(1, 0))
    assert raised.value.fields == {"expected": 5}
    with pytest.raises(ContextLengthExceeded):
        memory.take(states(60, 5))
    rows, root = memory.whole()
    assert rows.shape == (5, 3) and root == rows_root([ROW] * 5)


def test_rows_that_are_taken_over_are_as_if_computed_here() -> None:
    source, mine = Record(False), Record(False)
    rows = [bytes([at]) for at in range(40)]
    source.append(rows, [row * 3 for row in rows], [True] * 40)
    mine.append(rows[:33] + [b"x"], [b"out"] * 34, [False] * 34)
    assert mine.shares(source, 33) and not mine.shares(source, 34)
    mine.crop(33)
    mine.take(source, 33, 40)
    assert mine.new_rows(30, rows[30:]) == 10
    assert mine.claim(1).input == source.claim(1).input and mine.claim(1).output != source.claim(1).output
    assert mine.bytes_of(33, 40) == 21 and mine.size_bytes == 33 * 3 + 21


class Push:
    """A push connection whose frames the test gives."""

    def __init__(self) -> None:
        self.frames: asyncio.Queue[Frame] = asyncio.Queue()
        self.sent: list[Frame] = []

    async def send(self, frame: Frame) -> None:
        self.sent.append(frame)

    async def receive(self) -> Frame:
        frame = await self.frames.get()
        if frame.kind is Kind.CLOSE:
            raise Unreachable("gone")
        return frame

    async def close(self) -> None: ...


def step(position: int) -> Frame:
    return rows_frame(Kind.STEP, DType.F32, [ROW], position, {})


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_an_epoch_divides_what_a_crop_makes_void_from_what_follows_it() -> None:
    for crop_first in (True, False):
        push: Any = Push()
        inbox = Inbox(8, lambda: 0, 3)
        serving = asyncio.create_task(inbox.serve_push(push, 3))
        await settle()
        if crop_first:
            inbox.enter(inbox.announce(0), 4)
        for frame in (step(5), Frame(Kind.CROP, {"epoch": 4}), step(7)):
            push.frames.put_nowait(frame)
        if not crop_first:
            async with asyncio.timeout(5):
                assert (await inbox.next())[1].position == 5
            waiting = asyncio.create_task(inbox.next())
            await settle()
            assert not waiting.done(), "rows of a later epoch wait for the client's own word"
            inbox.enter(inbox.announce(4), 4)
            _, frame, _ = await waiting
        else:
            async with asyncio.timeout(5):
                _, frame, _ = await inbox.next()
        assert frame.position == 7 and push.sent[0].body == {"position": 0, "epoch": 3}
        push.frames.put_nowait(Frame(Kind.CLOSE))
        with pytest.raises(Unreachable):
            await serving


async def test_epochs_only_rise_and_a_clients_rows_belong_to_what_it_announced_before_them() -> None:
    inbox = Inbox(8, lambda: 0, 0)
    assert inbox.announce(0) == 1 and inbox.announce(1) == 1, "a refused fork's number is used again"
    for back in (-1, 1 << 31):
        with pytest.raises(BadFrame):
            inbox.announce(back)
    inbox.put(step(1))
    assert inbox.announce(5) == 5
    with pytest.raises(BadFrame):
        inbox.announce(4)
    inbox.put(step(2))
    inbox.enter(5, 1)
    async with asyncio.timeout(5):
        channel, frame, epoch = await inbox.next()
    assert channel is None and frame.position == 2 and epoch == 5


async def test_rows_before_those_that_were_taken_back_stay_though_the_crop_overtakes_them() -> None:
    """A replay that is on its way when drafts behind it are dropped."""
    inbox = Inbox(8, lambda: 0, 3)
    inbox.put(step(1))
    inbox.enter(inbox.announce(4), 5)
    inbox.enter(inbox.announce(5), 3)
    inbox.enter(inbox.announce(6), 7)
    async with asyncio.timeout(5):
        _, frame, epoch = await inbox.next()
    assert (frame.position, epoch, inbox.kept_of(epoch)) == (1, 3, 3)
    assert inbox.kept_of(2) == 0 and inbox.kept_of(5) == 7 and inbox.kept_of(6) > 1 << 60
    for later in range(7, 300):
        inbox.enter(later, 9)
    assert inbox.kept_of(3) == 0, "it is not known any more what was taken back"


@pytest.mark.parametrize("body", [{}, {"epoch": 0}, {"epoch": "1"}, {"epoch": 1 << 31}, {"epoch": -1}])
async def test_a_mark_that_leads_nowhere_ends_the_push_connection(body: dict[str, Any]) -> None:
    push: Any = Push()
    inbox = Inbox(8, lambda: 0, 0)
    push.frames.put_nowait(Frame(Kind.CROP, body))
    with pytest.raises(BadFrame):
        await inbox.serve_push(push, 0)


async def test_rows_of_a_push_connection_that_was_replaced_are_void_and_its_room_is_given_back() -> None:
    inbox, old, new = Inbox(8, lambda: 3, 0), Push(), Push()
    first: Any = old
    second: Any = new
    serving = [asyncio.create_task(inbox.serve_push(first, 0))]
    for at in range(12):
        old.frames.put_nowait(step(at))
    await settle()
    assert old.frames.qsize() > 0, "no more than a few wait in memory"
    serving.append(asyncio.create_task(inbox.serve_push(second, 0)))
    await settle()
    for at in range(20, 32):
        new.frames.put_nowait(step(at))
    async with asyncio.timeout(5):
        found = [(await inbox.next())[1].position for _ in range(12)]
    assert found == list(range(20, 32))
    assert new.sent[0].body == {"position": 3, "epoch": 0}
    inbox.close()
    await asyncio.gather(*serving, return_exceptions=True)


def recurrent(length: int) -> StockCache:
    config = MambaConfig(hidden_size=8, num_hidden_layers=2, vocab_size=16, state_size=4)
    cache = StockCache(config, 16)
    assert isinstance(cache.inner, DynamicCache)
    cache.commit(length)
    return cache


def test_a_recurrent_state_is_gone_on_from_whole_or_not_at_all() -> None:
    mine, theirs = recurrent(3), recurrent(5)
    with pytest.raises(CannotForget, match="open a new session"):
        mine.crop(2)
    with pytest.raises(CannotForget):
        mine.take(theirs, 2, 4)
    assert mine.length == 3
    mine.take(theirs, 2, 5)
    assert mine.length == 5
