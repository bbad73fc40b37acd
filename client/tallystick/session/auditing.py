"""Redundant computation: a second node redoes a hop's windows on the same rows, and a third one breaks a tie.

The auditor has a session of its own; the hop before the audited one sends it the rows that it kept (the client sends
the token ids for the first hop). It never sees what the audited hop answered, so there is nothing to copy.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tallystick.checks import agree, same_work
from tallystick.comparing import Found, Work, is_same, zone
from tallystick.routing.candidates import Candidate
from tallystick.routing.choice import apart, owners
from tallystick.session.ending import end
from tallystick.session.proving import agreed
from tallystick.session.remote import Hearing, Remote
from tallystick.session.results import Results
from tallystick.session.sketching import Undecided
from tallystick.verdict import Check
from tallystick_protocol.errors import LinkMismatch, NoAuditor, TallystickError, Unreachable
from tallystick_protocol.frames import Frame, Kind, take
from tallystick_protocol.receipts import Receipt
from tallystick_protocol.sketching.thresholds import Zone
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
    """Two nodes signed different outputs for the same work. found: how far apart they are, in other classes.

    is_of_one: the hop differs from several, none of which is in question.
    """

    def __init__(self, window: int, hop: Receipt, auditor: Receipt, found: Found | None = None) -> None:
        super().__init__(window)
        self.window = window
        self.hop = hop
        self.auditor = auditor
        self.found = found
        self.is_of_one = False
        self.ruling: Ruling | None = None
        self.failure: TallystickError | None = None
        self.evidence = ""


class Audit:
    """The auditor of one hop, fed window by window as the hop signs them.

    Of another class: results, the rows that it returned; squares, by window, how far what it added is from the hop's.
    """

    def __init__(self, session: Session, index: int, remote: Remote) -> None:
        self.index = index
        self.remote = remote
        self.approved = 0
        self.task: asyncio.Task[None] | None = None
        self.results = Results(session.setting)
        self.squares: dict[int, Any] = {}
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
        await end(task)

    def refeed(self) -> None:
        """Another node feeds the auditor from now on: what it has not signed may never have arrived."""
        self._fed = min(self._fed, self.remote.standing.covered)
        self._flushed = 0
        self.wake()

    def reopen(self) -> None:
        """Compare again: the other party of a dispute has been replaced."""
        self._disputed = False

    def judged_to(self) -> int:
        """Positions of the audited hop that were compared, and agreed."""
        receipts = self._session.hops[self.index].standing.receipts[: self.approved]  # fewer, if it is a new one
        return receipts[-1].last if receipts else 0

    def on_receipt(self, remote: Remote, receipt: Receipt) -> None:
        self._pending[self._session.window_index(receipt)] = receipt

    def on_result(self, remote: Remote, frame: Frame) -> None:
        """Results are compared where nodes of other classes end the model."""
        kept = min(remote.kept_of(take(frame.body, "epoch", int, 0)), len(self._session.ids))
        self.results.take(remote.node, frame, lambda at: at < kept)

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
            found = None
            if claim.numeric_class == answer.numeric_class:
                if not agree(claim, answer):
                    self._disputed = True
                    raise Disagreement(window, claim, answer)
                agreed(self._session, claim, owners([hop.candidate]), owners([self.remote.candidate]))
            elif (found := self._judge_across(window, min(len(theirs), len(ours)))) is None:
                self.approved = min(self.approved, window)
                break
            self._judged[window] = state
            self.approved = window + 1
            how = ("hash", 0.0, 0.0) if found is None else ("sketch", found.error, found.tolerance)
            checks.append(Check(hop.candidate.span, claim.positions, hop.node, self.remote.node, True, *how))
        return checks

    def _judge_across(self, window: int, both: int) -> Found | None:
        """A window that is clear by sketches; None where that cannot be said yet. Raises Disagreement, Undecided."""
        sketching = self._session.sketching
        try:
            found = bad = sketching.judge(self, window)
            if found is None or found.zone is Zone.CLEAR:
                return found
            if found.zone is Zone.BETWEEN:
                bad = sketching.look_further(self, window, found, both)
        except Undecided:
            self._disputed = True
            raise
        if bad is None:
            return None
        self._disputed = True
        hop = self._session.hops[self.index]
        raise Disagreement(window, hop.standing.receipts[window], self.remote.standing.receipts[window], bad)

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
        self.squares = {window: found for window, found in self.squares.items() if window < position // WINDOW}
        self.results.forget(position)
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
            if self.remote.sketchbook.fields(standing.previous(window)) is None:
                self._pending[window] = receipt  # the answer that it carries is still to come
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
        except asyncio.CancelledError:
            if self.index:  # the hop before has its order, and the auditor will charge for the rows
                self._fed = max(self._fed, target)
            raise
        except TallystickError as error:
            log.info("feeding the auditor %s failed: %s", self.remote.node, error)
            self._session.feeding.blame(self.index, self.remote, error)


async def send_kept(session: Session, index: int, to: Remote, first: int, last: int) -> None:
    """Have the rows that entered hop `index` at positions [first, last) sent to another node's session."""
    if index == 0:
        await session.send_ids_to(to, first, last)
        return
    body = {"to": to.node, "session": to.session, "first": first, "last": last}
    await session.hops[index - 1].command(Frame(Kind.REPLAY, body))


async def arbitrate(session: Session, audit: Audit, disagreement: Disagreement) -> Ruling:
    """A third node, of a third operator, recomputes the span up to the disputed window; whoever stands alone is wrong.

    Raises NoAuditor when there is no third node, or all three differ, or none of them does by enough.
    """
    hop, window = session.hops[audit.index], disagreement.window
    drawn = session.openings.draw_auditors(audit.index, {audit.remote.node})
    for candidate in apart(drawn, owners([audit.remote.candidate])):
        try:
            answer = await testify(session, audit.index, candidate, disagreement.hop)
        except TallystickError as error:
            log.info("%s cannot be a witness (%s)", candidate.node, error)
            continue
        claims = (
            (hop, _work(session, hop, disagreement.hop, window, session.results)),
            (audit.remote, _work(session, audit.remote, disagreement.auditor, window, audit.results)),
        )
        for remote, claim in claims:
            if is_same(claim, answer):
                agreed(session, answer.receipt, owners([remote.candidate]), owners([candidate]))
        for (accused, theirs), (other, claim) in (claims, claims[::-1]):
            if _is_borne_out(session, claim, answer) and _is_denied(session, theirs, answer, disagreement):
                return Ruling(accused.node, (other.node, candidate.node))
    raise NoAuditor(f"no third node can say who is wrong about layers {hop.candidate.span}")


def _work(session: Session, remote: Remote, receipt: Receipt, window: int, results: Results) -> Work:
    """What one of the two claims; no more than what it signed where its sketches are missing."""
    return session.sketching.work(remote, window, results.rows) or Work(receipt)


def _is_borne_out(session: Session, claim: Work, answer: Work) -> bool:
    """Whether a third node's answer says what a claim says."""
    return _zone(session, claim, answer) is Zone.CLEAR


def _is_denied(session: Session, claim: Work, answer: Work, dispute: Disagreement) -> bool:
    """Whether a third node's answer says something else than a claim. Where nothing but bits tells hop and auditor
    apart, and their class does not count, that takes an error that convicts."""
    found = _zone(session, claim, answer)
    if dispute.found is None and not session.setting.proven.counts(claim.receipt.numeric_class):
        return found is Zone.GUILTY
    return found in (Zone.BETWEEN, Zone.GUILTY)


def _zone(session: Session, claim: Work, answer: Work) -> Zone | None:
    setting = session.setting
    return zone(claim, answer, setting.manifest, setting.top_k, setting.proven.counts(claim.receipt.numeric_class))


async def testify(session: Session, index: int, candidate: Candidate, claim: Receipt) -> Work:
    """What another node answers for the window that hop `index` claims; it is paid for its work.

    Raises Unreachable, and what else goes wrong with that node or the hop before.
    """
    window = session.window_index(claim)
    remote = await session.openings.open_witness(candidate, index)
    heard: dict[int, Receipt] = {}
    changed = asyncio.Event()
    results = Results(session.setting)
    remote.listen(
        Hearing(
            lambda _, receipt: heard.__setitem__(session.window_index(receipt), receipt),
            lambda node, frame: results.take(node.node, frame, lambda at: at < claim.last),
            changed.set,
        )
    )
    session.witnesses.add(remote)
    try:
        await send_kept(session, index, remote, 0, claim.last)
        await remote.send(Frame(Kind.FLUSH, position=claim.last))
        deadline = time.monotonic() + WITNESS_TIMEOUT_S
        checked = 0
        while True:
            if remote.failure is not None:
                raise remote.failure
            if checked > window:
                work = session.sketching.work(remote, window, results.rows)
                if work is not None:
                    return work
            receipt = heard.pop(checked, None)
            if receipt is not None:
                session.books.check_receipt(remote, receipt, checked)
                remote.owe(receipt, checked)
                checked += 1
                await session.sketching.ask(remote)
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
    finally:
        session.witnesses.discard(remote)
        session.books.note_payment(remote)
        await remote.close()
