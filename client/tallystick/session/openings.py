"""Who takes part in a session: hops and auditors chosen, paid for in advance, opened, and others put in their place."""

from __future__ import annotations

import asyncio
import logging
import secrets
import statistics
import time
from collections.abc import Collection
from functools import partial
from typing import TYPE_CHECKING

from tallystick.attribution import failed
from tallystick.payments import Need
from tallystick.routing.candidates import Candidate
from tallystick.routing.choice import (
    auditors,
    draw,
    foreign_auditors,
    of_other_classes,
    owners,
    strangers_first,
)
from tallystick.routing.gaps import unserved
from tallystick.routing.route import successors
from tallystick.session.auditing import Audit
from tallystick.session.remote import Hearing, Opening, Remote, fresh_nonce
from tallystick_protocol.errors import (
    ChainError,
    ConfigError,
    InsufficientFunds,
    NoAuditor,
    NoRoute,
    Overloaded,
    Rejected,
    TallystickError,
)
from tallystick_protocol.types import ZERO_ADDRESS, Address

if TYPE_CHECKING:
    from tallystick.session.session import Session

log = logging.getLogger(__name__)

AUDITOR_PRICE_FACTOR = 4
LOOK_OUT_S = 0.5
_COINS = secrets.SystemRandom()


class Openings:
    """Opens the sessions at nodes of which one session of the client's consists."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._nonce = fresh_nonce()
        self._reserved: list[Need] = []
        self._give_up_at: dict[int, float] = {}
        self._missed_at: dict[int, int] = {}
        self._opened: set[Address] = set()
        self._entered: dict[int, set[Address]] = {}
        self._any_class: set[int] = set()

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

    def stand_ins(self, index: int, itself: bool = False) -> list[Candidate]:
        """The `successors` of hop `index`. itself: the same node, too, if it serves again."""
        session = self._session
        setting, hop = session.setting, session.route[index]
        taken = session.nodes - {hop.node} if itself else session.nodes
        avoid = {*session.unfit, *taken}
        found = successors(setting.candidates, session.route, index, setting.work, avoid)
        if found or index not in self._any_class:
            return found
        return of_other_classes(setting.candidates, hop, avoid, setting.work)

    def admit_other_classes(self, index: int) -> bool:
        """Let a node of another class take hop `index`'s place, where sketches are in use and there is one: its rows
        are other bits, so that everything is computed anew."""
        session = self._session
        avoid = {*session.unfit, *session.nodes}
        found = of_other_classes(session.setting.candidates, session.route[index], avoid)
        if session.sketching.is_on and session.setting.numeric_class is None and found:
            self._any_class.add(index)
        return index in self._any_class

    async def substitute(self, index: int, error: TallystickError) -> None:
        """Put another node of the span into the route; wait for one as long as the setting says. Raises NoRoute."""
        session = self._session
        lost = session.route[index]
        session.lost.add(lost.node)
        if lost.node not in session.avoid:  # else it has been put down to something already
            session.verdict.attributions.append(failed(error, lost.node, lost.span))
        if isinstance(error, Rejected):  # perhaps of an offer that it has replaced
            await self._look_again(lost)
        spare = self.stand_ins(index) or await self._await_node(index, error)
        session.route[index] = spare[0]
        if spare[0].offer.numeric_class != lost.offer.numeric_class:
            session.verdict.moved.append(lost.node)
            self._any_class.discard(index)
        session.verdict.replaced.append((lost.node, spare[0].node, error.code))
        session.setting.on_replaced()
        log.info("%s takes the place of %s (%s)", spare[0].node, lost.node, error)

    async def _await_node(self, index: int, error: TallystickError) -> list[Candidate]:
        """Nobody is left who could serve a hop's layers: say so, and look out for somebody. Raises NoRoute."""
        session = self._session
        log.warning("%s is lost (%s) and nobody can take its place", session.route[index].node, error)
        nobody = self.miss(index)
        while time.monotonic() < self._give_up_at[index]:
            await asyncio.sleep(LOOK_OUT_S)
            await self.look_out()
            if found := self.stand_ins(index, itself=True):
                return found
        raise nobody

    def miss(self, index: int) -> NoRoute:
        """Nobody serves a hop's layers at present: the user hears of it, once, and the time to wait begins. It begins
        anew only when the answer has grown meanwhile: who takes the place, and fails at once, ends no waiting."""
        session, span = self._session, self._session.route[index].span
        nobody = unserved(f"nobody else serves layers {span}; to do so", span, session.setting.work.model)
        if self._missed_at.get(index, len(session.ids)) < len(session.ids):
            self.filled(index)
        self._missed_at[index] = len(session.ids)
        if index not in self._give_up_at:
            self._give_up_at[index] = time.monotonic() + (session.setting.wait_s if session.is_open else 0.0)
            if session.is_open:
                session.setting.on_waiting(nobody)
        return nobody

    async def look_out(self) -> None:
        """Ask all nodes; those that answer are no longer lost."""
        await self._look_again()
        self._session.lost -= {c.node for c in self._session.setting.candidates}

    async def _look_again(self, refused: Candidate | None = None) -> None:
        """Ask all nodes for their offers anew. refused: whom nothing is held against if it offers something else."""
        session = self._session
        session.setting.candidates[:] = await session.setting.look_again()
        for found in session.setting.candidates:
            if refused is not None and found.node == refused.node and found.offer_digest != refused.offer_digest:
                session.lost.discard(found.node)

    def filled(self, index: int) -> None:
        """Somebody serves a hop's layers again."""
        self._give_up_at.pop(index, None)

    def opening(self, index: int, is_end: bool = False) -> Opening:
        """What is asked of hop `index`. is_end: it shall not push yet."""
        following = [] if is_end else self._session.route[index + 1 : index + 2]
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
            epoch=session.epoch,
            wire=session.setting.wire,
            sketches=session.sketching.is_on,
        )

    async def connect(self, candidate: Candidate, opening: Opening) -> Remote:
        setting = self._session.setting
        remembered = setting.purse.remembers(candidate.node)
        await self.reserve([candidate])
        if candidate.node in self._opened:  # what was set aside for it may be spent
            await asyncio.to_thread(setting.purse.top_up, candidate.node)
        self._opened.add(candidate.node)
        self._entered.setdefault(candidate.span.start, set()).update(owners([candidate]))
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

    async def reserve_with_standbys(self, candidates: list[Candidate]) -> None:
        """Set aside what these nodes may cost, and one for each hop that could take its place, if there is money for
        them: paying into a channel takes a block, and whoever is lost is not to be waited for so long."""
        spare = [c for index in range(len(self._session.route)) for c in self.stand_ins(index)[:1]]
        try:
            await self.reserve([*candidates, *spare])
        except (ConfigError, ChainError):
            await self.reserve(candidates)

    async def reserve(self, candidates: list[Candidate]) -> None:
        """Set aside what the whole session may cost at these nodes, replays included, in one transaction."""
        known = {need.node for need in self._reserved}
        fresh = {candidate.node: candidate for candidate in candidates if candidate.node not in known}
        needs = [self._session.setting.need(candidate) for candidate in fresh.values()]
        if needs:
            await asyncio.to_thread(self._session.setting.purse.reserve, needs)
            self._reserved += needs

    def draw_auditors(self, index: int, avoid: Collection[Address] = ()) -> list[Candidate]:
        """Who may check hop `index`, drawn at random by stake; not at many times the usual price. Its own class comes
        first, others only where sketches are in use, those that count before the rest; `strangers_first` in each."""
        drawn: list[Candidate] = []
        for possible in self._auditors(index, avoid):
            coins = [1.0 - _COINS.random() for _ in possible]
            usual = statistics.median(c.offer.price for c in possible) if possible else 0
            drawn += draw(possible, coins, int(AUDITOR_PRICE_FACTOR * usual))
        return self._in_order(index, drawn)

    def _in_order(self, index: int, drawn: list[Candidate]) -> list[Candidate]:
        """The next hop, all who were, and whoever checks it get what hop `index` answered; whoever checks the hop
        before would be shown what that one answered."""
        session, hop = self._session, self._session.route[index]
        beside = [audit.remote.candidate for audit in session.audits if audit.index == index - 1]
        acquainted = owners([*session.route[index + 1 : index + 2], *beside])
        return strangers_first(drawn, hop, acquainted | self._entered.get(hop.span.end, set()))

    def may_audit(self, candidate: Candidate, index: int) -> bool:
        """Whether a node may still check hop `index`."""
        return any(candidate in possible for possible in self._auditors(index))

    def _auditors(self, index: int, avoid: Collection[Address] = ()) -> list[list[Candidate]]:
        session = self._session
        asked = session.setting.candidates, session.route, index, {*session.unfit, *avoid}
        if not session.sketching.is_on:
            return [auditors(*asked)]
        foreign, counts = foreign_auditors(*asked), session.setting.proven.counts
        counted = [c for c in foreign if counts(c.offer.numeric_class)]
        return [auditors(*asked), counted, [c for c in foreign if c not in counted]]

    def peers(self, index: int) -> list[Candidate]:
        """Who of hop `index`'s own class may check it."""
        return self._auditors(index)[0]

    async def open_audit(self, index: int, drawn: list[Candidate] | None = None) -> None:
        """Open an auditor for hop `index`: a session of its own, fed by the hop before. Raises NoAuditor."""
        for candidate in self.draw_auditors(index) if drawn is None else self._in_order(index, drawn):
            if candidate.node in self._session.unfit or candidate.node == self._session.route[index].node:
                continue
            try:
                remote = await self.open_witness(candidate, index)
            except (ConfigError, ChainError):
                raise
            except TallystickError as error:
                log.info("%s cannot audit (%s)", candidate.node, error)
                self._session.lost.add(candidate.node)
                if isinstance(error, Overloaded):
                    self._session.busy.add(candidate.node)
                continue
            audit = Audit(self._session, index, remote)
            self._session.audits.append(audit)
            insist_s = partial(self._session.repair.insist_s, remote)
            remote.listen(
                Hearing(audit.on_receipt, audit.on_result, self._session.wake, audit.rejoin, insist_s=insist_s)
            )
            audit.start()
            return
        span = self._session.route[index].span
        others = '"audit" or "off"' if self._session.verdict.policy == "full" else '"off"'
        raise NoAuditor(
            f"nobody of another operator and the same class can recompute layers {span}; use verify={others}",
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
