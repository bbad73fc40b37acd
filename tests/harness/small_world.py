"""A whole network on one event loop: a node's own sessions, books and models, a client's own session, and faults.

Only what is beside the point is replaced: sockets by `End`s, the device's thread by a pause, the chain by one that
knows every key and holds enough money.
"""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from harness import samples
from harness.in_memory import InMemory
from harness.one_loop import End
from tallystick.payments import Purse
from tallystick.routing.candidates import Candidate
from tallystick.routing.proven import Proven
from tallystick.routing.suspicions import Suspicions
from tallystick.session.repair import RolledBack
from tallystick.session.ring import Ring
from tallystick.session.session import Session
from tallystick.session.setting import Setting, Sketches
from tallystick.speculation.steps import Speculation, Steps
from tallystick.verdict import Policy, Verdict
from tallystick_model.segments import Segment
from tallystick_model.span import SpanModel
from tallystick_node.channel import serve_channel
from tallystick_node.journal import Journal
from tallystick_node.scheduling.engine import Engine
from tallystick_node.session.hop import Shop
from tallystick_node.session.links import Dialler
from tallystick_node.session.registry import Limits, Sessions
from tallystick_node.stake import Lookups
from tallystick_node.till import Till
from tallystick_protocol.chain.reads import ChannelFunds
from tallystick_protocol.errors import NoRoute, Unreachable
from tallystick_protocol.frames import Kind
from tallystick_protocol.messages import Offer
from tallystick_protocol.peer import CONNECT_TIMEOUT_S
from tallystick_protocol.sampling import Sampling
from tallystick_protocol.signing import Domain, digest
from tallystick_protocol.types import Address, Span, Wei
from tallystick_protocol.vouchers import charge
from tallystick_protocol.wire import Wire

PRICE = Wei(1000)
MAX_LENGTH = 192
CREDIT_ROWS = 64
"""Less than a node may offer, so that a replay of an answer here takes several times as much."""

LEASE_S, DRAIN_S = 30.0, 15.0
STAKING = Domain("Tallystick", "1", 31337, samples.address("staking"))
ESCROW = Domain("Tallystick Escrow", "1", 31337, samples.address("escrow"))
STEP_S, ROW_S, WIRE_S = 0.004, 0.0002, 0.0005


class Inline(Engine):
    """Computes on the event loop, in as much of its time as a small device would take."""

    async def _submit(self, work: Any, payer: str, rows: int, divisible: bool, wait_s: float, model: SpanModel) -> Any:
        await asyncio.sleep(STEP_S + rows * ROW_S)
        return model.forward([work])[0] if isinstance(work, Segment) else work()


class Device:
    """What one node has of an engine that the nodes of a span share. It may be slow, or stop while its node answers.

    row_s: what a row takes besides. noise: how far off its results are, relative to what the span adds (of logits: to
    their standard deviation); a function of the row, as another class's rounding is, or a cheater's weights.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.stands = False
        self.row_s = self.noise = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def forward(self, segment: Segment, *rest: Any, **options: Any) -> Any:
        await asyncio.sleep(len(segment) * self.row_s)
        while self.stands:
            await asyncio.sleep(0.05)
        result = await self._engine.forward(segment, *rest, **options)
        return self._off(segment, result) if self.noise else result

    def _off(self, segment: Segment, result: torch.Tensor) -> torch.Tensor:
        rows = result.clone()
        for at, row in enumerate(rows):
            drawn = torch.Generator().manual_seed(zlib.crc32(row.numpy().tobytes()))
            entered = segment.rows[at] if segment.rows.ndim == 2 and len(segment.rows[at]) == len(row) else 0.0
            is_hidden = len(row) == self._engine.model.manifest.width
            size = (row - entered).norm() / len(row) ** 0.5 if is_hidden else row.std()
            row += self.noise * size * torch.randn(len(row), generator=drawn)
        return rows


class Chain:
    """Knows whose keys are whose, and that every channel is full."""

    book = SimpleNamespace(chain_id=31337, escrow_domain=ESCROW, staking_domain=STAKING)

    def __init__(self) -> None:
        self.nodes: dict[Address, Address] = {}

    def node_of(self, signer: Address) -> Address | None:
        return self.nodes.get(signer)

    def funds(self, client: Address, node: Address) -> ChannelFunds:
        return ChannelFunds(Wei(10**24), Wei(10**24), Wei(0))

    def may_sign(self, client: Address, signer: Address) -> bool:
        return client == signer


class Node:
    """One node, and everything that can happen to it."""

    def __init__(self, world: World, name: str, engine: Engine, folder: Path) -> None:
        self.world, self.name, self.engine = world, name, engine
        self.device = Device(engine)
        self.address, self.hot = samples.address(name), samples.key("hot " + name)
        world.chain.nodes[self.hot.address] = self.address
        span, layers = engine.model.span, engine.model.manifest.layers
        self.credit = charge(span, layers, PRICE, CREDIT_ROWS)
        self.till = Till(folder / f"{name}.till", self.address, ESCROW, self.credit, Wei(0), world.chain.may_sign)  # type: ignore[arg-type]
        self.journal = Journal(folder / f"{name}.journal", self.hot, STAKING)
        self.tasks: set[asyncio.Task[None]] = set()
        self.ends: set[End] = set()
        self.hangs = self.is_down = False  # is_down: nobody can dial it
        self.delay_s = WIRE_S
        self.sessions: Sessions | None = None
        self.starts = self._opened = 0
        self.numeric_class = samples.digest("class")
        self.start()

    def start(self) -> None:
        model = self.engine.model
        self.starts += 1
        offer = Offer(
            node=self.address, model=model.manifest.model_id, numeric_class=self.numeric_class,
            start=model.span.start, end=model.span.end, price=PRICE, credit=self.credit, max_length=MAX_LENGTH,
            seq=self.starts, expires=2_000_000_000,
        )  # fmt: skip
        self.offer, offer_digest = offer, digest(STAKING, offer)
        lookups = Lookups(self.world.chain, self.address)  # type: ignore[arg-type]
        peers: Any = SimpleNamespace(connect=lambda _, node: self.world.connect(node, self))
        shop = Shop(
            node=self.address, model=offer.model, numeric_class=offer.numeric_class, price=PRICE, domain=STAKING,
            engine=self.device, journal=self.journal, till=self.till,
            dialler=Dialler(peers, self.address, self.hot, STAKING, self._find, time.time), escrow_domain=ESCROW,
            lookups=lookups, clock=time.time,
        )  # fmt: skip
        limits = Limits(1 << 30, 64, LEASE_S)
        self.shop, self.sessions = shop, Sessions(shop, self.hot, {offer_digest: offer}, limits)
        self.candidate = Candidate(
            offer=offer, offer_digest=offer_digest, operator=self.address, payee=self.address, signer=self.hot.address,
            stake=Wei(1), url=self.name, rtt_s=0.0,
        )  # fmt: skip

    async def _find(self, node: Address) -> Any:
        return node

    def become(self, name: str, noise: float = 0.0) -> None:
        """Serve as a node of another class, whose results are so far off."""
        self.numeric_class, self.device.noise = samples.digest(name), noise
        self.start()

    def accept(self, end: End) -> None:
        sessions = self.sessions
        assert sessions is not None
        firsts = {Kind.OPEN: sessions.serve_client, Kind.PUSH_OPEN: sessions.serve_push, Kind.RESUME: sessions.resume}
        self.tasks.add(task := asyncio.create_task(serve_channel(end, firsts)))  # type: ignore[arg-type]
        task.add_done_callback(self.tasks.discard)

    @property
    def opened(self) -> int:
        """Sessions that it has opened, however often it was killed."""
        return self._opened + (self.sessions.counters.opened if self.sessions is not None else 0)

    # -- what may happen

    async def kill(self) -> None:
        self._opened, self.sessions = self.opened, None
        self.cut()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        self.cut()
        self.hangs = False

    def cut(self, of: Callable[[End], bool] = lambda _: True) -> None:
        for end in list(self.ends):
            if of(end):
                end.cut()
        self.ends = {end for end in self.ends if end.is_open}

    def hang(self) -> None:
        self.hangs = True

    def go_on(self) -> None:
        self.hangs = self.device.stands = False
        for end in self.ends:
            end.deliver()
            end.far.deliver()

    async def stop(self) -> None:
        """As on SIGTERM."""
        if self.sessions is not None:
            await self.sessions.drain(DRAIN_S)
            await self.kill()


class World:
    """Nodes by name; `client` is how somebody asks them."""

    def __init__(self, model: InMemory, engines: dict[Span, Engine], copies: int, folder: Path) -> None:
        """copies: nodes of each span, all of operators of their own."""
        self.chain = Chain()
        self.manifest = model.manifest
        names = [(f"{span}#{copy}", engine) for copy in range(copies) for span, engine in engines.items()]
        self.nodes = {samples.address(name): Node(self, name, engine, folder) for name, engine in names}
        self.spans = list(engines)
        self.key = samples.key("client")
        self.purse = Purse(self.chain, self.key, Wei(10**24))  # type: ignore[arg-type]
        self.waited: list[str] = []
        self.sketches: Sketches = "auto"
        self.suspicions = Suspicions()
        self.proven = Proven()
        self.client_ends: set[End] = set()

    async def connect(self, node: Address, by: Node | None = None) -> End:
        """A connection to a node. Raises Unreachable."""
        there = self.nodes[node]
        await asyncio.sleep(2 * there.delay_s)
        deadline = asyncio.get_running_loop().time() + CONNECT_TIMEOUT_S
        while there.hangs and there.sessions is not None:
            await asyncio.sleep(0.01)
            if asyncio.get_running_loop().time() > deadline:
                break
        if there.sessions is None or there.is_down or there.hangs:
            raise Unreachable(f"{node} does not answer", hop=node)

        def hold() -> bool:
            return there.hangs or (by is not None and by.hangs)

        def delay_s() -> float:
            return max(there.delay_s, by.delay_s if by is not None else 0.0)

        near, far = End(hold, delay_s), End(hold, delay_s)
        near.far, far.far = far, near
        there.ends.add(far)
        (self.client_ends if by is None else by.ends).add(near)
        there.accept(far)
        return near

    async def look(self) -> list[Candidate]:
        """Who answers."""
        await asyncio.sleep(WIRE_S)
        return [
            node.candidate
            for node in self.nodes.values()
            if node.sessions is not None and not (node.sessions.draining or node.hangs or node.is_down)
        ]

    async def prepare(self, policy: Policy, wait_s: float, wire: Wire = "f32") -> Session:
        """A session that is not open yet, over whoever answers. Raises NoRoute."""
        candidates = await self.look()
        if {c.offer.span for c in candidates} != set(self.spans):
            raise NoRoute("somebody is missing")
        peers: Any = SimpleNamespace(connect=lambda _, node: self.connect(node))
        setting = Setting(
            peers=peers, key=self.key, domain=STAKING, purse=self.purse, manifest=self.manifest,
            stack=self.manifest.whole, candidates=candidates, max_length=MAX_LENGTH, top_k=16, wire=wire,
            on_replaced=lambda: None, wait_s=wait_s, look_again=self.look,
            on_waiting=lambda error: self.waited.append(error.message), sketches=self.sketches,
            suspicions=self.suspicions, proven=self.proven,
        )  # fmt: skip
        route = [next(c for c in candidates if c.offer.span == span) for span in self.spans]
        return Session(setting, route, Verdict(policy))

    async def session(self, policy: Policy = "off", wait_s: float = 60.0) -> Session:
        """An open session."""
        session = await self.prepare(policy, wait_s)
        await session.open(audited(session))
        return session

    async def leftovers(self) -> list[str]:
        """What is held though nobody uses it, once every lease is over."""
        await asyncio.sleep(LEASE_S + DRAIN_S)
        found = []
        for node in self.nodes.values():
            sessions, ends = node.sessions, [end for end in node.ends if end.is_open]
            if sessions is None:
                continue
            if len(sessions) or sessions.reserved_bytes or node.shop.waiting or node.shop.sessions:
                found.append(f"{node.name}: {len(sessions)} sessions, {sessions.reserved_bytes} bytes")
            if ends:
                found.append(f"{node.name}: {len(ends)} connections")
            if node.tasks:
                found.append(f"{node.name}: {len(node.tasks)} tasks")
        found += [f"the client: {end}" for end in self.client_ends if end.is_open]
        ours = asyncio.current_task()
        found += [f"a task: {task.get_coro()}" for task in asyncio.all_tasks() if task is not ours]
        return found


def audited(session: Session) -> list[int]:
    """The hops that get an auditor when it opens."""
    return list(range(len(session.route))) if session.verdict.policy == "full" else []


async def generate(
    session: Session, prompt: list[int], count: int, sampling: Sampling | None = None,
    steps: Steps | Ring | None = None, on_token: Callable[[int], None] = lambda _: None,
) -> list[int]:  # fmt: skip
    """Tokens as `Stream` decides them. on_token: called with the number of tokens that are there."""
    last = len(prompt) + count
    steps = steps or Steps(session, sampling or Sampling(), Speculation(), last, session.setting.manifest.vocab)
    known = list(prompt)
    try:
        await steps.start(known)
        while True:
            try:
                while len(known) < last:
                    known = (known + await steps.decide(known))[:last]
                    if len(known) < last:
                        await steps.go_on(known)
                    on_token(len(known) - len(prompt))
                await steps.stop(known)
                await session.finish()
                return known[len(prompt) :]
            except RolledBack as back:
                del known[max(back.position + 1, len(prompt)) :]
                await steps.start(known)
    finally:
        await steps.close()


async def audit_at_end(session: Session, index: int, prompt: list[int], ids: list[int]) -> list[int]:
    """Have a hop audited behind an answer's last token; what that takes back is generated again. Returns the tokens."""
    count = len(ids)
    while True:
        try:
            if not session.has_audits:
                await session.audit_at_end(index)
            await session.finish()
            return ids
        except RolledBack as back:
            kept = max(back.position + 1 - len(prompt), 0)
            ids = ids[:kept] + await generate(session, prompt + ids[:kept], count - kept)
