"""One generation over several hops: rows in at the first, results out of the last, receipts and vouchers beside.

While it waits for results it has broken things mended (`repair`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from tallystick.admission import has_class
from tallystick.prefixes import Prefix
from tallystick.routing.candidates import Candidate
from tallystick.routing.monitor import Monitor
from tallystick.session.auditing import Audit
from tallystick.session.books import Books
from tallystick.session.ending import end
from tallystick.session.farewells import Farewells
from tallystick.session.feeding import Feeding
from tallystick.session.lookout import Lookout
from tallystick.session.openings import Openings
from tallystick.session.remote import Hearing, Remote
from tallystick.session.repair import SETTLE_TIMEOUT_S, Repair
from tallystick.session.results import Results
from tallystick.session.rewinding import Rewinding
from tallystick.session.ring import Ring
from tallystick.session.setting import Setting
from tallystick.session.sketching import Sketching
from tallystick.session.stakes import Stakes
from tallystick.session.watch import IDLE_S, LOOK_EVERY_S, Watch
from tallystick.verdict import Verdict
from tallystick_protocol.errors import NoAuditor, TallystickError, Unreachable
from tallystick_protocol.evidence.bundle import most_positions
from tallystick_protocol.frames import Frame, Kind, take
from tallystick_protocol.receipts import Receipt
from tallystick_protocol.types import Address, Positions, SessionId, window_of

log = logging.getLogger(__name__)

STEP_ROWS = 64
STEP_TIMEOUT_S = 60.0


class Session:
    """An open route. Use `open`, then `feed` and `result`, then `finish`; always `close`.

    avoid: nodes that lied or are banned; lost: those that failed; hearsay: those of them that failed by another node's
    word alone; busy: that had no room for an audit. apart: nodes that may not take part for another reason. clearance:
    how many windows of a hop may be paid, where that depends on more than its auditor. to_audit: hops that the coins
    have chosen and that are still to be audited; None before they have fallen.
    """

    def __init__(self, setting: Setting, route: list[Candidate], verdict: Verdict) -> None:
        self.setting = setting
        self.route = route
        self.hops: list[Remote] = []
        self.verdict = verdict
        self.avoid: set[Address] = set()
        self.lost: set[Address] = set()
        self.hearsay: set[Address] = set()
        self.busy: set[Address] = set()
        self.ids: list[int] = []
        self.want: list[bool] = []
        self.results = Results(setting)
        self.audits: list[Audit] = []
        self.repair = Repair(self)
        self.openings = Openings(self)
        self.lookout = Lookout(self)
        self.apart: Callable[[], set[Address]] = set
        self.clearance: Callable[[int], int] | None = None
        self.attempt = 0
        self.epoch = 0
        self.witnesses: set[Remote] = set()
        self.watch = Watch(self)
        self.stakes = Stakes(self)
        self.ring: Ring | None = None
        self.monitor = Monitor(setting.reputation, route, setting.candidates, setting.work)
        self.books = Books(self)
        self.feeding = Feeding(self)
        self.rewinding = Rewinding(self)
        self.sketching = Sketching(self)
        self.to_audit: list[int] | None = None
        self._flushed = -1
        self.work = asyncio.Event()
        self.news = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self.farewells = Farewells(self)

    @property
    def one_shot(self) -> bool:
        return self.setting.one_shot

    @property
    def is_open(self) -> bool:
        """Whether every hop has been opened once."""
        return self._keeper is not None

    @property
    def id(self) -> SessionId:
        """The same at all hops."""
        return self.hops[0].session

    @property
    def unfit(self) -> set[Address]:
        """Nodes that take no part: those that lied or are banned, that were lost, whose stake has left, and those to be
        kept apart."""
        return self.avoid | self.lost | self.stakes.gone.keys() | self.apart()

    @property
    def nodes(self) -> set[Address]:
        """Nodes that take part in the route."""
        return {candidate.node for candidate in self.route}

    @property
    def routes(self) -> list[list[Candidate]]:
        """Its one route."""
        return [list(self.route)]

    @property
    def rewinds(self) -> bool:
        """Whether every hop can take rows back and compute them again to the same bits."""
        return all(hop.rewinds and has_class(hop.candidate) for hop in self.hops)

    @property
    def is_flushed(self) -> bool:
        """Whether every hop was told to sign for all rows that there are."""
        return self._flushed == len(self.ids)

    @property
    def has_audits(self) -> bool:
        return bool(self.audits or self.repair.unaudited)

    # -- opening

    async def open(self, audited: list[int]) -> None:
        """Open every hop, the last one first, and an auditor for each hop in `audited`. Raises NoAuditor…"""
        self.sketching.decide()
        drawn = {index: self.openings.draw_auditors(index) for index in audited}
        needed = [*self.route, *(c for possible in drawn.values() for c in possible[:1])]
        await self.openings.reserve_with_standbys(needed)
        for index in reversed(range(len(self.route))):
            await self.openings.open_hop(index)
        for index in audited:
            await self.openings.open_audit(index, drawn[index])
        self._keeper = asyncio.create_task(self.books.keep())

    def attach(self, remote: Remote) -> None:
        """Begin to hear a hop that has been opened."""
        self.books.pending[remote] = {}
        insist_s = partial(self.repair.insist_s, remote)
        remote.listen(
            Hearing(self._on_receipt, self.take_result, self.wake, self._rejoin, self.first_missing, insist_s)
        )

    async def _rejoin(self, remote: Remote, position: int, _: int) -> None:
        """A hop is back that has so many rows: what the client sent it since then is sent again."""
        if remote is self.hops[0]:
            await self.resend(remote, position)

    def first_missing(self) -> int:
        """The first position whose result is wanted and not there; all of them are: the number of positions."""
        rows = self.results.rows
        return next((at for at, wanted in enumerate(self.want) if wanted and at not in rows), len(self.want))

    async def drop(self, length: int) -> None:
        """Forget rows from `length` on without waiting for anybody: `Rewinding.drop`."""
        await self.rewinding.drop(length)

    def forget(self, position: int) -> None:
        """Forget the rows from `position` on, and what came of them."""
        del self.ids[position:], self.want[position:]
        self._flushed = -1
        self.results.forget(position)
        self.watch.forget(position)
        self.repair.forget(position)
        self.sketching.forget(position)

    # -- rows

    async def feed(self, ids: list[int], want: Sequence[bool] | None = None) -> None:
        """Append token ids to the session, in steps that fit into credit.

        want: whose results are wanted, one flag per id; None for the last one's. A one-shot session takes one feed.
        """
        start = len(self.ids)
        self.ids += ids
        self.want += [i == len(ids) - 1 for i in range(len(ids))] if want is None else list(want)
        if (switch := self.monitor.look(start, self.setting.max_length - start, self.unfit)) is not None:
            self.repair.migrate(switch.index, switch.candidate, "slow")
        self.monitor.fed(start, len(self.ids))
        self.watch.fed(start)
        await self.send_ids(start)

    async def confirm(self, ids: list[int]) -> None:
        """Append token ids that the ring has brought to the first hop already, or should have; all results wanted."""
        start = len(self.ids)
        self.ids += ids
        self.want += [True] * len(ids)
        self.watch.fed(start)
        try:
            await self.hops[0].send_rows(self.input_rows(start, len(self.ids)), start, self.want[start:], confirm=True)
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
        await remote.send_rows(self.input_rows(first, last), first, self.want[first:last], types)

    @property
    def holds(self) -> Prefix:
        """What another session may take over from this one."""
        return Prefix(
            self.id,
            self.setting.form,
            tuple((hop.node, hop.candidate.span) for hop in self.hops),
            tuple(self.ids),
            tuple(self.want),
            dict(self.results.rows),
        )

    def input_rows(self, first: int, last: int) -> list[bytes]:
        """What the client sends for positions [first, last): u32 little-endian ids."""
        return [token.to_bytes(4, "little") for token in self.ids[first:last]]

    def result_rows(self, positions: Positions, rows: Mapping[int, bytes]) -> list[bytes]:
        """Of returned rows those at these positions, as they are signed for: empty where nobody wanted one."""
        return [rows.get(at, b"") if self.want[at] else b"" for at in positions]

    async def result(self, position: int) -> bytes:
        """The row that left the model at a position. Raises RolledBack, NoRoute, and Unreachable when nobody has moved
        for STEP_TIMEOUT_S and nobody can take a place."""
        await self.until(lambda: position in self.results.rows, STEP_TIMEOUT_S, f"position {position}")
        return self.results.rows[position]

    async def finish(self) -> None:
        """Have every row signed, checked as the policy says, and paid. Raises RolledBack."""
        if not self.ids:
            return
        await self.flush()
        await self.until(lambda: self.is_settled, SETTLE_TIMEOUT_S, "the receipts")
        beyond = len(self.ids) - most_positions(4 * self.setting.manifest.width)
        self.verdict.not_slashable = max(self.verdict.not_slashable, beyond)

    async def flush_again(self, remote: Remote) -> None:
        """A hop that joins late is told what all others were told: to sign the last window as it is."""
        if self.is_flushed:
            await remote.send(Frame(Kind.FLUSH, position=len(self.ids)))

    async def flush(self) -> None:
        """Have everything signed that is computed."""
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

    @property
    def is_settled(self) -> bool:
        """Whether every row is signed, judged and paid."""
        length = len(self.ids)
        signed = all(hop.standing.covered == length for hop in self.hops)
        open_questions = self.books.disputes or self.repair.unaudited
        judged = not open_questions and all(audit.judged_to() == length for audit in self.audits)
        paid = all(remote.rows_paid >= remote.rows_due for remote in self.everybody())
        return signed and judged and paid

    def everybody(self) -> list[Remote]:
        """Hops and auditors."""
        return [*self.hops, *(audit.remote for audit in self.audits)]

    async def audit_at_end(self, index: int) -> None:
        """Audit one hop over the whole session after it was signed. Where nobody can, the verdict says so."""
        try:
            await self.openings.open_audit(index)
        except NoAuditor as nobody:
            self.note_unaudited(index, nobody)
            return
        self.wake()
        await self.until(lambda: self.is_settled, SETTLE_TIMEOUT_S, "the audit")

    def note_unaudited(self, index: int, nobody: NoAuditor) -> None:
        """Nobody can recompute what a hop did, which is delivered, and paid: under `audit` no more is promised."""
        log.warning("%s", nobody)
        one = (self.hops[index].node, self.hops[index].candidate.span)
        if one not in self.verdict.unaudited:
            self.verdict.unaudited.append(one)

    async def close(self) -> None:
        """Close every hop. What is signed and checked has been paid before."""
        for task in (self._keeper, *self.books.arbitrations.values(), *(audit.task for audit in self.audits)):
            await end(task)
        await self.lookout.close()
        await self.repair.call_off()
        await self.stakes.close()
        for remote in self.everybody():
            self.books.note_payment(remote)
            await remote.close()
        await self.farewells.settle()
        self.openings.release()
        blameless = {"draining", "unstaked", "slow", "overloaded"}
        if self.watch.longest_pause_s > IDLE_S:
            blameless.add("session_unknown")
        left = {old for old, _, why in self.verdict.replaced if why in blameless}
        self.monitor.close(self.lost - left - self.hearsay - self.busy, served=self.is_open)

    # -- what arrives

    def wake(self) -> None:
        """Something has changed: look at everything again, first whoever waits for a token."""
        self.news.set()
        self.work.set()

    def _on_receipt(self, remote: Remote, receipt: Receipt) -> None:
        self.books.pending[remote][self.window_index(receipt)] = receipt

    def window_index(self, receipt: Receipt) -> int:
        return 0 if self.one_shot else window_of(receipt.first)

    def take_result(self, remote: Remote, frame: Frame) -> None:
        """Rows that left the model, if the last hop says so."""
        if remote is self.hops[-1]:
            known = len(self.ids)
            ahead = 0 if self.ring is None else self.ring.until
            kept = min(remote.kept_of(take(frame.body, "epoch", int, 0)), max(known, ahead))
            self.results.take(remote.node, frame, lambda at: at < kept and (at >= known or self.want[at]))
            if self.ring is not None:
                self.ring.check(remote.node, frame)
            if (last := frame.position + frame.num_rows - 1) in self.results.rows:
                self.watch.answered(last)
            self.monitor.arrived(frame.position)

    # -- failures

    async def until(self, done: Callable[[], bool], timeout_s: float, what: str) -> None:
        """Wait for something while repairing what breaks. Raises RolledBack, NoRoute, and Unreachable when nothing has
        moved for so long and whom that is owed to cannot be replaced."""
        began = time.monotonic()
        while not done():
            self.news.clear()
            if await self.repair.mend_first():
                began = time.monotonic()
                continue
            if done():
                return
            left = max(began, self.watch.moved_at) + timeout_s - time.monotonic()
            if left <= 0:
                if not self.watch.fail_one(timeout_s):
                    raise Unreachable(f"nothing came for {timeout_s:g} s while waiting for {what}")
                continue
            try:
                async with asyncio.timeout(min(left, LOOK_EVERY_S)):
                    await self.news.wait()
            except TimeoutError:
                self.work.set()
            await self.watch.look()
            self.lookout.look()
            self.stakes.look()
