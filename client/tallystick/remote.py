"""One hop as the client sees it: an open session at one node, its receipts, what is owed to it."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from tallystick.checks import Terms
from tallystick.payments import Purse
from tallystick.routing.candidates import Candidate
from tallystick_protocol.errors import (
    BadFrame,
    CorruptResult,
    InternalError,
    Rejected,
    TallystickError,
    Unreachable,
    from_wire,
)
from tallystick_protocol.frames import DType, Frame, Kind, rows_frame, rows_per_frame, take
from tallystick_protocol.messages import Opened, SessionOpen, session_id
from tallystick_protocol.peer import Peers, WebSocketChannel, expect, sealed_field
from tallystick_protocol.receipts import Receipt, pack_flags
from tallystick_protocol.signing import Domain, Key, digest, seal, unseal
from tallystick_protocol.types import WINDOW, ZERO32, Address, Digest, ModelId, SessionId, Wei
from tallystick_protocol.vouchers import charge

log = logging.getLogger(__name__)

OPEN_TIMEOUT_S = 15.0
COMMAND_TIMEOUT_S = 30.0
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
        self, candidate: Candidate, opening: Opening, channel: WebSocketChannel, domain: Domain, client: Address
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
        self.failure: TallystickError | None = None
        self.told: list[TallystickError] = []
        self.base: Wei = Wei(0)
        self.rows_due = 0
        self.rows_paid = 0
        self.due_after: dict[int, int] = {}
        self._due_to = 0
        self._channel = channel
        self._domain = domain
        self.arrivals: dict[Receipt, int] = {}
        self._commands: dict[int, tuple[asyncio.Future[None], Callable[[], None]]] = {}
        self._last_command = 0
        self._reader: asyncio.Task[None] | None = None
        self._leave: Callable[[], None] | None = None
        self._promised: Callable[[], Wei] = lambda: Wei(0)

    @property
    def node(self) -> Address:
        return self.candidate.node

    @classmethod
    async def open(
        cls, peers: Peers, candidate: Candidate, opening: Opening, key: Key, domain: Domain, purse: Purse
    ) -> Remote:
        """Open a session. Raises Unreachable, Overloaded, Rejected, and what else the node answers."""
        channel = await peers.connect(candidate.url, candidate.node)
        try:
            now = int(time.time())
            asked = SessionOpen(
                node=candidate.node,
                spki=ZERO32,
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
            await channel.send(Frame(Kind.OPEN, {"open": seal(domain, asked, key)}))
            answer = await expect(channel, Kind.OPENED, OPEN_TIMEOUT_S)
            opened, signer = unseal(domain, Opened, sealed_field(answer, "opened"))
            if signer != candidate.signer or opened.open != digest(domain, asked):
                raise Rejected(f"{candidate.node} did not sign this opening", hop=candidate.node)
            if opened.credit < candidate.offer.credit:
                raise Rejected(f"{candidate.node} gives less credit than it offered", hop=candidate.node)
            remote = cls(candidate, opening, channel, domain, key.address)
            owed = Wei(int(take(answer.body, "owed", str)[:78]))
            voucher = take(answer.body, "voucher", bytes)
            remote.base = purse.recall(candidate.node, owed, voucher, Wei(candidate.offer.credit))
            remote._leave = partial(purse.leave, candidate.node)
            remote._promised = partial(purse.promised, candidate.node)
            return remote
        except ValueError as error:
            await channel.close()
            raise BadFrame(f"{candidate.node} opened with nonsense: {error}") from None
        except BaseException:
            await channel.close()
            raise

    def listen(
        self,
        on_receipt: Callable[[Remote, Receipt], None],
        on_result: Callable[[Remote, Frame], None],
        on_change: Callable[[], None],
    ) -> None:
        """Begin to read. on_change is called after every frame and when the connection has failed."""

        async def read() -> None:
            try:
                while True:
                    frame = await self._channel.receive()
                    self._take(frame, on_receipt, on_result)
                    on_change()
            except Exception as error:
                if not isinstance(error, TallystickError):
                    log.exception("reading from %s failed", self.node)
                known = error if isinstance(error, TallystickError) else InternalError(f"reading failed: {error}")
                self.failure = self.failure or known
                for number in list(self._commands):
                    self._answer(number, self.failure)
                on_change()

        self._reader = asyncio.create_task(read())

    def _take(
        self,
        frame: Frame,
        on_receipt: Callable[[Remote, Receipt], None],
        on_result: Callable[[Remote, Frame], None],
    ) -> None:
        if frame.kind is Kind.RECEIPT:
            receipt, signer = unseal(self._domain, Receipt, sealed_field(frame, "receipt"))
            if signer != self.candidate.signer:
                raise CorruptResult(f"a receipt of {self.node} is signed by {signer}", hop=self.node)
            self.arrivals[receipt] = int(time.time())
            on_receipt(self, receipt)
        elif frame.kind in (Kind.RESULT, Kind.TENSOR):
            on_result(self, frame)
        elif frame.kind is Kind.DONE:
            self._answer(frame.body.get("of"), None)
        elif frame.kind is Kind.ERROR:
            error = from_wire(frame.body)
            if error.code == "payment_required" or self._is_overtaken(error):
                return  # a reminder: the voucher is on its way, withheld on purpose, or was there before
            if "of" in frame.body:
                error.fields.setdefault("hop", self.node)
                self._answer(frame.body["of"], error)  # a command that failed, perhaps one that nobody waits for now
                return
            if error.fields.setdefault("hop", self.node) == self.node:
                raise error
            self.told.append(error)
        else:
            raise BadFrame(f"{self.node} sent {frame.kind.name}")

    def _is_overtaken(self, error: TallystickError) -> bool:
        """Whether a voucher was refused because a higher one of ours, from a session beside this, had arrived."""
        signed = str(error.fields.get("signed", ""))[:78]
        return error.code == "bad_voucher" and signed.isdecimal() and int(signed) <= self._promised()

    async def send(self, frame: Frame) -> None:
        """Raises Unreachable, and remembers it."""
        try:
            await self._channel.send(frame)
        except Unreachable as error:
            self.failure = self.failure or error
            raise

    async def send_rows(self, ids: list[bytes], position: int, want: list[bool], types: bytes = b"") -> None:
        """Token ids from `position` on; `want`: whose results are wanted; `types`: their token types, if any."""
        body = {"want": pack_flags(want), **({"types": types} if types else {})}
        await self.send(rows_frame(Kind.STEP, DType.IDS, ids, position, body))

    async def give_memory(self, states: Sequence[bytes]) -> None:
        """Send an encoder's states, fp32 rows, to a decoder's span. Raises Unreachable."""
        step = rows_per_frame(len(states[0]))
        for begin in range(0, len(states), step):
            body = {"more": begin + step < len(states)}
            await self.send(rows_frame(Kind.MEMORY, DType.F32, list(states[begin : begin + step]), begin, body))

    async def command(
        self, frame: Frame, timeout_s: float = COMMAND_TIMEOUT_S, on_done: Callable[[], None] = lambda: None
    ) -> None:
        """Send a command and wait until the node has done it. Raises Unreachable, or what the node answers.

        on_done: called when it has, before anything that the node sent afterwards is looked at.
        """
        self._last_command += 1
        number = self._last_command
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._commands[number] = answer, on_done
        try:
            await self.send(replace(frame, body={**frame.body, "id": number}))
            async with asyncio.timeout(timeout_s):
                await answer
        except TimeoutError:
            raise Unreachable(f"{self.node} did not acknowledge {frame.kind.name}", hop=self.node) from None
        finally:
            del self._commands[number]

    def _answer(self, number: object, error: TallystickError | None) -> bool:
        """Settle a command; False when there is none of that number."""
        answer, on_done = self._commands.get(number, (None, None)) if isinstance(number, int) else (None, None)
        if answer is None or on_done is None or answer.done():
            return False
        if error is None:
            on_done()
            answer.set_result(None)
        else:
            answer.set_exception(error)
        return True

    def owe(self, receipt: Receipt, index: int) -> None:
        """A receipt that checked out stands, and its rows are due; rows signed for before are not due again."""
        self.rows_due += max(0, receipt.last - max(receipt.first, self._due_to))
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
        return self.rows_due + max(0, length - self._due_to)

    def total(self, rows: int) -> Wei:
        """What the node is owed in all when `rows` rows of this session, and no other one's since, are paid."""
        span, price = self.candidate.span, Wei(self.candidate.offer.price)
        return Wei(self.base + charge(span, self.opening.num_layers, price, rows))

    async def pay(self, rows: int, purse: Purse) -> None:
        """Send a voucher that covers `rows` rows of this session."""
        if rows > self.rows_paid:
            more = Wei(self.total(rows) - self.total(self.rows_paid))
            self.rows_paid = rows
            await self.send(Frame(Kind.VOUCHER, {"voucher": purse.promise(self.node, more)}))

    async def close(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        if self._leave is not None:
            self._leave()
            self._leave = None
        await self._channel.close()


def fresh_nonce() -> bytes:
    return secrets.token_bytes(32)
