"""Redundant computation: a second node redoes a hop's windows on the same rows, and a third one breaks a tie.

The auditor has a session of its own; the hop before the audited one sends it the rows that it kept (the client sends
the token ids for the first hop). It never sees what the audited hop answered, so there is nothing to copy.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tallystick.checks import agree, same_work
from tallystick.routing.candidates import Candidate
from tallystick.session.remote import Hearing, Remote
from tallystick.verdict import Check
from tallystick_protocol.errors import LinkMismatch, NoAuditor, TallystickError, Unreachable
from tallystick_protocol.frames import Frame, Kind
from tallystick_protocol.receipts import Receipt
from tallystick_protocol.types import WINDOW, Address

if TYPE_CHECKING:
    from tallystick.session.session import Session

log = logging.getLogger(__name__)

WITNESS_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Ruling:
    """Two against one: who is wrong, and who says so."""

    liar: Address
    witnesses: tuple[Address, ...]


class Disagreement(Exception):
    """Two nodes signed different outputs for the same work."""

    def __init__(self, window: int, hop: Receipt, auditor: Receipt) -> None:
        super().__init__(window)
        self.window = window
        self.hop = hop
        self.auditor = auditor
        self.ruling: Ruling | None = None
        self.failure: TallystickError | None = None


class Audit:
    """The auditor of one hop, fed window by window as the hop signs them."""

    def __init__(self, session: Session, index: int, remote: Remote) -> None:
        self.index = index
        self.remote = remote
        self.approved = 0
        self.task: asyncio.Task[None] | None = None
        self._session = session
        self._pending: dict[int, Receipt] = {}
        self._fed = 0
        self._flushed = 0
        self._judged: dict[int, tuple[Address, int, int]] = {}
        self._disputed = False
        self._awake = asyncio.Event()

    def wake(self) -> None:
        """The audited hop may have signed more."""
        self._awake.set()

    def start(self) -> None:
        """Begin to feed, or go on."""
        if self.task is None:
            self.task = asyncio.create_task(self._feed())

    async def pause(self) -> None:
        """Stop feeding: nothing is on its way to the auditor when this returns."""
        task, self.task = self.task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def refeed(self) -> None:
        """Another node feeds the auditor from now on: what it has not signed may never have arrived."""
        self._fed = min(self._fed, self.remote.standing.covered)
        self._flushed = 0
        self.wake()

    def judged_to(self) -> int:
        """Positions of the audited hop that were compared, and agreed."""
        receipts = self._session.hops[self.index].standing.receipts[: self.approved]  # fewer, if it is a new one
        return receipts[-1].last if receipts else 0

    def on_receipt(self, remote: Remote, receipt: Receipt) -> None:
        self._pending[self._session.window_index(receipt)] = receipt

    def compare(self, hop: Remote) -> list[Check]:
        """Compare every window that both have signed. Raises Disagreement, and what else is wrong with the auditor."""
        self._take_receipts()
        if self._disputed:
            return []
        checks = []
        theirs, ours = hop.standing.receipts, self.remote.standing.receipts
        self.approved = min(self.approved, len(theirs))
        for window in range(min(len(theirs), len(ours))):
            claim, answer = theirs[window], ours[window]
            state = (hop.node, claim.revision, claim.last)
            if self._judged.get(window) == state:
                self.approved = max(self.approved, window + 1)
                continue
            if claim.positions != answer.positions:
                self.approved = min(self.approved, window)
                break
            if not same_work(claim, answer):
                raise LinkMismatch(f"the auditor {self.remote.node} worked on other rows", hop=self.remote.node)
            if not agree(claim, answer):
                self._disputed = True
                raise Disagreement(window, claim, answer)
            self._judged[window] = state
            self.approved = window + 1
            checks.append(Check(hop.candidate.span, claim.positions, hop.node, self.remote.node, True))
        return checks

    async def crop(self, position: int) -> None:
        """Roll the auditor back with everybody else."""
        epoch = self._session.epoch
        self.remote.rewound(epoch, position)
        await self.remote.command(Frame(Kind.CROP, {"epoch": epoch}, position))
        self.remote.crop(position, self._fed)
        self._fed = min(self._fed, position)
        self._pending = {}
        self._flushed = 0
        self.approved = min(self.approved, position // WINDOW)
        self._judged = {window: state for window, state in self._judged.items() if window < self.approved}
        self._disputed = False

    def _take_receipts(self) -> None:
        standing = self.remote.standing
        while True:
            window = len(standing.receipts)
            receipt = self._pending.pop(window, None)
            if receipt is None and window and (again := self._pending.get(window - 1)) is not None:
                if again.last <= standing.covered:
                    return
                window, receipt = window - 1, self._pending.pop(window - 1)
            if receipt is None:
                return
            self._session.books.check_receipt(self.remote, receipt, window)
            self.remote.owe(receipt, window)

    async def rejoin(self, remote: Remote, position: int, _: int) -> None:
        """The auditor is back: ids that were on their way from the client are sent again; rows come from a hop."""
        while self.index == 0 and position < self._fed:
            target = self._fed
            await send_kept(self._session, 0, remote, position, target)
            position = target

    async def _feed(self) -> None:
        """Send the auditor what the hop has signed for, as it signs."""
        while True:
            await self._feed_now()
            await self._awake.wait()
            self._awake.clear()

    async def _feed_now(self) -> None:
        hop = self._session.hops[self.index]
        target = hop.standing.covered
        involved = [hop, self.remote]
        if self.index:
            feeder = self._session.hops[self.index - 1]
            target = min(target, feeder.standing.covered)  # it may be a new one, which is still computing them
            involved.append(feeder)
        if any(remote.failure is not None for remote in involved):
            return  # whoever mends that wakes us
        try:
            if target > self._fed:
                await send_kept(self._session, self.index, self.remote, self._fed, target)
                self._fed = target
            if target == self._fed and target % WINDOW and self._flushed != target:
                self._flushed = target
                await self.remote.send(Frame(Kind.FLUSH, position=target))
        except TallystickError as error:
            log.info("feeding the auditor %s failed: %s", self.remote.node, error)
            self._session.blame_feeding(self.index, self.remote, error)


async def send_kept(session: Session, index: int, to: Remote, first: int, last: int) -> None:
    """Have the rows that entered hop `index` at positions [first, last) sent to another node's session."""
    if index == 0:
        await session.send_ids_to(to, first, last)
        return
    body = {"to": to.node, "session": to.session, "first": first, "last": last}
    await session.hops[index - 1].command(Frame(Kind.REPLAY, body))


async def arbitrate(session: Session, audit: Audit, disagreement: Disagreement) -> Ruling:
    """A third node recomputes the span up to the disputed window; whoever stands alone is wrong.

    Raises NoAuditor when there is no third node, or all three differ.
    """
    hop = session.hops[audit.index]
    for candidate in session.openings.draw_auditors(audit.index, {audit.remote.node}):
        try:
            answer = await testify(session, audit.index, candidate, disagreement.hop)
        except TallystickError as error:
            log.info("%s cannot be a witness (%s)", candidate.node, error)
            continue
        for accused, other, theirs in (
            (hop.node, audit.remote.node, disagreement.auditor),
            (audit.remote.node, hop.node, disagreement.hop),
        ):
            if agree(answer, theirs):
                return Ruling(accused, (other, candidate.node))
    raise NoAuditor(f"no third node can say who is wrong about layers {hop.candidate.span}")


async def testify(session: Session, index: int, candidate: Candidate, claim: Receipt) -> Receipt:
    """The receipt of another node for the window that hop `index` claims; it is paid for its work.

    Raises Unreachable, and what else goes wrong with that node or the hop before.
    """
    window = session.window_index(claim)
    remote = await session.openings.open_witness(candidate, index)
    heard: dict[int, Receipt] = {}
    changed = asyncio.Event()
    remote.listen(
        Hearing(
            lambda _, receipt: heard.__setitem__(session.window_index(receipt), receipt), lambda *_: None, changed.set
        )
    )
    session.witnesses.add(remote)
    try:
        await send_kept(session, index, remote, 0, claim.last)
        await remote.send(Frame(Kind.FLUSH, position=claim.last))
        deadline = time.monotonic() + WITNESS_TIMEOUT_S
        checked = 0
        while checked <= window:
            if remote.failure is not None:
                raise remote.failure
            receipt = heard.pop(checked, None)
            if receipt is not None:
                session.books.check_receipt(remote, receipt, checked)
                remote.owe(receipt, checked)
                checked += 1
            await remote.pay(remote.rows_due, session.setting.purse)
            if receipt is not None:
                continue
            if time.monotonic() > deadline:
                raise Unreachable(f"the witness {remote.node} did not answer in time", hop=remote.node)
            changed.clear()
            try:
                async with asyncio.timeout(0.5):
                    await changed.wait()
            except TimeoutError:
                continue
        return remote.standing.receipts[window]
    finally:
        session.witnesses.discard(remote)
        session.books.note_payment(remote)
        await remote.close()
