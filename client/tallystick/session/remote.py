"""One hop as the client sees it: an open session at one node, its receipts, what is owed to it."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from tallystick.checks import SignedOnce, Terms
from tallystick.payments import Purse
from tallystick.routing.candidates import Candidate
from tallystick.session.line import COMMAND_TIMEOUT_S, Comeback, Line
from tallystick.session.sketchbook import Sketchbook
from tallystick_protocol.errors import (
    BadFrame,
    CorruptResult,
    Draining,
    Rejected,
    TallystickError,
    Unreachable,
    from_wire,
)
from tallystick_protocol.frames import DType, Frame, Kind, rows_frame, rows_per_frame, take
from tallystick_protocol.messages import Opened, Resume, SessionOpen, session_id
from tallystick_protocol.peer import Channel, Peers, expect, sealed_field
from tallystick_protocol.receipts import Receipt, pack_flags
from tallystick_protocol.signing import Domain, Key, digest, seal, unseal
from tallystick_protocol.types import WINDOW, ZERO32, Address, Digest, ModelId, SessionId, Wei
from tallystick_protocol.vouchers import charge
from tallystick_protocol.wire import Wire

log = logging.getLogger(__name__)

OPEN_TIMEOUT_S = 15.0
KEPT_CROPS = 256
DROPPED_ROWS = 64
OPEN_LIFETIME_S = 3600


@dataclass(frozen=True, slots=True)
class Opening:
    """What the client asks of a hop besides what the offer says. `nonce` names the session; the same at all hops."""

    nonce: bytes
    model: ModelId
    num_layers: int
    attempt: int
    previous: Address
    next: Address
    max_length: int
    top_k: int
    epoch: int = 0
    wire: Wire = "f32"
    sketches: bool = False


@dataclass(frozen=True, slots=True)
class Hearing:
    """Who hears what a node says. on_change: called after every frame, and when the connection has failed.

    on_resumed: the node is back and has computed so many positions of an epoch; it lacks what was on its way.
    first_missing: the first position whose result is still to come. insist_s: how long to try to come back.
    """

    on_receipt: Callable[[Remote, Receipt], None]
    on_result: Callable[[Remote, Frame], None]
    on_change: Callable[[], None]
    on_resumed: Callable[[Remote, int, int], Awaitable[None]] | None = None
    first_missing: Callable[[], int] = lambda: 0
    insist_s: Callable[[], float] = lambda: 0.0


@dataclass(slots=True)
class Standing:
    """The receipts of one hop that stand, window by window, with their digests."""

    receipts: list[Receipt] = field(default_factory=list)
    digests: list[Digest] = field(default_factory=list)

    @property
    def covered(self) -> int:
        """Positions covered by receipts."""
        return self.receipts[-1].last if self.receipts else 0

    def previous(self, index: int) -> Digest:
        return self.digests[index - 1] if index else ZERO32

    def put(self, index: int, receipt: Receipt, its_digest: Digest) -> None:
        del self.receipts[index:], self.digests[index:]
        self.receipts.append(receipt)
        self.digests.append(its_digest)

    def crop(self, length: int) -> None:
        keep = sum(receipt.last <= length and receipt.last % WINDOW == 0 for receipt in self.receipts)
        del self.receipts[keep:], self.digests[keep:]


class Remote:
    """An open session at one node. Frames that arrive are handed to the callbacks on the event loop."""

    def __init__(
        self, candidate: Candidate, opening: Opening, channel: Channel, domain: Domain, client: Address
    ) -> None:
        self.candidate = candidate
        self.opening = opening
        self.session: SessionId = session_id(domain.chain_id, client, opening.nonce, opening.model)
        self.terms = Terms(
            candidate.node,
            opening.model,
            candidate.offer.numeric_class,
            self.session,
            opening.attempt,
            candidate.span,
        )
        self.standing = Standing()
        self._once = SignedOnce()
        self.sketchbook = Sketchbook(opening.sketches)
        self.failure: TallystickError | None = None
        self.rewinds = True
        self.told: list[TallystickError] = []
        self.base: Wei = Wei(0)
        self.rows_due = 0
        self.rows_paid = 0
        self.due_after: dict[int, int] = {}
        self._due_to = self._dropped = 0
        self.is_draining = False
        self.lacks: Wei | None = None
        self.crops: list[tuple[int, int]] = []
        self.line = Line(candidate.node, channel)
        self._domain = domain
        self.arrivals: dict[Receipt, int] = {}
        self.sealed: dict[Receipt, bytes] = {}
        self._fetched: list[Frame] | None = None
        self._fetching = asyncio.Lock()
        self._claims = 0
        self._flush: Frame | None = None
        self._voucher: Frame | None = None
        self._signed: Wei = Wei(0)  # the total of that
        self._reminder: tuple[Wei, int] | None = None  # what is owed in all at which position, as the node says
        self._is_reminded = False  # since the last voucher
        self._leave: Callable[[], None] | None = None
        self._promised: Callable[[], Wei] = lambda: Wei(0)
        self._dial: Callable[[], Awaitable[Channel]] | None = None
        self._key: Key | None = None
        self._hearing: Hearing

    @property
    def node(self) -> Address:
        return self.candidate.node

    @classmethod
    async def open(
        cls, peers: Peers, candidate: Candidate, opening: Opening, key: Key, domain: Domain, purse: Purse
    ) -> Remote:
        """Open a session. Raises Unreachable, Overloaded, Rejected, and what else the node answers."""
        channel = await peers.connect(candidate.door, candidate.node)
        try:
            now = int(time.time())
            asked = SessionOpen(
                node=candidate.node,
                spki=channel.spki,
                offer=candidate.offer_digest,
                client=key.address,
                nonce=opening.nonce,
                model=opening.model,
                start=candidate.span.start,
                end=candidate.span.end,
                attempt=opening.attempt,
                previous=opening.previous,
                next=opening.next,
                max_length=opening.max_length,
                top_k=opening.top_k,
                issued=now,
                expires=now + OPEN_LIFETIME_S,
            )
            body = {"open": seal(domain, asked, key), "epoch": opening.epoch, "wire": opening.wire}
            body |= {"sketches": True} if opening.sketches else {}
            await channel.send(Frame(Kind.OPEN, body))
            answer = await expect(channel, Kind.OPENED, OPEN_TIMEOUT_S)
            opened, signer = unseal(domain, Opened, sealed_field(answer, "opened"))
            if signer != candidate.signer or opened.open != digest(domain, asked) or opened.spki != channel.spki:
                raise Rejected(f"{candidate.node} did not sign this opening", hop=candidate.node)
            if opened.credit < candidate.offer.credit:
                raise Rejected(f"{candidate.node} gives less credit than it offered", hop=candidate.node)
            if opening.sketches and not take(answer.body, "sketches", bool, False):
                raise Rejected(f"{candidate.node} gives no sketches", hop=candidate.node)
            remote = cls(candidate, opening, channel, domain, key.address)
            owed = Wei(int(take(answer.body, "owed", str)[:78]))
            voucher = take(answer.body, "voucher", bytes)
            remote.rewinds = take(answer.body, "rewinds", bool, True)
            price = Wei(candidate.offer.price)
            window = charge(candidate.span, opening.num_layers, price, WINDOW)
            remote.base = purse.recall(candidate.node, owed, voucher, Wei(candidate.offer.credit), window)
            remote._key = key
            remote._dial = partial(peers.connect, candidate.door, candidate.node)
            remote._leave = partial(purse.leave, candidate.node)
            remote._promised = partial(purse.promised, candidate.node)
            return remote
        except ValueError as error:
            await channel.close()
            raise BadFrame(f"{candidate.node} opened with nonsense: {error}") from None
        except BaseException:
            await channel.close()
            raise

    def listen(self, hearing: Hearing) -> None:
        """Begin to read."""
        self._hearing = hearing
        comeback = None
        if hearing.on_resumed is not None and self._dial is not None:
            comeback = Comeback(self._dial, self._claim, self._rejoin, hearing.insist_s)
        self.line.listen(self._take, hearing.on_change, self._fail, comeback)

    def _fail(self, error: TallystickError) -> None:
        self.failure = self.failure or error

    def _take(self, frame: Frame) -> None:
        hearing = self._hearing
        if frame.kind is Kind.RECEIPT:
            receipt, signer = unseal(self._domain, Receipt, sealed_field(frame, "receipt"))
            if signer != self.candidate.signer:
                raise CorruptResult(f"a receipt of {self.node} is signed by {signer}", hop=self.node)
            self._once.check(receipt)
            if receipt.last > self.kept_of(take(frame.body, "epoch", int, 0)):
                return  # signed before rows of it were taken back
            self.sealed[receipt] = sealed_field(frame, "receipt")
            if self._closes(receipt):
                return
            self.arrivals[receipt] = int(time.time())
            hearing.on_receipt(self, receipt)
        elif frame.kind in (Kind.RESULT, Kind.TENSOR):
            hearing.on_result(self, frame)
        elif frame.kind is Kind.SKETCHES:
            self.sketchbook.take(self.node, frame)
        elif frame.kind is Kind.KEPT:
            if self._fetched is not None:
                self._fetched.append(frame)
        elif frame.kind is Kind.ERROR:
            error = from_wire(frame.body)
            if error.code == "payment_required" and "of" not in frame.body:
                self._reminder = Wei(_number(error, "owed") or 0), _number(error, "at") or 0
                self._is_reminded = True
                return
            if self._is_overtaken(error):
                return
            if error.code == "insufficient_funds" and error.fields.get("waits") is True and "of" not in frame.body:
                self.lacks = Wei(_number(error, "needed") or 0)
                return
            if isinstance(error, Draining):
                self.is_draining = True
                return
            if "of" in frame.body:
                error.fields.setdefault("hop", self.node)
                self.line.settle_error(frame.body["of"], error)
                return
            if error.fields.setdefault("hop", self.node) == self.node:
                raise error
            self.told.append(error)
        else:
            raise BadFrame(f"{self.node} sent {frame.kind.name}")

    def _closes(self, receipt: Receipt) -> bool:
        """Whether a receipt closes the last window, over the sketches that were given of it. Raises CorruptResult."""
        standing = self.standing
        is_last = bool(standing.digests) and receipt.previous == standing.digests[-1]
        if not is_last or not self.sketchbook.is_on or receipt.first != standing.receipts[-1].first:
            return False
        self.sketchbook.close(standing.receipts[-1], receipt, standing.digests[-1], int(time.time()))
        return True

    def _is_overtaken(self, error: TallystickError) -> bool:
        """Whether a voucher was refused because a higher one of ours, from a session beside this, had arrived."""
        signed = _number(error, "signed")
        return error.code == "bad_voucher" and signed is not None and signed <= self._promised()

    def kept_of(self, epoch: int) -> int:
        """What of an epoch's rows is still wanted: positions before this one."""
        return min((length for crop, length in self.crops if crop > epoch), default=1 << 62)

    async def send(self, frame: Frame) -> None:
        """Raises Unreachable, and remembers it; also where the node has ended the session for another reason."""
        if frame.kind is Kind.FLUSH:
            self._flush = frame
        try:
            await self.line.send(frame)
        except Unreachable:
            raise
        except TallystickError as error:
            raise Unreachable(f"{self.node} has ended the session", hop=self.node) from error

    async def send_rows(
        self, ids: list[bytes], position: int, want: list[bool], types: bytes = b"", confirm: bool = False
    ) -> None:
        """Token ids from `position` on; `want`: whose results are wanted; `types`: their token types, if any.

        confirm: those that the node has already are not answered again.
        """
        body: dict[str, bytes | bool] = {"want": pack_flags(want)}
        body |= {"types": types} if types else {}
        body |= {"confirm": True} if confirm else {}
        await self.send(rows_frame(Kind.STEP, DType.IDS, ids, position, body))

    async def give_memory(self, states: Sequence[bytes]) -> None:
        """Send an encoder's states, fp32 rows, to a decoder's span. Raises Unreachable."""
        step = rows_per_frame(len(states[0]))
        for begin in range(0, len(states), step):
            body = {"more": begin + step < len(states)}
            await self.line.post(rows_frame(Kind.MEMORY, DType.F32, list(states[begin : begin + step]), begin, body))

    async def command(
        self, frame: Frame, timeout_s: float = COMMAND_TIMEOUT_S, on_done: Callable[[], None] = lambda: None
    ) -> None:
        """Send a command and wait until the node has done it. Raises Unreachable, or what the node answers."""
        await self.line.command(frame, timeout_s, on_done)

    async def fetch_kept(self, first: int, last: int) -> list[bytes]:
        """The outputs of [first, last) that the node has kept. Raises Unreachable, what it answers, and CorruptResult
        for other rows than those."""
        async with self._fetching:
            self._fetched = []
            try:
                await self.command(Frame(Kind.FETCH, {"first": first, "last": last}))
                rows: list[bytes] = []
                for frame in self._fetched:
                    if frame.position != first + len(rows):
                        break
                    rows += frame.rows()
            finally:
                self._fetched = None
        if len(rows) != last - first:
            raise CorruptResult(f"{self.node} sent other rows than it was asked for", hop=self.node)
        return rows

    async def drop(self, epoch: int, length: int, computed: int) -> None:
        """Have rows [length, computed) forgotten, in a new epoch, without waiting; they complete no window.

        They are due with the rows of the next receipt, or when there are many.
        """
        self.rewound(epoch, length)
        self._dropped += computed - length
        if self._dropped >= DROPPED_ROWS:
            self.rows_due, self._dropped = self.rows_due + self._dropped, 0
        answer = await self.line.post(Frame(Kind.CROP, {"epoch": epoch}, length))
        answer.add_done_callback(self._on_dropped)

    def _on_dropped(self, answer: asyncio.Future[None]) -> None:
        error = None if answer.cancelled() else answer.exception()
        if isinstance(error, TallystickError):
            self._fail(error)

    def rewound(self, epoch: int, length: int) -> None:
        """A command that takes rows back was sent: what the node says of them is not wanted any more."""
        self.crops = [*(crop for crop in self.crops[-KEPT_CROPS:] if crop[0] != epoch), (epoch, length)]
        self._flush = None

    # -- coming back

    def _claim(self, spki: Digest) -> Frame:
        assert self._key is not None
        self._claims += 1
        claim = Resume(self.node, self.session, self._claims, spki, int(time.time()))
        body = {
            "resume": seal(self._domain, claim, self._key),
            "receipts": len(self.standing.receipts),
            "results": self._hearing.first_missing(),
        }
        return Frame(Kind.RESUME, body)

    async def _rejoin(self, resumed: Frame) -> None:
        """The node lacks what was on its way: the last voucher, rows, a flush."""
        position, epoch = take(resumed.body, "position", int), take(resumed.body, "epoch", int)
        self.sketchbook.ask_again()
        for frame in (self._voucher, self._flush):
            if frame is not None:
                await self.line.send(frame)
        if self._hearing.on_resumed is not None:
            await self._hearing.on_resumed(self, min(position, self.kept_of(epoch)), epoch)

    def owe(self, receipt: Receipt, index: int) -> None:
        """A receipt that checked out stands, and its rows are due; rows signed for before are not due again."""
        self.rows_due += max(0, receipt.last - max(receipt.first, self._due_to)) + self._dropped
        self._dropped = 0
        self._due_to = max(self._due_to, receipt.last)
        self.standing.put(index, receipt, digest(self._domain, receipt))
        self.due_after[index] = self.rows_due

    def crop(self, length: int, computed: int) -> None:
        """Rows computed and not signed for are due, too: rolling back lowers nothing."""
        self.rows_due += max(0, computed - self._due_to)
        self._due_to = min(max(self._due_to, computed), length)
        self.standing.crop(length)
        kept = len(self.standing.receipts)
        self.due_after = {index: rows for index, rows in self.due_after.items() if index < kept}

    def fork(self, position: int, length: int, computed: int) -> None:
        """Rolled back to `position` and filled up to `length` with rows that another session has paid for."""
        self.crop(position, computed)
        self._due_to = length

    def rows_fed(self, length: int) -> int:
        """Rows that are due or will be, when the session has `length`."""
        return self.rows_due + self._dropped + max(0, length - self._due_to)

    def total(self, rows: int) -> Wei:
        """What the node is owed in all when `rows` rows of this session, and no other one's since, are paid."""
        span, price = self.candidate.span, Wei(self.candidate.offer.price)
        return Wei(self.base + charge(span, self.opening.num_layers, price, rows))

    def due_to(self, windows: int) -> int:
        """Rows that are due when so many windows, from the first one on, have passed an audit.

        A node that waits for money though all its windows have passed is also paid for rows that were taken back:
        nobody can look at those any more, and without that it could not go on.
        """
        if self.waits_for_money and windows >= len(self.standing.receipts):
            return self.rows_due
        return self.due_after.get(windows - 1, 0)

    @property
    def waits_for_money(self) -> bool:
        """Whether the node says that a step waits for a voucher."""
        return self._is_reminded or self.line.pong.unpaid

    async def pay(self, rows: int, purse: Purse) -> None:
        """Send a voucher that covers `rows` rows of this session, and what else the node has said that it waits for."""
        debt = self._debt(purse)
        if rows > self.rows_paid or debt is not None:
            rows = max(rows, self.rows_paid)
            more = Wei(self.total(rows) - self.total(self.rows_paid) + (debt or 0))
            self.rows_paid = rows
            self._voucher = Frame(Kind.VOUCHER, {"voucher": purse.promise(self.node, more)})
            self._signed = purse.promised(self.node)
            await self.send(self._voucher)

    async def show_voucher(self) -> None:
        """Send the last voucher again: a node that waits for money looks at its channel then."""
        if self._voucher is not None:
            await self.send(self._voucher)

    def _debt(self, purse: Purse) -> Wei | None:
        """What a node that waits for a voucher is owed besides this session's rows: nothing, perhaps, but it may lack a
        voucher over what is promised already. None where it waits for neither."""
        if self._reminder is None:
            return None
        owed, at = self._reminder
        own = Wei(self.total(self.rows_fed(at)) - self.total(self.rows_paid))
        window = self.total(WINDOW) - self.base
        debt = purse.settle(self.node, owed, own, Wei(self.candidate.offer.credit), window)
        lacks = purse.promised(self.node) > self._signed and (self._is_reminded or debt is not None)
        self._is_reminded = False
        return (debt or Wei(0)) if debt or lacks else None

    async def close(self) -> None:
        await self.line.close()
        if self._leave is not None:
            self._leave()
            self._leave = None


def fresh_nonce() -> bytes:
    return secrets.token_bytes(32)


def _number(error: TallystickError, name: str) -> int | None:
    """A number, or an amount in decimal, that a node's error names."""
    text = str(error.fields.get(name, ""))[:78]
    return int(text) if text.isdecimal() else None
