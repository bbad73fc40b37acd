"""One span of a route that runs passes: a node that computes, perhaps another that recomputes, and their money."""

from __future__ import annotations

import asyncio
import logging
import secrets
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from tallystick.payments import Need, Purse
from tallystick.routing.candidates import Candidate
from tallystick.routing.choice import auditors, draw, owners, stand_ins, strangers_first
from tallystick.routing.planner import no_route
from tallystick.session.openings import AUDITOR_PRICE_FACTOR
from tallystick.session.remote import Hearing, Opening, Remote, fresh_nonce
from tallystick.verdict import Accusation, Check, Verdict
from tallystick_protocol.errors import (
    BadTensor,
    ChainError,
    ConfigError,
    ContextLengthExceeded,
    CorruptResult,
    InsufficientFunds,
    NoAuditor,
    TallystickError,
)
from tallystick_protocol.frames import DType, Frame, Kind
from tallystick_protocol.manifest import Manifest
from tallystick_protocol.passes import MAX_ROWS, Collector, tensor_frames
from tallystick_protocol.peer import Peers
from tallystick_protocol.signing import Domain, Key
from tallystick_protocol.types import ZERO_ADDRESS, Address, Positions, Span, Wei
from tallystick_protocol.vouchers import charge

log = logging.getLogger(__name__)

PASS_TIMEOUT_S = 120.0
TOLERANCE = 1e-5
"""How far two honest nodes' tensors may lie apart, relative to the largest value: passes are not canonical."""

BUDGET_ROWS = 16 * MAX_ROWS
"""Rows that a channel is funded for at a time."""

_COINS = secrets.SystemRandom()
_OWN_FAULTS = (ConfigError, ChainError, BadTensor, ContextLengthExceeded)
"""What another node would not mend."""


@dataclass(frozen=True, slots=True)
class Workshop:
    """What all lanes share. audit_probability: of each request under verify="audit". model: as for `unserved`.

    ban(verdict): who is accused there is not used by the client again.
    """

    peers: Peers
    key: Key
    domain: Domain
    purse: Purse
    manifest: Manifest
    candidates: list[Candidate]
    max_length: int
    verdict: Verdict
    audit_probability: float
    avoid: set[Address] = field(default_factory=set)
    reserved: dict[Address, Need] = field(default_factory=dict)
    model: str = ""
    ban: Callable[[Verdict], None] = lambda _: None

    async def reserve(self, candidates: list[Candidate]) -> None:
        """Set money aside for nodes that are about to be used, in one transaction."""
        needs = {c.node: Need(c.node, self.price(c, BUDGET_ROWS)) for c in candidates}
        await asyncio.to_thread(self.purse.reserve, list(needs.values()))
        self.reserved.update(needs)

    def release(self) -> None:
        """Give back what is set aside for nodes that were not used."""
        self.purse.release(list(self.reserved.values()))
        self.reserved.clear()

    def price(self, candidate: Candidate, num_rows: int) -> Wei:
        return charge(candidate.span, self.manifest.layers, Wei(candidate.offer.price), num_rows)


@dataclass(slots=True)
class _Bench:
    """An open session at one node, and the answer that is coming from it."""

    remote: Remote
    need: Need
    collector: Collector
    expected: dict[str, tuple[int, ...]]
    settling: asyncio.Task[None]
    funded_to: int = BUDGET_ROWS // 2


class Lane:
    """Requests to one span, one after the other."""

    def __init__(self, workshop: Workshop, route: list[Candidate], index: int) -> None:
        self._shop = workshop
        self._route = route
        self._index = index
        self._benches: dict[Address, _Bench] = {}
        self._turn = asyncio.Lock()
        self._number = 0
        self._drawn: list[Candidate] = []  # who may check, in the order of the draw

    @property
    def span(self) -> Span:
        return self._route[self._index].span

    def draw(self) -> list[Candidate]:
        """The nodes that this lane is going to use: its own, and under "full" the first auditor."""
        shop = self._shop
        possible = auditors(shop.candidates, self._route, self._index, shop.avoid)
        usual = statistics.median(c.offer.price for c in possible) if possible else 0
        coins = [1.0 - _COINS.random() for _ in possible]
        drawn = draw(possible, coins, int(AUDITOR_PRICE_FACTOR * usual))
        after = owners(self._route[self._index + 1 : self._index + 2])
        self._drawn = strangers_first(drawn, self._route[self._index], after)
        return [self._route[self._index], *(self._drawn[:1] if shop.verdict.policy == "full" else [])]

    async def ask(
        self,
        kind: Kind,
        body: dict[str, Any],
        tensors: Mapping[str, np.ndarray],
        expected: dict[str, tuple[int, ...]],
        num_rows: int,
    ) -> dict[str, np.ndarray]:
        """The tensors that a request gives, of the expected names and shapes; checked as the policy says, and paid.

        num_rows: what it is charged as. A node that fails is asked once more, then another one of the span.
        """
        request = partial(self._exchange, kind=kind, body=body, tensors=tensors, expected=expected, num_rows=num_rows)
        async with self._turn:
            failed: set[Address] = set()
            while True:
                candidate = self._route[self._index]
                try:
                    answer = await request(candidate)
                    break
                except _OWN_FAULTS:
                    raise
                except TallystickError as error:
                    log.info("%s failed in a pass (%s)", candidate.node, error)
                    await self._dismiss(candidate.node)
                    if candidate.node in failed:
                        self._substitute(candidate, error)
                    failed.add(candidate.node)
            if self._is_checked():
                answer = await self._compare(request, candidate, answer, Positions(0, len(tensors["rows"])))
            for bench in self._benches.values():
                await self._pay(bench)
            return answer

    async def close(self) -> None:
        for node in list(self._benches):
            await self._dismiss(node)

    # -- one node

    async def _exchange(
        self,
        candidate: Candidate,
        *,
        kind: Kind,
        body: dict[str, Any],
        tensors: Mapping[str, np.ndarray],
        expected: dict[str, tuple[int, ...]],
        num_rows: int,
    ) -> dict[str, np.ndarray]:
        bench = self._benches.get(candidate.node) or await self._open(candidate)
        remote = bench.remote
        self._number += 1
        bench.expected = expected
        try:
            for name, values in tensors.items():
                for frame in tensor_frames(self._number, name, values):
                    await remote.send(frame)
            await remote.command(Frame(kind, {**body, "request": self._number}), PASS_TIMEOUT_S)
        except BadTensor:
            remote.rows_due += num_rows  # it has computed before it refused what came out
            await self._pay(bench)
            raise
        answer = bench.collector.whole(self._number)
        if set(answer) != set(expected):
            raise CorruptResult(f"{candidate.node} returned other tensors than were asked for", hop=candidate.node)
        remote.rows_due += num_rows
        return answer

    async def _open(self, candidate: Candidate) -> _Bench:
        shop = self._shop
        opening = Opening(
            nonce=fresh_nonce(),
            model=shop.manifest.model_id,
            num_layers=shop.manifest.layers,
            attempt=0,
            previous=ZERO_ADDRESS,
            next=ZERO_ADDRESS,
            max_length=shop.max_length,
            top_k=0,
        )
        remembered = shop.purse.remembers(candidate.node)
        if candidate.node not in shop.reserved:
            await shop.reserve([candidate])
        need = shop.reserved.pop(candidate.node)
        ask = partial(Remote.open, shop.peers, candidate, opening, shop.key, shop.domain, shop.purse)
        try:
            try:
                remote = await ask()
            except InsufficientFunds:
                if remembered:
                    raise
                await asyncio.to_thread(shop.purse.refill, candidate.node)
                remote = await ask()
        except BaseException:
            shop.purse.release([need])
            raise
        collector, changed = Collector(lambda *said: self._expect(candidate.node, *said)), asyncio.Event()
        bench = _Bench(remote, need, collector, {}, asyncio.create_task(self._settle(remote, changed)))
        self._benches[candidate.node] = bench
        remote.listen(Hearing(lambda *_: None, lambda _, frame: collector.take(frame), changed.set))
        if not remembered:
            await asyncio.to_thread(shop.purse.top_up, candidate.node)
        return bench

    def _expect(self, node: Address, name: str, dtype: DType, rows: int, width: int) -> None:
        if dtype is not DType.F32 or self._benches[node].expected.get(name) != (rows, width):
            raise CorruptResult(f"{node} returned a tensor that was not asked for", hop=node)

    async def _settle(self, remote: Remote, changed: asyncio.Event) -> None:
        """Send what a node waits for that interrupted sessions have left: no pass is due before its answer is there."""
        while remote.failure is None:
            await changed.wait()
            changed.clear()
            try:
                await remote.pay(remote.rows_paid, self._shop.purse)
            except TallystickError as error:
                log.info("a voucher did not reach %s (%s)", remote.node, error)

    async def _pay(self, bench: _Bench) -> None:
        remote, purse = bench.remote, self._shop.purse
        if remote.rows_due > bench.funded_to:
            bench.funded_to = remote.rows_due + BUDGET_ROWS // 2
            await asyncio.to_thread(purse.top_up, remote.node)
        paid, before = self._shop.verdict.paid, remote.rows_paid
        try:
            await remote.pay(remote.rows_due, purse)
        except TallystickError as error:
            log.info("a voucher did not reach %s (%s)", remote.node, error)
        more = self._shop.price(remote.candidate, remote.rows_paid - before)
        paid[remote.node] = Wei(paid.get(remote.node, Wei(0)) + more)

    async def _dismiss(self, node: Address) -> None:
        """End the session at a node, if one is open."""
        bench = self._benches.pop(node, None)
        if bench is None:
            return
        remote, shop = bench.remote, self._shop
        bench.settling.cancel()
        shop.purse.release([bench.need])
        if node not in shop.avoid:
            shop.purse.expect(node, self._shop.price(remote.candidate, remote.rows_due - remote.rows_paid))
        await remote.close()

    def _substitute(self, lost: Candidate, error: TallystickError) -> None:
        """Put another node of the span into the route. Raises NoRoute when there is none."""
        shop = self._shop
        shop.avoid.add(lost.node)
        spare = stand_ins(shop.candidates, lost, shop.avoid)
        if not spare:
            left = [c for c in shop.candidates if c.node not in shop.avoid]
            raise no_route(left, Span(0, shop.manifest.layers), shop.model)
        self._route[self._index] = spare[0]
        shop.verdict.replaced.append((lost.node, spare[0].node, error.code))
        self.draw()
        log.info("%s takes the place of %s (%s)", spare[0].node, lost.node, error)

    # -- checking

    def _is_checked(self) -> bool:
        policy = self._shop.verdict.policy
        return policy == "full" or (policy == "audit" and _COINS.random() < self._shop.audit_probability)

    async def _compare(
        self, request: Any, candidate: Candidate, answer: dict[str, np.ndarray], positions: Positions
    ) -> dict[str, np.ndarray]:
        """The same request at another node; where the two differ, a third one decides. Raises NoAuditor, CorruptResult.

        Who is overruled is not paid for the pass and not used again. Under "audit", nobody to ask is no failure.
        """
        shop, verdict = self._shop, self._shop.verdict
        second = await self._second_answer(request, {candidate.node})
        if second is None:
            if verdict.policy == "audit":
                return answer
            raise NoAuditor(
                f'nobody of another operator can recompute layers {self.span}; use verify="audit" or "off"',
                start=self.span.start,
                end=self.span.end,
            )
        auditor, other = second
        error = distance(answer, other)
        verdict.came_near(error, TOLERANCE)
        if error <= TOLERANCE:
            verdict.checks.append(Check(self.span, positions, candidate.node, auditor, True, "tolerance"))
            return answer
        third = await self._second_answer(request, {candidate.node, auditor})
        wrong = [
            node
            for node, tensors in ((candidate.node, answer), (auditor, other))
            if third is None or distance(tensors, third[1]) > TOLERANCE
        ]
        passed = None if len(wrong) != 1 else wrong[0] != candidate.node
        verdict.checks.append(Check(self.span, positions, candidate.node, auditor, passed, "tolerance"))
        for node in wrong:
            shop.avoid.add(node)
            await self._dismiss(node)
        if len(wrong) != 1 or third is None:
            raise CorruptResult(
                f"{candidate.node} and {auditor} computed different passes, and nobody can say who erred"
            )
        agreed = {candidate.node, auditor, third[0]} - set(wrong)
        verdict.accusations.append(Accusation(wrong[0], self.span, positions, tuple(sorted(agreed))))
        shop.ban(verdict)
        if wrong[0] == candidate.node:
            self._route[self._index] = next(c for c in shop.candidates if c.node == auditor)
            self.draw()
        return third[1]

    async def _second_answer(self, request: Any, done: set[Address]) -> tuple[Address, dict[str, np.ndarray]] | None:
        for auditor in self._drawn:
            if auditor.node in self._shop.avoid | done:
                continue
            try:
                return auditor.node, await request(auditor)
            except _OWN_FAULTS:
                raise
            except TallystickError as error:
                log.info("%s cannot check a pass (%s)", auditor.node, error)
                await self._dismiss(auditor.node)
        return None


def distance(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> float:
    """The largest difference of two answers, tensor by tensor, relative to the tensor's largest value."""
    worst = 0.0
    for name, values in one.items():
        scale = max(float(np.abs(values).max(initial=0.0)), float(np.abs(other[name]).max(initial=0.0)), 1e-30)
        worst = max(worst, float(np.abs(values - other[name]).max(initial=0.0)) / scale)
    return worst
