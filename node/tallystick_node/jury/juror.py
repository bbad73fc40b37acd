"""The juror: looks at the Court again and again, and does what is due for this node.

Every look begins from the chain and the ledger alone, so that a restart, a lost transaction or a reorganisation is no
case of its own.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tallystick_node.config import NodeConfig
from tallystick_node.jury.appealing import Appeals, Budget, Side, has_begun, is_worth_it, side_in
from tallystick_node.jury.duties import Duty, duty_in, is_late, turns
from tallystick_node.jury.holding import Holding
from tallystick_node.jury.judging import Finding, judge
from tallystick_node.jury.ledger import Ledger
from tallystick_protocol.chain.court import State, Verdict, Vote
from tallystick_protocol.chain.docket import Docket, Opening, Standing, is_fined, is_silent
from tallystick_protocol.chain.writes import Wallet
from tallystick_protocol.content.store import LocalStore
from tallystick_protocol.errors import (
    BadEvidence,
    BlockMissing,
    ChainError,
    ContentError,
    ManifestError,
    TallystickError,
    UnknownModel,
)
from tallystick_protocol.evidence.checking import Evidence, check_model, read_evidence
from tallystick_protocol.evidence.recomputing import Job, recompute
from tallystick_protocol.manifest import Manifest
from tallystick_protocol.transport.scopes import MayDial, scope_of
from tallystick_protocol.types import ZERO32, Address, Digest, ModelId, Wei

log = logging.getLogger(__name__)

FORGET_BLOCKS = 10_000
"""A case that a reorganisation has taken away and that does not come back."""

_MALFORMED = "unreadable"
_UNABLE = "unable"
_MISSING = "missing"
_WAITING = "waiting"
_PASSING = (_MISSING, _WAITING)
"""Problems that may pass: the evidence, or what it takes to judge it, is not to be had at present."""

RETRY_S = 600.0


@dataclass(frozen=True, slots=True)
class Costs:
    """What evidence may cost this node: positions, and seconds of recomputing. Bytes are the holding's business."""

    positions: int
    seconds: float


class Juror:
    """One node's service to the Court."""

    def __init__(
        self, config: NodeConfig, node: Address, wallet: Wallet, own: LocalStore, may_dial: MayDial, state: Path
    ) -> None:
        """wallet: of the node or a hot key of it. own: the node's pieces. may_dial: of addresses that accusers name."""
        self._config, self._node, self._wallet = config, node, wallet
        self._docket = Docket(wallet.chain)
        self._may_dial = may_dial
        self._folder = state / "jury"
        self.holding = Holding(self._folder, own, config.jury_bytes, config.jury_disk)
        self._ledger = Ledger(state / "jury.db")
        self._costs = Costs(config.jury_positions, config.jury_seconds)
        budget = Budget(Wei(config.appeal_max), Wei(config.jury_appeal_max))
        self._appeals = Appeals(self._docket, wallet, self._ledger, budget)
        self._judging: dict[Digest, asyncio.Task[Finding]] = {}
        self._one_at_a_time = asyncio.Lock()
        self._last: dict[Digest, Finding] = {}
        self._pauses: dict[Digest, tuple[float, float]] = {}
        self._due_since: dict[tuple[Digest, str], float] = {}

    def close(self) -> None:
        self._ledger.close()

    async def run(self) -> None:
        """Serve until cancelled."""
        try:
            self._tidy()
            while True:
                await self.look()
                await asyncio.sleep(self._config.jury_poll_s)
        finally:
            for task in self._judging.values():
                task.cancel()
            await asyncio.gather(*self._judging.values(), return_exceptions=True)

    async def look(self) -> None:
        """Enter new cases and do what is due in each; what fails is tried again at the next look."""
        try:
            await asyncio.to_thread(self._enter)
        except ChainError as error:
            log.warning("the Court cannot be read for now: %s", error)
            return
        for opening in self._ledger.open_cases():
            try:
                await self._attend(opening)
            except (ChainError, ContentError) as error:
                log.warning("case %s waits: %s", _short(opening.id), error)

    def _enter(self) -> None:
        """Read cases from the last block that is sure to stay, up to the newest one."""
        first = self._docket.chain.book.contracts["Court"].deploy_block
        sure, newest = self._docket.head(self._docket.chain.book.block_tag)[0], self._docket.head()[0]
        begin = max(first, self._ledger.seen + 1)
        found = self._docket.openings(begin, newest) if begin <= newest else []
        self._ledger.note(found, max(self._ledger.seen, min(sure, newest)))

    async def _attend(self, opening: Opening) -> None:
        look = await asyncio.to_thread(self._look_at, opening)
        if look is None:
            return
        standing, duty, now, seats, said = look
        sworn = self._ledger.ballot(opening.id, standing.round)
        vote = sworn.vote if sworn is not None else None
        side = side_in(opening, self._node, self._wallet.address, vote)
        if side in (Side.ACCUSED, Side.ACCUSER) and standing.state not in (State.RULED, State.ENFORCED):
            self._finding(opening)  # a party wants to know in time, while the evidence is to be had
        if duty is Duty.APPEAL:
            await self._appeal(opening, standing, side, vote, said, now)
        elif duty is Duty.VOTE:
            if seats:
                await self._vote(opening, standing, seats, now)
        elif duty is Duty.REVEAL:
            await asyncio.to_thread(self._reveal, opening, standing)
        elif duty is Duty.SETTLE:
            if await asyncio.to_thread(self._settle, opening, standing):
                await asyncio.to_thread(self._appeals.account, opening, standing.verdict)
                self._close(opening)
        elif duty is not Duty.WAIT:
            concerned = seats or side or self._ledger.rounds(opening.id) or duty is Duty.RETARGET
            if concerned and self._is_our_turn(opening, duty):
                await asyncio.to_thread(self._serve, opening, standing, duty)

    def _look_at(self, opening: Opening) -> tuple[Standing, Duty, int, list[int], Verdict] | None:
        """How a case stands, what is due, the time, this node's seats in its round and what the votes say."""
        docket = self._docket
        (block, now), standing = docket.head(), docket.standing(opening.id)
        if standing.state is State.NONE:
            if block > opening.block + FORGET_BLOCKS:
                self._appeals.account(opening, None)
                self._close(opening)
            return None
        said = docket.verdict_so_far(opening.id)
        duty = duty_in(standing, docket.times(), block, now, said)
        if standing.state is State.DRAWN:
            seed = docket.seed(opening.id, standing.round)
        elif duty is Duty.DRAW:
            seed = docket.future_seed(opening.id, standing.round, standing.seed_block)
        else:
            return standing, duty, now, [], said
        return standing, duty, now, docket.seats(opening.id, standing, standing.round, self._node, seed), said

    def _is_our_turn(self, opening: Opening, duty: Duty) -> bool:
        """Whether this node has left the others their turns."""
        since = self._due_since.setdefault((opening.id, duty.value), time.monotonic())
        wait_s = 2 * self._config.jury_poll_s * turns(opening.id, self._node, [duty.value.encode()])
        return time.monotonic() - since >= wait_s

    # -- voting

    async def _vote(self, opening: Opening, standing: Standing, seats: Sequence[int], now: int) -> None:
        sworn = self._ledger.ballot(opening.id, standing.round)
        if sworn is None:
            finding = self._finding(opening)
            if finding is None or finding.problem in _PASSING:
                if not is_late(standing, self._docket.times(), now):
                    return
                finding = finding or Finding(_UNABLE, "not recomputed in time")
                if finding.problem == _MISSING:
                    finding = Finding(_MALFORMED, finding.why)
            vote = judge(finding)
            roots = ZERO32 if finding.problem else Digest(bytes.fromhex(finding.root))
            sworn = self._ledger.swear(opening.id, standing.round, seats, vote, roots)
            log.info(
                "case %s, round %d: %s, %d seats (error %s; %s)", _short(opening.id), standing.round, vote.name.lower(),
                len(seats), finding.error, finding.why or ("same class" if finding.same_class else "another class"),
            )  # fmt: skip
        if not (await asyncio.to_thread(self._docket.ballot, opening.id, standing.round, self._node)).seats:
            call = self._court.commit(opening.id, list(sworn.seats), sworn.commitment(opening.id, self._node))
            await asyncio.to_thread(self._wallet.send, "committing to a vote", call)
            log.info("case %s, round %d: committed", _short(opening.id), standing.round)

    def _finding(self, opening: Opening) -> Finding | None:
        """What is known; begins to find out what is not."""
        if (known := self._ledger.finding(opening.id)) is not None:
            return known
        task = self._judging.get(opening.id)
        if task is None:
            self._judging[opening.id] = asyncio.create_task(self._examine(opening))
            return None
        if not task.done():
            return self._last.get(opening.id)
        found = task.result()
        if found.problem in _PASSING:
            self._try_again(opening, found)
        elif found.problem != _UNABLE:  # which other settings may change
            self._ledger.find(opening.id, found)
        return found

    def _try_again(self, opening: Opening, found: Finding) -> None:
        """After a pause that doubles each time."""
        pause_s, since = self._pauses.get(opening.id, (self._config.jury_poll_s, time.monotonic()))
        self._last[opening.id] = found
        if time.monotonic() - since < pause_s:
            self._pauses[opening.id] = pause_s, since
            return
        self._pauses[opening.id] = min(2 * pause_s, RETRY_S), time.monotonic()
        self._judging[opening.id] = asyncio.create_task(self._examine(opening))

    async def _examine(self, opening: Opening) -> Finding:
        """Fetch, check, recompute; what fails is a finding, too. One case at a time."""
        async with self._one_at_a_time:
            try:
                return await self._recompute(opening)
            except BadEvidence as error:
                return Finding(_MALFORMED, error.message)
            except (BlockMissing, TimeoutError) as error:
                return Finding(_MISSING, f"not to be had: {error}")
            except (ChainError, ContentError) as error:
                return Finding(_WAITING, error.message)
            except TallystickError as error:
                return Finding(_UNABLE, error.message)
            except OSError as error:
                return Finding(_UNABLE, str(error))

    async def _recompute(self, opening: Opening) -> Finding:
        chain = self._docket.chain
        sources = await asyncio.to_thread(self._sources, opening)
        path = await self.holding.evidence(opening.evidence, sources)
        evidence = await asyncio.to_thread(self._read, path, opening)
        if evidence.bundle.num_positions > self._costs.positions:
            return Finding(_UNABLE, f"more than the {self._costs.positions} positions of jury_positions")
        model = ModelId(evidence.accused.model)
        try:
            record = await asyncio.to_thread(chain.model, model)
        except UnknownModel as error:
            raise BadEvidence(error.message) from None
        serving = await asyncio.to_thread(chain.serving, model)
        sources += [source for one in serving for source in one.contact.sources if one.record.node != self._node]
        try:
            described = await self.holding.manifest(record, sources)
            manifest = Manifest.from_bytes(described.read_bytes())
            if manifest.weights != record.weights or manifest.layers != record.layers:
                raise ManifestError("the manifest is not of the pieces that the chain records")
            check_model(evidence, manifest)
            pieces = await self.holding.pieces(manifest, evidence.accused.span, sources)
        except (BlockMissing, TimeoutError) as error:
            return Finding(_WAITING, f"pieces are not to be had: {error}")
        job = Job(
            str(path), opening.receipt.hex(), str(described), pieces, chain.book.chain_id,
            chain.book.staking_domain.contract, str(self._config.class_cache.expanduser()),
            max(1, self._config.num_threads // 2), self._config.memory,
        )  # fmt: skip
        return await self._in_a_process(job)

    def _read(self, path: Path, opening: Opening) -> Evidence:
        """Raises BadEvidence unless it is about the accused receipt, and every receipt in it is the accused's."""
        chain = self._docket.chain
        evidence = read_evidence(chain.book.staking_domain, path.read_bytes(), opening.receipt)
        if any(chain.node_of(signer) != opening.accused for signer in evidence.signers):
            raise BadEvidence("a receipt in it is not signed by a key of the accused")
        return evidence

    async def _in_a_process(self, job: Job) -> Finding:
        try:
            told, status = await recompute(job, self._folder, self._costs.seconds)
        except TimeoutError:
            return Finding(_UNABLE, f"recomputing took more than the {self._costs.seconds:g} s of jury_seconds")
        try:
            return Finding.from_json(told)
        except (ValueError, TypeError):
            return Finding(_UNABLE, f"recomputing ended with status {status}")

    def _sources(self, opening: Opening) -> list[str]:
        """Who may have the evidence: whom the accuser names, itself if it is a node, who has voted, the settings'."""
        docket = self._docket
        named = [source for source in docket.sources(opening) if self._is_dialled(source)]
        found = []
        for node in (opening.accuser, *docket.jurors(opening.id)):
            contact = docket.chain.locate(node) if node != self._node else None
            found += contact.sources if contact is not None else []
        return list(dict.fromkeys([*named, *found, *self._config.sources]))

    def _is_dialled(self, source: str) -> bool:
        """An accuser's address is dialled only if it is a number, of a kind that this node dials anyhow."""
        host = source.rpartition("@")[2] if "@" in source else source.partition("://")[2]
        ip = host.partition("/")[0].rpartition(":")[0].strip("[]")
        return scope_of(ip) != "none" and self._may_dial(ip)

    # -- after the vote

    async def _appeal(
        self, opening: Opening, standing: Standing, side: Side | None, vote: Vote | None, said: Verdict, now: int
    ) -> None:
        """Appeal where this node knows better than the round."""
        if side is None or not has_begun(side, standing, self._docket.times(), now):
            return
        finding = self._ledger.finding(opening.id)
        if finding is None or not is_worth_it(side, finding, vote, said):
            return
        if side is not Side.JUROR or self._is_our_turn(opening, Duty.APPEAL):
            await asyncio.to_thread(self._appeals.appeal, opening, standing, side)

    def _reveal(self, opening: Opening, standing: Standing) -> None:
        sworn = self._ledger.ballot(opening.id, standing.round)
        ballot = self._docket.ballot(opening.id, standing.round, self._node)
        if sworn is None or not ballot.seats or ballot.vote:
            return
        call = self._court.reveal(opening.id, self._node, int(sworn.vote), sworn.roots, sworn.salt)
        self._wallet.send("revealing a vote", call)
        log.info("case %s, round %d: revealed %s", _short(opening.id), standing.round, sworn.vote.name.lower())

    def _serve(self, opening: Opening, standing: Standing, duty: Duty) -> None:
        """What anybody may do, and somebody has to."""
        calls: dict[Duty, Callable[[], Any]] = {
            Duty.DRAW: lambda: self._court.draw(opening.id, self._docket.header(standing.seed_block)),
            Duty.RETARGET: lambda: self._court.retarget(opening.id),
            Duty.REDRAW: lambda: self._court.redraw(opening.id),
            Duty.RULE: lambda: self._court.rule(opening.receipt, opening.evidence),
            Duty.ENFORCE: lambda: self._court.enforce(opening.id),
        }
        self._wallet.send(f"{duty.value} in a case", calls[duty]())
        log.info("case %s, round %d: %s done", _short(opening.id), standing.round, duty.value)
        self._due_since.pop((opening.id, duty.value), None)

    def _settle(self, opening: Opening, standing: Standing) -> bool:
        """Settle what is this node's; report silence and settle fined votes in turn. True when nothing is left."""
        docket, own = self._docket, self._ledger.rounds(opening.id)
        for round_ in own:
            ballot = docket.ballot(opening.id, round_, self._node)
            if ballot.vote and not ballot.settled:
                self._wallet.send("settling a ballot", self._court.settle(opening.id, round_, self._node))
                log.info("case %s, round %d: settled", _short(opening.id), round_)
        if not own:
            return True
        if not self._is_our_turn(opening, Duty.SETTLE):
            return False
        for round_ in range(standing.round + 1):
            self._fine_others(opening, standing, round_)
        return True

    def _fine_others(self, opening: Opening, standing: Standing, round_: int) -> None:
        docket = self._docket
        seed = docket.seed(opening.id, round_)
        if seed == ZERO32:
            return
        for node in docket.staked_nodes():
            if node == self._node:
                continue
            ballot = docket.ballot(opening.id, round_, node)
            if is_fined(ballot.vote, standing.verdict) and not ballot.settled:
                self._wallet.send("settling a fined ballot", self._court.settle(opening.id, round_, node))
            seats = docket.seats(opening.id, standing, round_, node, seed)
            if is_silent(len(seats), ballot):
                self._wallet.send("reporting silence", self._court.report(opening.id, round_, node, seats))
                log.info("case %s, round %d: reported the silence of %s", _short(opening.id), round_, node)

    def _close(self, opening: Opening) -> None:
        self._ledger.close_case(opening.id)
        self._judging.pop(opening.id, None)
        if all(task.done() for task in self._judging.values()):
            self._tidy()

    def _tidy(self) -> None:
        try:
            self.holding.tidy([one.evidence for one in self._ledger.open_cases()])
        except ContentError as error:
            log.warning("what was fetched for cases is not dropped: %s", error)

    @property
    def _court(self) -> Any:
        return self._docket.chain.court.functions


def _short(case: Digest) -> str:
    return "0x" + case.hex()[:12]
