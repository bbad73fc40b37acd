"""The client itself as the third one, where no other node can say who is wrong."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from tallystick.routing.choice import owners
from tallystick.session.auditing import Audit, Disagreement, Ruling
from tallystick.session.evidence import gather
from tallystick.session.proving import agreed
from tallystick_protocol.errors import NoAuditor, TallystickError
from tallystick_protocol.receipts import Receipt
from tallystick_protocol.types import Digest

if TYPE_CHECKING:
    from tallystick.session.session import Session

_LOOK_S = 5.0


async def recompute(session: Session, index: int, claim: Receipt) -> Digest:
    """The root over what leaves the span of hop `index` in the window that it claims, as the client itself computes it.

    Raises NoAuditor where it cannot, or is not of that hop's class.
    """
    if session.setting.recompute is None:
        raise NoAuditor(f"no third node can say who is wrong about layers {claim.span}")
    try:
        evidence = await gather(session, index, Disagreement(session.window_index(claim), claim, claim))
    except (TallystickError, KeyError) as error:
        raise NoAuditor(f"what the client needs to recompute layers {claim.span} is not to be had: {error}") from None
    task = asyncio.ensure_future(session.setting.recompute(evidence, claim))
    try:
        while not (await asyncio.wait([task], timeout=_LOOK_S))[0]:
            session.watch.excuse()
        return task.result()
    finally:
        task.cancel()


async def rule(session: Session, audit: Audit, disagreement: Disagreement) -> Ruling:
    """Two against one, by what the client computes itself. Raises NoAuditor, also when all three differ."""
    claim, answer, itself = disagreement.hop, disagreement.auditor, session.setting.key.address
    root = await recompute(session, audit.index, claim)
    for remote, receipt in ((session.hops[audit.index], claim), (audit.remote, answer)):
        if root == receipt.output and receipt.numeric_class == claim.numeric_class:
            agreed(session, receipt, owners([remote.candidate]), {itself})
    if root == claim.output:
        return Ruling(answer.node, (claim.node, itself))
    if root == answer.output or answer.numeric_class != claim.numeric_class:
        return Ruling(claim.node, (answer.node, itself))
    raise NoAuditor(f"hop, auditor and client differ about layers {claim.span}")
