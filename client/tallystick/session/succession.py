"""Every replacement is an audit of what it replays: what the lost hop has signed must be what its successor signs.

This is how audits extend backwards. A hop that does not give its rows is replaced, and its successor rebuilds them from
those of the hop before, which is replaced in its turn if it refuses, at worst from the token ids. Where a rebuilt root
is not the one that was signed, the first such root names the hop, and other nodes decide which of the two lied.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tallystick.attribution import Attribution, Cause
from tallystick.routing.choice import apart, owners
from tallystick.session.ballot import Ballot
from tallystick.session.proving import succeeded
from tallystick.session.remote import Remote
from tallystick.session.voting import hear, vote
from tallystick.verdict import Accusation, Check
from tallystick_protocol.errors import CorruptResult
from tallystick_protocol.receipts import Receipt
from tallystick_protocol.types import WINDOW, Address

if TYPE_CHECKING:
    from tallystick.session.session import Session

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Contradiction:
    """A hop and the one whose place it took have signed different outputs for a window of the same rows."""

    index: int
    successor: Remote
    before: Receipt
    after: Receipt


class Succession:
    """What the hops of one session that were replaced had signed, held against what their successors sign."""

    def __init__(self, session: Session) -> None:
        self.contradiction: Contradiction | None = None
        self._session = session
        self._claims: dict[int, list[Receipt]] = {}

    def note(self, index: int, lost: Remote) -> None:
        """Another node takes a hop's place. Who is avoided was judged already."""
        if lost.node in self._session.avoid:
            return
        receipts = list(lost.standing.receipts)
        self._claims[index] = receipts + self._claims.get(index, [])[len(receipts) :]

    def is_open(self, index: int) -> bool:
        """Whether a successor has still to sign what was signed before it came."""
        claims, hop = self._claims.get(index, []), self._session.hops[index]
        return len(hop.standing.receipts) < len(claims)

    def forget(self, position: int) -> None:
        """Rows from `position` on were taken back: what was signed for them is void."""
        self._claims = {
            index: [claim for claim in claims if claim.last <= position] for index, claims in self._claims.items()
        }
        self.contradiction = None

    def contradicts(self, index: int, hop: Remote, receipt: Receipt, window: int) -> bool:
        """Whether a successor's receipt is not what was signed before; then it is not taken, and `judge` is due."""
        claims = self._claims.get(index, [])
        if window >= len(claims):
            return False
        claim = claims[window]
        if claim.numeric_class != receipt.numeric_class:
            return False  # other bits; what it has signed is not what a successor of another class signs
        if (claim.positions, claim.input) != (receipt.positions, receipt.input):
            return False
        if claim.output == receipt.output:
            succeeded(self._session, claim, receipt)
            return False
        if self.contradiction is None:
            log.warning("%s does not compute what %s has signed", receipt.node, claim.node)
            self.contradiction = Contradiction(index, hop, claim, receipt)
            self._session.wake()
        return True

    async def judge(self) -> None:
        """Have others compute the window, avoid who is wrong, and go back to before it. Raises RolledBack."""
        session, found = self._session, self.contradiction
        assert found is not None
        self.contradiction = None
        if found.successor not in session.hops:
            return
        witnesses, liar = await self._hear_others(found)
        self._record(found, witnesses, liar)
        position = 0 if session.one_shot else session.window_index(found.after) * WINDOW
        if liar == found.before.node:
            await session.repair.roll_back(position)
        index = session.hops.index(found.successor)
        await session.repair.expel(index, position, CorruptResult("it was contradicted", hop=found.after.node))

    async def _hear_others(self, found: Contradiction) -> tuple[tuple[Address, ...], Address | None]:
        """Who agrees with the one that is right, and who is wrong; nobody where that cannot be said."""
        session, ballot = self._session, Ballot()
        for receipt in (found.before, found.after):
            ballot.cast(receipt)
        parties = [c for c in session.setting.candidates if c.node in (found.before.node, found.after.node)]
        drawn = session.openings.draw_auditors(found.index, {found.before.node, found.after.node})
        taken = owners(parties)
        for candidate in drawn:
            if not apart([candidate], taken):
                continue
            if await hear(session, found.index, candidate, found.after, ballot) is None:
                taken |= owners([candidate])
            if ballot.won is not None:
                break
        else:
            await vote(session, found.index, found.after, ballot)
        if (right := ballot.won) is None:
            return (), None
        liar = found.after if found.before.output == right else found.before
        return tuple(ballot.votes[right]), liar.node

    def _record(self, found: Contradiction, witnesses: tuple[Address, ...], liar: Address | None) -> None:
        session, before, after = self._session, found.before, found.after
        avoided = (liar,) if liar is not None else (before.node, after.node)
        session.avoid.update(avoided)
        span, positions, verdict = after.span, after.positions, session.verdict
        passed = None if liar is None else liar != before.node
        verdict.checks.append(Check(span, positions, before.node, after.node, passed))
        if liar is not None:
            verdict.accusations.append(Accusation(liar, span, positions, witnesses))
        cause: Cause = "numerics" if liar is None else "fraud"
        verdict.attributions.append(Attribution(cause, span, "disagreement", avoided, liar, witnesses, positions))
