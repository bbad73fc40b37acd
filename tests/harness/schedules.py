"""Schedules of faults against the small world: what fails, where in the route, and when in the life of a session."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Literal

from harness.small_world import WIRE_S, Node, World
from tallystick.session.session import Session
from tallystick.verdict import Policy
from tallystick_protocol.manifest import Numerics
from tallystick_protocol.wire import Wire

Way = Literal["plain", "ring", "lookup"]
KINDS = ("kill", "hang", "stall", "stand", "cut", "cut client", "cut pushes", "flap", "late", "drain")
LONGEST_S = {"kill": 4.0, "hang": 12.0, "stall": 40.0, "stand": 40.0, "flap": 3.0, "late": 2.0}
OPENING_S = 0.03
"""What opening takes when nothing happens, about."""

PAUSES_S = (0.2, 1.0, 4.0)
"""Of a stall, before it hangs."""

BETWEEN_S = 0.05


@dataclass(frozen=True)
class Fault:
    """hop: where in the route of that moment. step: after so many tokens; None while the session opens, `at` seconds
    after it began. for_s: until it is over."""

    kind: str
    hop: int
    step: int | None
    at: float
    for_s: float


@dataclass(frozen=True)
class Schedule:
    faults: tuple[Fault, ...] = ()
    sampling: int = 0
    policy: Policy = "off"
    numerics: Numerics = "fp32"
    way: Way = "plain"
    wire: Wire = "f32"

    @property
    def truth(self) -> Schedule:
        """What says the same tokens, undisturbed."""
        return Schedule(sampling=self.sampling, numerics=self.numerics, wire=self.wire)


def draw(seed: int, tokens: int) -> Schedule:
    """tokens: how many the answer has."""
    dice = random.Random(seed)
    faults = []
    for _ in range(dice.choice((1, 1, 2, 2, 3, 5))):
        kind = dice.choice(KINDS)
        step = None if dice.random() < 0.2 else dice.randrange(tokens)
        at = dice.uniform(0.0, OPENING_S)
        faults.append(Fault(kind, dice.randrange(3), step, at, dice.uniform(0.01, LONGEST_S.get(kind, 1.0))))
    if dice.random() < 0.3:  # several at once
        faults = [replace(fault, step=faults[0].step, at=faults[0].at) for fault in faults]
    return Schedule(
        tuple(faults),
        dice.randrange(2),
        dice.choice(("off", "off", "full")),
        dice.choice(("fp32", "bf16w")),
        dice.choice(("plain", "plain", "ring", "lookup")),
        dice.choice(("f32", "f32", "f32", "bf16", "int8")),
    )


class Moments:
    """How far an answer has come, for whoever waits for a step of it; and which session it is."""

    def __init__(self) -> None:
        self._steps: defaultdict[int, asyncio.Event] = defaultdict(asyncio.Event)
        self._began = asyncio.Event()
        self._session: Session | None = None

    @property
    def session(self) -> Session:
        assert self._session is not None
        return self._session

    def begin(self, session: Session) -> None:
        """A session begins to open."""
        self._session = session
        self._began.set()

    def reach(self, step: int) -> None:
        """So many tokens are there; 0: the session is open."""
        for earlier in range(step + 1):
            self._steps[earlier].set()

    async def wait(self, fault: Fault) -> None:
        """Return when it is time for a fault."""
        await self._began.wait()
        await asyncio.sleep(fault.at)
        if fault.step is not None:
            await self._steps[fault.step].wait()


async def suffer(world: World, moments: Moments, fault: Fault) -> None:
    """Have one fault happen, and end."""
    await moments.wait(fault)
    route = moments.session.route
    node = world.nodes[route[fault.hop % len(route)].node]
    if node.sessions is None:
        return
    if fault.kind == "kill":
        await node.kill()
        await asyncio.sleep(fault.for_s)
        _restart(node)
    elif fault.kind == "drain":
        await node.stop()
        _restart(node)
    elif fault.kind == "hang":
        await _hang(node, fault.for_s)
    elif fault.kind == "stall":
        for pause_s in PAUSES_S:
            await _hang(node, pause_s)
            await asyncio.sleep(BETWEEN_S)
        await _hang(node, fault.for_s)
    elif fault.kind == "stand":
        node.device.stands = True
        await asyncio.sleep(fault.for_s)
        node.device.stands = False
    elif fault.kind == "cut":
        node.cut()
    elif fault.kind == "cut client":
        node.cut(lambda end: end.far in world.client_ends)
    elif fault.kind == "cut pushes":
        node.cut(lambda end: end.far not in world.client_ends)
    elif fault.kind == "flap":
        node.is_down = True
        node.cut()
        await asyncio.sleep(fault.for_s)
        node.is_down = False
    else:
        node.delay_s = 0.3
        await asyncio.sleep(fault.for_s)
        node.delay_s = WIRE_S


async def _hang(node: Node, for_s: float) -> None:
    node.hang()
    await asyncio.sleep(for_s)
    node.go_on()


def _restart(node: Node) -> None:
    if node.sessions is None:
        node.start()
