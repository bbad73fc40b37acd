"""Appealing by hand: against what a round of a case says, for a bond."""

from __future__ import annotations

from dataclasses import dataclass

from tallystick_protocol.chain.court import State, Verdict
from tallystick_protocol.chain.docket import LAST_ROUND, Docket
from tallystick_protocol.chain.writes import Wallet
from tallystick_protocol.errors import ChainError, ConfigError
from tallystick_protocol.types import Digest, Wei


@dataclass(frozen=True, slots=True)
class Appealed:
    """What was appealed against, in which round, and for how much."""

    round: int
    against: Verdict
    bond: Wei


def appeal(wallet: Wallet, case: Digest, max_bond: Wei | None = None) -> Appealed:
    """Appeal with a bond of the wallet's own tokens; it comes back if the last verdict is another one. Blocking.

    Raises ConfigError for a bond beyond max_bond, ChainError where there is nothing to appeal against, or not now.
    """
    docket = Docket(wallet.chain)
    (_, now), standing, times = docket.head(), docket.standing(case), docket.times()
    if standing.state is not State.DRAWN:
        raise ChainError(f"the case is {standing.state.name.lower()}: appeals are against what a jury has said")
    if standing.round == LAST_ROUND:
        raise ChainError("this is the last round, which has no appeal")
    opens = standing.commit_end + times.reveal
    if not opens <= now < opens + times.appeal:
        raise ChainError(f"appeals are made from {opens} to {opens + times.appeal} (unix seconds), now it is {now}")
    against = docket.verdict_so_far(case)
    if against is Verdict.MISSED:
        raise ChainError("this round missed its quorum: it is drawn anew without an appeal")
    bond = docket.appeal_bond(case)
    if max_bond is not None and bond > max_bond:
        raise ConfigError(f"the bond is {bond} token units, more than the {max_bond} that were allowed")
    wallet.appeal(case, bond)
    return Appealed(standing.round, against, bond)
