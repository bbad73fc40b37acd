"""Mending a session: lost hops are replaced, lying ones expelled, auditors changed, everybody rolled back.

A hop that is lost is filled by the hop before, which sends the rows it kept: the stream goes on where it was. A hop
that is caught lying takes everybody back to the last window that was true.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Collection
from typing import TYPE_CHECKING

from tallystick.admission import has_class
from tallystick.attribution import Attribution, cause_of_difference, failed
from tallystick.routing.candidates import Candidate
from tallystick.session.auditing import Audit, Disagreement
from tallystick.session.migration import FILL_TIMEOUT_S, Migration
from tallystick.session.openings import LOOK_OUT_S
from tallystick.session.remote import Remote
from tallystick.session.succession import Succession
from tallystick.verdict import Accusation, Check
from tallystick_protocol.errors import (
    ChainError,
    ConfigError,
    CorruptResult,
    LinkMismatch,
    NoAuditor,
    Overloaded,
    TallystickError,
    Unreachable,
)
from tallystick_protocol.frames import Frame, Kind
from tallystick_protocol.types import WINDOW, Address

if TYPE_CHECKING:
    from tallystick.session.session import Session

log = logging.getLogger(__name__)

SETTLE_TIMEOUT_S = 60.0
INSIST_S = 0.3
LEASE_S = 20.0
FUNDINGS = 2
COMPLAINTS = ("link_mismatch", "bad_tensor", "bad_position")
"""What a hop says of rows or receipts of the one before."""


class RolledBack(Exception):
    """Rows from `position` on were wrong and are forgotten; everything before is true. Feed on from there."""

    def __init__(self, position: int) -> None:
        super().__init__(position)
        self.position = position


class Repair:
    """What a session does when something in it is broken, one thing at a time."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.succession = Succession(session)
        self._migration: Migration | None = None
        self._unmoved: set[int] = set()
        self._parted: set[tuple[str, str]] = set()
        self._complaints: dict[Remote, str] = {}
        self.wrong_from: dict[Remote, int] = {}
        self.unaudited: dict[int, float] = {}
        self._tried_at: dict[int, float] = {}
        self._funded: Counter[Remote] = Counter()
        self._pointed: dict[Remote, asyncio.Future[None]] = {}

    @property
    def joining(self) -> list[Candidate]:
        """Who is being filled to take a hop's place."""
        return [] if self._migration is None else [self._migration.candidate]

    def has_stand_in(self, index: int) -> bool:
        """Whether another node could take hop `index`'s place at once."""
        return bool(self._session.openings.stand_ins(index))

    def insist_s(self, remote: Remote) -> float:
        """How long to try to come back to a node: not for long when another one can take its place."""
        hops = self._session.hops
        if remote not in hops or self.has_stand_in(hops.index(remote)):
            return INSIST_S
        return min(LEASE_S, max(INSIST_S, self._session.setting.wait_s))

    async def mend_first(self) -> bool:
        """Mend the first thing that is broken; False when nothing is."""
        for index, disagreement in list(self._session.books.disputes.items()):
            if disagreement.ruling is not None or disagreement.failure is not None:
                await self._resolve(index, disagreement)
                return True
        if self.succession.contradiction is not None:
            await self.succession.judge()
            return True
        for remote in self._session.everybody():
            if remote.lacks is not None:
                await self._fund(remote)
                return True
        for index, hop in enumerate(self._session.hops):
            if hop.failure is not None:
                await self._mend(index, hop.failure)
                return True
            if index and self._session.lookout.back(index):
                await self._point(self._session.hops[index - 1], hop.node)
                return True
            if hop.told and ((answer := self._pointed.get(hop)) is None or answer.done()):
                error = hop.told.pop()
                named = next(
                    (i for i, other in enumerate(self._session.hops) if other.node == error.fields.get("hop")), None
                )
                if named is not None and isinstance(error, LinkMismatch) and self.succession.is_open(named):
                    return True  # it does not send what its predecessor did: receipts will say which of them lied
                if named is not None and self._session.lookout.keeps(named, hop, error):
                    return True
                if named is not None and not self._is_believed(hop, error):
                    hop.failure = hop.failure or CorruptResult(f"{hop.node} complains of everybody", hop=hop.node)
                elif named is not None:  # else it has been replaced meanwhile
                    self._note_wrong(self._session.hops[named], error)
                    self._session.hearsay.add(self._session.hops[named].node)
                    await self._lose(named, error)
                return True
        for audit in list(self._session.audits):
            if audit.remote.failure is None and await self._session.feeding.hear(audit):
                return True
            draining = audit.remote.is_draining and self._session.openings.draw_auditors(audit.index)
            if audit.remote.failure is not None or draining:
                self._session.lost.add(audit.remote.node)
                self._note_failed(audit)
                await self.change_auditor(audit)
                return True
        for index, hop in enumerate(self._session.hops):
            if hop.is_draining and index not in self._unmoved and self.has_stand_in(index):
                why = "unstaked" if hop.node in self._session.stakes.gone else "draining"
                self.migrate(index, self._session.openings.stand_ins(index)[0], why)
        await self._find_auditors()
        return await self._finish_migration()

    async def _fund(self, remote: Remote) -> None:
        """A node waits for money in its channel: put there once more what was set aside for it. A node that says so
        again and again is believed twice; without money somebody else may put it there, as long as the node waits."""
        needed, remote.lacks = remote.lacks, None
        assert needed is not None
        self._funded[remote] += 1
        if self._funded[remote] > FUNDINGS:
            return
        log.warning("the channel to %s is used up: %d token units are needed there", remote.node, needed)
        try:
            await asyncio.to_thread(self._session.setting.purse.cover, remote.node, needed)
            await remote.show_voucher()
        except (ConfigError, ChainError) as error:
            log.warning("it cannot be filled (%s); within 45 s: tallystick fund --node %s", error, remote.node)
        except Unreachable:
            return  # it is mended in its turn

    def _note_failed(self, audit: Audit) -> None:
        """Put down why an auditor goes. Who was too busy is not gone for other sessions."""
        failure, candidate = audit.remote.failure, audit.remote.candidate
        if failure is None:
            return
        self._session.verdict.attributions.append(failed(failure, candidate.node, candidate.span))
        if isinstance(failure, Overloaded):
            self._session.busy.add(candidate.node)

    def _is_believed(self, hop: Remote, error: TallystickError) -> bool:
        """A hop says that another one sends or signs wrong rows: it is believed once. Who says the same of that one's
        stand-in lies, or has computed on what the first one sent; either way it is itself replaced."""
        if error.code not in COMPLAINTS:
            return True
        named = str(error.fields.get("hop"))
        return self._complaints.setdefault(hop, named) == named

    def _note_wrong(self, hop: Remote, error: TallystickError) -> None:
        """What a hop has sent in a window that it signed otherwise is wrong everywhere behind it."""
        first = error.fields.get("first")
        if error.code == "link_mismatch" and type(first) is int and 0 <= first < len(self._session.ids):
            self.wrong_from[hop] = first

    async def _mend(self, index: int, failure: TallystickError) -> None:
        """A hop failed: replace it, unless another one would fail alike."""
        if failure.code in ("insufficient_funds", "context_length_exceeded"):
            raise failure
        self._session.hearsay.discard(self._session.hops[index].node)
        await self._lose(index, failure)

    async def _lose(self, index: int, failure: TallystickError) -> None:
        """A hop is gone. Whoever stands in for one without a class computes other bits: all begins anew then."""
        wrong = failure.fields.get("wrong_from")
        known = len(self._session.ids)
        if (first := self.wrong_from.pop(self._session.hops[index], known)) < known:
            await self.expel(index, 0 if self._session.one_shot else first // WINDOW * WINDOW, failure)
        elif type(wrong) is int and known - 2 * WINDOW < wrong <= known:  # the ring was fed with a false token
            self._session.hops[index].failure = None
            await self.expel(index, wrong // WINDOW * WINDOW, failure)
        elif has_class(self._session.hops[index].candidate) and not (
            isinstance(failure, LinkMismatch) and self._moves(index)  # it is not trusted: nobody waits for it to return
        ):
            await self._replace(index, failure)
        else:
            await self.expel(index, 0, failure)

    def _moves(self, index: int) -> bool:
        """Whether another class takes over from a hop whose own has no other node."""
        return not self.has_stand_in(index) and self._session.openings.admit_other_classes(index)

    async def _replace(self, index: int, failure: TallystickError) -> None:
        """Put another node in hop `index`'s place and have it filled by the hop before."""
        session = self._session
        lost = session.hops[index]
        lost.failure = lost.failure or failure
        if self._migration is not None and self._migration.index == index:
            await asyncio.wait([self._migration.task], timeout=FILL_TIMEOUT_S)
            if await self._finish_migration():
                return
        self.succession.note(index, lost)
        session.farewells.drop(lost)
        await self.call_off()
        await session.openings.substitute(index, failure)
        while True:
            candidate = session.route[index]
            session.attempt += 1
            try:
                await self._announce(index, candidate.node)
                remote = await session.openings.connect(candidate, session.openings.opening(index))
            except (ConfigError, ChainError):
                raise  # another node would not mend the purse
            except TallystickError as error:
                if error.fields.get("hop") not in (None, candidate.node):
                    raise
                await session.openings.substitute(index, error)
                continue
            break
        session.books.drop_dispute(index)
        session.hops[index] = remote
        session.attach(remote)
        await session.flush_again(remote)
        if index:
            await self._point(session.hops[index - 1], candidate.node)
        else:
            await session.send_ids(0)
        await self._change_neighbours()

    async def _change_neighbours(self) -> None:
        """Auditors that have become neighbours of what they judge, or the hop itself, are changed."""
        session = self._session
        for audit in list(session.audits):
            if not session.openings.may_audit(audit.remote.candidate, audit.index):
                await self.change_auditor(audit)

    # -- moving a hop while it serves

    def migrate(self, index: int, candidate: Candidate, why: str) -> None:
        """Begin to fill another node of hop `index`'s span while the hop serves; they change places later, between two
        tokens. One hop at a time, and none without a class: another node would compute other rows."""
        if self._migration is None and has_class(candidate) and not self._session.one_shot:
            self._migration = Migration(self._session, index, candidate, why)

    async def _finish_migration(self) -> bool:
        """Let a filled node take its hop's place, whose failure matters no more; False when nothing has changed."""
        session, migration = self._session, self._migration
        if migration is None or not migration.task.done():
            return False
        self._migration = None
        index, old = migration.index, session.hops[migration.index]
        remote = migration.result()
        if remote is None or old is not migration.old:
            await migration.call_off()
            if not self.has_stand_in(index):
                self._unmoved.add(index)
            return False
        session.route[index] = migration.candidate
        session.verdict.replaced.append((old.node, migration.candidate.node, migration.why))
        self.succession.note(index, old)
        session.books.drop_dispute(index)
        session.hops[index] = remote
        session.attach(remote)
        migration.hand_over()
        await session.flush_again(remote)
        session.lost.add(old.node)
        await self._announce(index, remote.node)
        if index + 1 < len(session.hops):
            await self.tell(remote, {"next": session.hops[index + 1].node})
        if index:
            await self.tell_neighbour(index - 1, {"next": remote.node})
        else:
            await session.resend(remote, migration.fed)
        if old.failure is None:
            session.farewells.part(old, index)
        else:
            session.farewells.drop(old)
        await self._change_neighbours()
        return True

    def forget(self, position: int) -> None:
        """Rows from `position` on were taken back, and whoever is being filled was told so."""
        self.succession.forget(position)
        if self._migration is not None:
            self._migration.forget(position)

    async def call_off(self) -> None:
        """Whoever was to take a hop's place is let go: the rows that it was filled with are in question."""
        migration, self._migration = self._migration, None
        if migration is not None:
            await migration.call_off()

    async def _announce(self, index: int, node: Address) -> None:
        """Tell whoever takes rows from hop `index` that another node will send them."""
        if index + 1 < len(self._session.hops):
            await self.tell_neighbour(index + 1, {"previous": node})
        for audit in self._session.audits:
            if audit.index == index + 1 and audit.remote.failure is None:
                try:
                    await audit.remote.command(Frame(Kind.ROUTE, {"previous": node}))
                    audit.refeed()
                except TallystickError as error:
                    audit.remote.failure = audit.remote.failure or error

    async def tell_neighbour(self, index: int, body: dict[str, str]) -> None:
        """Tell a hop of its new neighbour; a hop that is gone as well is repaired in its turn."""
        await self.tell(self._session.hops[index], body)

    async def tell(self, hop: Remote, body: dict[str, str]) -> None:
        """What a hop said of that neighbour before is over: the same node may have come back."""
        try:
            try:
                await hop.command(Frame(Kind.ROUTE, dict(body)))
            finally:
                _retract(hop, body.values())
        except TallystickError as error:
            self._blame(hop, error)

    async def _point(self, hop: Remote, following: Address) -> None:
        """Have a hop send all that it keeps to another node. It has done so when that one has computed most of it:
        nobody waits for that, the watch sees how it comes on."""

        def on_answer(answer: asyncio.Future[None]) -> None:
            _retract(hop, [following])
            error = None if answer.cancelled() else answer.exception()
            if isinstance(error, TallystickError):
                self._blame(hop, error)
            self._session.wake()

        try:
            self._pointed[hop] = answer = await hop.line.post(Frame(Kind.ROUTE, {"next": following}))
            answer.add_done_callback(on_answer)
        except TallystickError as error:
            self._blame(hop, error)

    def _blame(self, hop: Remote, error: TallystickError) -> None:
        """A hop that cannot reach another one, which answers us, is believed once; then it is itself at fault."""
        pair = (hop.node, str(error.fields.get("hop")))
        if hop.failure is None and pair[1] in self._session.nodes - {hop.node} and pair not in self._parted:
            self._parted.add(pair)
            hop.told.append(error)
        else:
            hop.failure = hop.failure or error

    async def _resolve(self, index: int, disagreement: Disagreement) -> None:
        """Act on a ruling: expel the hop (raises RolledBack), or change the auditor. Without a ruling, expel both."""
        auditor = disagreement.auditor.node
        audit = next((one for one in self._session.audits if (one.index, one.remote.node) == (index, auditor)), None)
        hop, ruling = self._session.hops[index], disagreement.ruling
        del self._session.books.disputes[index]
        window = disagreement.window
        liar = ruling.liar if ruling is not None else None
        passed = False if liar is not None else None
        found = disagreement.found
        self._session.verdict.note(
            Check(
                hop.candidate.span,
                disagreement.hop.positions,
                hop.node,
                auditor,
                passed if liar != auditor else None,
                *(("hash",) if found is None else ("sketch", found.error, found.tolerance)),
            )
        )
        span, positions = hop.candidate.span, disagreement.hop.positions
        if ruling is not None:
            self._session.verdict.accusations.append(
                Accusation(ruling.liar, span, positions, ruling.witnesses, disagreement.evidence)
            )
        avoided = {liar} if liar is not None else {hop.node} if disagreement.is_of_one else {hop.node, auditor}
        failure = hop.failure or (audit.remote.failure if audit is not None else None)
        self._session.avoid |= avoided
        self._session.verdict.attributions.append(
            Attribution(
                cause_of_difference(failure, True, overruled=ruling is not None),
                span,
                "disagreement",
                tuple(sorted(avoided)),
                liar,
                ruling.witnesses if ruling is not None else (),
                positions,
            )
        )
        if audit is not None and liar != hop.node:
            await self.change_auditor(audit)
        if liar != auditor:
            await self.expel(index, 0 if self._moves(index) or self._session.one_shot else window * WINDOW)

    async def change_auditor(self, audit: Audit) -> None:
        """Another node audits from now on, from the beginning."""
        await audit.pause()
        self.unaudited[audit.index] = time.monotonic() + self._session.setting.wait_s  # from now on it is paid nothing
        self._session.audits.remove(audit)
        self._session.books.note_payment(audit.remote)
        await audit.remote.close()
        await self._find_auditors()

    async def _find_auditors(self) -> None:
        """Open an auditor for each hop that has lost its own. Raises NoAuditor when there was none for too long; under
        `audit`, only after a disagreement that nobody could settle."""
        now = time.monotonic()
        for index, deadline in list(self.unaudited.items()):
            if now - self._tried_at.get(index, 0.0) < LOOK_OUT_S:
                continue
            try:
                await self._session.openings.open_audit(index)
                del self.unaudited[index]
                self._tried_at.pop(index, None)
            except NoAuditor as nobody:
                if now > deadline:
                    if self._session.verdict.policy != "audit" or self._session.verdict.is_undecided:
                        raise
                    self._session.note_unaudited(index, nobody)
                    del self.unaudited[index]
                    continue
                await self._session.openings.look_out()
                self._tried_at[index] = time.monotonic()

    async def expel(self, index: int, position: int, why: TallystickError | None = None) -> None:
        """Replace a hop that lied (or `why`) and roll everybody back to `position`. Raises RolledBack."""
        log.warning("%s is replaced; rolling back to position %d", self._session.hops[index].node, position)
        liar = self._session.hops[index]
        await self.roll_back(position, liar, why)

    async def roll_back(self, position: int, liar: Remote | None = None, why: TallystickError | None = None) -> None:
        """Have everybody forget the rows from `position` on: they came of a lie. liar: the hop that is replaced, for
        `why`, and forgets nothing. Raises RolledBack."""

        def others() -> list[Remote]:
            return [hop for hop in self._session.hops if hop is not liar]  # any of them may be replaced meanwhile

        await self._session.until(
            lambda: all(hop.standing.covered >= position for hop in others()), SETTLE_TIMEOUT_S, "receipts"
        )
        for task in self._session.books.arbitrations.values():
            task.cancel()  # what else was in dispute is computed anew
        for audit in self._session.audits:
            await audit.pause()
        self._session.epoch += 1
        for hop in others():
            await self._crop(hop, position, len(self._session.ids))
        for audit in self._session.audits:
            try:
                await audit.crop(position)
            except TallystickError as error:
                audit.remote.failure = audit.remote.failure or error
        self._session.books.disputes = {}
        self._session.forget(position)
        if liar is not None and liar in self._session.hops:
            lie = CorruptResult("its work was contradicted by two others", hop=liar.node)
            await self._replace(self._session.hops.index(liar), why or lie)
        for audit in self._session.audits:
            audit.start()
        raise RolledBack(position)

    async def _crop(self, hop: Remote, position: int, computed: int) -> None:
        epoch = self._session.epoch
        hop.rewound(epoch, position)
        try:
            await hop.command(Frame(Kind.CROP, {"epoch": epoch}, position))
        except TallystickError as error:  # it is replaced in its turn
            hop.failure = hop.failure or error
        hop.crop(position, computed)
        hop.told = [error for error in hop.told if not isinstance(error, LinkMismatch)]  # about rows that are void now
        self._session.books.pending[hop] = {}


def _retract(hop: Remote, nodes: Collection[str]) -> None:
    """What a hop has said of these nodes counts no more."""
    hop.told = [error for error in hop.told if error.fields.get("hop") not in nodes]
