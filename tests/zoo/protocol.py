"""Nodes that break the protocol, in a whole network on one event loop: by which check each of them is caught."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from faults.breaking import BREAKING, Bend, bending
from harness.small_models import Models, fast
from harness.small_world import World, audited, generate
from tallystick.session.session import Session
from tallystick.verdict import Policy
from tallystick_node.session.hop import Hop
from tallystick_protocol.errors import TallystickError
from tallystick_protocol.types import Address

PROMPT = [7 + 3 * i % 90 for i in range(75)]
TOKENS = 24
WAIT_S = 60.0
ATTEMPTS = 16
"""Sessions until a certain one of two nodes is drawn as the auditor: all but once in 65,536."""

Place = tuple[int, int]
"""Which hop of the route, and which of the nodes of its span: 0 is on the route, others audit."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """who does what. guilty: who is to be caught. check: the code for which it is replaced, or "accused".

    audits: whether an audit is what finds it; else it is found in every session, under every policy.
    """

    who: Mapping[Place, str]
    guilty: Place
    check: str
    policy: Policy = "off"

    @property
    def audits(self) -> bool:
        return self.policy == "full"


def one(name: str, check: str, policy: Policy = "off", place: Place = (1, 0)) -> Scenario:
    return Scenario({place: name}, place, check, policy)


SCENARIOS: dict[str, Scenario] = {
    "copied_receipts": one("copied_receipts", "corrupt_result"),
    "copied_roots": one("copied_roots", "link_mismatch"),
    "equivocating": one("equivocating", "corrupt_result"),
    "two_faced": one("two_faced", "link_mismatch"),
    "other_input": one("other_input", "link_mismatch"),
    "complaining": one("complaining", "corrupt_result"),
    "framing": one("framing", "corrupt_result"),
    "overcharging": one("overcharging", "rejected"),
    "charging_thrice": one("charging_thrice", "unreachable"),
    "withholding": one("withholding", "unreachable"),
    "refusing_audits": one("refusing_audits", "rejected", "full", (0, 0)),
    "right_for_audits": one("right_for_audits", "accused", "full"),
    "lazy_auditor": one("lazy_auditor", "accused", "full", (1, 1)),
    "lying_auditor": one("lying_auditor", "accused", "full", (1, 1)),
    "colluding_neighbours": Scenario(
        {(0, 0): "colluding_liar", (1, 0): "colluding_voucher"}, (1, 0), "accused", "full"
    ),
    "stubborn_neighbours": Scenario(
        {(0, 0): "stubborn_liar", (1, 0): "colluding_voucher"}, (0, 0), "link_mismatch", "full"
    ),
}


@dataclass(slots=True)
class Outcome:
    """What came of it. checks: what the guilty node was caught by. accused: all that were.

    is_right: whether the answer is what honest nodes give. overpaid: what the guilty one got beyond what it may cost.
    """

    checks: set[str] = field(default_factory=set)
    accused: set[Address] = field(default_factory=set)
    cheaters: set[Address] = field(default_factory=set)
    is_right: bool = True
    error: str = ""
    overpaid: int = 0
    sessions: int = 0

    @property
    def innocent(self) -> set[Address]:
        """Honest nodes that were accused."""
        return self.accused - self.cheaters


def perform(models: Models, scenario: Scenario, folder: Path) -> Outcome:
    """Sessions until the guilty one is caught; one, unless it has to be drawn."""
    truth = fast(lambda: _honest(models, folder / "honest"))
    return fast(lambda: _perform(models, scenario, folder / "bent", truth))


async def _honest(models: Models, folder: Path) -> list[int]:
    folder.mkdir(parents=True)
    world = models.world(folder, 1)
    session = await world.session()
    try:
        return await generate(session, PROMPT, TOKENS)
    finally:
        await session.close()
        await _end(world)


async def _perform(models: Models, scenario: Scenario, folder: Path, truth: list[int]) -> Outcome:
    folder.mkdir(parents=True)
    world, outcome = models.world(folder, 3), Outcome()
    nodes = list(world.nodes)

    def node(place: Place) -> Address:
        return nodes[place[0] + len(world.spans) * place[1]]

    bends = {node(place): BREAKING[name].bend for place, name in scenario.who.items()}
    outcome.cheaters = set(bends)
    guilty = node(scenario.guilty)

    def choose(hop: Hop) -> Bend | None:
        return bends.get(hop.shop.node)

    with bending(choose):
        while outcome.sessions < ATTEMPTS and not outcome.checks:
            outcome.sessions += 1
            session = await world.prepare(scenario.policy, WAIT_S)
            try:
                await session.open(audited(session))
                outcome.is_right &= await generate(session, PROMPT, TOKENS) == truth
                await session.take_leave()
            except TallystickError as error:
                outcome.error = error.code
            finally:
                await session.close()
            _look(session, guilty, outcome)
            if scenario.guilty[1] == 0:
                break
    signed = world.nodes[guilty].till.account(world.key.address).signed
    outcome.overpaid = max(0, signed - outcome.sessions * _most(world, guilty))
    await _end(world)
    return outcome


def _look(session: Session, guilty: Address, outcome: Outcome) -> None:
    verdict = session.verdict
    outcome.checks |= {code for lost, _, code in verdict.replaced if lost == guilty}
    outcome.accused |= {accusation.node for accusation in verdict.accusations}
    if guilty in outcome.accused:
        outcome.checks.add("accused")


def _most(world: World, node: Address) -> int:
    """What a node can be owed for one session: each row once."""
    model = world.nodes[node].engine.model
    return (len(PROMPT) + TOKENS) * model.span.units(world.manifest.layers) * world.nodes[node].shop.price


async def _end(world: World) -> None:
    for node in world.nodes.values():
        await node.kill()
        node.till.close()
        node.journal.close()
