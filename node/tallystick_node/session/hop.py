"""One session at this node: rows in, rows out, receipts to the client, one step after the other.

Frames from the client and from the previous hop go into one inbox and are handled in order; vouchers are taken at once.
The rows leave before anything is signed, and nothing a token waits for touches the disk.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace

from tallystick_model.stock import StockCache
from tallystick_node.session.admission import row_bytes
from tallystick_node.session.billing import Billing
from tallystick_node.session.control import Commands, Control, told
from tallystick_node.session.downstream import Downstream
from tallystick_node.session.inbox import Inbox
from tallystick_node.session.kept import Source
from tallystick_node.session.memory import Memory
from tallystick_node.session.passes import Passes
from tallystick_node.session.record import Record
from tallystick_node.session.rewinding import Rewinding
from tallystick_node.session.ring import Order, Receiver, Sender
from tallystick_node.session.rows import RowFormat
from tallystick_node.session.shop import Shop
from tallystick_node.session.signer import Signer
from tallystick_node.session.sketcher import Sketcher
from tallystick_node.session.steps import Steps
from tallystick_node.session.windows import Terms, Windows
from tallystick_protocol.errors import (
    BadFrame,
    ContextLengthExceeded,
    SessionUnknown,
    TallystickError,
    Unauthorized,
)
from tallystick_protocol.frames import Frame, Kind, rows_frame, rows_per_frame, take
from tallystick_protocol.messages import SessionOpen
from tallystick_protocol.peer import Channel, sealed_field
from tallystick_protocol.signing import address_bytes, checksum_address
from tallystick_protocol.types import (
    WINDOW,
    ZERO_ADDRESS,
    Address,
    Positions,
    SessionId,
    Wei,
)
from tallystick_protocol.vouchers import charge
from tallystick_protocol.wire import DTYPES, Wire

log = logging.getLogger(__name__)

MEMORY_TIMEOUT_S = 30.0
QUEUED_COMMANDS = 64
IDLE_TIMEOUT_S = 600.0
WATCH_EVERY_S = 5.0
CLOSE_TIMEOUT_S = 10.0


class Hop:
    """A session. `run` serves it until the client closes or is gone."""

    def __init__(
        self,
        shop: Shop,
        opened: SessionOpen,
        session: SessionId,
        control: Control,
        epoch: int,
        wire: Wire,
        find: Callable[[SessionId], Source | None],
        reserve: Callable[[int], None],
        sketches: bool = False,
    ) -> None:
        """epoch: the one that the session is in where it is open already. find: what another session holds or held.

        reserve: takes so many more bytes, or raises Overloaded. sketches: whether the client is going to challenge.
        """
        model = self.model = shop.engine.part(opened.span)
        manifest = model.manifest
        self.id = session
        self.client = opened.client
        self.shop = shop
        self.opened = opened
        self.control = control
        self.rows = RowFormat(manifest, model.span, opened.top_k, wire)
        self.find, self.reserve = find, reserve
        self.memory = Memory(manifest, row_bytes(model), reserve) if manifest.is_decoder(model.span) else None
        self.cache = None if self.memory is not None else model.new_cache(opened.max_length)
        self.remembers = asyncio.Event()
        self.reused = 0  # rows that were taken over
        self.continues: SessionId | None = None  # the session all of whose rows were taken over
        self.has_parted = False  # whether it was closed in order, and has computed nothing since
        self.one_shot = not manifest.is_causal(model.span)
        window = charge(model.span, manifest.layers, shop.price, WINDOW)
        self.billing = Billing(
            shop.till,
            shop.lookups,
            shop.waiting,
            self.client,
            shop.escrow_domain,
            self.tell,
            lambda: Wei(window * shop.sessions[opened.client]),
        )
        self._passes = Passes(
            shop.engine, opened.span, self.client, shop.price, opened.max_length, self.billing, control.send, reserve
        )
        self.record = Record(self.one_shot, sketches)
        terms = Terms(
            shop.node,
            shop.model,
            shop.numeric_class,
            session,
            opened.attempt,
            model.span,
            opened.previous,
            opened.top_k,
            manifest.numerics,
            wire,
        )
        self.windows = Windows(terms, self.record, sketches)
        self.inbox = Inbox(opened.max_length, lambda: self.position, epoch)
        self.commands = Commands(control, QUEUED_COMMANDS)
        self.moving = asyncio.Lock()  # held while rows are computed and sent, cropped, or their way is changed
        self.downstream = Downstream(
            shop.dialler, session, opened.attempt, opened.next, self.record, DTYPES[wire], epoch, self.tell,
            self._connect_next,
        )  # fmt: skip
        self._dialling = asyncio.Lock()
        self.steps, self.signer, self.rewinding = Steps(self), Signer(self), Rewinding(self)
        self.sketcher = Sketcher(self, sketches)
        self.ring, self.fed_by = Sender(shop.dialler, session, opened.attempt), Receiver()
        self._claims = 0

    @property
    def attempt(self) -> int:
        return self.opened.attempt

    @property
    def previous(self) -> Address:
        return self.windows.terms.previous

    @property
    def feeders(self) -> set[Address]:
        """Nodes that may push rows: the previous hop, or to the first one the end of the ring."""
        return {self.previous} if self.previous != ZERO_ADDRESS else {self.fed_by.node or ZERO_ADDRESS}

    @property
    def position(self) -> int:
        return len(self.record)

    @property
    def rewinds(self) -> bool:
        """Whether rows can be taken back one by one: not out of a recurrent state, nor of a sequence taken at once."""
        return not self.one_shot and not (isinstance(self.cache, StockCache) and self.cache.recurrent)

    @property
    def source(self) -> Source:
        """What another session may go on from."""
        return Source(
            self.id,
            self.client,
            self.model.span,
            self.rows.form,
            self.windows.side,
            None if self.one_shot else self.cache,
            self.record,
            self.steps.computed,
            self.moving,
        )

    @property
    def size_bytes(self) -> int:
        cache = 0 if self.cache is None else self.cache.size_bytes
        return cache + self.record.size_bytes

    async def run(self) -> None:
        """Serve the session until its client is gone. Everything it started has ended when this returns.

        Raises Unreachable when the client has left, BadFrame when it has sent what is no frame.
        """
        tasks = [
            asyncio.create_task(self._read_control()),
            asyncio.create_task(self._work()),
            asyncio.create_task(self._hear()),
            asyncio.create_task(self._obey()),
            asyncio.create_task(self.signer.run()),
            asyncio.create_task(self.sketcher.run()),
            asyncio.create_task(self._watch()),
        ]
        self.downstream.keep_linked()
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if (error := task.exception()) is not None:
                    raise error
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._disconnect()

    async def serve_push(self, channel: Channel, epoch: int) -> None:
        """Take rows and receipts from the previous hop until its connection ends or another one takes its place."""
        await self.inbox.serve_push(channel, epoch)

    async def resume(self, channel: Channel, num_receipts: int, first_result: int) -> None:
        """Serve the client on another connection: send what it lacks, then go on.

        num_receipts: how many windows' receipts it has. first_result: the first position whose result it lacks.
        """
        async with self.moving, self.signer.lock:
            state = {"position": self.fed_by.confirmed(self.position), "epoch": self.inbox.epoch}
            hello = [Frame(Kind.RESUMED, state)]
            hello += self.signer.missing(num_receipts)
            if self.rows.is_last and first_result < self.position:
                hello += self.steps.results(Positions(first_result, self.position))
            pump = await self.control.attach(channel, hello)
        self.downstream.keep_linked()  # the client may not have heard that it was lost
        await asyncio.wait([pump])

    def claim(self, signer: Address, number: int) -> None:
        """Check a claim to this session. Raises Unauthorized when it is not the client's, or not its newest."""
        if signer != self.client or number <= self._claims:
            raise Unauthorized("the claim is not signed by the session's client, or is an old one")
        self._claims = number

    def expel(self, error: TallystickError) -> None:
        """End the session for a reason."""
        self.control.expel(error)

    async def warn(self, error: TallystickError) -> None:
        """Tell the client something that is not an answer."""
        await self.tell(error)

    # -- tasks

    async def _read_control(self) -> None:
        """Vouchers are taken at once; rows and commands wait in lines of their own: a step that waits for a voucher
        must not hold up the commands that lead to it."""
        while True:
            frame = await self.control.receive()
            if frame.kind is Kind.VOUCHER:
                now = int(self.shop.clock())
                await self.report(self.billing.take_voucher(sealed_field(frame, "voucher"), now))
            elif frame.kind is Kind.PING:
                await self.control.send(Frame(Kind.PONG, {"at": self.position, "unpaid": self.billing.is_waiting}))
            elif frame.kind is Kind.TENSOR:
                await self.report(self._passes.take(frame))
            elif frame.kind is Kind.CHALLENGE:
                await self.sketcher.put(frame)
            elif frame.kind is Kind.STEP:
                try:
                    self.inbox.put(frame)
                except ContextLengthExceeded as error:
                    await self.tell(error)
            elif await self.commands.is_fresh(frame):
                await self.report(self._take_command(frame), frame)

    async def _take_command(self, frame: Frame) -> None:
        """What comes from the client after a command that takes rows back belongs to the epoch it leads to."""
        if frame.kind in (Kind.CROP, Kind.FORK):
            epoch = self.inbox.announce(take(frame.body, "epoch", int, 0))
            frame = replace(frame, body={**frame.body, "epoch": epoch})
            self.shop.engine.withdraw(self.cache, frame.position)
        await self.commands.put(frame)

    async def _watch(self) -> None:
        """End a session that has computed nothing for long, whatever its client says: its place is somebody else's."""
        while True:
            await asyncio.sleep(WATCH_EVERY_S)
            idle_s = time.monotonic() - self.billing.charged_at
            if idle_s > IDLE_TIMEOUT_S and not self.moving.locked():
                raise SessionUnknown(f"nothing was computed for {IDLE_TIMEOUT_S:g} s; open a new session")

    async def _work(self) -> None:
        """Rows, in the order in which they came."""
        while True:
            channel, frame, epoch = await self.inbox.next()
            await self.control.wait_attached()
            await self.report(self.steps.take(channel, frame, epoch))

    async def _hear(self) -> None:
        """The previous hop's receipts, as they come."""
        while True:
            await self.report(self.signer.hear(*await self.inbox.next_receipt()))

    async def _obey(self) -> None:
        """The client's commands, one after the other."""
        handlers = {
            Kind.FLUSH: self.signer.flush,
            Kind.CROP: self.rewinding.crop,
            Kind.FORK: self.rewinding.fork,
            Kind.MEMORY: self._on_memory,
            Kind.ROUTE: self._on_route,
            Kind.FORWARD: self._passes.forward,
            Kind.BACKWARD: self._passes.backward,
            Kind.REPLAY: self._on_replay,
            Kind.FETCH: self._on_fetch,
            Kind.RING: self._on_ring,
            Kind.CLOSE: self._on_close,
        }
        while True:
            frame = await self.commands.next()
            handler = handlers.get(frame.kind)
            if handler is None:
                await self.tell(BadFrame(f"{frame.kind.name} does not belong into a session"))
                continue
            if await self.report(handler(frame), frame) and frame.kind not in (Kind.CROP, Kind.FORK):
                await self.commands.done(frame)
            self.signer.wake()

    async def report(self, work: Awaitable[None], command: Frame | None = None) -> bool:
        """Run a handler; an expected failure is told to the client and the session goes on where it was."""
        try:
            await work
        except TallystickError as error:
            if command is None:
                await self.tell(error)
            else:
                await self.commands.failed(command, error, self.position)
            return False
        return True

    async def tell(self, error: TallystickError) -> None:
        await self.control.send(told(error, self.position))

    # -- the client's other commands

    async def _on_memory(self, frame: Frame) -> None:
        """The encoder's last hidden states, which a decoder attends to: before the first step, in one frame or more."""
        if self.memory is None or self.cache is not None:
            raise BadFrame("states of an encoder belong to a decoder's session, once, before its first step")
        self.memory.take(frame)
        if not take(frame.body, "more", bool, False):
            states, root = self.memory.whole()
            self.cache = self.model.new_cache(self.opened.max_length, states)
            self.windows.side = replace(self.windows.side, memory=root)
            self.remembers.set()

    async def _on_route(self, frame: Frame) -> None:
        """Another node takes the place of a neighbour: the one that pushes to us, or the one that we push to."""
        if "previous" in frame.body:
            self.inbox.drop_push()
            async with self.signer.lock:
                self.windows.replace_previous(_address(frame, "previous"))
        if "next" in frame.body:
            self.downstream.redirect(_address(frame, "next"))
            await self._connect_next()

    async def _on_replay(self, frame: Frame) -> None:
        """Send kept outputs [first, last) to a node where the client has opened a session of its own."""
        first, last = take(frame.body, "first", int), take(frame.body, "last", int)
        if not 0 <= first < last:
            raise BadFrame(f"there are no positions [{first}, {last})")
        positions = Positions(first, last)
        session = SessionId(take(frame.body, "session", bytes))
        self.record.outputs(positions)
        await self.downstream.replay(positions, _address(frame, "to"), session, self.signer.sealed)

    async def _on_fetch(self, frame: Frame) -> None:
        """Send kept outputs [first, last) to the client itself, which may need them as evidence."""
        first, last = take(frame.body, "first", int), take(frame.body, "last", int)
        if not 0 <= first < last or self.rows.is_last:
            raise BadFrame(f"there are no rows of positions [{first}, {last}) that leave for another hop")
        rows, _ = self.record.outputs(Positions(first, last))
        step = rows_per_frame(len(rows[0]))
        for begin in range(0, len(rows), step):
            part = rows[begin : begin + step]
            await self.control.send(rows_frame(Kind.KEPT, DTYPES[self.rows.wire], part, first + begin, {}))

    async def _on_ring(self, frame: Frame) -> None:
        """The client has the last hop choose tokens (`first`), and the first one take them from there (`from`)."""
        if self.one_shot or not self.opened.top_k:
            raise BadFrame("a ring is for sessions of causal models whose results are top-k rows")
        if "from" in frame.body:
            if self.previous != ZERO_ADDRESS:
                raise BadFrame("only the first hop takes ids from the ring")
            self.fed_by.open(frame)
        if "first" in frame.body:
            if not (self.rows.is_last and self.downstream.is_end):
                raise BadFrame("only the last hop chooses tokens")
            self.ring.arm(Order.parse(frame), self.inbox.epoch)

    async def _on_close(self, _: Frame) -> None:
        """Sign what is left. When this is done, every voucher sent before it has been taken."""
        async with self.moving:
            self.windows.flush(len(self.record))
            async with self.signer.lock:
                await self.signer.sign_due()
            self.has_parted = True

    # -- the next hop

    async def _connect_next(self) -> None:
        """Dial the next hop and send it what it has not got, receipts included."""
        async with self._dialling:
            link = await self.downstream.dial()
            if link is not None:
                async with self.moving, self.signer.lock:
                    await self.downstream.join(link, self.signer.sealed)

    async def _disconnect(self) -> None:
        await self.downstream.close()
        self.ring.disarm()
        self.inbox.close()


def _address(frame: Frame, key: str) -> Address:
    return checksum_address(address_bytes(Address(take(frame.body, key, str))))
