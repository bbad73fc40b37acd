"""One session at this node: rows in, rows out, receipts to the client, one step after the other.

Frames from the client and from the previous hop go into one inbox and are handled in order; vouchers are taken at once.
The rows leave before anything is signed, and nothing a token waits for touches the disk.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from tallystick_model.canonical.cache import KvCache
from tallystick_model.stock import CannotForget, StockCache
from tallystick_node.journal import Journal
from tallystick_node.scheduling.engine import Engine, Withdrawn
from tallystick_node.session.admission import row_bytes
from tallystick_node.session.billing import Billing
from tallystick_node.session.control import Commands, Control, told
from tallystick_node.session.downstream import Downstream, result_frames
from tallystick_node.session.inbox import Inbox
from tallystick_node.session.kept import FORKS_PER_ROW, FREE_FORKS, Source
from tallystick_node.session.links import Dialler
from tallystick_node.session.memory import Memory
from tallystick_node.session.passes import Passes
from tallystick_node.session.record import Record
from tallystick_node.session.ring import Order, Receiver, Sender
from tallystick_node.session.rows import RowFormat
from tallystick_node.session.windows import Terms, Windows
from tallystick_node.stake import Lookups
from tallystick_node.till import Till
from tallystick_protocol.errors import (
    BadFrame,
    BadPosition,
    BadSignature,
    ContextLengthExceeded,
    Rejected,
    SessionUnknown,
    TallystickError,
    Unauthorized,
)
from tallystick_protocol.frames import Frame, Kind, take
from tallystick_protocol.messages import SessionOpen
from tallystick_protocol.peer import Channel, sealed_field
from tallystick_protocol.receipts import Receipt, rows_root, unpack_flags
from tallystick_protocol.signing import Domain, address_bytes, checksum_address, unseal
from tallystick_protocol.types import (
    WINDOW,
    ZERO_ADDRESS,
    Address,
    Digest,
    ModelId,
    Positions,
    SessionId,
    Wei,
    window_of,
)
from tallystick_protocol.vouchers import charge
from tallystick_protocol.wire import DTYPES, Wire

log = logging.getLogger(__name__)

MEMORY_TIMEOUT_S = 30.0
QUEUED_COMMANDS = 64
IDLE_TIMEOUT_S = 600.0
WATCH_EVERY_S = 5.0
CLOSE_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Shop:
    """What all sessions of a node share."""

    node: Address
    model: ModelId
    numeric_class: Digest
    price: Wei
    domain: Domain
    engine: Engine
    journal: Journal
    till: Till
    dialler: Dialler
    escrow_domain: Domain
    lookups: Lookups
    clock: Callable[[], float]
    waiting: dict[Address, set[asyncio.Event]] = field(default_factory=dict)  # sessions that wait for a voucher
    sessions: Counter[Address] = field(default_factory=Counter)  # open ones of each client


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
    ) -> None:
        """epoch: the one that the session is in where it is open already. find: what another session holds or held.

        reserve: takes so many more bytes, or raises Overloaded.
        """
        model = self._model = shop.engine.part(opened.span)
        manifest = model.manifest
        self.id = session
        self.client = opened.client
        self._shop = shop
        self._open = opened
        self._control = control
        self._rows = RowFormat(manifest, model.span, opened.top_k, wire)
        self._find, self._reserve = find, reserve
        self._result_room = 4 * manifest.width * opened.max_length  # what the opening has reserved for kept rows
        self._memory = Memory(manifest, row_bytes(model), reserve) if manifest.is_decoder(model.span) else None
        self._cache = None if self._memory is not None else model.new_cache(opened.max_length)
        self._remembers = asyncio.Event()
        self._computed = self._forks = 0
        self.reused = 0  # rows that were taken over
        self.continues: SessionId | None = None  # the session all of whose rows were taken over
        self.has_parted = False  # whether it was closed in order, and has computed nothing since
        self._one_shot = not manifest.is_causal(model.span)
        window = charge(model.span, manifest.layers, shop.price, WINDOW)
        self._billing = Billing(
            shop.till,
            shop.lookups,
            shop.waiting,
            self.client,
            shop.escrow_domain,
            self._tell,
            lambda: Wei(window * shop.sessions[opened.client]),
        )
        self._passes = Passes(
            shop.engine, opened.span, self.client, shop.price, opened.max_length, self._billing, control.send, reserve
        )
        self._record = Record(self._one_shot)
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
        self._windows = Windows(terms, self._record)
        self._inbox = Inbox(opened.max_length, lambda: self.position, epoch)
        self._commands = Commands(control, QUEUED_COMMANDS)
        self._moving = asyncio.Lock()  # held while rows are computed and sent, cropped, or their way is changed
        self._sign = asyncio.Event()
        self._signing = asyncio.Lock()
        self._downstream = Downstream(
            shop.dialler, session, opened.attempt, opened.next, self._record, DTYPES[wire], epoch, self._tell,
            self._connect_next,
        )  # fmt: skip
        self._dialling = asyncio.Lock()
        self._sealed: dict[int, bytes] = {}
        self._drop_held()
        self._ring, self._fed_by = Sender(shop.dialler, session, opened.attempt), Receiver()
        self._heard_at = time.monotonic()
        self._claims = 0

    @property
    def attempt(self) -> int:
        return self._open.attempt

    @property
    def previous(self) -> Address:
        return self._windows.terms.previous

    @property
    def feeders(self) -> set[Address]:
        """Nodes that may push rows: the previous hop, or to the first one the end of the ring."""
        return {self.previous} if self.previous != ZERO_ADDRESS else {self._fed_by.node or ZERO_ADDRESS}

    @property
    def position(self) -> int:
        return len(self._record)

    @property
    def rewinds(self) -> bool:
        """Whether rows can be taken back one by one: not out of a recurrent state, nor of a sequence taken at once."""
        return not self._one_shot and not (isinstance(self._cache, StockCache) and self._cache.recurrent)

    @property
    def source(self) -> Source:
        """What another session may go on from."""
        return Source(
            self.id,
            self.client,
            self._model.span,
            self._rows.form,
            self._windows.side,
            None if self._one_shot else self._cache,
            self._record,
            self._computed,
            self._moving,
        )

    @property
    def size_bytes(self) -> int:
        cache = 0 if self._cache is None else self._cache.size_bytes
        return cache + self._record.size_bytes

    async def run(self) -> None:
        """Serve the session until its client is gone. Everything it started has ended when this returns.

        Raises Unreachable when the client has left, BadFrame when it has sent what is no frame.
        """
        tasks = [
            asyncio.create_task(self._read_control()),
            asyncio.create_task(self._work()),
            asyncio.create_task(self._obey()),
            asyncio.create_task(self._sign_windows()),
            asyncio.create_task(self._watch()),
        ]
        if not self._downstream.is_end:
            tasks.append(asyncio.create_task(self._first_link()))
        try:
            done, _ = await asyncio.wait(tasks[:5], return_when=asyncio.FIRST_COMPLETED)
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
        await self._inbox.serve_push(channel, epoch)

    async def resume(self, channel: Channel, num_receipts: int, first_result: int) -> None:
        """Serve the client on another connection: send what it lacks, then go on.

        num_receipts: how many windows' receipts it has. first_result: the first position whose result it lacks.
        """
        async with self._moving, self._signing:
            state = {"position": self.position, "epoch": self._inbox.epoch}
            hello = [Frame(Kind.RESUMED, state)]
            hello += [self._receipt_frame(self._sealed[at]) for at in sorted(self._sealed) if at >= num_receipts]
            if self._rows.is_last and first_result < self.position:
                hello += self._results(Positions(first_result, self.position))
            pump = await self._control.attach(channel, hello)
        self._heard_at = time.monotonic()
        await asyncio.wait([pump])

    def claim(self, signer: Address, number: int) -> None:
        """Check a claim to this session. Raises Unauthorized when it is not the client's, or not its newest."""
        if signer != self.client or number <= self._claims:
            raise Unauthorized("the claim is not signed by the session's client, or is an old one")
        self._claims = number

    def expel(self, error: TallystickError) -> None:
        """End the session for a reason."""
        self._control.expel(error)

    async def warn(self, error: TallystickError) -> None:
        """Tell the client something that is not an answer."""
        await self._tell(error)

    # -- tasks

    async def _read_control(self) -> None:
        """Vouchers are taken at once; rows and commands wait in lines of their own: a step that waits for a voucher
        must not hold up the commands that lead to it."""
        while True:
            frame = await self._control.receive()
            self._heard_at = time.monotonic()
            if frame.kind is Kind.VOUCHER:
                now = int(self._shop.clock())
                await self._report(self._billing.take_voucher(sealed_field(frame, "voucher"), now))
            elif frame.kind is Kind.PING:
                await self._control.send(
                    Frame(Kind.PONG, {"at": self.position, "unpaid": self._billing.is_waiting})
                )
            elif frame.kind is Kind.TENSOR:
                await self._report(self._passes.take(frame))
            elif frame.kind is Kind.STEP:
                try:
                    self._inbox.put(frame)
                except ContextLengthExceeded as error:
                    await self._tell(error)
            elif await self._commands.is_fresh(frame):
                await self._report(self._take_command(frame), frame)

    async def _take_command(self, frame: Frame) -> None:
        """What comes from the client after a command that takes rows back belongs to the epoch it leads to."""
        if frame.kind in (Kind.CROP, Kind.FORK):
            epoch = self._inbox.announce(take(frame.body, "epoch", int, 0))
            frame = replace(frame, body={**frame.body, "epoch": epoch})
            self._shop.engine.withdraw(self._cache, frame.position)
        await self._commands.put(frame)

    async def _watch(self) -> None:
        """End a session that nobody uses, or whose opening has expired: its place is somebody else's."""
        while True:
            await asyncio.sleep(WATCH_EVERY_S)
            if time.monotonic() - self._heard_at > IDLE_TIMEOUT_S or self._shop.clock() > self._open.expires:
                raise SessionUnknown("the session has expired or was idle for too long; open a new one")

    async def _work(self) -> None:
        """Rows, and the receipts that go with them, in the order in which they came."""
        while True:
            channel, frame = await self._inbox.next()
            await self._control.wait_attached()
            handler = self._on_step if frame.kind is Kind.STEP else self._on_receipt
            await self._report(handler(channel, frame))

    async def _obey(self) -> None:
        """The client's commands, one after the other."""
        handlers = {
            Kind.FLUSH: self._on_flush,
            Kind.CROP: self._on_crop,
            Kind.FORK: self._on_fork,
            Kind.MEMORY: self._on_memory,
            Kind.ROUTE: self._on_route,
            Kind.FORWARD: self._passes.forward,
            Kind.BACKWARD: self._passes.backward,
            Kind.REPLAY: self._on_replay,
            Kind.RING: self._on_ring,
            Kind.CLOSE: self._on_close,
        }
        while True:
            frame = await self._commands.next()
            handler = handlers.get(frame.kind)
            if handler is None:
                await self._tell(BadFrame(f"{frame.kind.name} does not belong into a session"))
                continue
            if await self._report(handler(frame), frame) and frame.kind not in (Kind.CROP, Kind.FORK):
                await self._commands.done(frame)
            self._sign.set()

    async def _report(self, work: Awaitable[None], command: Frame | None = None) -> bool:
        """Run a handler; an expected failure is told to the client and the session goes on where it was."""
        try:
            await work
        except TallystickError as error:
            if command is None:
                await self._tell(error)
            else:
                await self._commands.failed(command, error, self.position)
            return False
        return True

    async def _tell(self, error: TallystickError) -> None:
        await self._control.send(told(error, self.position))

    async def _first_link(self) -> None:
        await self._report(self._connect_next())

    # -- rows

    async def _on_step(self, channel: Channel | None, frame: Frame) -> None:
        is_first = self.previous == ZERO_ADDRESS
        by_ring = is_first and channel is not None
        if channel is None and not is_first:
            raise Unauthorized("rows come from the hop that the session names as the previous one")
        if by_ring and not self._fed_by.admits(frame, self.position):
            return
        rows = self._rows.parse(frame)
        want = self._flags(frame)
        types = self._rows.token_types(frame)
        if self._one_shot:
            await self._one_shot_step(frame, rows, want, types)
            return
        epoch = self._inbox.epoch
        await self._await_memory()
        async with self._moving:
            if epoch != self._inbox.epoch:
                return  # void since then
            if is_first and not by_ring:
                self._fed_by.confirm(self._record, frame.position, rows)
                self._sign.set()
            known = self._record.new_rows(frame.position, rows)
            if known and not take(frame.body, "confirm", bool, False):
                repeated = Positions(frame.position, frame.position + known)
                _, before = self._record.outputs(repeated)
                if any(asked and not had for asked, had in zip(want, before, strict=False)):
                    raise BadPosition("results are wanted of rows that were computed without: crop and send them again")
                await self._deliver(repeated)
        if by_ring:
            self._fed_by.fed(frame.position)
        if known < len(rows):
            await self._compute(frame.position + known, rows[known:], want[known:], epoch)

    async def _one_shot_step(self, frame: Frame, rows: list[bytes], want: list[bool], types: list[int]) -> None:
        """A bidirectional span takes the whole sequence at once, however many frames it came in."""
        if len(self._record):
            raise BadPosition("this model is bidirectional: a session takes one step", expected=len(self._record))
        if frame.position != len(self._held):
            raise BadPosition(f"rows go on at position {len(self._held)}", expected=len(self._held))
        self._check_length(len(self._held) + len(rows))
        if self._held and bool(types) != bool(self._held_types):
            raise BadFrame("token types come with every row of a session or with none")
        more = take(frame.body, "more", bool, False)
        self._held += rows
        self._held_want += want
        self._held_types += types
        if not more:
            rows, want, types = self._held, self._held_want, self._held_types
            self._drop_held()
            root = rows_root(bytes([kind]) for kind in types) if types else None
            self._windows.side = replace(self._windows.side, token_types=root)
            await self._compute(0, rows, want, self._inbox.epoch, types)

    def _drop_held(self) -> None:
        """Forget the frames of a step that is not whole yet."""
        self._held: list[bytes] = []
        self._held_want: list[bool] = []
        self._held_types: list[int] = []

    def _flags(self, frame: Frame) -> list[bool]:
        if "want" not in frame.body:
            return [False] * frame.num_rows
        try:
            return list(unpack_flags(take(frame.body, "want", bytes), frame.num_rows))
        except ValueError as error:
            raise BadFrame(str(error)) from None

    def _check_length(self, length: int) -> None:
        if length > self._open.max_length:
            raise ContextLengthExceeded(
                f"the session was opened for {self._open.max_length} positions, {length} were asked for",
                limit=self._open.max_length,
            )

    def _make_room(self, num_bytes: int) -> None:
        """Reserve what kept rows will take beyond what the opening has reserved: dense logits may be large."""
        missing = num_bytes - self._result_room
        if missing > 0:
            self._reserve(missing)
            self._result_room += missing

    async def _compute(
        self, start: int, rows: list[bytes], want: list[bool], epoch: int, types: Sequence[int] = ()
    ) -> None:
        """New rows from position `start`; void when the session has left their epoch."""
        self._check_length(start + len(rows))
        if self._rows.is_last:
            self._make_room(self._record.size_bytes + sum(want) * self._rows.result_bytes)
        shop, model = self._shop, self._model
        cost = charge(model.span, model.manifest.layers, shop.price, len(rows))
        if not await self._billing.book(cost, lambda: epoch != self._inbox.epoch):
            return  # cropped while it waited for a voucher
        async with self._moving:
            if epoch != self._inbox.epoch:
                self._billing.refund(cost)
                return
            self.has_parted = False
            try:
                segment = self._rows.segment(self._cache, start, rows, want, types)
                result = await shop.engine.forward(segment, self.client, model=model)
                outputs = self._rows.outputs(result, want)
            except (TallystickError, Withdrawn) as error:
                self._billing.refund(cost)
                if self._cache is not None and self._cache.length > start:
                    with suppress(CannotForget):  # then the model refuses what goes on from elsewhere than its state
                        self._cache.crop(start)  # its rows were computed, but are not fit to be signed
                if isinstance(error, Withdrawn):
                    return
                raise
            self._record.append(rows, outputs, want)
            self._computed += len(rows)
            chosen = await self._ring.turn(len(self._record) - 1, outputs[-1])
            await self._deliver(Positions(start, len(self._record)), chosen)
        self._sign.set()

    async def _deliver(self, positions: Positions, chosen: int | None = None) -> None:
        """Send output rows on: to the next hop, or from the model's end to the client.

        chosen: the token that the ring has chosen from the last one.
        """
        if not self._downstream.is_end:
            await self._downstream.pass_on(positions)
        elif self._rows.is_last:
            for frame in self._results(positions):
                body = frame.body if chosen is None else {**frame.body, "chosen": chosen}
                await self._control.send(replace(frame, body=body))

    def _results(self, positions: Positions) -> Iterator[Frame]:
        outputs, want = self._record.outputs(positions)
        return result_frames(self._rows.result_dtype, positions.first, outputs, want, self._inbox.epoch)

    # -- receipts

    async def _on_receipt(self, channel: Channel | None, frame: Frame) -> None:
        """The previous hop's receipt: it signed what it sent, or we do not sign what we got."""
        if not self._inbox.is_push(channel):
            raise Unauthorized("receipts come from the previous hop")
        receipt, signer = unseal(self._shop.domain, Receipt, sealed_field(frame, "receipt"))
        node = await asyncio.to_thread(self._shop.lookups.signer_of, signer)
        if node != self.previous or receipt.node != self.previous:
            raise BadSignature("the receipt is not signed by the previous hop", hop=self.previous)
        if receipt.model != self._shop.model or receipt.end != self._model.span.start:
            raise BadSignature("the receipt is for another model or other layers", hop=self.previous)
        self._check_length(receipt.last)
        self._windows.hear(receipt, 0 if self._one_shot else window_of(receipt.first))
        self._sign.set()

    async def _sign_windows(self) -> None:
        while True:
            await self._sign.wait()
            self._sign.clear()
            async with self._signing:
                await self._report(self._sign_due())

    async def _sign_due(self) -> None:
        shop = self._shop
        while (receipt := self._windows.next_unsigned(int(shop.clock()))) is not None:
            if not self._fed_by.may_sign(receipt.last):
                return
            index = 0 if self._one_shot else window_of(receipt.first)
            sealed = await asyncio.to_thread(shop.journal.sign, receipt)
            standing, _ = unseal(shop.domain, Receipt, sealed)  # the journal may have had it, with its old time
            self._windows.signed(standing, index, shop.journal.digest_of(standing))
            self._sealed[index] = sealed
            await asyncio.to_thread(shop.till.settle, self.client, int(shop.clock()))
            await self._control.send(self._receipt_frame(sealed))
            await self._downstream.pass_receipt(sealed)

    def _receipt_frame(self, sealed: bytes) -> Frame:
        return Frame(Kind.RECEIPT, {"receipt": sealed, "epoch": self._inbox.epoch})

    async def _on_flush(self, frame: Frame) -> None:
        self._windows.flush(frame.position)
        self._sign.set()

    # -- the client's other commands

    async def _on_crop(self, frame: Frame) -> None:
        """Forget positions from frame.position on; whoever gets rows from here hears of it in the order of the rows."""
        async with self._moving:
            await self._rewind(frame, min(frame.position, len(self._record)))

    async def _rewind(self, frame: Frame, length: int, source: Source | None = None, last: int = 0) -> None:
        """Keep `length` rows, then take [length, last) of `source`; the next hop hears of a crop. Holds _moving.

        Nothing is signed until the client has heard that it is done: it drops every receipt that came before.
        """
        self.has_parted = False
        if length < self.reused:
            self.continues = None
        async with self._signing:
            try:
                if source is None:
                    self._rewind_cache(length)
                else:  # copying takes its time
                    await asyncio.to_thread(self._rewind_cache, length, source, last)
            except CannotForget as error:
                raise BadPosition(str(error)) from None
            self._record.crop(length)
            self._windows.crop()
            self._sealed = {k: v for k, v in self._sealed.items() if k < self._record.num_complete}
            self._drop_held()
            self._ring.disarm()
            self._fed_by.crop(length)
            if source is not None:
                self._record.take(source.record, length, last)
            epoch = take(frame.body, "epoch", int)
            await self._downstream.enter(epoch, frame.position)
            self._inbox.enter(epoch)
            self._billing.wake()  # a step that waited for a voucher is void now
            await self._commands.done(frame)

    def _rewind_cache(self, length: int, source: Source | None = None, last: int = 0) -> None:
        """Raises CannotForget, and then has changed nothing."""
        if self._cache is None:
            return
        if source is None or isinstance(self._cache, KvCache):
            self._cache.crop(length)
        if source is not None:
            self._cache.take(source.cache, length, last)  # of the same span, so of the same class

    async def _on_fork(self, frame: Frame) -> None:
        """Go on from another session of this client, open or kept: its rows [frame.position, to) replace ours.

        Nothing is computed, so nothing is charged; the receipts that follow say what is true of these rows here, too.
        """
        source = self._find(SessionId(take(frame.body, "from", bytes)))
        first, last = frame.position, take(frame.body, "to", int)
        if source is None or source.id == self.id or source.client != self.client:
            raise SessionUnknown("no other session of yours with that id is open or kept here")
        if source.is_spent or self._forks >= FREE_FORKS + FORKS_PER_ROW * self._computed:
            raise Rejected("more forks than this session has computed rows for: each is signed, none is paid")
        same = source.side == self._windows.side and source.form == self._rows.form
        same = same and source.span == self._model.span
        if self._one_shot or self._cache is None or source.cache is None or not same:
            raise BadPosition("these sessions do not hold rows that one could go on from in the other")
        early, late = sorted((self.source, source), key=lambda one: one.id)
        async with early.moving, late.moving:
            if not 0 <= first <= last <= len(source.record) or first > len(self._record):
                raise BadPosition(f"rows [{first}, {last}) are not there to be taken", expected=len(source.record))
            self._check_length(last)
            if not self._record.shares(source.record, first):
                raise BadPosition(f"the two sessions differ before position {first}")
            self._make_room(self._record.bytes_of(0, first) + source.record.bytes_of(first, last))
            await self._rewind(frame, first, source, last)
            self._forks += 1
            source.forks += 1
            self.reused += last - first
            self.continues = source.id if last == len(source.record) else None

    async def _on_memory(self, frame: Frame) -> None:
        """The encoder's last hidden states, which a decoder attends to: before the first step, in one frame or more."""
        if self._memory is None or self._cache is not None:
            raise BadFrame("states of an encoder belong to a decoder's session, once, before its first step")
        self._memory.take(frame)
        if not take(frame.body, "more", bool, False):
            states, root = self._memory.whole()
            self._cache = self._model.new_cache(self._open.max_length, states)
            self._windows.side = replace(self._windows.side, memory=root)
            self._remembers.set()

    async def _await_memory(self) -> None:
        """The encoder's states come from the client, rows perhaps from the hop before: either may be first."""
        if self._memory is None or self._remembers.is_set():
            return
        try:
            async with asyncio.timeout(MEMORY_TIMEOUT_S):
                await self._remembers.wait()
        except TimeoutError:
            raise BadPosition("a decoder takes the encoder's states (MEMORY) before its first step") from None

    async def _on_route(self, frame: Frame) -> None:
        """Another node takes the place of a neighbour: the one that pushes to us, or the one that we push to."""
        if "previous" in frame.body:
            self._inbox.drop_push()
            async with self._signing:
                self._windows.replace_previous(_address(frame, "previous"))
        if "next" in frame.body:
            self._downstream.redirect(_address(frame, "next"))
            await self._connect_next()

    async def _on_replay(self, frame: Frame) -> None:
        """Send kept outputs [first, last) to a node where the client has opened a session of its own."""
        first, last = take(frame.body, "first", int), take(frame.body, "last", int)
        if not 0 <= first < last:
            raise BadFrame(f"there are no positions [{first}, {last})")
        positions = Positions(first, last)
        session = SessionId(take(frame.body, "session", bytes))
        self._record.outputs(positions)
        await self._downstream.replay(positions, _address(frame, "to"), session, self._sealed)

    async def _on_ring(self, frame: Frame) -> None:
        """The client has the last hop choose tokens (`first`), and the first one take them from there (`from`)."""
        if self._one_shot or not self._open.top_k:
            raise BadFrame("a ring is for sessions of causal models whose results are top-k rows")
        if "from" in frame.body:
            if self.previous != ZERO_ADDRESS:
                raise BadFrame("only the first hop takes ids from the ring")
            self._fed_by.open(frame)
        if "first" in frame.body:
            if not (self._rows.is_last and self._downstream.is_end):
                raise BadFrame("only the last hop chooses tokens")
            self._ring.arm(Order.parse(frame), self._inbox.epoch)

    async def _on_close(self, _: Frame) -> None:
        """Sign what is left. When this is done, every voucher sent before it has been taken."""
        async with self._moving:
            self._windows.flush(len(self._record))
            async with self._signing:
                await self._sign_due()
            self.has_parted = True

    # -- the next hop

    async def _connect_next(self) -> None:
        """Dial the next hop and send it what it has not got, receipts included."""
        async with self._dialling:
            link = await self._downstream.dial()
            if link is not None:
                async with self._moving, self._signing:
                    await self._downstream.join(link, self._sealed)

    async def _disconnect(self) -> None:
        await self._downstream.close()
        self._ring.disarm()
        self._inbox.close()


def _address(frame: Frame, key: str) -> Address:
    return checksum_address(address_bytes(Address(take(frame.body, key, str))))
