"""Appeals by the node itself: against a verdict that its own recomputation says is wrong, within a budget.

Only bits of the node's own numeric class count as knowing better. Where it could not compute them it leaves the
verdict, and a person may appeal (`tallystick appeal`).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from enum import Enum

from tallystick_node.jury.judging import Finding, judge
from tallystick_node.jury.ledger import Ledger
from tallystick_protocol.chain.court import Verdict, Vote
from tallystick_protocol.chain.docket import Docket, Opening, Standing, Times, is_fined
from tallystick_protocol.chain.writes import Wallet
from tallystick_protocol.types import Address, Digest, Wei

log = logging.getLogger(__name__)


class Side(Enum):
    """What a node is in a case. JUROR: it voted in the round and is no party."""

    ACCUSED = "accused"
    ACCUSER = "accuser"
    JUROR = "juror"


@dataclass(frozen=True, slots=True)
class Budget:
    """Bonds of appeals that are open or were lost, at most: where the node is a party, and in cases of others."""

    party: Wei
    juror: Wei

    def of(self, side: Side) -> Wei:
        return self.juror if side is Side.JUROR else self.party


def side_in(opening: Opening, node: Address, payer: Address, vote: Vote | None) -> Side | None:
    """payer: whose tokens the node's bonds are, and who accuses when it does. vote: the node's in the round."""
    if node == opening.accused:
        return Side.ACCUSED
    if opening.accuser in (node, payer):
        return Side.ACCUSER
    return Side.JUROR if vote is not None else None


def is_worth_it(side: Side, finding: Finding, vote: Vote | None, said: Verdict) -> bool:
    """Whether the round's verdict is the opposite of what the node found in its own class, and not in its favour.

    A juror appeals only for what it has voted.
    """
    if finding.problem or not finding.same_class or not is_fined(judge(finding), said):
        return False
    if side is Side.JUROR:
        return vote is not None and is_fined(vote, said)
    return (said is Verdict.CLEAR) == (side is Side.ACCUSER)


def has_begun(side: Side, standing: Standing, times: Times, now: int) -> bool:
    """Parties appeal at once; jurors, whom a verdict costs less, in the second half of the appeal's time."""
    opened = standing.commit_end + times.reveal
    return now >= opened + (times.appeal // 2 if side is Side.JUROR else 0)


class Appeals:
    """The appeals of one node. Blocking: call from a thread."""

    def __init__(self, docket: Docket, wallet: Wallet, ledger: Ledger, budget: Budget) -> None:
        self._docket, self._wallet, self._ledger, self._budget = docket, wallet, ledger, budget
        self._told: set[tuple[Digest, int, str]] = set()

    def appeal(self, opening: Opening, standing: Standing, side: Side) -> None:
        """Appeal against the round's verdict, once, if the budget and the wallet hold the bond. Raises ChainError.

        The bond is entered before it is sent. A restart in between finds the case as it was, or in the next round.
        """
        bond, budget = self._docket.appeal_bond(opening.id), self._budget.of(side)
        if not budget:
            return
        pledge = (opening.id, standing.round, bond, side is Side.JUROR)
        if not self._ledger.pledge(*pledge, budget):
            self._tell(opening, standing, "budget", f"{bond} token units are more than the budget for appeals leaves")
            return
        if (have := self._docket.chain.balance(self._wallet.address)) < bond:
            self._tell(opening, standing, "funds", f"{self._wallet.address} holds {have} of the {bond} token units")
            return
        self._wallet.appeal(opening.id, bond)
        log.info(
            "case 0x%s, round %d: appealed as %s for %d token units",
            opening.id.hex()[:12], standing.round, side.value, bond,
        )  # fmt: skip

    def account(self, opening: Opening, verdict: Verdict | None) -> None:
        """At the end of a case: what came back, or was never made, no longer counts. verdict: None if it is gone."""
        for round_ in self._ledger.pledges(opening.id):
            made = self._docket.appealed(opening.id, round_)
            is_lost = verdict is not None and made.by == self._wallet.address and made.against is verdict
            self._ledger.end_pledge(opening.id, round_, is_lost)

    def _tell(self, opening: Opening, standing: Standing, lacking: str, why: str) -> None:
        """Once for each reason: the appeal is due at every look until its time is over."""
        key = (opening.id, standing.round, lacking)
        if key not in self._told:
            self._told.add(key)
            log.warning(
                "case 0x%s, round %d: no appeal against a verdict that is wrong by what this node computed: %s; "
                "`tallystick appeal 0x%s` makes one", opening.id.hex()[:12], standing.round, why, opening.id.hex(),
            )  # fmt: skip
