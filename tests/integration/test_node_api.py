"""Real node processes against peers who mean harm: every refusal has its code, and nobody else notices anything."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import secrets
import struct
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from conftest import Running
from harness.raw_session import Attacker, Connection, Identity, RawSession, Target, ids, raised
from tallystick import AsyncClient
from tallystick_devnet.localchain import rich_key
from tallystick_node.server import create_app
from tallystick_node.session.registry import Limits, Sessions
from tallystick_protocol.chain.writes import Wallet
from tallystick_protocol.content.cid import Cid
from tallystick_protocol.content.store import LocalStore
from tallystick_protocol.errors import Rejected
from tallystick_protocol.frames import HEADER, MAGIC, MAX_FRAME, DType, Frame, Kind, rows_frame
from tallystick_protocol.receipts import Receipt, pack_flags
from tallystick_protocol.signing import Key, digest, seal, staking_domain, to_words
from tallystick_protocol.types import WINDOW, ZERO32, Wei
from tallystick_protocol.vouchers import Voucher

FUNDS = Wei(10**18)
ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
SILENCE_S = 10.0
"""How long a node waits for a request, or for a first frame."""


@dataclass(slots=True)
class Field:
    """One node of each span and a spare one; a client with money at each, another one, and two hops of our own."""

    attacker: Attacker
    first: Target
    middle: Target
    last: Target
    spare: Target
    other: Key
    hop: Identity
    stranger: Identity
    rows: dict[int, list[bytes]]
    """The canary's hidden rows at layer boundaries, which are true rows for its ids."""
    canary: list[bytes]

    def opening(self, **changes: Any) -> bytes:
        return seal(self.attacker.domain, self.attacker.opening(self.first, **changes), self.attacker.key)


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process holds."""

    rss_bytes: int
    num_files: int

    @classmethod
    def of(cls, pid: int) -> Usage:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return cls(pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(f"/proc/{pid}/fd")))


@pytest.fixture(scope="module", autouse=True)
def before(running: Running) -> dict[str, Usage]:
    """What every node held before it was attacked."""
    return {node.name: Usage.of(node.process.pid) for node in running.nodes}


@pytest.fixture(scope="module", autouse=True)
async def silent(running: Running) -> AsyncIterator[list[Silence]]:
    """Peers that have begun something and never go on; they wait in the background while the other tests run."""
    host, port = address(running.nodes[6].url)
    upgrade = (
        f"GET /v1/sessions HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    begun = {
        "nothing": b"",
        "half a head": b"GET /health HTTP/1.1\r\nHost: a\r\nX-",
        "a websocket and no frame": upgrade.encode(),
    }
    waiting = [await Silence.begin(what, host, port, sent) for what, sent in begun.items()]
    head = b"GET /health HTTP/1.1\r\nHost: a\r\n"
    waiting.append(await Silence.begin("a byte of head per second", host, port, head + b"X-", drip=b"a"))
    waiting.append(await Silence.begin("another head, a byte per second", host, port, head + b"\r\n", drip=b"a"))
    body = b"POST /health HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n"
    waiting.append(await Silence.begin("a byte of body per second", host, port, body, drip=b"a"))
    yield waiting
    for peer in waiting:
        peer.stop()


@pytest.fixture(scope="module")
async def field(running: Running) -> AsyncIterator[Field]:
    chain = running.net.chain.chain()
    client, other = Key(secrets.token_bytes(32)), Key(secrets.token_bytes(32))
    attacker = Attacker(chain, client, running.manifest.layers)
    nodes = [running.nodes[index] for index in (0, 1, 2, 6)]
    first, middle, last, spare = [await attacker.target(node.url) for node in nodes]

    def prepare() -> list[Identity]:
        wallet = Wallet(chain, rich_key())
        deposits = [(target.node, FUNDS) for target in (first, middle, last, spare)]
        wallet.send("approving", chain.token.functions.approve(chain.escrow.address, 5 * FUNDS))
        wallet.send("funding", chain.escrow.functions.fund(client.address, deposits))
        wallet.send("funding", chain.escrow.functions.fund(other.address, deposits[:1]))
        hops = []
        for _ in range(2):
            cold = Key(secrets.token_bytes(32))
            running.net.chain.give(cold.address, tokens=Wei(0))
            hops.append(attacker.bind(cold, Key(secrets.token_bytes(32))))
        return hops

    hop, stranger = await asyncio.to_thread(prepare)
    store, canary = LocalStore(running.net.folder / "content"), running.manifest.canary
    size = 4 * running.manifest.width
    rows = {}
    for boundary in {0, first.offer.end, middle.offer.end, running.manifest.layers}:
        block = store.get_block(canary.rows[boundary])
        rows[boundary] = [block[at : at + size] for at in range(0, len(block), size)]
    yield Field(attacker, first, middle, last, spare, other, hop, stranger, rows, ids(*canary.ids))
    await attacker.close()


@pytest.fixture
async def session(field: Field) -> AsyncIterator[RawSession]:
    """A session at the first span, everything owed signed for, two rows computed."""
    async with field.attacker.open(field.first) as opened:
        await pay_up(field, opened)
        await opened.step(ids(1, 2))
        await opened.signed(2)
        opened.frames.clear()
        yield opened


async def pay_up(field: Field, session: RawSession) -> None:
    """Sign for everything that was owed when the session was opened."""
    assert session.target is not None
    await session.send(field.attacker.voucher(session.target, session.owed))
    assert await session.command(Kind.CLOSE) is None, "the honest voucher was refused"


async def goes_on(field: Field, session: RawSession) -> None:
    """The session still computes, signs, and charges for what it computed and nothing else."""
    assert session.target is not None
    session.frames.clear()
    await session.step(ids(3, 4, 5), 2)
    (receipt,) = await session.signed(5)
    assert receipt.input == root(ids(1, 2, 3, 4, 5))
    owed, _ = await field.attacker.owed(session.target)
    assert owed == session.owed + session.target.cost(5)


# -- vouchers


def twin(sealed: bytes) -> bytes:
    """The same voucher with the other s: valid for the curve, refused by the contract."""
    words, r, s, v = sealed[:-65], sealed[-65:-33], sealed[-33:-1], sealed[-1]
    return words + r + (ORDER - int.from_bytes(s, "big")).to_bytes(32, "big") + bytes([55 - v])


def sealed_voucher(field: Field, **changes: Any) -> bytes:
    total = changes.pop("total", 10**15)
    return cast(bytes, field.attacker.voucher(field.first, total, **changes).body["voucher"])


BAD_VOUCHERS: dict[str, tuple[str, Callable[[Field, int], bytes]]] = {
    "signed by somebody else": ("bad_voucher", lambda f, _: sealed_voucher(f, signer=f.other)),
    "signed by the node": ("bad_voucher", lambda f, _: sealed_voucher(f, signer=f.hop.hot)),
    "lower than one before": ("bad_voucher", lambda f, signed: sealed_voucher(f, total=signed - 1)),
    "zero": ("bad_voucher", lambda f, _: sealed_voucher(f, total=0)),
    "lower, with a garbage signature": (
        "bad_signature",
        lambda f, signed: sealed_voucher(f, total=signed - 1)[:-65] + bytes(64) + b"\x1b",
    ),
    "made out to another node": ("bad_voucher", lambda f, _: sealed_voucher(f, node=f.middle.node)),
    "another client's": ("bad_voucher", lambda f, _: sealed_voucher(f, key=f.other)),
    "in another client's name": ("bad_voucher", lambda f, _: sealed_voucher(f, client=f.other.address)),
    "beyond the channel's funds": ("insufficient_funds", lambda f, _: sealed_voucher(f, total=FUNDS + 1)),
    "beyond all money": ("insufficient_funds", lambda f, _: sealed_voucher(f, total=2**256 - 1)),
    "the high-s twin": ("bad_signature", lambda f, _: twin(sealed_voucher(f))),
    "without a signature": ("bad_message", lambda f, _: sealed_voucher(f)[:-65]),
    "64 bytes of signature": ("bad_message", lambda f, _: sealed_voucher(f)[:-1]),
    "66 bytes of signature": ("bad_message", lambda f, _: sealed_voucher(f) + b"\0"),
    "v is 0": ("bad_signature", lambda f, _: sealed_voucher(f)[:-1] + b"\0"),
    "r is the order": (
        "bad_signature",
        lambda f, _: sealed_voucher(f)[:-65] + ORDER.to_bytes(32, "big") + sealed_voucher(f)[-33:],
    ),
    "s is zero": ("bad_signature", lambda f, _: sealed_voucher(f)[:-33] + bytes(32) + b"\x1b"),
    "for another chain": (
        "bad_voucher",
        lambda f, _: seal(
            replace(f.attacker.escrow, chain_id=1),
            Voucher(f.attacker.key.address, f.first.node, 10**15),
            f.attacker.key,
        ),
    ),
    "for another contract": (
        "bad_voucher",
        lambda f, _: seal(f.attacker.domain, Voucher(f.attacker.key.address, f.first.node, 10**15), f.attacker.key),
    ),
    "empty": ("bad_message", lambda f, _: b""),
    "with dirty padding": ("bad_message", lambda f, _: b"\1" + sealed_voucher(f)[1:]),
}


@pytest.mark.parametrize("what", BAD_VOUCHERS)
async def test_a_bad_voucher_is_refused_by_its_code_and_changes_nothing(
    field: Field, session: RawSession, what: str
) -> None:
    code, forge = BAD_VOUCHERS[what]
    owed, held = await field.attacker.owed(field.first)
    await session.send(Frame(Kind.VOUCHER, {"voucher": forge(field, session.owed)}))
    assert (await session.error())["code"] == code
    assert await field.attacker.owed(field.first) == (owed, held)
    await goes_on(field, session)


async def test_a_replayed_voucher_is_credited_once(field: Field, session: RawSession) -> None:
    total = session.owed + field.first.cost(2)
    voucher = field.attacker.voucher(field.first, total)
    for _ in range(3):
        await session.send(voucher)
    assert await session.command(Kind.CLOSE) is None and not session.frames
    assert await field.attacker.owed(field.first) == (total, voucher.body["voucher"])
    await goes_on(field, session)


async def test_a_voucher_on_another_session_pays_the_same_ledger(field: Field, session: RawSession) -> None:
    total = session.owed + field.first.cost(2)
    async with field.attacker.open(field.first) as second:
        assert second.owed == total
        await second.send(field.attacker.voucher(field.first, total))
        assert await second.command(Kind.CLOSE) is None
    _, held = await field.attacker.owed(field.first)
    assert held == field.attacker.voucher(field.first, total).body["voucher"]


# -- credit


def credit_rows(target: Target, sessions: int = 1) -> int:
    """Rows that a client gets before a voucher: the offer's credit, and a window for each of its open sessions."""
    return int(target.offer.credit) // target.cost(1) + WINDOW * sessions


async def test_service_stops_at_the_credit_limit_and_goes_on_after_a_voucher(field: Field) -> None:
    target, limit = field.first, credit_rows(field.first)
    async with field.attacker.open(target) as session:
        await pay_up(field, session)
        await session.step(ids(*[7] * limit))
        await session.signed(limit)
        await session.step(ids(8), limit)
        due = await session.error()
        assert (due["code"], due["owed"]) == ("payment_required", str(session.owed + target.cost(limit)))
        await session.send(field.attacker.voucher(target, session.owed + target.cost(limit)))
        await session.signed(limit + 1)


async def test_sessions_side_by_side_do_not_multiply_the_credit(field: Field) -> None:
    """What is owed and not signed for stays within one credit, and a window for each of a client's open sessions."""
    target, count = field.first, 4
    rows = credit_rows(target, count) * 3 // 4
    async with field.attacker.open(target) as payer:
        await pay_up(field, payer)
        before = payer.owed
    async with asyncio.TaskGroup() as tasks, many(field, target, count) as sessions:
        for session in sessions:
            tasks.create_task(session.step(ids(*[9] * rows)))
        told = [tasks.create_task(one_of(session, Kind.RECEIPT, Kind.ERROR)) for session in sessions]
        await asyncio.wait(told)
        assert {task.result().kind for task in told} == {Kind.RECEIPT, Kind.ERROR}
        owed, _ = await field.attacker.owed(target)
        assert target.cost(rows) // 2 < owed - before <= target.cost(credit_rows(target, count))


async def test_a_voucher_wakes_every_session_of_its_client(field: Field) -> None:
    target, limit = field.first, credit_rows(field.first, 2)
    async with field.attacker.open(target) as one, field.attacker.open(target) as two:
        await pay_up(field, one)
        await one.step(ids(*[7] * limit))
        await one.signed(limit)
        await two.step(ids(8))
        assert (await two.error())["code"] == "payment_required"
        await one.send(field.attacker.voucher(target, one.owed + target.cost(limit)))
        await two.signed(1)


async def test_who_has_no_money_in_the_channel_gets_no_session_and_takes_no_room(field: Field) -> None:
    pauper = Key(secrets.token_bytes(32))
    await field.attacker.idle(field.first)
    sealed = seal(field.attacker.domain, field.attacker.opening(field.first, pauper), pauper)
    for _ in range(70):
        assert await field.attacker.refusal(field.first, sealed) == "insufficient_funds"
    after = await field.attacker.status(field.first)
    assert (after["sessions"], after["reserved_bytes"]) == (0, 0)


# -- opening

NOW = int(time.time())
BAD_OPENINGS: dict[str, tuple[str, Callable[[Field], bytes]]] = {
    "unsigned": ("bad_signature", lambda f: f.opening()[:-65] + bytes(65)),
    "without a signature": ("bad_message", lambda f: f.opening()[:-65]),
    "cut short": ("bad_message", lambda f: f.opening()[:100]),
    "empty": ("bad_message", lambda f: b""),
    "signed by somebody else": (
        "bad_signature",
        lambda f: seal(f.attacker.domain, f.attacker.opening(f.first), f.other),
    ),
    "the high-s twin": ("bad_signature", lambda f: twin(f.opening())),
    "for another chain": (
        "bad_signature",
        lambda f: seal(replace(f.attacker.domain, chain_id=1), f.attacker.opening(f.first), f.attacker.key),
    ),
    "for another contract": (
        "bad_signature",
        lambda f: seal(
            staking_domain(f.attacker.domain.chain_id, f.first.node), f.attacker.opening(f.first), f.attacker.key
        ),
    ),
    "another node's": ("rejected", lambda f: f.opening(node=f.middle.node)),
    "bound to a TLS key that nobody showed": ("rejected", lambda f: f.opening(spki=secrets.token_bytes(32))),
    "expired": ("rejected", lambda f: f.opening(issued=NOW - 7200, expires=NOW - 3600)),
    "from the future": ("rejected", lambda f: f.opening(issued=NOW + 3600, expires=NOW + 7200)),
    "valid for ever": ("rejected", lambda f: f.opening(expires=2**64 - 1)),
    "under an unknown offer": ("rejected", lambda f: f.opening(offer=secrets.token_bytes(32))),
    "under another node's offer": ("rejected", lambda f: f.opening(offer=f.middle.offer_digest)),
    "for another model": ("unknown_model", lambda f: f.opening(model=secrets.token_bytes(32))),
    "for no layers of its own": (
        "wrong_layers",
        lambda f: f.opening(start=f.first.offer.end, end=f.first.offer.end + 1),
    ),
    "for too many layers": ("wrong_layers", lambda f: f.opening(end=f.first.offer.end + 1)),
    "for another span": (
        "wrong_layers",
        lambda f: f.opening(start=f.middle.offer.start, end=f.middle.offer.end),
    ),
    "for no positions": ("context_length_exceeded", lambda f: f.opening(max_length=0)),
    "for too many positions": ("context_length_exceeded", lambda f: f.opening(max_length=f.first.offer.max_length + 1)),
    "for all positions": ("context_length_exceeded", lambda f: f.opening(max_length=2**32 - 1)),
    "top_k beyond the limit": ("bad_message", lambda f: f.opening(top_k=1025)),
    "top_k of 65535": ("bad_message", lambda f: f.opening(top_k=65535)),
}


@pytest.mark.parametrize("what", BAD_OPENINGS)
async def test_a_bad_opening_is_refused_by_its_code_and_takes_no_room(field: Field, what: str) -> None:
    code, forge = BAD_OPENINGS[what]
    assert await field.attacker.refusal(field.first, forge(field)) == code
    await field.attacker.idle(field.first)


async def test_every_flipped_byte_of_an_opening_is_refused(field: Field) -> None:
    good = field.opening()
    for at in range(0, len(good), 13):
        flipped = good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :]
        code = await field.attacker.refusal(field.first, flipped)
        assert code in ("bad_signature", "bad_message"), f"byte {at}: {code}"


async def test_a_reversed_span_is_refused_before_anything_else(field: Field) -> None:
    asked = field.attacker.opening(field.first)
    words = bytearray(to_words(asked))
    words[7 * 32 - 1], words[8 * 32 - 1] = words[8 * 32 - 1], words[7 * 32 - 1]
    assert await field.attacker.refusal(field.first, bytes(words) + bytes(65)) == "bad_message"


async def test_a_nonce_opens_one_session_and_never_another(field: Field) -> None:
    sealed = field.opening()
    async with field.attacker.connect(field.first) as connection:
        await connection.send(Frame(Kind.OPEN, {"open": sealed}))
        await connection.next(Kind.OPENED)
        assert await field.attacker.refusal(field.first, sealed) == "session_exists"
        assert (await field.attacker.status(field.first))["sessions"] == 1
    await field.attacker.idle(field.first)
    assert await field.attacker.refusal(field.first, sealed) == "session_exists"
    await field.attacker.idle(field.first)


async def test_an_expired_offer_opens_nothing(field: Field) -> None:
    """A short path: an offer holds for a minute at least, so the clock is ours here."""
    offer = replace(field.first.offer, expires=NOW - 1)
    its_digest = digest(field.attacker.domain, offer)
    shop = SimpleNamespace(
        domain=field.attacker.domain,
        node=field.first.node,
        model=field.first.offer.model,
        clock=lambda: NOW,
        engine=SimpleNamespace(model=None, part=lambda span: SimpleNamespace(span=span)),
    )
    sessions = Sessions(cast(Any, shop), field.hop.hot, {its_digest: offer}, Limits(1 << 30, 1, 0.0))
    sealed = field.opening(offer=its_digest, issued=NOW)
    channel = cast(Any, SimpleNamespace(spki=ZERO32))
    error = await raised(sessions.serve_client(channel, Frame(Kind.OPEN, {"open": sealed})))
    assert isinstance(error, Rejected) and "offer" in error.message and len(sessions) == 0


# -- steps


def step(rows: Sequence[bytes], position: int, dtype: DType = DType.IDS, **body: Any) -> Frame:
    return rows_frame(Kind.STEP, dtype, list(rows), position, {"want": pack_flags([False] * len(rows)), **body})


BAD_STEPS: dict[str, tuple[str, Callable[[Field], Frame]]] = {
    "skips a position": ("bad_position", lambda f: step(ids(3), 3)),
    "skips to the end of time": ("bad_position", lambda f: step(ids(3), 1 << 22)),
    "repeats a position with another id": ("bad_position", lambda f: step(ids(9), 1)),
    "goes on from a position with another id": ("bad_position", lambda f: step(ids(1, 9, 3), 0)),
    "holds an id beyond the vocabulary": ("bad_tensor", lambda f: step(ids(3, 1 << 20), 2)),
    "holds the largest id": ("bad_tensor", lambda f: step(ids(2**32 - 1), 2)),
    "holds hidden rows": ("bad_tensor", lambda f: step([f.rows[0][0]], 2, DType.F32)),
    "holds logits": ("bad_tensor", lambda f: step([bytes(8)], 2, DType.TOP_K)),
    "holds two ids a row": ("bad_tensor", lambda f: step([bytes(8)], 2)),
    "holds no rows": ("bad_tensor", lambda f: Frame(Kind.STEP, {}, 2)),
    "is longer than agreed": ("context_length_exceeded", lambda f: step(ids(*[3] * f.first.offer.max_length), 2)),
    "wants more positions than it has": ("bad_frame", lambda f: step(ids(3), 2, want=b"\1\0")),
    "wants fewer positions than it has": ("bad_frame", lambda f: step(ids(*[3] * 9), 2, want=b"\1")),
    "wants a position that is padding": ("bad_frame", lambda f: step(ids(3), 2, want=b"\2")),
    "wants in words": ("bad_frame", lambda f: step(ids(3), 2, want="yes")),
}


@pytest.mark.parametrize("what", BAD_STEPS)
async def test_a_bad_step_is_refused_by_its_code_and_computes_nothing(
    field: Field, session: RawSession, what: str
) -> None:
    code, forge = BAD_STEPS[what]
    await session.send(forge(field))
    error = await session.error()
    assert (error["code"], error["at"]) == (code, 2)
    await goes_on(field, session)


async def test_rows_beyond_what_was_agreed_are_refused_before_memory_is_taken(field: Field) -> None:
    async with field.attacker.open(field.first, max_length=WINDOW) as session:
        reserved = (await field.attacker.status(field.first))["reserved_bytes"]
        await session.step(ids(*[3] * (WINDOW + 1)))
        assert (await session.error())["code"] == "context_length_exceeded"
        await session.step(ids(*[3] * WINDOW))
        await session.next(Kind.RECEIPT)
        await session.step(ids(3), WINDOW)
        assert (await session.error())["code"] == "context_length_exceeded"
        assert (await field.attacker.status(field.first))["reserved_bytes"] == reserved


async def test_a_repeated_step_is_answered_from_memory_and_not_charged(field: Field) -> None:
    target, rows = field.last, field.rows[field.last.offer.start][:4]
    async with field.attacker.open(target) as session:
        await session.step(rows, want=[False, False, False, True])
        answer = await session.next(Kind.RESULT)
        for _ in range(3):
            await session.step(rows, want=[False, False, False, True])
            again = await session.next(Kind.RESULT)
            assert (again.position, again.rows()) == (answer.position, answer.rows())
        await session.signed(4)
    assert (await field.attacker.owed(target))[0] == session.owed + target.cost(4)


def changed(row: bytes, *values: float) -> bytes:
    """A hidden row whose first values are others."""
    return struct.pack(f"<{len(values)}f", *values) + row[4 * len(values) :]


BAD_ROWS: dict[str, Callable[[bytes], bytes]] = {
    "NaN": lambda row: changed(row, float("nan")),
    "infinity": lambda row: changed(row, float("inf")),
    "minus infinity": lambda row: changed(row, float("-inf")),
    "a denormal": lambda row: changed(row, 1e-42),
    "a huge value": lambda row: changed(row, 1e9),
    "the largest value": lambda row: changed(row, 3.4e38, 3.4e38),
    "nothing but zeros": lambda row: bytes(len(row)),
    "too few values": lambda row: row[4:],
    "too many values": lambda row: row + bytes(4),
}


@pytest.mark.parametrize("what", BAD_ROWS)
async def test_hidden_rows_that_no_layer_would_make_are_refused(field: Field, what: str) -> None:
    rows = field.rows[field.middle.offer.start]
    async with field.attacker.open(field.middle) as session:
        await session.step(rows[:2])
        bad = BAD_ROWS[what](rows[2])
        await session.step([bad, bad] if len(bad) != len(rows[2]) else [rows[2], bad], 2)
        error = await session.error()
        assert (error["code"], error["at"]) == ("bad_tensor", 2)
        await session.step(rows[2:WINDOW], 2)
        receipt, _ = field.attacker.receipt(await session.next(Kind.RECEIPT))
        assert receipt.output == root(field.rows[field.middle.offer.end][:WINDOW])
        await session.send(field.attacker.voucher(field.middle, session.owed + field.middle.cost(WINDOW)))
        assert await session.command(Kind.CLOSE) is None


# -- frames that are none


def header(
    kind: int = Kind.STEP, dtype: int = 0, shape: tuple[int, int, int] = (0, 0, 0), body: int = 1, tensor: int = 0
) -> bytes:
    return HEADER.pack(MAGIC, 1, kind, dtype, *shape, 0, body, tensor)


GARBAGE: dict[str, bytes] = {
    "nothing": b"",
    "random bytes": secrets.token_bytes(333),
    "half a header": header()[:17],
    "another magic": b"HTTP" + header()[4:] + b"\x80",
    "another version": header()[:4] + b"\x09" + header()[5:] + b"\x80",
    "an unknown kind": header(kind=99) + b"\x80",
    "an unknown dtype": header(dtype=9) + b"\x80",
    "less than it says": header(body=100) + b"\x80",
    "more than it says": header() + b"\x80\x80",
    "a tensor that is not its shape": header(dtype=1, shape=(1, 2, 1), tensor=4) + b"\x80" + bytes(4),
    "a shape that overflows": header(dtype=1, shape=(2**32 - 1, 2**32 - 1, 2**32 - 1), tensor=4) + b"\x80" + bytes(4),
    "two sessions": header(dtype=1, shape=(2, 1, 1), tensor=8) + b"\x80" + bytes(8),
    "a body that is a list": header() + b"\x90",
    "a body with a key twice": header(body=5) + b"\x82\xa1a\x01\xa1"[:5],
    "a body nested without end": header(body=4096) + b"\x81\xa1a" + b"\x91" * 4093,
    "a body that announces a giant": header(body=5) + b"\xdf\xff\xff\xff\xff",
    "an extension type": header(body=6) + b"\x81\xa1a\xd4\x01\x00",
}


@pytest.mark.parametrize("what", GARBAGE)
async def test_garbage_in_a_session_is_named_and_ends_it(field: Field, what: str) -> None:
    async with field.attacker.open(field.first) as session:
        await session.send_bytes(GARBAGE[what])
        assert (await session.error())["code"] == "bad_frame"
        await session.until_closed()
    await field.attacker.idle(field.first)


@pytest.mark.parametrize("what", ["nothing", "random bytes", "an unknown kind", "a body nested without end"])
async def test_garbage_instead_of_an_opening_is_named_and_ends_the_connection(field: Field, what: str) -> None:
    async with field.attacker.connect(field.first) as connection:
        await connection.send_bytes(GARBAGE[what])
        assert (await connection.error())["code"] == "bad_frame"
        await connection.until_closed()


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind not in (Kind.OPEN, Kind.PUSH_OPEN)])
async def test_a_connection_begins_with_an_opening(field: Field, kind: Kind) -> None:
    async with field.attacker.connect(field.first) as connection:
        await connection.send(Frame(kind))
        assert (await connection.error())["code"] == "bad_frame"
        await connection.until_closed()


async def test_text_and_frames_beyond_the_limit_end_the_connection_and_nothing_else(field: Field) -> None:
    for opened in (False, True):
        async with field.attacker.open(field.first) if opened else field.attacker.connect(field.first) as connection:
            await connection.send_text("OPEN")
            assert (await connection.error())["code"] == "bad_frame"
            await connection.until_closed()
        async with field.attacker.open(field.first) if opened else field.attacker.connect(field.first) as connection:
            with suppress(Exception):  # the node may be gone before all of it is sent
                await connection.send_bytes(bytes(MAX_FRAME + 1))
            await connection.until_closed()
    await field.attacker.idle(field.first)


async def test_text_that_is_no_unicode_ends_the_connection_without_a_stack_trace(
    running: Running, field: Field
) -> None:
    log = running.node(field.first.node).process.log
    async with field.attacker.connect(field.first) as connection:
        masked = bytes(byte ^ mask for byte, mask in zip(b"\xff\xfe\xfd\xfc", b"\1\2\3\4", strict=True))
        transport = connection.channel._socket._response.connection.transport  # type: ignore[union-attr]
        transport.write(b"\x81\x84\1\2\3\4" + masked)  # type: ignore[union-attr]
        await connection.until_closed()
    assert "Traceback" not in log.read_text()


BAD_COMMANDS: dict[str, tuple[str, Callable[[Field, RawSession], Frame]]] = {
    "OPEN": ("bad_frame", lambda f, s: Frame(Kind.OPEN, {"open": f.opening()})),
    "PUSH_OPEN": ("bad_frame", lambda f, s: Frame(Kind.PUSH_OPEN)),
    "OPENED": ("bad_frame", lambda f, s: Frame(Kind.OPENED)),
    "RESULT": ("bad_frame", lambda f, s: Frame(Kind.RESULT)),
    "DONE": ("bad_frame", lambda f, s: Frame(Kind.DONE, {"of": 1})),
    "ERROR": ("bad_frame", lambda f, s: Frame(Kind.ERROR, {"code": "x"})),
    "a receipt of its own": ("bad_frame", lambda f, s: Frame(Kind.RECEIPT, {"receipt": bytes(17 * 32 + 65)})),
    "a replay of nothing": ("bad_frame", lambda f, s: Frame(Kind.REPLAY)),
    "a replay to nobody": ("unreachable", lambda f, s: replay(f.hop.address, s.id)),
    "a replay to a name": ("*", lambda f, s: replay("everybody.eth", s.id)),
    "a replay to a long name": ("*", lambda f, s: replay("A" * 50_000, s.id)),
    "a replay backwards": ("*", lambda f, s: replay(f.hop.address, s.id, 2, 1)),
    "a replay from below zero": ("*", lambda f, s: replay(f.hop.address, s.id, -1, 1)),
    "a replay of what is not there": ("bad_position", lambda f, s: replay(f.hop.address, s.id, 0, 3)),
    "a replay into no session": ("*", lambda f, s: replay(f.middle.node, b"short", 0, 2)),
    "a replay into an unknown session": ("session_unknown", lambda f, s: replay(f.middle.node, bytes(32), 0, 2)),
    "a replay to the hop itself": ("unauthorized", lambda f, s: replay(f.first.node, s.id, 0, 2)),
    "a route to nobody": ("unreachable", lambda f, s: Frame(Kind.ROUTE, {"next": f.hop.address})),
    "a route to a name": ("*", lambda f, s: Frame(Kind.ROUTE, {"next": "../../etc/passwd"})),
    "a route to a number": ("bad_frame", lambda f, s: Frame(Kind.ROUTE, {"next": 7})),
    "a route from a name": ("*", lambda f, s: Frame(Kind.ROUTE, {"previous": "<script>"})),
}


def replay(to: str, session: bytes, first: int = 0, last: int = 2) -> Frame:
    return Frame(Kind.REPLAY, {"to": to, "session": session, "first": first, "last": last})


@pytest.mark.parametrize("what", BAD_COMMANDS)
async def test_a_bad_command_is_refused_and_the_session_goes_on(field: Field, session: RawSession, what: str) -> None:
    """`*`: any code but internal_error."""
    code, forge = BAD_COMMANDS[what]
    await session.send(forge(field, session))
    error = await session.error()
    assert error["code"] == code or (code == "*" and error["code"] != "internal_error")
    assert len(str(error["message"])) < 400 and "Traceback" not in str(error)
    await goes_on(field, session)


async def test_a_crop_beyond_the_end_forgets_nothing_and_lowers_no_debt(field: Field, session: RawSession) -> None:
    assert await session.command(Kind.CROP, position=1 << 22) is None
    assert (await field.attacker.owed(field.first))[0] == session.owed + field.first.cost(2)
    assert await session.command(Kind.CROP, position=0) is None
    await session.step(ids(1, 2))
    await session.signed(2)
    assert (await field.attacker.owed(field.first))[0] == session.owed + field.first.cost(4)


# -- pushes

BAD_PUSHES: dict[str, tuple[str, Callable[[Field], dict[str, Any]]]] = {
    "from a key that is on no chain": ("unauthorized", lambda f: {"signer": f.other}),
    "signed by another node's key": ("unauthorized", lambda f: {"signer": f.stranger.hot}),
    "from another node than named": (
        "unauthorized",
        lambda f: {"signer": f.stranger.hot, "previous": f.stranger.address},
    ),
    "signed by the cold key": ("unauthorized", lambda f: {"signer": f.hop.cold}),
    "meant for another node": ("unauthorized", lambda f: {"node": f.last.node}),
    "into an unknown session": ("session_unknown", lambda f: {"session": bytes(32)}),
    "bound to another TLS key": ("unauthorized", lambda f: {"spki": secrets.token_bytes(32)}),
    "from yesterday": ("unauthorized", lambda f: {"issued": NOW - 86400}),
    "from tomorrow": ("unauthorized", lambda f: {"issued": NOW + 86400}),
}


@pytest.mark.parametrize("what", BAD_PUSHES)
async def test_a_push_from_anybody_but_the_previous_hop_is_refused(field: Field, what: str) -> None:
    code, changes = BAD_PUSHES[what]
    async with field.attacker.open(field.middle, previous=field.hop.address) as session:
        async with field.attacker.push(field.middle, session, field.hop, **changes(field)) as push:
            assert (await push.error())["code"] == code
            await push.until_closed()
        assert await session.command(Kind.CLOSE) is None


async def test_a_push_into_a_session_whose_rows_come_from_the_client_is_refused(field: Field) -> None:
    async with field.attacker.open(field.middle) as session:
        async with field.attacker.push(field.middle, session, field.hop) as push:
            assert (await push.error())["code"] == "unauthorized"


@asynccontextmanager
async def pushed(field: Field) -> AsyncIterator[tuple[RawSession, Connection]]:
    """A session at the middle span into which we push rows ourselves."""
    async with field.attacker.open(field.middle, previous=field.hop.address) as session:
        async with field.attacker.push(field.middle, session, field.hop) as push:
            assert (await push.next(Kind.PUSH_OPENED)).body["position"] == 0
            yield session, push


def upstream(field: Field, session: RawSession, **changes: Any) -> Receipt:
    """What our hop would sign for the first window, if it were honest."""
    start = field.middle.offer.start
    values: dict[str, Any] = {
        "node": field.hop.address,
        "model": field.middle.offer.model,
        "numeric_class": field.middle.offer.numeric_class,
        "session": session.id,
        "attempt": 0,
        "start": 0,
        "end": start,
        "first": 0,
        "last": WINDOW,
        "revision": 0,
        "context": ZERO32,
        "input": root(field.canary[:WINDOW]),
        "output": root(field.rows[start][:WINDOW]),
        "previous": ZERO32,
        "challenge": ZERO32,
        "sketches": ZERO32,
        "at": NOW,
    }
    return Receipt(**{**values, **changes})


def receipt_frame(field: Field, receipt: Receipt, signer: Key | None = None) -> Frame:
    return Frame(Kind.RECEIPT, {"receipt": seal(field.attacker.domain, receipt, signer or field.hop.hot)})


async def test_a_node_signs_only_rows_that_the_hop_before_has_signed(field: Field) -> None:
    start = field.middle.offer.start
    async with pushed(field) as (session, push):
        await session.step(field.rows[start][:1])
        assert (await session.error())["code"] == "unauthorized", "rows come from the previous hop alone"
        await push.send(step(field.rows[start][:WINDOW], 0, DType.F32))
        honest = upstream(field, session)
        for lie, code in (
            (receipt_frame(field, honest, field.stranger.hot), "bad_signature"),
            (receipt_frame(field, honest, field.other), "bad_signature"),
            (receipt_frame(field, replace(honest, node=field.stranger.address)), "bad_signature"),
            (receipt_frame(field, replace(honest, model=ZERO32)), "bad_signature"),
            (receipt_frame(field, replace(honest, end=start + 1)), "bad_signature"),
            (receipt_frame(field, replace(honest, output=ZERO32)), "link_mismatch"),
        ):
            await push.send(lie)
            error = await session.error()
            assert error["code"] == code and error.get("hop", field.hop.address) == field.hop.address
        assert await session.command(Kind.CLOSE) is not None, "the mismatch stands"
        assert not [frame for frame in session.frames if frame.kind is Kind.RECEIPT]
        await push.send(receipt_frame(field, replace(honest, revision=1)))
        receipt, signer = field.attacker.receipt(await session.next(Kind.RECEIPT))
        assert signer == field.middle.signer
        assert (receipt.input, receipt.output) == (honest.output, root(field.rows[field.middle.offer.end][:WINDOW]))


@pytest.mark.parametrize("kind", [Kind.ROUTE, Kind.REPLAY, Kind.FLUSH, Kind.CLOSE, Kind.VOUCHER, Kind.OPEN])
async def test_the_clients_commands_are_refused_on_a_push_connection(field: Field, kind: Kind) -> None:
    async with pushed(field) as (session, push):
        await push.send(Frame(kind, {"next": field.hop.address, "id": 1}))
        assert (await push.error())["code"] == "bad_frame"
        await push.until_closed()
        assert await session.command(Kind.CLOSE) is None


async def computed(session: RawSession, length: int) -> None:
    """Wait until the node has computed so many rows; every error says how far it is."""
    deadline = time.monotonic() + 15.0
    await session.send(Frame(Kind.DONE))
    while (at := (await session.error())["at"]) != length:
        assert time.monotonic() < deadline, f"waited 15 s for {length} rows, there are {at}"
        await session.send(Frame(Kind.DONE))


async def test_a_crop_on_a_push_connection_forgets_nothing(field: Field) -> None:
    rows = field.rows[field.middle.offer.start]
    async with pushed(field) as (session, push):
        await push.send(step(rows[:8], 0, DType.F32))
        await push.send(Frame(Kind.CROP, {"epoch": 1}))
        await push.send(step(rows[8:16], 8, DType.F32))  # waits for the client's own crop, which never comes
        await computed(session, 8)
        async with field.attacker.push(field.middle, session, field.hop) as again:
            assert (await again.next(Kind.PUSH_OPENED)).body["position"] == 8


async def test_a_push_connection_ends_with_its_session(field: Field) -> None:
    """Else whoever keeps it open would keep the session's memory, long after its reservation is gone."""
    for waits_for_a_crop in (False, True):
        async with field.attacker.open(field.middle, previous=field.hop.address) as session:
            push = Connection(await field.attacker.peers.connect(field.middle.url, field.middle.node))
            push.listen()
            async with field.attacker.push(field.middle, session, field.hop) as push:
                await push.next(Kind.PUSH_OPENED)
                if waits_for_a_crop:
                    await push.send(Frame(Kind.CROP, {"epoch": 1}))
                session.abort()
                await push.until_closed()
    await field.attacker.idle(field.middle)


# -- receipts


def root(rows: Sequence[bytes]) -> bytes:
    """The Merkle root of rows, written down anew from ruling 3: an odd node is promoted."""

    def over(level: list[bytes]) -> bytes:
        if len(level) == 1:
            return level[0]
        paired = [
            hashlib.sha256(b"\1" + level[at] + level[at + 1]).digest() if at + 1 < len(level) else level[at]
            for at in range(0, len(level), 2)
        ]
        return over(paired)

    return over([hashlib.sha256(b"\0" + row).digest() for row in rows])


def context(want: Sequence[bool], top_k: int = 8) -> bytes:
    """The context digest, written down anew: canonical JSON of everything an output depends on."""
    bits = sum(1 << position for position, asked in enumerate(want) if asked)
    packed = bits.to_bytes((len(want) + 7) // 8, "little").hex()
    text = f'{{"memory":null,"numerics":"fp32","token_types":null,"top_k":{top_k},"want":"{packed}","wire":"f32"}}'
    return hashlib.sha256(text.encode()).digest()


async def test_a_receipt_says_what_went_in_and_what_came_out(field: Field) -> None:
    """Ids in at the first span and hidden rows in at the last one; both outputs are known from the canary."""
    async with field.attacker.open(field.first) as session:
        await session.step(field.canary)
        whole, part = await session.signed(len(field.canary))
    first = field.first
    assert (whole.node, whole.model, whole.session, whole.span) == (
        first.node, first.offer.model, session.id, first.offer.span,
    )  # fmt: skip
    assert (whole.first, whole.last, part.first, part.last) == (0, WINDOW, WINDOW, len(field.canary))
    assert whole.input == root(field.canary[:WINDOW]) and part.input == root(field.canary[WINDOW:])
    assert whole.output == root(field.rows[first.offer.end][:WINDOW])
    assert whole.context == context([False] * WINDOW)
    assert (whole.previous, part.previous) == (ZERO32, digest(field.attacker.domain, whole))
    assert (whole.challenge, whole.sketches, whole.attempt) == (ZERO32, ZERO32, 0)
    assert abs(whole.at - time.time()) < 60

    rows, want = field.rows[field.last.offer.start][:20], [position % 7 == 3 for position in range(20)]
    async with field.attacker.open(field.last, top_k=5) as session:
        await session.step(rows, want=want)
        result = await session.next(Kind.RESULT)
        (receipt,) = await session.signed(20)
    answers = iter(result.rows())
    wanted = [position for position, asked in enumerate(want) if asked]
    assert result.position == wanted[0] and result.body["want"] == pack_flags(want[wanted[0] : wanted[-1] + 1])
    assert result.shape == (1, len(wanted), 5)
    assert receipt.output == root([next(answers) if asked else b"" for asked in want])
    assert receipt.input == root(rows) and receipt.context == context(want, 5)


async def test_every_signing_anew_raises_the_revision_and_no_claim_has_two_digests(field: Field) -> None:
    found: list[Receipt] = []
    async with field.attacker.open(field.first) as session:
        for position, rows in ((0, field.canary[:20]), (20, field.canary[20:WINDOW])):
            await session.step(rows, position)
            await session.send(Frame(Kind.FLUSH, position=position + len(rows)))
            found += await session.signed(position + len(rows))
        assert await session.command(Kind.CROP, position=10) is None
        await session.step(ids(*range(3, 25)), 10)
        found += await session.signed(WINDOW)
        assert await session.command(Kind.CROP, position=0) is None
        await session.step(field.canary[:WINDOW])
        found += await session.signed(WINDOW)
        assert await session.command(Kind.CLOSE) is None
        assert not [frame for frame in session.frames if frame.kind is Kind.RECEIPT], "nothing is signed twice"
    assert [(r.first, r.last) for r in found] == [(0, 20), (0, WINDOW), (0, WINDOW), (0, WINDOW)]
    assert [r.revision for r in found] == sorted({r.revision for r in found})
    assert found[2].input == root([*field.canary[:10], *ids(*range(3, 25))]) != found[1].input
    assert (found[3].input, found[3].output) == (found[1].input, found[1].output)
    claims = {(r.session, r.attempt, r.first // WINDOW, r.revision): digest(field.attacker.domain, r) for r in found}
    assert len(claims) == len(set(claims.values())) == len(found)


# -- room


@asynccontextmanager
async def many(field: Field, target: Target, count: int, key: Key | None = None) -> AsyncIterator[list[RawSession]]:
    """Sessions side by side."""
    async with asyncio.TaskGroup() as tasks:
        ended, opened = asyncio.Event(), []

        async def hold(ready: asyncio.Future[RawSession]) -> None:
            try:
                async with field.attacker.open(target, key) as session:
                    ready.set_result(session)
                    await ended.wait()
            except BaseException as error:
                if not ready.done():
                    ready.set_exception(error)
                raise

        for _ in range(count):
            ready: asyncio.Future[RawSession] = asyncio.get_running_loop().create_future()
            tasks.create_task(hold(ready))
            opened.append(ready)
        try:
            yield [await ready for ready in opened]
        finally:
            ended.set()


async def one_of(session: RawSession, *kinds: Kind) -> Frame:
    return await session._until(
        lambda: next((f for f in session.frames if f.kind in kinds), None), str(kinds), timeout_s=15.0
    )


async def test_a_node_that_is_full_for_a_payer_says_when_to_come_again(field: Field) -> None:
    async with many(field, field.spare, 48, field.attacker.key):  # three quarters of its 64 places
        async with field.attacker.connect(field.spare) as one_more:
            sealed = seal(field.attacker.domain, field.attacker.opening(field.spare), field.attacker.key)
            await one_more.send(Frame(Kind.OPEN, {"open": sealed}))
            error = await one_more.error()
            assert (error["code"], error["retry_after_s"]) == ("overloaded", 1)
            await one_more.until_closed()
    await field.attacker.idle(field.spare)


async def test_a_client_that_is_cut_off_in_mid_step_leaves_nothing_behind(field: Field) -> None:
    target, before = field.first, (await field.attacker.owed(field.first))[0]
    for _ in range(3):
        async with field.attacker.open(target) as session:
            await session.send(field.attacker.voucher(target, session.owed))
            await session.step(ids(*[5] * credit_rows(target)))
            session.abort()
        await field.attacker.idle(target)
    owed, _ = await field.attacker.owed(target)
    assert owed - before <= 3 * target.cost(credit_rows(target))


# -- HTTP


def address(url: str) -> tuple[str, int]:
    host, port = url.removeprefix("http://").split(":")
    return host, int(port)


async def spoken(target: Target, *sent: bytes, timeout_s: float = 5.0) -> bytes:
    """Everything that comes back for raw bytes, until the node closes or has been silent for a moment."""
    reader, writer = await asyncio.open_connection(*address(target.url))
    found = b""
    try:
        for part in sent:
            writer.write(part)
            await writer.drain()
        with suppress(TimeoutError, ConnectionError):
            while part := await asyncio.wait_for(reader.read(65536), timeout_s if not found else 0.3):
                found += part
    except ConnectionError:
        pass  # refused before all of it was read
    finally:
        writer.close()
    return found


def request(path: str, method: str = "GET", *headers: str) -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: a", "Connection: close", *headers, "", ""]).encode()


async def status_of(target: Target, sent: bytes) -> int:
    return int((await spoken(target, sent)).split(b" ", 2)[1])


NOT_HERE = Cid.of_raw(b"nobody has this")


async def test_only_what_is_listed_exists(field: Field) -> None:
    app = create_app(cast(Any, SimpleNamespace()), dict, lambda: True, cast(Any, None), cast(Any, None))
    found = {(route.path, frozenset(getattr(route, "methods", None) or ["WEBSOCKET"])) for route in app.routes}  # type: ignore[attr-defined]
    assert found == {
        ("/health", frozenset({"GET"})),
        ("/ready", frozenset({"GET"})),
        ("/metrics", frozenset({"GET"})),
        ("/v1/info", frozenset({"GET"})),
        ("/v1/reach/{node}", frozenset({"GET"})),
        ("/v1/reach", frozenset({"POST"})),
        ("/ipfs/{cid}", frozenset({"GET", "HEAD"})),
        ("/v1/sessions", frozenset({"WEBSOCKET"})),
    }


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (request("/"), 404),
        (request("/docs"), 404),
        (request("/openapi.json"), 404),
        (request("/v1/sessions"), 404),
        (request("/v1/info/../../etc/passwd"), 404),
        (request("/ipfs/"), 404),
        (request("/ipfs/a/b"), 404),
        (request("//health"), 404),
        (request("/health", "POST"), 405),
        (request("/health", "DELETE"), 405),
        (request("/v1/info", "PUT"), 405),
        (request("/metrics", "OPTIONS"), 405),
        (request("/health", "TRACE"), 405),
        (request("/ipfs/bafkqaaa?format=raw", "POST"), 405),
        (request(f"/ipfs/{NOT_HERE}?format=raw"), 404),
        (request(f"/ipfs/{NOT_HERE}?format=raw", "GET", "Cache-Control: only-if-cached"), 412),
        (request("/ipfs/hello?format=raw"), 400),
        (request("/ipfs/..%2f..%2fhot.json?format=raw"), 404),
        (request("/ipfs/%00?format=raw"), 400),
        (request("/ipfs/" + "b" * 9000 + "?format=raw"), 400),
        (request(f"/ipfs/{NOT_HERE}"), 400),
        (request(f"/ipfs/{NOT_HERE}?format=tar"), 406),
        (b"GET /health HTTP/1.1\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc", 400),
        (b"GET /health HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 501),
        (b"GET /health HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: a\r\nX: a\r\n b\x00\r\n\r\n", 400),
        (b"GET /health HTTP/1.0\r\n\r\n", 200),
        (request("/health"), 200),
        (request("/ready"), 200),
    ],
)
async def test_a_request_gets_its_status_and_no_hang(field: Field, sent: bytes, status: int) -> None:
    assert await status_of(field.first, sent) in (status, 400 if status == 501 else status)


async def test_a_head_beyond_the_limit_is_refused_before_it_is_whole(field: Field) -> None:
    answer = await spoken(field.first, b"GET /health HTTP/1.1\r\nHost: a\r\nX-Padding: " + b"a" * 70_000)
    assert answer == b"" or answer.split(b" ", 2)[1] in (b"400", b"431")
    assert await status_of(field.first, request("/health")) == 200


async def test_two_lengths_smuggle_nothing(field: Field) -> None:
    """Content-Length and Transfer-Encoding together: one request is one answer, whatever its body looks like."""
    smuggled = request("/metrics")
    head = f"POST /health HTTP/1.1\r\nHost: a\r\nContent-Length: {len(smuggled)}\r\nTransfer-Encoding: chunked\r\n\r\n"
    body = f"{len(smuggled):x}\r\n".encode() + smuggled + b"\r\n0\r\n\r\n"
    answer = await spoken(field.first, head.encode() + body)
    assert answer.count(b"HTTP/1.1 ") == 1 and b"tallystick_" not in answer


async def test_no_error_repeats_what_was_sent(field: Field) -> None:
    needle = "n33dle"
    for sent in (
        request(f"/{needle}"),
        request(f"/v1/{needle}?{needle}=1", "POST", f"X-{needle}: {needle}"),
        request(f"/ipfs/{needle * 20}?format=raw"),
        request(f"/ipfs/{NOT_HERE}?format={needle}"),
        request(f"/ipfs/{NOT_HERE}?format=car&dag-scope={needle}&car-order={needle}&entity-bytes={needle}"),
        f"{needle} {needle} {needle}\r\n\r\n".encode(),
    ):
        answer = await spoken(field.first, sent)
        assert answer and needle.encode() not in answer
    page = await spoken(field.first, request("/ipfs/%3Cscript%3E?format=raw"))
    assert b"text/plain" in page and b"nosniff" in page


async def test_the_probe_is_empty_and_a_served_block_is_the_one_that_was_asked_for(
    running: Running, field: Field
) -> None:
    peers = field.attacker.peers
    assert await peers.get(f"{field.first.url}/ipfs/bafkqaaa?format=raw", 10, 5.0) == b""
    piece = next(piece for piece in running.manifest.pieces if piece.kind == "embed")
    for cid in (running.manifest.cid, piece.cid):
        block = await peers.get(f"{field.first.url}/ipfs/{cid}?format=raw", 2 << 20, 5.0)
        cid.check(block)
    elsewhere = running.manifest.span_pieces(field.last.offer.span)[-1].cid
    assert await status_of(field.first, request(f"/ipfs/{elsewhere}?format=raw")) == 404


async def test_metrics_have_the_documented_names_and_no_secrets(running: Running, field: Field) -> None:
    text = (await spoken(field.first, request("/metrics"))).decode().partition("\r\n\r\n")[2]
    names = {line.split()[0].partition("{")[0] for line in text.splitlines() if line.startswith("tallystick_")}
    assert names == {
        "tallystick_asyncio_tasks",
        "tallystick_num_requests_running",
        "tallystick_num_requests_waiting",
        "tallystick_kv_cache_usage_perc",
        "tallystick_prefix_cache_hits_total",
        "tallystick_iterations_total",
        "tallystick_iteration_tokens_total",
        "tallystick_iteration_seconds_total",
        "tallystick_kv_cache_reserved_bytes",
        "tallystick_sessions_opened_total",
        "tallystick_sessions_refused_total",
        "tallystick_rows_total",
    }
    assert "{" not in text, "no label takes a value"
    info = json.loads((await spoken(field.first, request("/v1/info"))).decode().partition("\r\n\r\n")[2])
    assert set(info) == {"offer", "status"}
    seen_at = running.net.chain.chain().node(field.first.node).seen_at
    assert info["status"]["seen_at"] == seen_at > 0, "its last sign of life on chain"
    assert set(info["status"].pop("links_ms")) <= {node.address for node in running.nodes}, "the nodes on chain"
    for public in (text, json.dumps(info)):
        for secret in (field.attacker.key.address, "0x", str(running.net.folder), "password"):
            assert secret not in public, secret


async def test_a_websocket_elsewhere_is_refused(field: Field) -> None:
    upgrade = request("/v1/elsewhere").replace(b"Connection: close", b"Connection: Upgrade").removesuffix(b"\r\n")
    upgrade += b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    assert (await spoken(field.first, upgrade)).split(b" ", 2)[1] in (b"403", b"404")
    assert (await spoken(field.first, upgrade.replace(b"/v1/elsewhere", b"/v1/info"))).split(b" ", 2)[1] != b"101"


@pytest.mark.parametrize(
    "headers",
    [
        [],
        ["Sec-WebSocket-Version: 13"],
        ["Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: short"],
        ["Sec-WebSocket-Version: 8", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="],
        ["Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "X: \xff"],
    ],
)
async def test_half_a_handshake_opens_nothing(field: Field, headers: list[str]) -> None:
    head = ["GET /v1/sessions HTTP/1.1", "Host: a", "Connection: Upgrade", "Upgrade: websocket", *headers, "", ""]
    answer = await spoken(field.first, "\r\n".join(head).encode("latin-1"))
    assert answer.split(b" ", 2)[1] in (b"400", b"426") or "X: \xff" in headers


# -- peers that say nothing


@dataclass(slots=True)
class Silence:
    """A connection on which something was begun, and when the node dropped it."""

    what: str
    began: float
    dropped: asyncio.Future[float]
    tasks: list[asyncio.Task[None]]

    @classmethod
    async def begin(cls, what: str, host: str, port: int, sent: bytes, drip: bytes = b"") -> Silence:
        reader, writer = await asyncio.open_connection(host, port)
        dropped: asyncio.Future[float] = asyncio.get_running_loop().create_future()

        async def read() -> None:
            with suppress(ConnectionError):
                while await reader.read(4096):
                    pass
            dropped.set_result(time.monotonic())
            writer.close()

        async def write() -> None:
            with suppress(ConnectionError):
                writer.write(sent)
                while drip and not dropped.done():
                    await writer.drain()
                    await asyncio.sleep(1.0)
                    writer.write(drip)

        tasks = [asyncio.create_task(read()), asyncio.create_task(write())]
        return cls(what, time.monotonic(), dropped, tasks)

    def stop(self) -> None:
        for task in self.tasks:
            task.cancel()


@pytest.mark.parametrize("index", range(6))
async def test_a_peer_that_does_not_go_on_is_dropped(silent: list[Silence], index: int) -> None:
    peer = silent[index]
    deadline = peer.began + 2 * SILENCE_S + 5
    try:
        async with asyncio.timeout(deadline - time.monotonic()):
            await asyncio.shield(peer.dropped)
    except TimeoutError:
        pytest.fail(f"whoever sent {peer.what} was still connected after {2 * SILENCE_S + 5:g} s")


LISTENER_OUT_OF_FILES = """
import asyncio, resource, sys
from fastapi import FastAPI
from tallystick_node.listener import Listener, bind

app = FastAPI()

@app.get("/health")
async def health(): return {}

async def main():
    sock = bind("127.0.0.1", 0, encrypted=False)
    resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
    print(sock.getsockname()[1], flush=True)
    await Listener(app).serve(sock)

asyncio.run(main())
"""


async def test_a_listener_that_has_no_file_left_waits_for_one(tmp_path: Path) -> None:
    script = tmp_path / "listener.py"
    script.write_text(LISTENER_OUT_OF_FILES)
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(script), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        port = int(await asyncio.wait_for(process.stdout.readline(), 30))
        crowd = [await asyncio.open_connection("127.0.0.1", port) for _ in range(60)]
        ended: Awaitable[int] = asyncio.ensure_future(process.wait())
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(ended), 1.0)
        for _, writer in crowd:
            writer.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request("/health"))
        assert (await asyncio.wait_for(reader.readline(), 10)).startswith(b"HTTP/1.1 200")
        writer.close()
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


# -- afterwards


async def test_after_all_of_this_the_nodes_serve_as_before(
    running: Running, field: Field, before: dict[str, Usage]
) -> None:
    async with AsyncClient(running.key, running.net.settings()) as client:
        answer = await client.generate(
            "The function returns", model=running.id, max_tokens=8, verify="full", ignore_eos=True
        )
    assert len(answer.ids) == 8 and answer.verdict.failed == 0
    for target in (field.first, field.middle, field.last, field.spare):
        await field.attacker.idle(target)
    await field.attacker.peers.close()
    for node in running.nodes:
        log = node.process.log.read_text()
        assert "Traceback" not in log and "a session failed" not in log, node.process.tail(40)
        assert log.count(field.attacker.key.secret.hex()) == 0
        deadline, was = time.monotonic() + 10, before[node.name]
        while (now := Usage.of(node.process.pid)).num_files > was.num_files + 16:
            assert time.monotonic() < deadline, f"{node.name} holds {now.num_files} files, {was.num_files} before"
            await asyncio.sleep(0.1)
        assert now.rss_bytes < was.rss_bytes + (160 << 20), f"{node.name}: {was} -> {now}"
