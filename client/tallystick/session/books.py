"""What a session's nodes have signed: receipts checked, audits compared, vouchers sent, beside the rows.

Nothing here is waited for by a token. What goes wrong becomes a node's failure or a dispute, which `repair` mends.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from typing import TYPE_CHECKING

from tallystick.checks import check_input, check_output, check_terms
from tallystick.session.auditing import Audit, Disagreement, arbitrate
from tallystick.session.evidence import keep
from tallystick.session.remote import Remote
from tallystick.session.sketching import Undecided
from tallystick.session.third import rule
from tallystick.verdict import Check
from tallystick_protocol.errors import CorruptResult, LinkMismatch, NoAuditor, TallystickError, Unreachable
from tallystick_protocol.receipts import Receipt
from tallystick_protocol.types import WINDOW, ZERO32, Address, Wei
from tallystick_protocol.vouchers import charge

if TYPE_CHECKING:
    from tallystick.session.session import Session

log = logging.getLogger(__name__)


class Books:
    """The books of one session: receipts that are still to be checked, disputes, and what is owed to whom."""

    def __init__(self, session: Session) -> None:
        self.pending: dict[Remote, dict[int, Receipt]] = {}
        self.disputes: dict[int, Disagreement] = {}
        self.arbitrations: dict[int, asyncio.Task[None]] = {}
        self._contradicted: dict[Remote, Address] = {}
        self.undecided: dict[Remote, list[Address]] = defaultdict(list)
        self._session = session

    async def keep(self) -> None:
        """Check receipts as they come, in order of hops and windows; pay; compare audits."""
        session = self._session
        while True:
            await session.work.wait()
            session.work.clear()
            if session.rewinding.is_going_on:
                continue
            for index, hop in enumerate(session.hops):
                try:
                    self.check_hop(index, hop)
                    await self._pay_hop(index, hop)
                except LinkMismatch as error:
                    self._blame_one(index, error)
                except TallystickError as error:
                    hop.failure = hop.failure or error
            await session.sketching.tend()
            for audit in list(session.audits):
                audit.wake()
                await self._tend_audit(audit)
            session.news.set()

    def check_hop(self, index: int, hop: Remote) -> None:
        """Check every pending receipt that can be: in order of windows, after the hop before."""
        session = self._session
        pending = self.pending.get(hop, {})
        while (receipt := pending.get(len(hop.standing.receipts))) is not None or (
            receipt := _extension(hop, pending)
        ) is not None:
            window = session.window_index(receipt)
            if hop.sketchbook.fields(hop.standing.previous(window)) is None:
                return  # the answer that it carries was lost, and is being asked for again
            upstream = None
            if index:
                above = session.hops[index - 1].standing.receipts
                if len(above) <= window or above[window].last < receipt.last:
                    return
                upstream = above[window]
                if upstream.positions != receipt.positions:
                    return
            del pending[window]
            self.check_receipt(hop, receipt, window)
            check_input(receipt, upstream, session.input_rows(receipt.first, receipt.last))
            if session.repair.succession.contradicts(index, hop, receipt, window):
                return
            if index == len(session.hops) - 1:
                check_output(receipt, session.result_rows(receipt.positions, session.results.rows))
            hop.owe(receipt, window)
            session.verdict.receipts += 1
            session.work.set()

    def _blame_one(self, index: int, error: LinkMismatch) -> None:
        """A hop signed other rows than the one before. The same of its stand-in: then it is that one which sends others
        than it signs for, and what it has sent in this window is wrong everywhere behind it."""
        hop = self._session.hops[index]
        before = self._session.hops[index - 1] if index else None
        if before is not None and self._contradicted.get(before, hop.node) != hop.node:
            self._session.repair.wrong_from[before] = hop.standing.covered
            lie = CorruptResult(f"{before.node} sends other rows than it signs for", hop=before.node)
            before.failure = before.failure or lie
            return
        if before is not None:
            self._contradicted[before] = hop.node
        hop.failure = hop.failure or error

    def check_receipt(self, remote: Remote, receipt: Receipt, window: int) -> None:
        """Raises CorruptResult unless the receipt says what was agreed for this window."""
        session = self._session
        beyond = len(session.ids) if session.one_shot else min(len(session.ids), (window + 1) * WINDOW)
        if receipt.last > beyond or (not session.one_shot and receipt.first != window * WINDOW):
            raise CorruptResult(f"{remote.node} signed positions {receipt.positions}", hop=remote.node)
        want = tuple(session.want[receipt.first : receipt.last])
        context = session.setting.context(remote.candidate.span, want)
        arrived = remote.arrivals.pop(receipt, int(time.time()))
        previous = remote.standing.previous(window)
        answer = remote.sketchbook.fields(previous) or (ZERO32, ZERO32)
        check_terms(receipt, remote.terms, previous, want, context, arrived, answer)

    async def _pay_hop(self, index: int, hop: Remote) -> None:
        """Everything due, unless this hop is being audited: then what the audit has passed."""
        if index in self.disputes:
            return
        session, rows = self._session, 0
        audit = next((audit for audit in session.audits if audit.index == index), None)
        if audit is not None:
            rows = min(hop.due_to(audit.approved), session.sketching.payable(hop))
        elif session.clearance is not None:
            rows = min(hop.due_to(session.clearance(index)), session.sketching.payable(hop))
        elif index not in session.repair.unaudited:
            rows = session.sketching.payable(hop)
        await hop.pay(rows, session.setting.purse)

    # -- audits

    async def _tend_audit(self, audit: Audit) -> None:
        session = self._session
        hop = session.hops[audit.index]
        try:
            for check in audit.compare(hop):
                session.verdict.note(check)
        except Undecided as undecided:
            await self._ask_another(audit, hop, undecided)
        except Disagreement as disagreement:
            if audit.index not in self.disputes:
                self.disputes[audit.index] = disagreement
                log.info("%s and %s differ in window %d", hop.node, audit.remote.node, disagreement.window)
                self.arbitrations[audit.index] = asyncio.create_task(self._settle_dispute(audit, disagreement))
        except TallystickError as error:
            audit.remote.failure = audit.remote.failure or error
        if not audit.approved and (audit.remote.failure is not None or audit.index in self.disputes):
            return
        try:
            await audit.remote.pay(audit.remote.due_to(audit.approved), session.setting.purse)
        except Unreachable as error:
            log.info("the auditor %s is gone (%s)", audit.remote.node, error)

    async def _ask_another(self, audit: Audit, hop: Remote, undecided: Undecided) -> None:
        """An auditor of another class could not say: it is paid, and another one asked. After the second nobody is
        blamed, but the hop is not kept."""
        session, found = self._session, undecided.found
        claim = hop.standing.receipts[undecided.window]
        log.info("%s can neither clear nor blame %s in window %d", audit.remote.node, hop.node, undecided.window)
        asked = self.undecided[hop]
        asked.append(audit.remote.node)
        try:
            await audit.remote.pay(audit.remote.rows_due, session.setting.purse)
        except Unreachable as error:
            log.info("the auditor %s is gone (%s)", audit.remote.node, error)
        if len(asked) > 1:  # perhaps of the same one: there may be no other
            dispute = Disagreement(undecided.window, claim, audit.remote.standing.receipts[undecided.window])
            dispute.failure = NoAuditor(f"two auditors could not say whether layers {claim.span} are right")
            dispute.is_of_one = len(set(asked)) > 1
            self.disputes.setdefault(audit.index, dispute)
            return
        session.verdict.note(
            Check(
                claim.span, claim.positions, hop.node, audit.remote.node, None, "sketch", found.error, found.tolerance
            )
        )
        session.busy.add(audit.remote.node)
        audit.remote.failure = audit.remote.failure or Unreachable("another auditor is asked", hop=audit.remote.node)

    async def _settle_dispute(self, audit: Audit, disagreement: Disagreement) -> None:
        """Ask a third node, else compute it here; the verdict wakes whoever waits in `result` or `finish`."""
        session = self._session
        try:
            try:
                ruling = await arbitrate(session, audit, disagreement)
            except NoAuditor as nobody:
                log.info("%s", nobody)
                ruling = await rule(session, audit, disagreement)
            if ruling.liar == session.hops[audit.index].node:
                disagreement.evidence = await keep(session, audit.index, disagreement)
            disagreement.ruling = ruling
        except TallystickError as error:
            disagreement.failure = error
        session.wake()

    def drop_dispute(self, index: int) -> None:
        """Another node takes the place of a hop, perhaps in dispute: what that one had signed is held against what its
        successor signs, and the auditor's word is compared with the successor's."""
        if (arbitration := self.arbitrations.pop(index, None)) is not None:
            arbitration.cancel()
        self.disputes.pop(index, None)
        for audit in self._session.audits:
            if audit.index == index:
                audit.reopen()

    def note_payment(self, remote: Remote, length: int | None = None) -> None:
        """A hop's session has ended: what was paid, withheld, and may be claimed. length: rows it got, if not all."""
        session = self._session
        paid, due = remote.rows_paid, remote.rows_due
        for book, rows in ((session.verdict.paid, paid), (session.verdict.withheld, due - paid)):
            wei = charge(
                remote.candidate.span, remote.opening.num_layers, Wei(remote.candidate.offer.price), max(rows, 0)
            )
            if wei or book is session.verdict.paid:
                book[remote.node] = Wei(book.get(remote.node, Wei(0)) + wei)
        if remote.node not in {accusation.node for accusation in session.verdict.accusations}:
            fed = remote.rows_fed(len(session.ids) if length is None else length) - paid
            units = remote.candidate.span.units(remote.opening.num_layers)
            session.setting.purse.expect(remote.node, Wei(max(fed, 0) * units * remote.candidate.offer.price))


def _extension(hop: Remote, pending: dict[int, Receipt]) -> Receipt | None:
    """A pending receipt that extends the last window, which stands partially."""
    last = len(hop.standing.receipts) - 1
    found = pending.get(last) if last >= 0 else None
    return found if found is not None and found.last > hop.standing.covered else None
