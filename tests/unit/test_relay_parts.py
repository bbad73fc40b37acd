"""The relay's parts: reading a ClientHello, copying within limits, calling nodes, and what is owed for it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import samples
from harness.tls_server import TlsServer, tls_server, until_closed
from tallystick_node.relay import hello
from tallystick_node.relay import switchboard as switchboard_module
from tallystick_node.relay.account import Account, Tariff
from tallystick_node.relay.hello import UNRECOGNIZED_NAME, BadHello, dial_back_line, peek_opening, server_name
from tallystick_node.relay.registrar import Registrar
from tallystick_node.relay.splice import splice
from tallystick_node.relay.switchboard import Registration, RelayLimits, Switchboard
from tallystick_node.relay.wallet import RelayBill, RelayPurse, Terms
from tallystick_node.till import Funds, Till
from tallystick_protocol.errors import (
    BadSignature,
    InsufficientFunds,
    PaymentRequired,
    Rejected,
    TallystickError,
    Unauthorized,
    Unreachable,
)
from tallystick_protocol.frames import Frame, Kind
from tallystick_protocol.messages import RelayRegister
from tallystick_protocol.peer import Peers
from tallystick_protocol.signing import seal
from tallystick_protocol.transport.contact import Addr, Contact, label
from tallystick_protocol.types import ZERO32, Address, Digest, Wei
from tallystick_protocol.vouchers import Voucher

NODE, RELAY = samples.address("node"), samples.address("relay")


def client_hello(name: str | None) -> bytes:
    """What OpenSSL sends first."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname=name).do_handshake()
    return outgoing.read()


HELLO = client_hello(label(NODE))


@pytest.mark.parametrize("name", [label(NODE), "a", "xn--bcher-kva.example", None])
def test_the_name_in_a_hello_is_read_as_openssl_writes_it(name: str | None) -> None:
    assert server_name(client_hello(name)[5:]) == name


@given(st.integers(0, len(HELLO) - 6))
@settings(max_examples=60, deadline=None)
def test_a_hello_that_is_cut_off_is_refused(size: int) -> None:
    with pytest.raises(BadHello):
        server_name(HELLO[5 : 5 + size])


@given(st.lists(st.tuples(st.integers(0, len(HELLO) - 6), st.integers(0, 255)), min_size=1, max_size=8))
@settings(max_examples=200, deadline=None)
def test_a_garbled_hello_gives_a_name_or_a_refusal(changes: list[tuple[int, int]]) -> None:
    data = bytearray(HELLO[5:])
    for at, value in changes:
        data[at] = value
    try:
        found = server_name(bytes(data))
    except BadHello:
        return
    assert found is None or found.isascii()


@contextlib.contextmanager
def pair() -> Any:
    ours, theirs = socket.socketpair()
    for sock in (ours, theirs):
        sock.setblocking(False)
    with ours, theirs:
        yield ours, theirs


async def opening_of(*parts: bytes) -> hello.Opening:
    with pair() as (ours, theirs):
        opening = asyncio.create_task(peek_opening(theirs))
        for part in parts:
            ours.send(part)
            await asyncio.sleep(0.01)
        ours.shutdown(socket.SHUT_WR)
        return await opening


async def test_a_hello_stays_in_the_socket_and_may_come_in_pieces() -> None:
    assert (await opening_of(HELLO)).name == label(NODE)
    assert (await opening_of(HELLO[:3], HELLO[3:200], HELLO[200:])).name == label(NODE)
    with pair() as (ours, theirs):
        ours.send(HELLO)
        await peek_opening(theirs)
        assert theirs.recv(65536) == HELLO


async def test_a_dial_back_is_taken_off_the_socket() -> None:
    token = bytes(range(16))
    with pair() as (ours, theirs):
        ours.send(dial_back_line(token) + b"rest")
        assert (await peek_opening(theirs)).token == token
        assert theirs.recv(100) == b"rest"


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"DIAL1 " + b"z" * 32 + b"\n",
        b"DIAL1 " + b"0" * 32 + b"x",
        b"\x16\x03\x01\x40\x01" + bytes(64),
        b"\x16\x03\x01\x00\x00",
        b"\x16\x02\x01\x00\x05" + bytes(5),
        b"\x15\x03\x01\x00\x05" + bytes(5),
        b"\x16\x03\x01\x00\x08" + bytes(8),
    ],
)
async def test_what_is_neither_is_refused_at_once(sent: bytes) -> None:
    with pytest.raises(BadHello):
        await opening_of(sent)


async def test_who_drips_a_hello_is_dropped_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hello, "HELLO_TIMEOUT_S", 0.2)
    with pair() as (ours, theirs):
        ours.send(HELLO[:50])
        with pytest.raises(TimeoutError):
            await peek_opening(theirs)


# -- copying


class Free:
    """A meter that lets everything through."""

    num_bytes = 0

    def count(self, num_bytes: int) -> bool:
        self.num_bytes += num_bytes
        return True

    async def allowed(self) -> None: ...


async def test_bytes_go_both_ways_and_an_end_is_passed_on() -> None:
    meter, loop = Free(), asyncio.get_running_loop()
    a, relay_a = socket.socketpair()
    b, relay_b = socket.socketpair()
    for sock in (a, b, relay_a, relay_b):
        sock.setblocking(False)
    copying = asyncio.create_task(splice(relay_a, relay_b, meter))
    await loop.sock_sendall(a, b"question")
    assert await loop.sock_recv(b, 100) == b"question"
    a.shutdown(socket.SHUT_WR)
    assert await loop.sock_recv(b, 100) == b""
    await loop.sock_sendall(b, b"answer")
    b.close()
    assert await until_closed(a, 5.0) == b"answer"
    await asyncio.wait_for(copying, 5.0)
    assert meter.num_bytes == 14 and relay_a.fileno() == relay_b.fileno() == -1


async def test_who_does_not_read_stops_the_other_side_and_who_is_silent_is_cut() -> None:
    a, relay_a = socket.socketpair()
    b, relay_b = socket.socketpair()
    for sock in (a, b, relay_a, relay_b):
        sock.setblocking(False)
    copying = asyncio.create_task(splice(relay_a, relay_b, Free(), idle_s=0.3))
    sent = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(5.0):
            while not copying.done():
                try:
                    sent += a.send(bytes(65536))
                except BlockingIOError:
                    await asyncio.sleep(0.01)
                except OSError:
                    break
    await asyncio.wait_for(copying, 5.0)
    assert 0 < sent < 8 << 20, "kernel buffers and one chunk"
    a.close()
    b.close()


# -- calling


class Control:
    """A node's end of its control connection: what it was told."""

    spki: Digest = ZERO32

    def __init__(self) -> None:
        self.told: asyncio.Queue[Frame] = asyncio.Queue()
        self.frames: asyncio.Queue[Frame] = asyncio.Queue()
        self.closed = False

    async def send(self, frame: Frame) -> None:
        self.told.put_nowait(frame)

    async def receive(self) -> Frame:
        frame = await self.frames.get()
        if frame.kind is Kind.CLOSE:
            raise Unreachable("gone")
        return frame

    async def close(self) -> None:
        self.closed = True
        self.frames.put_nowait(Frame(Kind.CLOSE))


@pytest.fixture
async def relay(tmp_path: Path) -> AsyncIterator[tuple[TlsServer, Switchboard]]:
    board = Switchboard(RELAY, RelayLimits(sockets_per_node=3))
    async with tls_server(RELAY, tmp_path / "relay", board.divert) as server:
        yield server, board
        await board.close()


def registered(board: Switchboard, node: Address = NODE) -> tuple[Control, Any]:
    control, account = Control(), Free()
    account.num_sockets = 0  # type: ignore[attr-defined]
    board.register(Registration(node, control, account))  # type: ignore[arg-type]
    return control, account


async def dial_back(control: Control, port: int) -> socket.socket:
    call = await asyncio.wait_for(control.told.get(), 5.0)
    assert call.kind is Kind.CALL
    sock = socket.socket()
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(sock, ("127.0.0.1", port))
    await loop.sock_sendall(sock, dial_back_line(call.body["token"]))
    return sock


async def test_a_caller_and_a_node_that_dials_back_speak_tls_through_the_relay(
    relay: tuple[TlsServer, Switchboard], tmp_path: Path
) -> None:
    server, board = relay
    control, account = registered(board)
    async with tls_server(NODE, tmp_path / "node") as node:
        through = Contact(NODE, (Addr("relay", "127.0.0.1", server.port, via=RELAY),), node.keys.pins, 1)

        async def answer() -> None:
            while True:
                await node.listener.attach(await dial_back(control, server.port), "dialled back")

        answering, peers = asyncio.create_task(answer()), Peers()
        channel = await peers.connect(through, NODE)
        await channel.send(Frame(Kind.OPEN, {"hello": "node"}))
        assert (await channel.receive()).body == {"hello": "node"}
        assert channel.spki == node.keys.pins[0] != server.keys.pins[0]
        assert await peers.ask(server.contact, "/health", 100, 5.0), "one port does both"
        assert server.requests == ["/health"] and account.num_bytes > 1000
        node_of_another = Contact(NODE, through.addrs, server.keys.pins)
        with pytest.raises(Unreachable, match="another TLS key"):
            await peers.handshake(node_of_another)
        await channel.close()
        await peers.close()
        answering.cancel()


async def call_as(server: TlsServer, name: str) -> bytes:
    """What the relay says to a ClientHello before anybody dials back."""
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.setblocking(False)
        await asyncio.get_running_loop().sock_sendall(raw, client_hello(name))
        return await until_closed(raw, 5.0)


async def test_a_name_that_nobody_has_registered_is_refused(relay: tuple[TlsServer, Switchboard]) -> None:
    assert await call_as(relay[0], label(NODE)) == UNRECOGNIZED_NAME
    with socket.create_connection(("127.0.0.1", relay[0].port)) as raw:
        raw.setblocking(False)
        await asyncio.get_running_loop().sock_sendall(raw, b"GET / HTTP/1.1\r\n\r\n")
        assert await until_closed(raw, 5.0) == b""


async def test_a_node_that_does_not_dial_back_costs_its_caller_a_while(
    relay: tuple[TlsServer, Switchboard], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(switchboard_module, "DIAL_BACK_TIMEOUT_S", 0.3)
    _, account = registered(relay[1])
    assert await call_as(relay[0], label(NODE)) == b""
    assert account.num_sockets == 0


async def test_a_token_is_worth_one_connection_and_a_guess_none(relay: tuple[TlsServer, Switchboard]) -> None:
    server, board = relay
    control, _ = registered(board)
    loop = asyncio.get_running_loop()

    async def answer(token: bytes) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", server.port))
        sock.setblocking(False)
        await loop.sock_sendall(sock, dial_back_line(token))
        return sock

    with socket.create_connection(("127.0.0.1", server.port)) as caller:
        caller.sendall(client_hello(label(NODE)))
        call = await asyncio.wait_for(control.told.get(), 5.0)
        with await answer(bytes(16)) as guess, await answer(call.body["token"]) as first:
            assert await until_closed(guess, 5.0) == b""
            assert server_name((await asyncio.wait_for(loop.sock_recv(first, 65536), 5.0))[5:]) == label(NODE)
            with await answer(call.body["token"]) as second:
                assert await until_closed(second, 5.0) == b""


async def test_one_node_has_so_many_connections_and_no_more(relay: tuple[TlsServer, Switchboard]) -> None:
    server, board = relay
    control, account = registered(board)
    callers = []
    for _ in range(3):
        raw = socket.create_connection(("127.0.0.1", server.port))
        raw.sendall(client_hello(label(NODE)))
        await asyncio.wait_for(control.told.get(), 5.0)
        callers.append(raw)
    assert account.num_sockets == 3
    assert await call_as(server, label(NODE)) == UNRECOGNIZED_NAME
    for raw in callers:
        raw.close()


async def test_a_caller_that_calls_too_often_is_held_back(relay: tuple[TlsServer, Switchboard]) -> None:
    _, board = relay
    board._clock = lambda: 0.0
    control, account = registered(board)
    for _ in range(switchboard_module.CALLER_BURST):
        with socket.socketpair()[0] as raw:
            fake: Any = SimpleNamespace(getpeername=lambda: ("198.51.100.7", 1), fileno=raw.fileno)
            assert board._may_call(fake, Registration(NODE, control, account))  # type: ignore[arg-type]
    assert not board._may_call(fake, Registration(NODE, control, account))  # type: ignore[arg-type]
    board._clock = lambda: 1.0
    assert board._may_call(fake, Registration(NODE, control, account))  # type: ignore[arg-type]


# -- registering and paying

HOT = samples.key("hot")
TARIFF = Tariff(Wei(2), 1 << 20)
FUNDED = Wei(10**9)


class Ledger:
    """What a registrar reads from the chain: one hot key, one funded channel."""

    def __init__(self, funded: Wei = FUNDED) -> None:
        self.funded = funded

    def signer_of(self, signer: Address) -> Address | None:
        return NODE if signer == HOT.address else None

    def funds(self, *_: Any) -> Funds:
        return Funds(self.funded, self.funded, Wei(0))


def till(folder: Path) -> Till:
    return Till(
        folder / "till.db", RELAY, samples.ESCROW, TARIFF.credit, Wei(0), lambda client, signer: client == signer
    )


def registrar(folder: Path, board: Switchboard, funded: Wei = FUNDED, staked: bool = True) -> Registrar:
    lookups: Any = Ledger(funded)
    return Registrar(RELAY, samples.STAKING, board, TARIFF, till(folder), lookups, lambda _: staked)


def claim(signer: str = "hot", **changes: Any) -> Frame:
    values = {"relay": RELAY, "spki": ZERO32, "node": NODE, "nonce": samples.digest("n"), "issued": int(time.time())}
    sealed = seal(samples.STAKING, RelayRegister(**{**values, **changes}), samples.key(signer))
    return Frame(Kind.REGISTER, {"register": sealed})


async def test_a_node_registers_with_its_hot_key_and_pays_by_voucher(tmp_path: Path) -> None:
    board, control = Switchboard(RELAY, RelayLimits()), Control()
    desk = registrar(tmp_path, board)
    serving = asyncio.create_task(desk.serve(control, claim()))
    answer = await asyncio.wait_for(control.told.get(), 5.0)
    assert (answer.kind, answer.body["price"], answer.body["owed"]) == (Kind.REGISTERED, "2", "0")
    assert board.num_nodes == 1
    account = board._registered[label(NODE)].account
    assert account.count(1 << 20) and not account.count(1)
    waiting = asyncio.create_task(account.allowed())
    assert (await asyncio.wait_for(control.told.get(), 5.0)).body["code"] == "payment_required"
    sealed = seal(samples.ESCROW, Voucher(HOT.address, RELAY, 1 << 20), HOT)
    control.frames.put_nowait(Frame(Kind.VOUCHER, {"voucher": sealed}))
    await asyncio.wait_for(waiting, 5.0)
    again = Control()
    second = asyncio.create_task(desk.serve(again, claim(nonce=samples.digest("m"))))
    shown = (await asyncio.wait_for(again.told.get(), 5.0)).body
    assert (shown["owed"], shown["voucher"]) == (str(2 * (1 << 20) + 2), sealed)
    assert control.closed and board.num_nodes == 1, "the newest registration counts"
    await again.close()
    for task in (serving, second):
        with pytest.raises(Unreachable):
            await asyncio.wait_for(task, 5.0)
    assert board.num_nodes == 0


@pytest.mark.parametrize(
    ("changes", "staked", "funded", "error"),
    [
        ({"signer": "stranger"}, True, FUNDED, Unauthorized),
        ({"node": samples.address("victim")}, True, FUNDED, Unauthorized),
        ({"relay": samples.address("other relay")}, True, FUNDED, Unauthorized),
        ({"spki": samples.digest("other key")}, True, FUNDED, Unauthorized),
        ({"issued": 1_700_000_000}, True, FUNDED, Unauthorized),
        ({}, False, FUNDED, Unauthorized),
        ({}, True, Wei(5), InsufficientFunds),
        (None, True, FUNDED, TallystickError),
    ],
)
async def test_who_may_not_register_is_told_why(
    tmp_path: Path, changes: dict[str, Any] | None, staked: bool, funded: Wei, error: type[TallystickError]
) -> None:
    board = Switchboard(RELAY, RelayLimits())
    frame = Frame(Kind.REGISTER, {"register": bytes(300)}) if changes is None else claim(**changes)
    with pytest.raises(error):
        await registrar(tmp_path, board, funded, staked).serve(Control(), frame)
    assert board.num_nodes == 0


async def test_a_registration_is_used_once(tmp_path: Path) -> None:
    board, control, frame = Switchboard(RELAY, RelayLimits()), Control(), claim()
    desk = registrar(tmp_path, board)
    serving = asyncio.create_task(desk.serve(control, frame))
    await asyncio.wait_for(control.told.get(), 5.0)
    with pytest.raises(Unauthorized, match="used before"):
        await desk.serve(Control(), frame)
    assert board.num_nodes == 1
    serving.cancel()


async def test_who_does_not_pay_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tallystick_node.relay.account.PAY_TIMEOUT_S", 0.1)
    lookups: Any = Ledger()

    async def remind() -> None: ...

    account = Account(HOT.address, TARIFF, till(tmp_path), lookups, remind)
    a, relay_a = socket.socketpair()
    b, relay_b = socket.socketpair()
    for sock in (a, b, relay_a, relay_b):
        sock.setblocking(False)
    loop = asyncio.get_running_loop()
    copying = asyncio.create_task(splice(relay_a, relay_b, account))
    sending = asyncio.create_task(loop.sock_sendall(a, bytes(2 << 20)))
    got = await until_closed(b, 10.0)
    assert (1 << 19) <= len(got) <= 1 << 20, "the credit, less what was on its way"
    with pytest.raises(PaymentRequired):
        await copying
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)
    a.close()
    b.close()


async def test_a_node_is_kept_to_its_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lookups: Any = Ledger()
    now, slept = [100.0], []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    async def remind() -> None: ...

    monkeypatch.setattr("tallystick_node.relay.account.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr("tallystick_node.relay.account.asyncio", SimpleNamespace(Event=asyncio.Event, sleep=sleep))
    account = Account(HOT.address, Tariff(Wei(0), 1, 1000), till(tmp_path), lookups, remind)
    assert account.count(1000) and not account.count(2000)
    await account.allowed()
    assert sum(slept) == pytest.approx(2.0)
    now[0] += 60.0
    assert account.count(900), "what was not used is not saved up"
    assert not account.count(200)


class Chained:
    """A wallet whose channel to the relay holds what was put into it."""

    def __init__(self) -> None:
        self.key, self.address, self.held = HOT, HOT.address, 0
        self.chain = SimpleNamespace(
            book=SimpleNamespace(escrow_domain=samples.ESCROW), funds=lambda *_: SimpleNamespace(latest=Wei(self.held))
        )

    def fund(self, client: Address, deposits: list[tuple[Address, Wei]]) -> None:
        assert client == self.address
        self.held += sum(amount for _, amount in deposits)


TERMS = Terms(Wei(2), 1 << 20)


def test_a_relay_is_funded_as_far_as_the_budget_goes() -> None:
    wallet: Any = Chained()
    purse = RelayPurse(wallet, Wei(40 << 20))
    purse.fund(RELAY, TERMS, Wei(0))
    assert wallet.held >= 2 * TERMS.credit
    with pytest.raises(InsufficientFunds, match="relay_budget"):
        purse.fund(RELAY, TERMS, Wei(39 << 20))
    with pytest.raises(Rejected, match="relay_max_price"):
        Terms.read({"price": "3", "credit_bytes": 5}, Wei(2), RELAY)


def test_a_relays_claim_is_believed_as_far_as_it_was_counted() -> None:
    wallet: Any = Chained()
    purse = RelayPurse(wallet, Wei(10**12))
    signed = purse.sign(RELAY, Wei(1000))
    assert purse.recall(RELAY, Wei(10**12), signed, TERMS) == (1000 + TERMS.credit, 1000)
    purse.counted(RELAY, Wei(10**9))
    known = 1000 + TERMS.credit + 10**9
    assert purse.recall(RELAY, Wei(10**12), signed, TERMS)[0] == known + known // 50 + 2 * (4 << 20)
    assert purse.recall(RELAY, Wei(5000), signed, TERMS)[0] == 5000
    assert purse.recall(RELAY, Wei(10), signed, TERMS)[0] == 1000, "what was signed is signed"
    with pytest.raises(BadSignature):
        purse.recall(RELAY, Wei(0), seal(samples.ESCROW, Voucher(HOT.address, RELAY, 5), samples.key("x")), TERMS)


async def test_a_bill_is_paid_while_bytes_flow_and_at_the_end() -> None:
    wallet: Any = Chained()
    purse, control = RelayPurse(wallet, Wei(10**12)), Control()
    base, signed = purse.recall(RELAY, Wei(0), b"", TERMS)
    bill = RelayBill(purse, RELAY, TERMS, base, signed, control)
    assert bill.count(1000) and control.told.empty()
    bill.count(1 << 18)
    assert (await asyncio.wait_for(control.told.get(), 5.0)).kind is Kind.VOUCHER
    bill.count(10)
    await bill.close()
    last = await asyncio.wait_for(control.told.get(), 5.0)
    assert int.from_bytes(last.body["voucher"][64:96], "big") == 2 * (1000 + (1 << 18) + 10)
