"""Forks, encoder states, token types and dense rows at real nodes, by peers who mean harm."""

from __future__ import annotations

import asyncio
import secrets
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from conftest import Running
from harness import task_checkpoints as checkpoints
from harness.raw_session import Attacker, RawSession, Target, ids
from tallystick import AsyncClient
from tallystick_devnet.localchain import rich_key
from tallystick_protocol.chain.writes import Wallet
from tallystick_protocol.content.store import LocalStore
from tallystick_protocol.frames import DType, Frame, Kind, rows_frame
from tallystick_protocol.manifest import Manifest
from tallystick_protocol.receipts import Context, Receipt, pack_flags, rows_root
from tallystick_protocol.signing import Key
from tallystick_protocol.types import WINDOW, Span, Wei

FUNDS = Wei(10**18)


@dataclass(slots=True)
class Field:
    """A causal model's first and last span, an encoder-decoder's whole decoder, a bidirectional model; two clients."""

    attacker: Attacker
    other: Key
    first: Target
    last: Target
    decoder: Target
    encoder: Target
    manifests: dict[Target, Manifest]
    rows: list[bytes]
    """Hidden rows that enter the last span."""
    memory: list[bytes]
    """The encoder's states of the decoder's canary."""


@pytest.fixture(scope="module")
async def field(running: Running, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Field]:
    net, chain = running.net, running.net.chain.chain()
    folder = tmp_path_factory.mktemp("sides")

    def prepare() -> tuple[list[str], list[Path], list[Manifest]]:
        marian, translates = net.publish(checkpoints.marian(folder / "marian", seed=5), "raw marian")
        bert, fills = net.publish(checkpoints.bert(folder / "bert", "MaskedLM", max_position_embeddings=64), "raw bert")
        net.prepare(2)
        added = [net.add_node(marian, Span(2, 4)), net.add_node(bert, Span(0, 3))]
        for node in added:
            node.wait()
        return [node.url for node in added], [node.process.log for node in added], [translates, fills]

    urls, logs, (translates, fills) = await asyncio.to_thread(prepare)
    key, other = Key(secrets.token_bytes(32)), Key(secrets.token_bytes(32))
    attacker = Attacker(chain, key, running.manifest.layers)
    first, last, decoder, encoder = [
        await attacker.target(url) for url in (running.nodes[0].url, running.nodes[2].url, *urls)
    ]

    def fund() -> None:
        wallet = Wallet(chain, rich_key())
        deposits = [(target.node, FUNDS) for target in (first, last, decoder, encoder)]
        wallet.send("approving", chain.token.functions.approve(chain.escrow.address, 5 * FUNDS))
        wallet.send("funding", chain.escrow.functions.fund(key.address, deposits))
        wallet.send("funding", chain.escrow.functions.fund(other.address, deposits[:1]))

    await asyncio.to_thread(fund)
    store = LocalStore(net.folder / "content")

    def canary(manifest: Manifest, boundary: int) -> list[bytes]:
        block, size = store.get_block(manifest.canary.rows[boundary]), 4 * manifest.width
        return [block[at : at + size] for at in range(0, len(block), size)]

    yield Field(
        attacker, other, first, last, decoder, encoder,
        {first: running.manifest, last: running.manifest, decoder: translates, encoder: fills},
        canary(running.manifest, last.offer.start), canary(translates, 2),
    )  # fmt: skip
    for target in (first, last, decoder, encoder):
        await attacker.idle(target)
    await attacker.close()
    for log in logs:
        assert "Traceback" not in log.read_text()


async def settle(field: Field, session: RawSession) -> None:
    """Sign for everything that is owed at the session's opening."""
    assert session.target is not None
    await session.send(field.attacker.voucher(session.target, session.owed))
    assert await session.command(Kind.CLOSE) is None


async def computed(field: Field, session: RawSession, tokens: list[int]) -> RawSession:
    """The session with token ids computed and signed, and nothing left to read."""
    await session.step(ids(*tokens))
    await session.signed(len(tokens))
    session.frames.clear()
    return session


def context(field: Field, target: Target, receipt: Receipt, want: list[bool], **sides: Any) -> bool:
    """Whether a receipt's context says these wishes and these side inputs."""
    numerics = field.manifests[target].numerics
    values = {"token_types": None, "memory": None, **sides}
    return receipt.context == Context(numerics, "f32", 8, tuple(want), **values).digest()


# -- forks

BAD_FORKS: dict[str, tuple[str, int, Callable[[RawSession, RawSession, RawSession], dict[str, Any]]]] = {
    "from another client's session": ("session_unknown", 0, lambda me, s, o: {"from": o.id, "to": 2}),
    "from itself": ("session_unknown", 0, lambda me, s, o: {"from": me.id, "to": 2}),
    "from a session that is not open": ("session_unknown", 0, lambda me, s, o: {"from": bytes(32), "to": 2}),
    "from half an id": ("session_unknown", 0, lambda me, s, o: {"from": s.id[:16], "to": 2}),
    "from a text": ("bad_frame", 0, lambda me, s, o: {"from": "it", "to": 2}),
    "to a text": ("bad_frame", 0, lambda me, s, o: {"from": s.id, "to": "2"}),
    "beyond what the other has": ("bad_position", 0, lambda me, s, o: {"from": s.id, "to": 41}),
    "from beyond what it has itself": ("bad_position", 9, lambda me, s, o: {"from": s.id, "to": 20}),
    "backwards": ("bad_position", 2, lambda me, s, o: {"from": s.id, "to": 1}),
    "to below zero": ("bad_position", 0, lambda me, s, o: {"from": s.id, "to": -1}),
    "behind a row that differs": ("bad_position", 3, lambda me, s, o: {"from": s.id, "to": 20}),
    "beyond its length": ("context_length_exceeded", 2, lambda me, s, o: {"from": s.id, "to": 40}),
}


@pytest.mark.parametrize("what", BAD_FORKS)
async def test_a_bad_fork_is_refused_and_changes_nothing(field: Field, what: str) -> None:
    code, position, body = BAD_FORKS[what]
    open_ = field.attacker.open
    async with open_(field.first) as source, open_(field.first, max_length=36) as me:
        async with open_(field.first, field.other) as theirs:
            await settle(field, source)
            await computed(field, source, list(range(1, 41)))
            await computed(field, me, [1, 2, 99])
            await theirs.step(ids(1, 2))
            error = await me.command(Kind.FORK, body(me, source, theirs), position)
            assert error is not None and error["code"] == code
        assert await me.command(Kind.CROP, position=3) is None  # in the fork's place: all its rows stay
        await me.step(ids(5), 3)
        (receipt,) = await me.signed(4)
        assert receipt.input == rows_root(ids(1, 2, 99, 5))
    owed, _ = await field.attacker.owed(field.first)
    assert owed == source.owed + field.first.cost(40 + 4)


async def test_a_session_with_other_terms_cannot_be_gone_on_from(field: Field) -> None:
    """Its kept results are of another form: a receipt over them would be false."""
    open_ = field.attacker.open
    async with open_(field.last, top_k=5) as source, open_(field.last) as me:
        await settle(field, source)
        await source.step(field.rows[:4], want=[True] * 4)
        await source.signed(4)
        error = await me.command(Kind.FORK, {"from": source.id, "to": 4})
        assert error is not None and error["code"] == "bad_position"


async def test_forks_and_crops_in_a_chain_are_free_and_what_is_signed_is_true(field: Field) -> None:
    tokens = list(range(1, 41))
    open_ = field.attacker.open
    async with open_(field.first) as one, open_(field.first) as two, open_(field.first) as three:
        await settle(field, one)
        await one.step(ids(*tokens))
        expected = await one.signed(40)
        await two.step(ids(1, 2, 77))
        assert await two.command(Kind.FORK, {"from": one.id, "to": 40}, 2) is None
        assert not [frame for frame in two.frames if frame.kind is Kind.RECEIPT], "signed before the end was told"
        assert await two.command(Kind.CROP, position=35) is None
        assert await three.command(Kind.FORK, {"from": two.id, "to": 35}) is None
        assert await three.command(Kind.FORK, {"from": one.id, "to": 40}, 35) is None
        assert await three.command(Kind.FORK, {"from": one.id, "to": 40}) is None
        signed = await three.signed(40)
        # windows are signed as they become complete, and again after each fork: the last ones stand
        standing = {receipt.first: receipt for receipt in signed}
        for receipt in expected:
            again = standing[receipt.first]
            assert (again.input, again.output, again.session) == (receipt.input, receipt.output, three.id)
        await two.step(ids(36, 9), 35)
        assert (await two.signed(37))[-1].input == rows_root(ids(33, 34, 35, 36, 9))
    owed, _ = await field.attacker.owed(field.first)
    assert owed == one.owed + field.first.cost(40 + 3 + 2)


async def test_sessions_that_fork_from_each_other_at_once_do_not_wait_for_each_other(field: Field) -> None:
    open_ = field.attacker.open
    async with open_(field.first) as one, open_(field.first) as two:
        await settle(field, one)
        await computed(field, one, [1, 2, 3])
        await computed(field, two, [1, 2, 4, 5])

        async def fork(me: RawSession, source: RawSession) -> None:
            for _ in range(20):
                assert await me.command(Kind.FORK, {"from": source.id, "to": 2}) is None

        async with asyncio.timeout(20):
            await asyncio.gather(fork(one, two), fork(two, one))
        for session in (one, two):
            await session.step(ids(8), 2)
            assert (await session.signed(3))[-1].input == rows_root(ids(1, 2, 8))


async def test_forks_without_end_are_refused_until_rows_are_computed_again(field: Field) -> None:
    open_ = field.attacker.open
    async with open_(field.first) as source, open_(field.first) as session:
        await settle(field, source)
        await computed(field, source, [1, 2, 3])
        body = {"from": source.id, "to": 3}
        for _ in range(64):
            assert await session.command(Kind.FORK, body) is None
        refused = await session.command(Kind.FORK, body)
        assert refused is not None and refused["code"] == "rejected"
        assert await session.command(Kind.CROP, position=3) is None
        await session.step(ids(4), 3)
        await session.signed(4)
        assert await session.command(Kind.FORK, body) is None


# -- dense rows


async def test_dense_rows_are_the_whole_vocabulary_and_their_memory_is_reserved(field: Field) -> None:
    vocab, width = field.manifests[field.last].vocab, field.manifests[field.last].width
    async with field.attacker.open(field.last, top_k=0, max_length=WINDOW) as session:
        await settle(field, session)
        before = (await field.attacker.status(field.last))["reserved_bytes"]
        await session.step(field.rows[:WINDOW], want=[True] * WINDOW)
        found: list[bytes] = []
        while len(found) < WINDOW:
            found += (await session.next(Kind.RESULT)).rows()
        assert {len(row) for row in found} == {4 * vocab}
        receipt, _ = field.attacker.receipt(await session.next(Kind.RECEIPT))
        assert receipt.output == rows_root(found)
        after = (await field.attacker.status(field.last))["reserved_bytes"]
        assert after - before == max(0, 4 * WINDOW * (vocab - width))
        await session.send(field.attacker.voucher(field.last, session.owed + field.last.cost(WINDOW)))
        assert await session.command(Kind.CLOSE) is None
    await field.attacker.idle(field.last)


# -- an encoder's states


def memory(rows: list[bytes], position: int = 0, **body: Any) -> Frame:
    return rows_frame(Kind.MEMORY, DType.F32, rows, position, body)


BAD_MEMORIES: dict[str, tuple[str, Callable[[Field], Frame]]] = {
    "of another width": ("bad_tensor", lambda f: memory([f.memory[0] + bytes(4)])),
    "of token ids": ("bad_tensor", lambda f: rows_frame(Kind.MEMORY, DType.IDS, ids(1, 2), 0, {})),
    "of nothing": ("bad_tensor", lambda f: Frame(Kind.MEMORY)),
    "with NaN": ("bad_tensor", lambda f: memory([struct.pack("<f", float("nan")) + f.memory[0][4:]])),
    "of a norm that no encoder has": ("bad_tensor", lambda f: memory([struct.pack("<f", 1e9) + f.memory[0][4:]])),
    "that begins in the middle": ("bad_position", lambda f: memory(f.memory[:1], 1)),
    "that is too long": ("context_length_exceeded", lambda f: memory(f.memory[:1] * 129)),
    "that goes on in words": ("bad_frame", lambda f: memory(f.memory[:1], more="yes")),
}


@pytest.mark.parametrize("what", BAD_MEMORIES)
async def test_states_that_no_encoder_gave_are_refused(field: Field, what: str) -> None:
    code, forge = BAD_MEMORIES[what]
    async with field.attacker.open(field.decoder) as session:
        await session.send(forge(field))
        assert (await session.error())["code"] == code
    await field.attacker.idle(field.decoder)


async def test_states_come_once_are_reserved_and_bound_by_the_receipt(field: Field) -> None:
    target = field.decoder
    async with field.attacker.open(target) as session:
        await settle(field, session)
        before = (await field.attacker.status(target))["reserved_bytes"]
        await session.step(ids(0, 7, 9))  # it waits for them
        await session.send(memory(field.memory[:2], more=True))
        assert await session.command(Kind.FORK, {"from": bytes(32), "to": 0}) is not None
        assert not [frame for frame in session.frames if frame.kind is Kind.RECEIPT]
        await session.send(memory(field.memory[2:], 2))
        (receipt,) = await session.signed(3)
        assert context(field, target, receipt, [False] * 3, memory=rows_root(field.memory))
        reserved = (await field.attacker.status(target))["reserved_bytes"] - before
        assert reserved >= 8 * len(field.memory) * field.manifests[target].width, "keys and values of them, too"
        await session.send(memory(field.memory))
        assert (await session.error())["code"] == "bad_frame"
        async with field.attacker.open(target) as other:
            await other.send(memory(field.memory[:-1]))
            error = await other.command(Kind.FORK, {"from": session.id, "to": 3})
            assert error is not None and error["code"] == "bad_position", "it attends to another source"
        async with field.attacker.open(target) as same:
            await same.send(memory(field.memory))
            assert await same.command(Kind.FORK, {"from": session.id, "to": 3}) is None
            (again,) = await same.signed(3)
            assert (again.input, again.output, again.context) == (receipt.input, receipt.output, receipt.context)
        owed = (await field.attacker.owed(target))[0]
        assert owed > session.owed
        await session.send(field.attacker.voucher(target, owed))
        assert await session.command(Kind.CLOSE) is None
    await field.attacker.idle(target)


async def test_a_crop_makes_void_what_waits_for_states(field: Field) -> None:
    async with field.attacker.open(field.decoder) as session:
        await session.step(ids(0, 7, 9))
        assert await session.command(Kind.CROP, position=0) is None
        await session.send(memory(field.memory))
        await session.step(ids(0, 5))
        (receipt,) = await session.signed(2)
        assert receipt.input == rows_root(ids(0, 5))


async def test_only_decoders_take_states(field: Field) -> None:
    for target in (field.first, field.encoder):
        async with field.attacker.open(target) as session:
            await session.send(memory(field.memory))
            assert (await session.error())["code"] == "bad_frame"


# -- token types, and sessions that take one step


def typed(tokens: list[int], position: int = 0, **body: Any) -> Frame:
    want = {"want": pack_flags([False] * len(tokens))}
    return rows_frame(Kind.STEP, DType.IDS, ids(*tokens), position, {**want, **body})


BAD_TYPES: dict[str, tuple[str, str, list[Frame]]] = {
    "on a causal model": ("first", "bad_tensor", [typed([1, 2], types=b"\0\0")]),
    "too few": ("encoder", "bad_tensor", [typed([1, 2], types=b"\0")]),
    "too many": ("encoder", "bad_tensor", [typed([1, 2], types=b"\0\0\0")]),
    "that the model has not": ("encoder", "bad_tensor", [typed([1, 2], types=b"\0\2")]),
    "in words": ("encoder", "bad_frame", [typed([1, 2], types="ab")]),
    "only in the first frame": ("encoder", "bad_frame", [typed([1], types=b"\0", more=True), typed([2], 1)]),
    "only in the second frame": ("encoder", "bad_frame", [typed([1], more=True), typed([2], 1, types=b"\0")]),
    "at another place": ("encoder", "bad_position", [typed([1], types=b"\0", more=True), typed([2], 0, types=b"\0")]),
    "from the middle on": ("encoder", "bad_position", [typed([1, 2], 5, types=b"\0\0")]),
}


@pytest.mark.parametrize("what", BAD_TYPES)
async def test_bad_token_types_are_refused_and_nothing_is_computed(field: Field, what: str) -> None:
    name, code, frames = BAD_TYPES[what]
    async with field.attacker.open(getattr(field, name), max_length=16) as session:
        for frame in frames:
            await session.send(frame)
        error = await session.error()
        assert (error["code"], error["at"]) == (code, 0)


async def test_what_is_signed_says_the_token_types_of_this_step_and_of_no_earlier_one(field: Field) -> None:
    target = field.encoder
    async with field.attacker.open(target, max_length=16) as session:
        await settle(field, session)
        await session.send(typed([5, 6], types=b"\0\1", more=True))
        await session.send(typed([7], 2, types=b"\1"))
        (receipt,) = await session.signed(3)
        types = rows_root([b"\0", b"\1", b"\1"])
        assert context(field, target, receipt, [False] * 3, token_types=types)
        assert await session.command(Kind.CROP, position=0) is None
        await session.send(typed([5, 6, 7]))
        (plain,) = await session.signed(3)
        assert context(field, target, plain, [False] * 3) and plain.input == receipt.input
        async with field.attacker.open(target, max_length=16) as other:
            for last in (2, 3):
                error = await other.command(Kind.FORK, {"from": session.id, "to": last})
                assert error is not None and error["code"] == "bad_position", "its rows depend on all of them"
        await session.send(field.attacker.voucher(target, session.owed + target.cost(6)))
        await session.command(Kind.CLOSE)


# -- push connections


@pytest.mark.nightly
async def test_a_session_of_minutes_keeps_its_push_connections(running: Running) -> None:
    """Nodes drop connections on which pings are not answered for 20 s."""
    async with AsyncClient(running.key, running.net.settings()) as client:
        async with client.decoder(running.id, max_length=64, verify="full") as decoder:
            for at in range(3):
                await decoder.feed([at + 1])
                await decoder.row(at)
                await asyncio.sleep(20)
            await decoder.crop(1)
            await decoder.feed([7])
            await decoder.row(1)
            await decoder.finish()
            assert not decoder.verdict.replaced and decoder.verdict.failed == 0
