"""A client without manners: it speaks frames to one node and keeps what comes back, true or not.

Nothing here checks, pays or retries; a test says what is sent. `Attacker` knows the chain and can be any client, or a
hop of its own: an identity whose hot key is bound on chain pushes rows as the previous hop.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from tallystick_protocol.chain.reads import Chain
from tallystick_protocol.chain.writes import Wallet
from tallystick_protocol.errors import BadFrame, TallystickError, Unreachable
from tallystick_protocol.frames import DType, Frame, Kind, rows_frame
from tallystick_protocol.messages import Offer, PushOpen, SessionOpen, session_id
from tallystick_protocol.peer import Peers, WebSocketChannel
from tallystick_protocol.receipts import Receipt, pack_flags
from tallystick_protocol.signing import Domain, Key, digest, seal, unseal
from tallystick_protocol.types import ZERO32, ZERO_ADDRESS, Address, Digest, ModelId, SessionId, Wei
from tallystick_protocol.vouchers import Voucher, charge

TIMEOUT_S = 15.0


@dataclass(frozen=True, slots=True)
class Target:
    """A node under attack: where it is, what it offers, which hot key signs for it."""

    url: str
    offer: Offer
    offer_digest: Digest
    signer: Address
    num_layers: int
    domain: Domain

    @property
    def node(self) -> Address:
        return self.offer.node

    def cost(self, num_rows: int) -> Wei:
        return charge(self.offer.span, self.num_layers, Wei(self.offer.price), num_rows)


@dataclass(frozen=True, slots=True)
class Identity:
    """A node's keys without a node: cold is its address, hot signs for it."""

    cold: Key
    hot: Key

    @property
    def address(self) -> Address:
        return self.cold.address


@dataclass(slots=True)
class Connection:
    """A connection to a node and every frame that came over it; `next` takes them out one by one."""

    channel: WebSocketChannel
    frames: list[Frame] = field(default_factory=list)
    closed: bool = False
    _arrived: asyncio.Condition = field(default_factory=asyncio.Condition)
    _reader: asyncio.Task[None] | None = None
    _last_command: int = 0

    def listen(self) -> None:
        self._reader = asyncio.create_task(self._read())

    async def send(self, frame: Frame) -> None:
        await self.channel.send(frame)

    async def send_bytes(self, data: bytes) -> None:
        await self.channel._socket.send_bytes(data)

    async def send_text(self, text: str) -> None:
        await self.channel._socket.send_str(text)

    async def next(self, kind: Kind, timeout_s: float = TIMEOUT_S) -> Frame:
        """The oldest frame of this kind that was not taken yet. Fails when the connection ends or time is up."""
        frame = await self._until(lambda: next((f for f in self.frames if f.kind is kind), None), kind.name, timeout_s)
        self.frames.remove(frame)
        return frame

    async def error(self, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
        """The body of the next ERROR."""
        return (await self.next(Kind.ERROR, timeout_s)).body

    async def command(self, kind: Kind, body: dict[str, Any] | None = None, position: int = 0) -> dict[str, Any] | None:
        """Send a command and wait for its end: None for DONE, else the body of its ERROR.

        Vouchers sent before have been taken then; rows sent before may still be waiting.
        """
        self._last_command += 1
        number = self._last_command
        await self.send(Frame(kind, {**(body or {}), "id": number}, position))
        mine = lambda: next((f for f in self.frames if f.body.get("of") == number), None)  # noqa: E731
        answer = await self._until(mine, f"the end of {kind.name}", TIMEOUT_S)
        self.frames.remove(answer)
        return None if answer.kind is Kind.DONE else answer.body

    async def until_closed(self, timeout_s: float = TIMEOUT_S) -> None:
        """Wait until the node has closed the connection."""
        async with asyncio.timeout(timeout_s), self._arrived:
            await self._arrived.wait_for(lambda: self.closed)

    async def close(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        await self.channel.close()

    def abort(self) -> None:
        """Cut the connection without a farewell, as a crash would."""
        transport = self.channel._socket._response.connection.transport  # type: ignore[union-attr]
        assert transport is not None
        transport.abort()

    async def _read(self) -> None:
        try:
            while True:
                frame = await self.channel.receive()
                async with self._arrived:
                    self.frames.append(frame)
                    self._arrived.notify_all()
        except (Unreachable, BadFrame):
            async with self._arrived:
                self.closed = True
                self._arrived.notify_all()

    async def _until(self, found: Callable[[], Frame | None], what: str, timeout_s: float) -> Frame:
        try:
            async with asyncio.timeout(timeout_s), self._arrived:
                await self._arrived.wait_for(lambda: found() is not None or self.closed)
        except TimeoutError:
            raise AssertionError(f"waited {timeout_s:g} s for {what}; there are {self._told()}") from None
        frame = found()
        assert frame is not None, f"the node closed the connection before {what}; there are {self._told()}"
        return frame

    def _told(self) -> list[str]:
        return [f"{f.kind.name} {f.body.get('code', '')} {f.body.get('message', '')}".strip() for f in self.frames]


@dataclass(slots=True)
class RawSession(Connection):
    """A connection that has sent an OPEN and got an OPENED."""

    target: Target | None = None
    id: SessionId = field(default_factory=lambda: SessionId(ZERO32))
    opening: SessionOpen | None = None
    opened: Frame = field(default_factory=lambda: Frame(Kind.OPENED))

    @property
    def owed(self) -> int:
        """What the node said at the opening that it is owed."""
        return int(self.opened.body["owed"])

    async def step(self, rows: Sequence[bytes], position: int = 0, want: Sequence[bool] | None = None) -> None:
        """Send rows; ids of four bytes each, hidden rows else."""
        dtype = DType.IDS if len(rows[0]) == 4 else DType.F32
        flags = pack_flags(want if want is not None else [False] * len(rows))
        await self.send(rows_frame(Kind.STEP, dtype, list(rows), position, {"want": flags}))

    async def signed(self, length: int) -> list[Receipt]:
        """Have everything up to `length` positions signed; all receipts up to the one that ends there."""
        await self.send(Frame(Kind.FLUSH, position=length))
        found: list[Receipt] = []
        while not found or found[-1].last != length:
            sealed = bytes((await self.next(Kind.RECEIPT)).body["receipt"])
            assert self.target is not None
            receipt, signer = unseal(self.target.domain, Receipt, sealed)
            assert signer == self.target.signer, "the node's hot key signs"
            found.append(receipt)
        return found


def ids(*tokens: int) -> list[bytes]:
    """Rows of token ids."""
    return [token.to_bytes(4, "little") for token in tokens]


class Attacker:
    """Any number of clients and hops against the nodes of one chain."""

    def __init__(self, chain: Chain, key: Key, num_layers: int) -> None:
        self.chain = chain
        self.key = key
        self.domain: Domain = chain.book.staking_domain
        self.escrow: Domain = chain.book.escrow_domain
        self.peers = Peers()
        self._num_layers = num_layers

    async def target(self, url: str) -> Target:
        """What the node at `url` says of itself."""
        text = (await self.peers.info(url))["offer"]
        offer, signer = unseal(self.domain, Offer, bytes.fromhex(text))
        return Target(url, offer, digest(self.domain, offer), signer, self._num_layers, self.domain)

    async def status(self, target: Target) -> dict[str, Any]:
        status: dict[str, Any] = (await self.peers.info(target.url))["status"]
        return status

    async def idle(self, target: Target, timeout_s: float = TIMEOUT_S) -> None:
        """Wait until no session is open at the node and nothing is reserved."""
        deadline = time.monotonic() + timeout_s
        while (status := await self.status(target))["sessions"] or status["reserved_bytes"]:
            assert time.monotonic() < deadline, f"waited {timeout_s:g} s for {target.url} to be idle: {status}"
            await asyncio.sleep(0.05)

    def opening(self, target: Target, key: Key | None = None, **changes: Any) -> SessionOpen:
        """A good opening, or one with other values."""
        now = int(time.time())
        values: dict[str, Any] = {
            "node": target.node,
            "spki": ZERO32,
            "offer": target.offer_digest,
            "client": (key or self.key).address,
            "nonce": secrets.token_bytes(32),
            "model": target.offer.model,
            "start": target.offer.start,
            "end": target.offer.end,
            "attempt": 0,
            "previous": ZERO_ADDRESS,
            "next": ZERO_ADDRESS,
            "max_length": target.offer.max_length,
            "top_k": 8,
            "issued": now,
            "expires": now + 600,
        }
        return SessionOpen(**{**values, **changes})

    @asynccontextmanager
    async def connect(self, target: Target) -> AsyncIterator[Connection]:
        """A connection on which nothing was sent yet."""
        connection = Connection(await self.peers.connect(target.url, target.node))
        connection.listen()
        try:
            yield connection
        finally:
            await connection.close()

    @asynccontextmanager
    async def open(self, target: Target, key: Key | None = None, **changes: Any) -> AsyncIterator[RawSession]:
        """An open session; `changes` as for `opening`."""
        key = key or self.key
        asked = self.opening(target, key, **changes)
        session = RawSession(await self.peers.connect(target.url, target.node), target=target, opening=asked)
        session.id = session_id(self.domain.chain_id, key.address, asked.nonce, ModelId(asked.model))
        session.listen()
        try:
            await session.send(Frame(Kind.OPEN, {"open": seal(self.domain, asked, key)}))
            session.opened = await session.next(Kind.OPENED)
            yield session
        finally:
            await session.close()

    async def refusal(self, target: Target, sealed: bytes) -> str:
        """The code with which the node refuses a sealed opening; the connection must end with it."""
        async with self.connect(target) as connection:
            await connection.send(Frame(Kind.OPEN, {"open": sealed}))
            error = await connection.error()
            await connection.until_closed()
        return str(error["code"])

    async def owed(self, target: Target, key: Key | None = None) -> tuple[int, bytes]:
        """What the node's ledger says of a client: owed, and the voucher it holds."""
        async with self.open(target, key) as session:
            return session.owed, bytes(session.opened.body["voucher"])

    def voucher(self, target: Target, total: int, key: Key | None = None, **changes: Any) -> Frame:
        """A voucher of the client, or one that names others (`client`, `node`) or is signed by another (`signer`)."""
        key = key or self.key
        signer = changes.pop("signer", key)
        promised = Voucher(**{"client": key.address, "node": target.node, "total": total, **changes})
        return Frame(Kind.VOUCHER, {"voucher": seal(self.escrow, promised, signer)})

    @asynccontextmanager
    async def push(
        self, target: Target, into: RawSession, hop: Identity, *, signer: Key | None = None, **changes: Any
    ) -> AsyncIterator[Connection]:
        """A connection that has sent a PUSH_OPEN for a session, as `hop` or pretending to be it."""
        values: dict[str, Any] = {
            "node": target.node,
            "session": into.id,
            "attempt": 0,
            "previous": hop.address,
            "spki": ZERO32,
            "nonce": secrets.token_bytes(32),
            "issued": int(time.time()),
        }
        async with self.connect(target) as connection:
            sealed = seal(self.domain, PushOpen(**{**values, **changes}), signer or hop.hot)
            await connection.send(Frame(Kind.PUSH_OPEN, {"push": sealed}))
            yield connection

    def receipt(self, frame: Frame) -> tuple[Receipt, Address]:
        return unseal(self.domain, Receipt, bytes(frame.body["receipt"]))

    def bind(self, cold: Key, hot: Key) -> Identity:
        """Put a hot key on chain for a node that serves nothing. Blocking."""
        Wallet(self.chain, cold).bind(hot)
        return Identity(cold, hot)

    async def close(self) -> None:
        await self.peers.close()


async def raised(work: Any) -> TallystickError:
    """The expected failure of an awaitable."""
    try:
        await work
    except TallystickError as error:
        return error
    raise AssertionError("nothing was raised")
