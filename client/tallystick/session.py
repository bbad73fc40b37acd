"""One generation over several hops: rows in at the first, results out of the last, receipts and vouchers beside.

While it waits for results it has broken things mended (`repair`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

from tallystick.admission import has_class
from tallystick.auditing import Audit, Disagreement, arbitrate
from tallystick.checks import check_input, check_output, check_terms
from tallystick.farewells import Farewells
from tallystick.openings import Openings
from tallystick.prefixes import Prefix
from tallystick.remote import Hearing, Remote
from tallystick.repair import SETTLE_TIMEOUT_S, Repair
from tallystick.results import Results
from tallystick.ring import Ring
from tallystick.routing.candidates import Candidate
from tallystick.routing.monitor import Monitor
from tallystick.setting import Setting
from tallystick.verdict import Verdict
from tallystick.watch import LOOK_EVERY_S, Watch
from tallystick_protocol.errors import (
    CorruptResult,
    TallystickError,
    Unreachable,
)
from tallystick_protocol.frames import Frame, Kind, take
from tallystick_protocol.receipts import Receipt
from tallystick_protocol.types import WINDOW, Address, SessionId, Wei, window_of
from tallystick_protocol.vouchers import charge

log = logging.getLogger(__name__)

STEP_ROWS = 64
STEP_TIMEOUT_S = 60.0
FORK_REFUSALS = ("bad_position", "session_unknown", "rejected", "overloaded")
"""What a hop answers that cannot take over a session's rows, and can go on otherwise."""


class Session:
    """An open route. Use `open`, then `feed` and `result`, then `finish`; always `close`."""

    def __init__(self, setting: Setting, route: list[Candidate], verdict: Verdict) -> None:
        self.setting = setting
        self.route = route
        self.hops: list[Remote] = []
        self.verdict = verdict
        self.avoid: set[Address] = set()
        self.lost: set[Address] = set()
        self.ids: list[int] = []
        self._want: list[bool] = []
        self._results = Results(setting)
        self.pending: dict[Remote, dict[int, Receipt]] = {}
        self.audits: list[Audit] = []
        self.disputes: dict[int, Disagreement] = {}
        self.repair = Repair(self)
        self.openings = Openings(self)
        self.attempt = 0
        self.epoch = 0
        self.witnesses: set[Remote] = set()
        self.watch = Watch(self)
        self.ring: Ring | None = None
        self.monitor = Monitor(setting.reputation, route, setting.candidates, setting.work)
        self._is_rewinding = False
        self._flushed = -1
        self._work = asyncio.Event()
        self._news = asyncio.Event()
        self._tender: asyncio.Task[None] | None = None
        self.farewells = Farewells(self)
        self.arbitrations: dict[int, asyncio.Task[None]] = {}

    @property
    def one_shot(self) -> bool:
        return self.setting.one_shot

    @property
    def is_open(self) -> bool:
        """Whether every hop has been opened once."""
        return self._tender is not None

    @property
    def id(self) -> SessionId:
        """The same at all hops."""
        return self.hops[0].session

    @property
    def unfit(self) -> set[Address]:
        """Nodes that take no part: those that lied or are banned, and those that were lost."""
        return self.avoid | self.lost

    @property
    def nodes(self) -> set[Address]:
        """Nodes that take part in the route."""
        return {candidate.node for candidate in self.route}

    @property
    def rewinds(self) -> bool:
        """Whether every hop can take rows back and compute them again to the same bits."""
        return all(hop.rewinds and has_class(hop.candidate) for hop in self.hops)

    @property
    def has_audits(self) -> bool:
        return bool(self.audits or self.repair.unaudited)

    # -- opening

    async def open(self, audited: list[int]) -> None:
        """Open every hop, the last one first, and an auditor for each hop in `audited`. Raises NoAuditor…"""
        drawn = {index: self.openings.draw_auditors(index) for index in audited}
        needed = [*self.route, *(c for possible in drawn.values() for c in possible[:1])]
        await self.openings.reserve_with_standbys(needed)
        for index in reversed(range(len(self.route))):
            await self.openings.open_hop(index)
        for index in audited:
            await self.openings.open_audit(index, drawn[index])
        self._tender = asyncio.create_task(self._tend())

    def attach(self, remote: Remote) -> None:
        """Begin to hear a hop that has been opened."""
        self.pending[remote] = {}
        insist_s = partial(self.repair.insist_s, remote)
        remote.listen(
            Hearing(self._on_receipt, self.take_result, self.wake, self._rejoin, self._first_missing, insist_s)
        )

    async def _rejoin(self, remote: Remote, position: int, _: int) -> None:
        """A hop is back that has so many rows: what the client sent it since then is sent again."""
        if remote is self.hops[0]:
            await self.resend(remote, position)

    def _first_missing(self) -> int:
        rows = self._results.rows
        return next((at for at, wanted in enumerate(self._want) if wanted and at not in rows), len(self._want))

    def forget(self, position: int) -> None:
        """Forget the rows from `position` on, and what came of them."""
        del self.ids[position:], self._want[position:]
        self._flushed = -1
        self._results.forget(position)
        self.repair.forget(position)

    # -- rows

    async def feed(self, ids: list[int], want: Sequence[bool] | None = None) -> None:
        """Append token ids to the session, in steps that fit into credit.

        want: whose results are wanted, one flag per id; None for the last one's. A one-shot session takes one feed.
        """
        start = len(self.ids)
        self.ids += ids
        self._want += [i == len(ids) - 1 for i in range(len(ids))] if want is None else list(want)
        if (switch := self.monitor.look(start, self.setting.max_length - start, self.unfit)) is not None:
            self.repair.migrate(switch.index, switch.candidate, "slow")
        self.monitor.fed(start, len(self.ids))
        self.watch.fed(start, len(self.ids))
        await self.send_ids(start)

    async def confirm(self, ids: list[int]) -> None:
        """Append token ids that the ring has brought to the first hop already, or should have; all results wanted."""
        start = len(self.ids)
        self.ids += ids
        self._want += [True] * len(ids)
        self.watch.fed(start, len(self.ids))
        try:
            await self.hops[0].send_rows(self.input_rows(start, len(self.ids)), start, self._want[start:], confirm=True)
        except Unreachable:
            return  # as in `send_ids`

    async def send_ids(self, start: int) -> None:
        try:
            await self.resend(self.hops[0], start)
        except Unreachable:
            return  # `result` sees the failure and feeds whoever takes the place

    async def resend(self, remote: Remote, first: int) -> None:
        """Send a hop that takes ids those from `first` on."""
        while first < len(self.ids):
            last = len(self.ids) if self.one_shot else min(first + STEP_ROWS, len(self.ids))
            await self.send_ids_to(remote, first, last)
            first = last

    async def send_ids_to(self, remote: Remote, first: int, last: int) -> None:
        """Send the token ids of positions [first, last) to a hop that takes ids. Raises Unreachable."""
        types = self.setting.sides.token_types[first:last]
        await remote.send_rows(self.input_rows(first, last), first, self._want[first:last], types)

    # -- going back, and on from elsewhere

    async def crop(self, length: int) -> None:
        """Forget the rows from `length` on, everywhere; what was computed is due. Raises RolledBack, NoRoute."""
        await self._settle_windows(length)
        computed = len(self.ids)
        async with self._rewinding(Frame(Kind.CROP, position=length), lambda remote: remote.crop(length, computed)):
            self.forget(length)

    async def drop(self, length: int) -> None:
        """Forget rows from `length` on that complete no window, as rejected drafts do, without waiting for anybody."""
        computed = len(self.ids)
        is_signed = any(hop.standing.covered > length for hop in self.hops)
        if self.one_shot or is_signed or length // WINDOW != computed // WINDOW:
            await self.crop(length)
            return
        if length == computed:
            return
        self.epoch += 1
        self.forget(length)
        for remote in [*self.everybody(), *self.witnesses]:
            try:
                await remote.drop(self.epoch, length, computed if remote in self.hops else length)
            except Unreachable:
                continue  # `until` mends it

    async def fork_from(self, other: Session, shared: int) -> None:
        """Hold what `other` holds; both begin with the same `shared` rows. Nothing is computed where the hops are the
        same; else the rows are fed again. Raises RolledBack, NoRoute."""
        held = other.holds
        await self._settle_windows(shared)
        if self.holds.hops != held.hops:
            await self.crop(shared)
        elif await self.take_over(held, shared, len(held.ids)):
            return
        await self.feed(list(held.ids[shared:]), held.want[shared:])

    @property
    def holds(self) -> Prefix:
        """What another session may take over from this one."""
        return Prefix(
            self.id,
            self.setting.form,
            tuple((hop.node, hop.candidate.span) for hop in self.hops),
            tuple(self.ids),
            tuple(self._want),
            dict(self._results.rows),
        )

    async def take_over(self, held: Prefix, shared: int, length: int) -> bool:
        """Hold rows [shared, length) of what another session of these hops holds, open or not; both begin with the same
        `shared` rows. False, and only those are held, where a hop has them no more. Nothing is computed or due."""
        frame = Frame(Kind.FORK, {"from": held.session, "to": length}, shared)
        computed = len(self.ids)
        refused: list[Remote] = []
        async with self._rewinding(frame, lambda remote: remote.fork(shared, length, computed), refused):
            for hop in refused:  # it is owed a crop in the fork's place: marks on push connections are counted
                await self._rewind_hop(hop, Frame(Kind.CROP, position=shared), lambda hop: hop.crop(shared, computed))
            self.forget(shared)
            if not refused:
                self.ids += held.ids[shared:length]
                self._want += held.want[shared:length]
                self._results.rows |= {at: row for at, row in held.results.items() if shared <= at < length}
        if refused:
            async with self._rewinding(Frame(Kind.CROP, position=shared), lambda remote: remote.crop(shared, shared)):
                pass  # those that did fork
        return not refused

    async def computed(self) -> None:
        """Wait until every hop has computed what was fed. Raises RolledBack, NoRoute."""
        length = len(self.ids)
        if self._want and self._want[-1]:
            await self.result(length - 1)
            return
        await self._flush()
        await self.until(lambda: all(hop.standing.covered >= length for hop in self.hops), STEP_TIMEOUT_S, "the rows")

    async def _settle_windows(self, length: int) -> None:
        """Wait until every complete window before `length` is signed for: its rows stay.

        Where hops are audited, until all that was computed is signed, judged and paid: what is dropped was looked at.
        """
        if self.has_audits:
            await self.finish()
            return
        complete = 0 if self.one_shot else length // WINDOW * WINDOW
        await self.until(
            lambda: all(hop.standing.covered >= complete for hop in self.hops), SETTLE_TIMEOUT_S, "receipts"
        )

    @asynccontextmanager
    async def _rewinding(
        self, frame: Frame, note: Callable[[Remote], None], refused: list[Remote] | None = None
    ) -> AsyncIterator[None]:
        """Give every hop and auditor the command that takes rows back; within, the session's own books follow.

        A hop that fails is repaired later; one that only cannot do it is put into `refused`, if that is given.
        Receipts that come meanwhile wait.
        """
        await self.repair.call_off()
        self._is_rewinding = True
        self.epoch += 1
        try:
            for audit in self.audits:
                await audit.pause()
            for hop in self.hops:
                await self._rewind_hop(hop, frame, note, refused)
            for audit in self.audits:
                try:
                    await audit.crop(frame.position)
                except TallystickError as error:
                    audit.remote.failure = audit.remote.failure or error
            yield
        finally:
            self._is_rewinding = False
            for audit in self.audits:
                audit.start()
            self.wake()

    async def _rewind_hop(
        self, hop: Remote, frame: Frame, note: Callable[[Remote], None], refused: list[Remote] | None = None
    ) -> None:
        def on_done() -> None:
            note(hop)
            self.pending[hop] = {}  # what it signed before

        try:
            hop.rewound(self.epoch, frame.position)
            await hop.command(replace(frame, body={**frame.body, "epoch": self.epoch}), on_done=on_done)
        except TallystickError as error:
            if refused is not None and error.code in FORK_REFUSALS:
                refused.append(hop)
                return
            hop.failure = hop.failure or error

    def blame_feeding(self, index: int, auditor: Remote, error: TallystickError) -> None:
        """Rows for the auditor of hop `index` did not come: refusing to send them is failing, as the hop before."""
        feeder = self.hops[index - 1] if index else None
        at_fault = feeder if feeder is not None and error.fields.get("hop") == feeder.node else auditor
        at_fault.failure = at_fault.failure or error
        self.wake()

    def input_rows(self, first: int, last: int) -> list[bytes]:
        """What the client sends for positions [first, last): u32 little-endian ids."""
        return [token.to_bytes(4, "little") for token in self.ids[first:last]]

    async def result(self, position: int) -> bytes:
        """The row that left the model at a position. Raises RolledBack, NoRoute, Unreachable after STEP_TIMEOUT_S."""
        await self.until(lambda: position in self._results.rows, STEP_TIMEOUT_S, f"position {position}")
        return self._results.rows[position]

    async def finish(self) -> None:
        """Have every row signed, checked as the policy says, and paid. Raises RolledBack."""
        if not self.ids:
            return
        await self._flush()
        await self.until(self._all_settled, SETTLE_TIMEOUT_S, "the receipts")

    async def flush_again(self, remote: Remote) -> None:
        """A hop that joins late is told what all others were told: to sign the last window as it is."""
        if self._flushed == len(self.ids):
            await remote.send(Frame(Kind.FLUSH, position=len(self.ids)))

    async def _flush(self) -> None:
        self._flushed = len(self.ids)
        for remote in self.everybody():
            try:
                await remote.send(Frame(Kind.FLUSH, position=len(self.ids)))
            except Unreachable:
                continue

    async def take_leave(self) -> None:
        """Close every session in order, so that the last vouchers are known to have arrived."""
        partings = (remote.command(Frame(Kind.CLOSE)) for remote in self.everybody() if remote.failure is None)
        for outcome in await asyncio.gather(*partings, return_exceptions=True):
            if isinstance(outcome, TallystickError):
                log.info("a session ended without a farewell (%s)", outcome)

    def _all_settled(self) -> bool:
        length = len(self.ids)
        signed = all(hop.standing.covered == length for hop in self.hops)
        open_questions = self.disputes or self.repair.unaudited
        judged = not open_questions and all(audit.judged_to() == length for audit in self.audits)
        paid = all(remote.rows_paid >= remote.rows_due for remote in self.everybody())
        return signed and judged and paid

    def everybody(self) -> list[Remote]:
        """Hops and auditors."""
        return [*self.hops, *(audit.remote for audit in self.audits)]

    async def audit_at_end(self, index: int) -> None:
        """Audit one hop over the whole session after it was signed."""
        await self.openings.open_audit(index)
        self.wake()
        await self.until(self._all_settled, SETTLE_TIMEOUT_S, "the audit")

    async def close(self) -> None:
        """Close every hop. What is signed and checked has been paid before."""
        for task in (self._tender, *self.arbitrations.values(), *(audit.task for audit in self.audits)):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        await self.repair.call_off()
        for remote in self.everybody():
            self.note_payment(remote)
            await remote.close()
        await self.farewells.settle()
        self.openings.release()
        left = {old for old, _, why in self.verdict.replaced if why in ("draining", "slow", "overloaded")}
        self.monitor.close(self.lost - left, served=self.is_open)

    # -- what arrives

    def wake(self) -> None:
        """Something has changed: look at everything again."""
        self._work.set()
        self._news.set()

    def _on_receipt(self, remote: Remote, receipt: Receipt) -> None:
        self.pending[remote][self.window_index(receipt)] = receipt

    def window_index(self, receipt: Receipt) -> int:
        return 0 if self.one_shot else window_of(receipt.first)

    def take_result(self, remote: Remote, frame: Frame) -> None:
        """Rows that left the model, if the last hop says so."""
        if remote is self.hops[-1]:
            known = len(self.ids)
            ahead = 0 if self.ring is None else self.ring.until
            kept = min(remote.kept_of(take(frame.body, "epoch", int, 0)), max(known, ahead))
            self._results.take(remote.node, frame, lambda at: at < kept and (at >= known or self._want[at]))
            if self.ring is not None:
                self.ring.check(remote.node, frame)
            self.watch.answered(frame.position)
            self.monitor.arrived(frame.position)

    async def _tend(self) -> None:
        """Check receipts as they come, in order of hops and windows; pay; compare audits."""
        while True:
            await self._work.wait()
            self._work.clear()
            if self._is_rewinding:
                continue
            for index, hop in enumerate(self.hops):
                try:
                    self.check_hop(index, hop)
                    await self._pay_hop(index, hop)
                except TallystickError as error:
                    hop.failure = hop.failure or error
            for audit in list(self.audits):
                audit.wake()
                await self._tend_audit(audit)
            self._news.set()

    def check_hop(self, index: int, hop: Remote) -> None:
        """Check every pending receipt that can be: in order of windows, after the hop before."""
        pending = self.pending.get(hop, {})
        while (receipt := pending.get(len(hop.standing.receipts))) is not None or (
            receipt := _extension(hop, pending)
        ) is not None:
            window = self.window_index(receipt)
            upstream = None
            if index:
                above = self.hops[index - 1].standing.receipts
                if len(above) <= window or above[window].last < receipt.last:
                    return
                upstream = above[window]
                if upstream.positions != receipt.positions:
                    return
            del pending[window]
            self.check_receipt(hop, receipt, window)
            check_input(receipt, upstream, self.input_rows(receipt.first, receipt.last))
            if index == len(self.hops) - 1:
                check_output(receipt, self._result_rows(receipt))
            hop.owe(receipt, window)
            self.verdict.receipts += 1
            self._work.set()

    def check_receipt(self, remote: Remote, receipt: Receipt, window: int) -> None:
        """Raises CorruptResult unless the receipt says what was agreed for this window."""
        beyond = len(self.ids) if self.one_shot else min(len(self.ids), (window + 1) * WINDOW)
        if receipt.last > beyond or (not self.one_shot and receipt.first != window * WINDOW):
            raise CorruptResult(f"{remote.node} signed positions {receipt.positions}", hop=remote.node)
        want = tuple(self._want[receipt.first : receipt.last])
        context = self.setting.context(remote.candidate.span, want)
        arrived = remote.arrivals.pop(receipt, int(time.time()))
        check_terms(receipt, remote.terms, remote.standing.previous(window), want, context, arrived)

    def _result_rows(self, receipt: Receipt) -> list[bytes]:
        rows = self._results.rows
        return [rows.get(position, b"") if self._want[position] else b"" for position in receipt.positions]

    async def _pay_hop(self, index: int, hop: Remote) -> None:
        """Everything due, unless this hop is being audited: then what the audit has passed."""
        audit = next((audit for audit in self.audits if audit.index == index), None)
        if audit is None and index not in self.repair.unaudited:
            await hop.pay(hop.rows_due, self.setting.purse)
        elif audit is not None and audit.approved and index not in self.disputes:
            await hop.pay(hop.due_after.get(audit.approved - 1, 0), self.setting.purse)

    # -- audits

    async def _tend_audit(self, audit: Audit) -> None:
        hop = self.hops[audit.index]
        try:
            for check in audit.compare(hop):
                self.verdict.checks.append(check)
        except Disagreement as disagreement:
            if audit.index not in self.disputes:
                self.disputes[audit.index] = disagreement
                log.info("%s and %s differ in window %d", hop.node, audit.remote.node, disagreement.window)
                self.arbitrations[audit.index] = asyncio.create_task(self._settle_dispute(audit, disagreement))
        except TallystickError as error:
            audit.remote.failure = audit.remote.failure or error
        if audit.approved:
            try:
                await audit.remote.pay(audit.remote.due_after.get(audit.approved - 1, 0), self.setting.purse)
            except Unreachable as error:
                log.info("the auditor %s is gone (%s)", audit.remote.node, error)

    async def _settle_dispute(self, audit: Audit, disagreement: Disagreement) -> None:
        """Ask a third node; the verdict wakes whoever waits in `result` or `finish`."""
        try:
            disagreement.ruling = await arbitrate(self, audit, disagreement)
        except TallystickError as error:
            disagreement.failure = error
        self.wake()

    # -- failures

    async def until(self, done: Callable[[], bool], timeout_s: float, what: str) -> None:
        """Wait for something while repairing what breaks. Raises RolledBack, NoRoute, Unreachable."""
        deadline = time.monotonic() + timeout_s
        while not done():
            self._news.clear()
            if await self.repair.mend_first():
                deadline = time.monotonic() + timeout_s
                continue
            if done():
                return
            left = deadline - time.monotonic()
            if left <= 0:
                raise Unreachable(f"nothing came for {timeout_s:g} s while waiting for {what}")
            try:
                async with asyncio.timeout(min(left, LOOK_EVERY_S)):
                    await self._news.wait()
            except TimeoutError:
                self._work.set()
            await self.watch.look()

    def note_payment(self, remote: Remote, length: int | None = None) -> None:
        """A hop's session has ended: what was paid, withheld, and may be claimed. length: rows it got, if not all."""
        paid, due = remote.rows_paid, remote.rows_due
        for book, rows in ((self.verdict.paid, paid), (self.verdict.withheld, due - paid)):
            wei = charge(
                remote.candidate.span, remote.opening.num_layers, Wei(remote.candidate.offer.price), max(rows, 0)
            )
            if wei or book is self.verdict.paid:
                book[remote.node] = Wei(book.get(remote.node, Wei(0)) + wei)
        if remote.node not in {accusation.node for accusation in self.verdict.accusations}:
            fed = remote.rows_fed(len(self.ids) if length is None else length) - paid
            units = remote.candidate.span.units(remote.opening.num_layers)
            self.setting.purse.expect(remote.node, Wei(max(fed, 0) * units * remote.candidate.offer.price))


def _extension(hop: Remote, pending: dict[int, Receipt]) -> Receipt | None:
    """A pending receipt that extends the last window, which stands partially."""
    last = len(hop.standing.receipts) - 1
    found = pending.get(last) if last >= 0 else None
    return found if found is not None and found.last > hop.standing.covered else None
