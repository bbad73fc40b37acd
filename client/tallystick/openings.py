"""Who takes part in a session: hops and auditors chosen, paid for in advance, opened, and others put in their place."""

from __future__ import annotations

import asyncio
import logging
import secrets
import statistics
from collections.abc import Collection
from functools import partial
from typing import TYPE_CHECKING

from tallystick.auditing import Audit
from tallystick.payments import Need
from tallystick.remote import Opening, Remote, fresh_nonce
from tallystick.routing.candidates import Candidate
from tallystick.routing.choice import auditors, draw, stand_ins
from tallystick_protocol.errors import (
    ChainError,
    ConfigError,
    InsufficientFunds,
    NoAuditor,
    NoRoute,
    TallystickError,
)
from tallystick_protocol.types import ZERO_ADDRESS, Address

if TYPE_CHECKING:
    from tallystick.session import Session

log = logging.getLogger(__name__)

AUDITOR_PRICE_FACTOR = 4
_COINS = secrets.SystemRandom()


class Openings:
    """Opens the sessions at nodes of which one session of the client's consists."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._nonce = fresh_nonce()
        self._reserved: list[Need] = []

    async def open_hop(self, index: int) -> None:
        """Open hop `index` on the candidate that the route names, or on one that can stand in for it."""
        while True:
            candidate = self._session.route[index]
            try:
                remote = await self.connect(candidate, self.opening(index))
            except (ConfigError, ChainError):
                raise  # another node would not mend the purse
            except TallystickError as error:
                await self.substitute(index, error)
                if self._session.hops:  # the next hop is open already and expects rows from another one
                    await self._session.repair.tell_neighbour(0, {"previous": self._session.route[index].node})
                continue
            self._session.hops.insert(0, remote)
            self._session.attach(remote)
            return

    async def substitute(self, index: int, error: TallystickError) -> None:
        """Put another node of the span into the route. Raises NoRoute when there is none."""
        lost = self._session.route[index]
        self._session.avoid.add(lost.node)
        others = self._session.avoid | {c.node for c in self._session.route}
        spare = stand_ins(self._session.setting.candidates, lost, others)
        if not spare:
            log.warning("%s is lost (%s) and nobody can take its place", lost.node, error)
            raise NoRoute(
                f"nobody else serves layers {lost.span}; to do so: tallystick-node run --join --span"
                f" {lost.span.start}:{lost.span.end}",
                start=lost.span.start,
                end=lost.span.end,
            )
        self._session.route[index] = spare[0]
        self._session.verdict.replaced.append((lost.node, spare[0].node, error.code))
        self._session.setting.on_replaced()
        log.info("%s takes the place of %s (%s)", spare[0].node, lost.node, error)

    def opening(self, index: int) -> Opening:
        """What is asked of hop `index`."""
        following = self._session.route[index + 1 : index + 2]
        onward = following[0].node if following else ZERO_ADDRESS
        return self._opening(index, self._nonce, self._session.attempt, onward)

    def _opening(self, index: int, nonce: bytes, attempt: int, onward: Address) -> Opening:
        session = self._session
        return Opening(
            nonce=nonce,
            model=session.setting.manifest.model_id,
            num_layers=session.setting.manifest.layers,
            attempt=attempt,
            previous=session.route[index - 1].node if index else ZERO_ADDRESS,
            next=onward,
            max_length=session.setting.max_length,
            top_k=session.setting.top_k,
        )

    async def connect(self, candidate: Candidate, opening: Opening) -> Remote:
        setting = self._session.setting
        remembered = setting.purse.remembers(candidate.node)
        await self.reserve([candidate])
        ask = partial(Remote.open, setting.peers, candidate, opening, setting.key, setting.domain, setting.purse)
        try:
            remote = await ask()
        except InsufficientFunds:
            if remembered:
                raise
            await asyncio.to_thread(setting.purse.refill, candidate.node)
            remote = await ask()
        try:
            if not remembered:  # only now is it known what earlier sessions came to
                await asyncio.to_thread(setting.purse.top_up, candidate.node)
            if setting.sides.memory is not None:
                await remote.give_memory(setting.sides.memory)
        except BaseException:
            await remote.close()
            raise
        return remote

    async def reserve(self, candidates: list[Candidate]) -> None:
        """Set aside what the whole session may cost at these nodes, replays included, in one transaction."""
        known = {need.node for need in self._reserved}
        needs = [self._session.setting.need(candidate) for candidate in candidates if candidate.node not in known]
        if needs:
            await asyncio.to_thread(self._session.setting.purse.reserve, needs)
            self._reserved += needs

    def draw_auditors(self, index: int, avoid: Collection[Address] = ()) -> list[Candidate]:
        """Who may check hop `index`, drawn at random by stake; not at many times the usual price."""
        session = self._session
        possible = auditors(session.setting.candidates, session.route, index, {*session.avoid, *avoid})
        coins = [1.0 - _COINS.random() for _ in possible]
        usual = statistics.median(c.offer.price for c in possible) if possible else 0
        return draw(possible, coins, int(AUDITOR_PRICE_FACTOR * usual))

    async def open_audit(self, index: int, drawn: list[Candidate] | None = None) -> None:
        """Open an auditor for hop `index`: a session of its own, fed by the hop before. Raises NoAuditor."""
        for candidate in self.draw_auditors(index) if drawn is None else drawn:
            if candidate.node in self._session.avoid or candidate.node == self._session.route[index].node:
                continue
            try:
                remote = await self.open_witness(candidate, index)
            except (ConfigError, ChainError):
                raise
            except TallystickError as error:
                log.info("%s cannot audit (%s)", candidate.node, error)
                self._session.avoid.add(candidate.node)
                continue
            audit = Audit(self._session, index, remote)
            self._session.audits.append(audit)
            remote.listen(audit.on_receipt, lambda _remote, _frame: None, self._session.wake)
            audit.start()
            return
        span = self._session.route[index].span
        raise NoAuditor(
            f'nobody of another operator and the same class can recompute layers {span}; use verify="audit" or "off"',
            start=span.start,
            end=span.end,
        )

    async def open_witness(self, candidate: Candidate, index: int) -> Remote:
        """A session of its own at another node of hop `index`'s span, to recompute what that hop did."""
        return await self.connect(candidate, self._opening(index, fresh_nonce(), 0, ZERO_ADDRESS))

    def release(self) -> None:
        """The session has ended: what was set aside for it is free again."""
        self._session.setting.purse.release(self._reserved)
        self._reserved = []
