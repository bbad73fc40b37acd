"""Votes about one window that a hop claims: of nodes that compute it again, and of the client itself."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from tallystick.routing.candidates import Candidate
from tallystick.session.auditing import testify
from tallystick.session.ballot import Ballot
from tallystick.session.third import recompute
from tallystick_protocol.errors import NoAuditor, TallystickError
from tallystick_protocol.receipts import Receipt

if TYPE_CHECKING:
    from tallystick.session.session import Session

log = logging.getLogger(__name__)


async def hear(
    session: Session, index: int, candidate: Candidate, claim: Receipt, ballot: Ballot
) -> TallystickError | None:
    """Have a node vote on the window that hop `index` claims; its word counts if it did the same work, in that class.
    Returns why it could not."""
    try:
        answer = (await testify(session, index, candidate, claim)).receipt
    except TallystickError as error:
        log.info("%s cannot be a witness (%s)", candidate.node, error)
        return error
    if (answer.input, answer.numeric_class) == (claim.input, claim.numeric_class):
        ballot.cast(answer)
    return None


async def vote(session: Session, index: int, claim: Receipt, ballot: Ballot) -> bool:
    """Vote as the client itself; False where it cannot compute the window."""
    try:
        root = await recompute(session, index, claim)
    except NoAuditor as nobody:
        log.info("%s", nobody)
        return False
    ballot.add(root, session.setting.key.address)
    return True
