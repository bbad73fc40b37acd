"""Auditors that could not be fed: whose fault that is. Refusing rows is failing, as is giving others than were signed.

An auditor's word alone costs it its own place. When a second one has the same trouble with the same hop, or nobody else
could audit, the hop is at fault: it is replaced, and its successor rebuilds the rows (`succession`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tallystick_protocol.errors import LinkMismatch, TallystickError
from tallystick_protocol.types import Address

if TYPE_CHECKING:
    from tallystick.session.auditing import Audit
    from tallystick.session.remote import Remote
    from tallystick.session.session import Session


class Feeding:
    """What was said about the rows that hops of one session give to auditors."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._trouble: dict[Address, set[Address]] = {}

    def blame(self, index: int, auditor: Remote, error: TallystickError) -> None:
        """Rows for the auditor of hop `index` did not come, or were not those that were signed for.

        `error` names the one that is said to be at fault.
        """
        feeder = self._session.hops[index - 1] if index else None
        named = error.fields.get("hop")
        if feeder is not None and named == feeder.node and not isinstance(error, LinkMismatch):
            feeder.failure = feeder.failure or error  # it says itself that it does not
        elif feeder is not None and self._is_here(auditor) and self._is_repeated(index, feeder, auditor):
            why = f"{feeder.node} gives no auditor the rows that it signed for"
            feeder.failure = feeder.failure or LinkMismatch(why, hop=feeder.node)
            self._session.lost -= self._trouble[feeder.node]  # they were right: they may audit again
        else:
            auditor.failure = auditor.failure or error
        self._session.wake()

    async def hear(self, audit: Audit) -> bool:
        """Take up what an auditor has said of the hop that feeds it; False when it has said nothing."""
        if not audit.remote.told:
            return False
        error, auditor = audit.remote.told.pop(), audit.remote
        feeder = self._session.hops[audit.index - 1] if audit.index else None
        if feeder is not None and error.fields.get("hop") != feeder.node:
            return True  # about somebody who has been replaced
        self.blame(audit.index, auditor, error if feeder else _own(auditor, error))
        if auditor.failure is None:  # it holds rows that nobody signed for
            await self._session.repair.change_auditor(audit)
        return True

    def _is_here(self, auditor: Remote) -> bool:
        """Whether the client itself has not lost it."""
        return auditor.failure is None and not auditor.line.is_away

    def _is_repeated(self, index: int, feeder: Remote, auditor: Remote) -> bool:
        trouble = self._trouble.setdefault(feeder.node, set())
        trouble.add(auditor.node)
        return len(trouble) > 1 or not self._session.openings.draw_auditors(index, {auditor.node})


def _own(auditor: Remote, error: TallystickError) -> TallystickError:
    """A complaint about the client's own rows is the auditor's failure."""
    return LinkMismatch(f"{auditor.node}: {error.message}", hop=auditor.node)
