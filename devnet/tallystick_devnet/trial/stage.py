"""The trial's network, and the hands that move chain time and kill processes while a case runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from web3.types import RPCEndpoint

from tallystick_devnet.localnet import LocalNet, LocalNode
from tallystick_devnet.processes import ProcessFailed
from tallystick_node.jury.judging import Finding
from tallystick_node.jury.ledger import Ledger
from tallystick_protocol.chain.court import State, Verdict
from tallystick_protocol.chain.docket import Ballot, Docket, Standing
from tallystick_protocol.types import Digest, ModelId

PATIENCE_S = 300.0
JUROR_SETTINGS = ("--jury-poll-s", "0.5")


@dataclass(slots=True)
class Stage:
    """lazy: the node whose juror is off. commands: with which a node is started, where it is not the usual one."""

    net: LocalNet
    model: ModelId
    docket: Docket
    say: Callable[[str], None]
    lazy: str = ""
    killed: list[str] = field(default_factory=list)
    commands: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def nodes(self) -> dict[str, LocalNode]:
        return {node.name: node for node in self.net.nodes}

    # -- time

    def wait(self, seconds: int) -> None:
        """Chain time goes on by so many seconds."""
        self._rpc("evm_increaseTime", seconds)
        self._rpc("evm_mine")

    def mine(self, blocks: int) -> None:
        self._rpc("anvil_mine", hex(blocks))

    def until(self, what: str, done: Callable[[], bool]) -> None:
        """Raises ProcessFailed when nobody does it in time."""
        deadline = time.monotonic() + PATIENCE_S
        while not done():
            if time.monotonic() > deadline:
                tails = "; ".join(f"{node.name}: {node.process.tail(3)}" for node in self.net.nodes)
                raise ProcessFailed(f"{what}: nobody did within {PATIENCE_S:g} s; {tails}")
            time.sleep(0.2)

    def _rpc(self, method: str, *parameters: object) -> None:
        provider = self.docket.chain.web3.provider
        self.docket.chain.guard(method, lambda: provider.make_request(RPCEndpoint(method), list(parameters)))

    # -- processes

    def kill(self, name: str, settings: Sequence[str] = JUROR_SETTINGS) -> None:
        """SIGKILL, and a new process on what is left of it."""
        node = self.nodes[name]
        node.process.kill()
        self.killed.append(name)
        if name in self.commands:
            self.net.restart(node, self.model, self.commands[name], settings)
        else:
            self.net.restart(node, self.model, settings=settings)
        node.wait()

    # -- a case

    def standing(self, case: Digest) -> Standing:
        return self.docket.standing(case)

    def seats(self, case: Digest, round_: int) -> dict[str, int]:
        """Of each node that has any in a round that was drawn."""
        standing, seed = self.standing(case), self.docket.seed(case, round_)
        return self._seats(case, standing, round_, seed)

    def _seats(self, case: Digest, standing: Standing, round_: int, seed: Digest) -> dict[str, int]:
        found = {
            name: len(self.docket.seats(case, standing, round_, node.address, seed))
            for name, node in self.nodes.items()
        }
        return {name: count for name, count in found.items() if count}

    def ballots(self, case: Digest, round_: int) -> dict[str, Ballot]:
        found = {name: self.docket.ballot(case, round_, node.address) for name, node in self.nodes.items()}
        return {name: ballot for name, ballot in found.items() if ballot.seats or ballot.fined}

    def choose_lazy(self, case: Digest, but: set[str]) -> None:
        """Mine up to the seed block while everybody is stopped; who has the fewest seats, and some, is the lazy one."""
        for node in self.net.nodes:
            node.process.hang()
        standing = self.standing(case)
        head, _ = self.docket.head()
        self.mine(max(standing.seed_block + 1 - head, 1))
        seed = self.docket.future_seed(case, standing.round, standing.seed_block)
        seats = self._seats(case, standing, standing.round, seed)
        self.lazy = min((name for name in seats if name not in but), key=lambda name: (seats[name], name))
        lazy = self.nodes[self.lazy]
        lazy.process.kill()
        for node in self.net.nodes:
            if node is not lazy:
                node.process.go_on()
        self.net.restart(lazy, self.model, settings=[*JUROR_SETTINGS, "--jury", "off"])
        lazy.wait()
        self.say(
            f"  {self.lazy}, with {seats[self.lazy]} of {sum(seats.values())} seats, is killed and comes back lazy"
        )

    def try_case(self, case: Digest, kills: int) -> None:
        """Move time on whenever everybody has done what is due, until every ballot is settled.

        kills: so many jurors are killed, one after its commitment and so on, and started again.
        """
        while self.standing(case).state in (State.OPEN, State.DRAWN):
            standing = self.standing(case)
            if standing.state is State.OPEN:
                self.mine(max(standing.seed_block + 1 - self.docket.head()[0], 1))
                self.until("drawing seats", lambda: self.standing(case).state is State.DRAWN)
            kills -= self._try_round(case, kills)
        self.until("enforcing", lambda: self.standing(case).state is State.ENFORCED)
        round_ = self.standing(case).round
        for drawn in range(round_ + 1):
            self.until("settling", lambda drawn=drawn: self._is_settled(case, drawn))  # type: ignore[misc]

    def _try_round(self, case: Digest, kills: int) -> int:
        times, round_ = self.docket.times(), self.standing(case).round
        seats = self.seats(case, round_)
        jurors = sorted(name for name in seats if name != self.lazy)
        self.say(f"  round {round_}: {sum(seats.values())} seats, {seats}")
        self.until("committing", lambda: all(self._ballot(case, round_, name).seats for name in jurors))
        victims = jurors[:kills]
        for name in victims:
            self.say(f"  {name} has committed, is killed and starts again")
            self.kill(name)
        self._to(self.standing(case).commit_end)
        self.until("revealing", lambda: all(self._ballot(case, round_, name).vote for name in jurors))
        said = self.docket.verdict_so_far(case)
        self.say(f"  round {round_}: the votes say {said.name.lower()}")
        end = self.standing(case).commit_end + times.reveal
        self._to(end if said is Verdict.MISSED else end + times.appeal)
        self.until("ruling", lambda: self.standing(case).state is not State.DRAWN)
        return len(victims)

    def _ballot(self, case: Digest, round_: int, name: str) -> Ballot:
        return self.docket.ballot(case, round_, self.nodes[name].address)

    def _to(self, moment: int) -> None:
        self.wait(max(moment - self.docket.head()[1], 1))

    def _is_settled(self, case: Digest, round_: int) -> bool:
        seats = self.seats(case, round_)
        ballots = {name: self.docket.ballot(case, round_, self.nodes[name].address) for name in seats}
        return all(ballot.settled or ballot.fined == seats[name] for name, ballot in ballots.items())

    def finding(self, name: str, case: Digest) -> Finding | None:
        """What a node's juror has in its book."""
        path = self.nodes[name].folder / "state" / "jury.db"
        if not path.exists():
            return None
        ledger = Ledger(path)
        try:
            return ledger.finding(case)
        finally:
            ledger.close()
