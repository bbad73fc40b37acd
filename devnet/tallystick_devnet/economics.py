"""What the Court and the rewards are worth, in numbers: who can capture a jury, whom it deters, whether farming pays.

`scripts/economics` prints the tables; `docs/court.md` quotes them. Closed forms where there are any, and simulations
that draw seats as the contract does, so that a wrong formula shows.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from tallystick_protocol.chain.court import winning_seats
from tallystick_protocol.signing import keccak
from tallystick_protocol.types import WINDOW, Address, Digest

SEATS = (15, 31, 61)
SHARES = (0.1, 0.2, 0.3)
FIRST, REPEAT, CAP = 0.01, 0.1, 0.3
BOUNTY, JURORS_PART, BURNED = 0.25, 0.25, 0.5
FINE = 0.5
FEE, GAMMA = 0.05, 0.9
PRICE = 1e-6
"""Tokens per position and layer: a node's default."""


# Committees


def poisson(mean: float, limit: int) -> list[float]:
    """P(0), …, P(limit - 1)."""
    return [math.exp(k * math.log(mean) - mean - math.lgamma(k + 1)) if mean else float(k == 0) for k in range(limit)]


def has_quorum(voted: int, seats: int) -> bool:
    return 2 * voted >= seats


def agrees(part: int, voted: int) -> bool:
    """Two thirds of those that did not abstain. They must be half of the expected seats, too: `has_quorum`."""
    return voted > 0 and 3 * part >= 2 * voted


@dataclass(frozen=True, slots=True)
class Committee:
    """Probabilities in one round, for an adversary with a share of the stake, everybody voting on the merits.

    missed: too few seats were drawn; convicts: the adversary alone has two thirds of the seats; captures: and there is
    a quorum, so that the verdict counts; blocks: the honest alone do not have two thirds. unopposed: the adversary has
    half of the expected seats, so that it rules if all others abstain or are silent.
    """

    missed: float
    convicts: float
    captures: float
    blocks: float
    unopposed: float


def committee(seats: int, share: float) -> Committee:
    """Seats of the adversary and of the honest are Poisson with means seats x share and seats x (1 - share)."""
    limit = 4 * seats + 40
    adversary, honest = poisson(seats * share, limit), poisson(seats * (1 - share), limit)
    missed = convicts = captures = blocks = unopposed = 0.0
    for a, p in enumerate(adversary):
        unopposed += p * has_quorum(a, seats)
        for h, q in enumerate(honest):
            quorum, alone = has_quorum(a + h, seats), agrees(a, a + h)
            missed += p * q * (not quorum)
            convicts += p * q * alone
            captures += p * q * (alone and quorum)
            blocks += p * q * (not agrees(h, a + h))
    return Committee(missed, convicts, captures, blocks, unopposed)


def drawn_committees(seats: int, share: float, rounds: int, units: int = 300, seed: int = 0) -> Committee:
    """The same, counted over juries drawn by hash as the contract draws them; ten nodes hold the units."""
    jurors = [Address(f"0x{node:040x}") for node in range(1, 11)]
    bad = round(share * len(jurors))
    missed = convicts = captures = blocks = unopposed = 0
    for number in range(rounds):
        drawn = Digest(keccak(f"{seed} {number}".encode()))
        counts = [len(winning_seats(drawn, juror, units // len(jurors), units, seats)) for juror in jurors]
        a, h = sum(counts[:bad]), sum(counts[bad:])
        quorum, alone = has_quorum(a + h, seats), agrees(a, a + h)
        missed += not quorum
        convicts += alone
        captures += alone and quorum
        blocks += not agrees(h, a + h)
        unopposed += has_quorum(a, seats)
    return Committee(missed / rounds, convicts / rounds, captures / rounds, blocks / rounds, unopposed / rounds)


# Deterrence


def break_even(audit: float, detection: float, slashed: float, stake: float) -> float:
    """The gain per session at which cheating is worth nothing: p·d·s·S."""
    return audit * detection * slashed * stake


def audited_windows(price: float, units: int, audit: float, stake: float, slashed: float = FIRST) -> float:
    """After how many audited windows a cheater must have been found, so that all it was paid is less than it loses.

    d of `break_even` is one in so many windows, the gain of a window its whole price. price: tokens per position and
    layer. units: layers that are charged for.
    """
    return audit * slashed * stake / (WINDOW * units * price)


def cheater(gain: float, audit: float, detection: float, stake: float, sessions: int, seed: int) -> float:
    """Profit of a node that cheats in every session, in tokens, under graded slashing.

    One session after the other, each conviction before the next session: the first costs 1 %, all later ones 10 % of
    what is left. The cap of 30 % in seven days is left out: it delays, and a week of sessions lies between.
    """
    draws = random.Random(seed)
    left, profit = stake, 0.0
    for _ in range(sessions):
        profit += gain
        if draws.random() < audit * detection:
            lost = left * (FIRST if left == stake else REPEAT)
            left, profit = left - lost, profit - lost
    return profit


def accuser(bond_per_bounty: float, convicts: float, clears: float, stake: float, slashed: float = FIRST) -> float:
    """What an accuser of a cheater may expect from a case, in tokens; what is neither is void and costs a tenth."""
    bounty = BOUNTY * slashed * stake
    bond = bond_per_bounty * bounty
    return convicts * bounty - clears * bond - (1 - convicts - clears) * bond / 10


# Self-dealing


def self_payment(paid: float, others: float, budget: float = math.inf) -> float:
    """What somebody has gained who paid itself `paid` in an epoch in which others paid `others`."""
    burned, all_burned = FEE * paid, FEE * (paid + others)
    reward = min(GAMMA * all_burned, budget) * burned / all_burned if all_burned else 0.0
    return reward - burned


def self_accusation(stake: float, jury: float, slashed: float = FIRST) -> float:
    """What somebody has gained who accused its own node and got it convicted, holding a share of the jury."""
    loss = slashed * stake
    return -loss + BOUNTY * loss + JURORS_PART * loss * jury


def self_acquittal(stake: float, jury: float, slashed: float = FIRST) -> float:
    """The same, acquitted: half of the bond came to the node, half went to the jurors."""
    bond = 2 * BOUNTY * slashed * stake
    return -bond / 2 + jury * bond / 2


def bogus_case(stake: float, before: int = 0) -> tuple[float, float]:
    """What burns of an accuser's bond, and in fines, when a case about nothing finds no voter in three rounds.

    before: earlier cases over the same receipt; each doubled the bond, three times at most.
    """
    bond = 2 * BOUNTY * FIRST * stake * 2 ** min(before, 3)
    return bond / 2, FINE * sum(SEATS)


# Tables


def tables(rounds: int) -> Iterator[str]:
    yield f"committees: one round, closed form (and {rounds} juries drawn by hash)"
    yield "seats  missed             f    convicts alone   with a quorum    blocks           unopposed"
    for seats in SEATS:
        for share in SHARES:
            exact, counted = committee(seats, share), drawn_committees(seats, share, rounds)
            yield (
                f"{seats:5}  {exact.missed:.1e} ({counted.missed:.1e})  {share:.1f}  "
                f"{exact.convicts:.0e} ({counted.convicts:.0e})  {exact.captures:.0e} ({counted.captures:.0e})  "
                f"{exact.blocks:.0e} ({counted.blocks:.0e})  {exact.unopposed:.0e} ({counted.unopposed:.0e})"
            )
    yield ""
    yield "deterrence: gain per session, in tokens, above which cheating pays; stake 1,000"
    yield "audits  detected  first conviction (1 %)  later ones (10 %)"
    for audit in (0.01, 0.05):
        for detection in (1.0, 0.8):
            first, later = (break_even(audit, detection, part, 1000) for part in (FIRST, REPEAT))
            yield f"{audit:6.2f}  {detection:8.1f}  {first:22.3f}  {later:17.3f}"
    yield ""
    yield "audited windows within which a cheater must be found, else its price is worth more than the first slash"
    yield "audits  2 layers  2 layers and the head; stake 1,000, at the default price"
    for audit in (0.01, 0.05 / 3):
        two, three = (audited_windows(PRICE, units, audit, 1000) for units in (2, 3))
        yield f"{audit:6.3f}  {two:8.0f}  {three:21.0f}"
    yield ""
    yield "griefing: a case about nothing that finds no voter, in tokens burned; stake 1,000"
    yield "cases before  of the bond  in fines"
    for before in range(4):
        bond, fines = bogus_case(1000, before)
        yield f"{before:12}  {bond:11.1f}  {fines:8.1f}"
    yield ""
    yield "self-dealing: gain in tokens, of 1,000 paid to oneself; of accusing one's own node with 10,000 staked"
    yield "share of network or jury    paid    convicted    acquitted"
    for share in (0.0, 0.1, 0.5, 0.9, 1.0):
        others = 1000 / share - 1000 if share else 1e9
        convicted, acquitted = self_accusation(10_000, share), self_acquittal(10_000, share)
        yield f"{share:24.1f}  {self_payment(1000, others):6.1f}  {convicted:11.1f}  {acquitted:11.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/economics", description="Tables of the Court and the rewards.")
    parser.add_argument("--rounds", type=int, default=1000, help="juries drawn by hash for each line (default 1000)")
    for line in tables(parser.parse_args().rounds):
        print(line)


if __name__ == "__main__":
    main()
