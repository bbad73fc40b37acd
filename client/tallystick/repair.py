"""Mending a session: lost hops are replaced, lying ones expelled, auditors changed, everybody rolled back.

A hop that is lost is filled by the hop before, which sends the rows it kept: the stream goes on where it was. A hop
that is caught lying takes everybody back to the last window that was true.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from tallystick.admission import has_class
from tallystick.auditing import Audit, Disagreement
from tallystick.remote import Remote
from tallystick.routing.choice import auditors
from tallystick.verdict import Accusation, Check
from tallystick_protocol.errors import ChainError, ConfigError, CorruptResult, TallystickError
from tallystick_protocol.frames import Frame, Kind
from tallystick_protocol.types import WINDOW, Address

if TYPE_CHECKING:
    from tallystick.session import Session

log = logging.getLogger(__name__)

SETTLE_TIMEOUT_S = 60.0


class RolledBack(Exception):
    """Rows from `position` on were wrong and are forgotten; everything before is true. Feed on from there."""

    def __init__(self, position: int) -> None:
        super().__init__(position)
        self.position = position


class Repair:
    """What a session does when something in it is broken, one thing at a time."""

    def __init__(self, session: Session) -> None:
        self._session = session

    async def mend_first(self) -> bool:
        """Mend the first thing that is broken; False when nothing is."""
        for index, disagreement in list(self._session.disputes.items()):
            if disagreement.ruling is not None or disagreement.failure is not None:
                await self._resolve(index, disagreement)
                return True
        for index, hop in enumerate(self._session.hops):
            if hop.failure is not None:
                await self._mend(index, hop.failure)
                return True
            if hop.told:
                error = hop.told.pop()
                named = next(
                    (i for i, other in enumerate(self._session.hops) if other.node == error.fields.get("hop")), None
                )
                if named is not None:  # else it has been replaced meanwhile
                    await self._lose(named, error)
                return True
        for audit in list(self._session.audits):
            if audit.remote.failure is not None:
                self._session.avoid.add(audit.remote.node)
                await self._change_auditor(audit)
                return True
        return False

    async def _mend(self, index: int, failure: TallystickError) -> None:
        """A hop failed: replace it, unless another one would fail alike."""
        if failure.code in ("insufficient_funds", "context_length_exceeded"):
            raise failure
        await self._lose(index, failure)

    async def _lose(self, index: int, failure: TallystickError) -> None:
        """A hop is gone. Whoever stands in for one without a class computes other bits: all begins anew then."""
        if has_class(self._session.hops[index].candidate):
            await self._replace(index, failure)
        else:
            await self._expel(index, 0, failure)

    async def _replace(self, index: int, failure: TallystickError) -> None:
        """Put another node in hop `index`'s place and have it filled by the hop before."""
        lost = self._session.hops[index]
        self._session.note_payment(lost)
        await lost.close()
        self._session.pending.pop(lost, None)
        await self._session.openings.substitute(index, failure)
        self._session.attempt += 1
        while True:
            candidate = self._session.route[index]
            try:
                await self._announce(index, candidate.node)
                remote = await self._session.openings.connect(candidate, self._session.openings.opening(index))
            except (ConfigError, ChainError):
                raise  # another node would not mend the purse
            except TallystickError as error:
                if error.fields.get("hop") not in (None, candidate.node):
                    raise
                await self._session.openings.substitute(index, error)
                continue
            break
        self._session.hops[index] = remote
        self._session.attach(remote)
        if index:
            await self.tell_neighbour(index - 1, {"next": candidate.node})
        else:
            await self._session.send_ids(0)
        for audit in list(self._session.audits):
            if audit.remote.candidate not in auditors(
                self._session.setting.candidates, self._session.route, audit.index, self._session.avoid
            ):
                await self._change_auditor(audit)  # it has become a neighbour, or the hop itself

    async def _announce(self, index: int, node: Address) -> None:
        """Tell whoever takes rows from hop `index` that another node will send them."""
        if index + 1 < len(self._session.hops):
            await self.tell_neighbour(index + 1, {"previous": node})
        for audit in self._session.audits:
            if audit.index == index + 1 and audit.remote.failure is None:
                try:
                    await audit.remote.command(Frame(Kind.ROUTE, {"previous": node}))
                except TallystickError as error:
                    audit.remote.failure = audit.remote.failure or error

    async def tell_neighbour(self, index: int, body: dict[str, str]) -> None:
        """Tell a hop of its new neighbour; a hop that is gone as well is repaired in its turn."""
        try:
            await self._session.hops[index].command(Frame(Kind.ROUTE, dict(body)))
        except TallystickError as error:
            self._session.hops[index].failure = self._session.hops[index].failure or error

    async def _resolve(self, index: int, disagreement: Disagreement) -> None:
        """Act on a ruling: expel the hop (raises RolledBack), or change the auditor. Without a ruling, expel both."""
        audit = next(audit for audit in self._session.audits if audit.index == index)
        hop, ruling = self._session.hops[index], disagreement.ruling
        del self._session.disputes[index]
        window = disagreement.window
        liar = ruling.liar if ruling is not None else None
        passed = False if liar is not None else None
        self._session.verdict.checks.append(
            Check(
                hop.candidate.span,
                disagreement.hop.positions,
                hop.node,
                audit.remote.node,
                passed if liar != audit.remote.node else None,
            )
        )
        if ruling is not None:
            self._session.verdict.accusations.append(
                Accusation(ruling.liar, hop.candidate.span, disagreement.hop.positions, ruling.witnesses)
            )
            self._session.avoid.add(ruling.liar)
        else:
            self._session.avoid |= {hop.node, audit.remote.node}
        if liar != hop.node:
            await self._change_auditor(audit)
        if liar != audit.remote.node:
            await self._expel(index, 0 if self._session.one_shot else window * WINDOW)

    async def _change_auditor(self, audit: Audit) -> None:
        await audit.pause()
        self._session.audits.remove(audit)
        self._session.note_payment(audit.remote)
        await audit.remote.close()
        await self._session.openings.open_audit(audit.index)

    async def _expel(self, index: int, position: int, why: TallystickError | None = None) -> None:
        """Replace a hop that lied (or `why`) and roll everybody back to `position`. Raises RolledBack."""
        log.warning("%s is replaced; rolling back to position %d", self._session.hops[index].node, position)
        liar = self._session.hops[index]
        others = [hop for hop in self._session.hops if hop is not liar]
        await self._session.until(
            lambda: all(hop.standing.covered >= position for hop in others), SETTLE_TIMEOUT_S, "receipts"
        )
        for task in self._session.arbitrations.values():
            task.cancel()  # what else was in dispute is computed anew
        for audit in self._session.audits:
            await audit.pause()
        for hop in others:
            await self._crop(hop, position, len(self._session.ids))
        for audit in self._session.audits:
            await audit.crop(position)
        self._session.disputes = {}
        self._session.forget(position)
        lie = CorruptResult("its work was contradicted by two others", hop=liar.node)
        await self._replace(index, why or lie)
        for audit in self._session.audits:
            audit.start()
        raise RolledBack(position)

    async def _crop(self, hop: Remote, position: int, computed: int) -> None:
        await hop.command(Frame(Kind.CROP, position=position))
        hop.crop(position, computed)
        self._session.pending[hop] = {}
