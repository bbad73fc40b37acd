"""Several routes through the small world for one answer, and nodes of it that compute wrongly."""

from __future__ import annotations

from typing import Any

from harness.small_world import MAX_LENGTH, STAKING, Device, Node, World
from tallystick.agreement.agreement import Agreement
from tallystick.agreement.routes import disjoint
from tallystick.routing.candidates import Candidate
from tallystick.routing.cost import Workload
from tallystick.routing.planner import plan
from tallystick.session.session import Session
from tallystick.session.setting import Setting
from tallystick.verdict import Policy, Verdict, num_routes
from tallystick_model.segments import Segment


class Liar(Device):
    """Computes rows wrongly from a position on. lied: how many."""

    lies_from = 1 << 30
    lied = 0

    async def forward(self, segment: Segment, *rest: Any, **options: Any) -> Any:
        rows = await super().forward(segment, *rest, **options)
        kept = range(len(segment)) if len(rows) == len(segment) else segment.wanted or ()
        wrong = [at for at, row in enumerate(kept) if segment.first + row >= self.lies_from]
        if not wrong:
            return rows
        self.lied += len(wrong)
        rows = rows.clone()
        rows[wrong] *= 1 + 1e-3
        return rows


def corrupt(node: Node, position: int) -> Liar:
    """Have a node compute wrongly from a position on; it begins anew with the same price and name."""
    liar = Liar(node.engine)
    liar.lies_from = position
    node.device = liar
    node.start()
    return liar


def setting(world: World, candidates: list[Candidate], wait_s: float = 5.0) -> Setting:
    """A session's setting over these nodes."""

    async def look_again() -> list[Candidate]:
        return await world.look()

    peers: Any = type("Doors", (), {"connect": staticmethod(lambda _, node: world.connect(node))})
    return Setting(
        peers=peers, key=world.key, domain=STAKING, purse=world.purse, manifest=world.manifest,
        stack=world.manifest.whole, candidates=list(candidates), max_length=MAX_LENGTH, top_k=16,
        on_replaced=lambda: None, wait_s=wait_s, look_again=look_again,
        on_waiting=lambda error: world.waited.append(error.message), proven=world.proven,
    )  # fmt: skip


async def agreement(world: World, policy: Policy, routes: list[list[str]] | None = None) -> Agreement:
    """Open routes as a client does. routes: the names of their nodes, where the planner's choice does not do."""
    candidates = await world.look()
    work = Workload(world.manifest.layers)
    if routes is None:
        found = disjoint(candidates, num_routes(policy), lambda usable: plan(usable, work))
    else:
        named = {world.nodes[c.node].name: c for c in candidates}
        found = [[named[name] for name in route] for route in routes]
    verdict = Verdict(policy)
    agreed = Agreement([Session(setting(world, candidates), route, verdict) for route in found], verdict)
    try:
        await agreed.open()
    except BaseException:
        await agreed.close()
        raise
    return agreed

