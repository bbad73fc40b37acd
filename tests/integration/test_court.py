"""A whole case on a chain of its own: opened, drawn from a real header, voted, appealed, ruled, paid to the wei."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from web3.types import RPCEndpoint

from tallystick_devnet.localchain import LocalChain, repository, rich_key, start_chain
from tallystick_protocol.chain.book import load_book
from tallystick_protocol.chain.court import State, Verdict, Vote, case_id, commitment, header_rlp, winning_seats
from tallystick_protocol.chain.reads import Chain, abi
from tallystick_protocol.chain.writes import Wallet
from tallystick_protocol.errors import ChainError
from tallystick_protocol.receipts import Receipt
from tallystick_protocol.signing import Key, digest, keccak
from tallystick_protocol.types import Digest, ModelId, Wei
from tallystick_protocol.vouchers import Voucher

THOUSAND = 1000 * 10**18
EVIDENCE = Digest(keccak(b"evidence"))
ROOTS = Digest(keccak(b"what a juror computed"))
JURORS = 5


def key(number: int) -> Key:
    return Key(number.to_bytes(32, "big"))


@dataclass(slots=True)
class Bench:
    """The chain, one accused node and five jurors of 24 units each, in the epoch after they staked."""

    local: LocalChain
    chain: Chain
    model: ModelId = field(init=False)
    hot: Key = field(default_factory=lambda: key(900))
    accused: Wallet = field(init=False)
    accuser: Wallet = field(init=False)
    stranger: Wallet = field(init=False)
    jurors: list[Wallet] = field(init=False)

    def __post_init__(self) -> None:
        self.rpc("evm_setIntervalMining", 0)
        self.rpc("evm_setAutomine", True)
        self.accused, self.accuser, self.stranger = (Wallet(self.chain, key(n)) for n in (901, 902, 903))
        self.jurors = [Wallet(self.chain, key(910 + i)) for i in range(JURORS)]
        everybody = [self.accused, self.accuser, self.stranger, *self.jurors]
        self.local.give(*(wallet.address for wallet in everybody), tokens=Wei(20 * THOUSAND))
        manifest, weights = Digest(keccak(b"manifest")), Digest(keccak(b"weights"))
        self.accuser.add_model(manifest, weights, 4)
        self.model = ModelId(bytes(self.call(self.chain.models.functions.add(manifest, weights, 5))))
        self.accuser.add_model(manifest, weights, 5)
        for wallet, thousands in [(self.accused, 10), *((juror, 12) for juror in self.jurors)]:
            wallet.stake(wallet.address, Wei(thousands * THOUSAND))
            serve = self.chain.staking.functions.serve(self.model, 0, 5, 1, b"", wallet.address)
            wallet.send("serving", serve)
        self.accused.bind(self.hot)
        for wallet in (self.accuser, self.accused):
            wallet.send("approving", self.chain.token.functions.approve(self.chain.court.address, 10 * THOUSAND))
        self.wait(86_400)

    def rpc(self, method: str, *params: Any) -> Any:
        answer = self.chain.web3.provider.make_request(RPCEndpoint(method), list(params))
        assert "error" not in answer, answer
        return answer["result"]

    def call(self, function: Any) -> Any:
        return function.call({"from": self.accuser.address})

    def wait(self, seconds: int) -> None:
        self.rpc("evm_increaseTime", seconds)
        self.rpc("evm_mine")

    def wealth(self) -> dict[str, int]:
        """Tokens of everybody, stakes included; they add up to the supply."""
        chain = self.chain
        named = {"accused": self.accused.address, "accuser": self.accuser.address, "stranger": self.stranger.address}
        named |= {f"juror {i}": juror.address for i, juror in enumerate(self.jurors)}
        found = {name: chain.balance(address) + chain.node(address).active for name, address in named.items()}
        assert all(chain.node(address).leaving == 0 for address in named.values())
        others = (chain.court.address, chain.escrow.address, chain.emissions.address, rich_key().address)
        found["court"] = chain.balance(others[0])
        found["rest"] = sum(chain.balance(address) for address in others[1:])
        assert sum(found.values()) == chain.token.functions.totalSupply().call()
        return found


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    local = start_chain(tmp_path_factory.mktemp("court"))
    try:
        yield Bench(local, local.chain())
    finally:
        local.process.stop()


@pytest.fixture(autouse=True)
def undone(bench: Bench) -> Iterator[None]:
    """Every test begins on the same chain."""
    snapshot = bench.rpc("evm_snapshot")
    yield
    bench.rpc("evm_revert", snapshot)


def receipt(bench: Bench, session: bytes = b"session") -> Receipt:
    zero = bytes(32)
    return Receipt(
        node=bench.accused.address, model=bench.model, numeric_class=keccak(b"class"), session=keccak(session),
        attempt=0, start=0, end=5, first=0, last=32, revision=0, context=keccak(b"context"), input=keccak(b"input"),
        output=keccak(b"output"), previous=zero, challenge=zero, sketches=zero, at=bench.chain.now(),
    )  # fmt: skip


def words(value: Receipt) -> tuple[Any, ...]:
    return tuple(getattr(value, name) for name in Receipt.__slots__)


def open_case(bench: Bench, claim: Receipt) -> Digest:
    signature = bench.hot.sign_struct(bench.chain.book.staking_domain, claim)
    call = bench.chain.court.functions.open(words(claim), signature, EVIDENCE)
    bench.accuser.send("accusing", call)
    return case_id(digest(bench.chain.book.staking_domain, claim), EVIDENCE)


def case(bench: Bench, id_: Digest) -> dict[str, Any]:
    names = next(entry for entry in bench.chain.court.abi if entry.get("name") == "cases")["outputs"][0]["components"]
    found = bench.chain.court.functions.cases(id_).call()
    return dict(zip((member["name"] for member in names), found, strict=True))


def draw(bench: Bench, id_: Digest) -> list[list[int]]:
    """Draws with the seed block's own header; each juror's seats."""
    state = case(bench, id_)
    bench.rpc("anvil_mine", hex(state["seedBlock"] + 1 - bench.chain.web3.eth.block_number))
    header = header_rlp(bench.chain.web3.eth.get_block(state["seedBlock"]))
    bench.stranger.send("drawing", bench.chain.court.functions.draw(id_, header))
    seed = Digest(bytes(bench.chain.court.functions.seeds(id_, state["round"]).call()))
    expected = bench.chain.court.functions.seatsOf(state["round"]).call()
    seats = [winning_seats(seed, juror.address, 24, state["units"], expected) for juror in bench.jurors]
    for juror, own in zip(bench.jurors, seats, strict=True):
        wins = bench.chain.court.functions.wins
        assert own == [unit for unit in range(25) if wins(id_, state["round"], juror.address, unit).call()]
    return seats


def vote(bench: Bench, id_: Digest, seats: list[list[int]], votes: list[Vote | None]) -> None:
    """Everybody commits; who votes None does not reveal. Then the reveals' time is over."""
    functions, round_ = bench.chain.court.functions, case(bench, id_)["round"]
    for number, juror in enumerate(bench.jurors):
        if seats[number]:
            made = commitment(id_, round_, juror.address, votes[number] or Vote.CLEAR, ROOTS, keccak(b"salt"))
            juror.send("committing", functions.commit(id_, seats[number], made))
    bench.wait(43_200)
    for number, juror in enumerate(bench.jurors):
        choice = votes[number]
        if seats[number] and choice is not None:
            reveal = functions.reveal(id_, juror.address, int(choice), ROOTS, keccak(b"salt"))
            juror.send("revealing", reveal)
    bench.wait(43_200)


def test_a_case_is_appealed_ruled_and_paid_to_the_wei(bench: Bench) -> None:
    court, before = bench.chain.court.functions, bench.wealth()
    supply = bench.chain.token.functions.totalSupply().call()
    claim = receipt(bench)
    assert bytes(court.digestOf(words(claim)).call()) == digest(bench.chain.book.staking_domain, claim)
    id_ = open_case(bench, claim)
    bond = 10 * THOUSAND // 100 // 2
    assert bench.wealth()["court"] == bond
    assert (case(bench, id_)["state"], case(bench, id_)["units"]) == (State.OPEN, 120)

    first = draw(bench, id_)
    silent = max(range(JURORS), key=lambda number: -len(first[number]) if first[number] else -100)
    votes: list[Vote | None] = [Vote.GUILTY] * JURORS
    votes[silent] = None
    vote(bench, id_, first, votes)
    if court.standing(id_).call() == Verdict.MISSED:
        bench.stranger.send("drawing anew", court.redraw(id_))
        appealed = 0
    else:
        bench.accused.send("appealing", court.appeal(id_))
        appealed = 2 * bond
    second = draw(bench, id_)
    vote(bench, id_, second, [Vote.GUILTY] * JURORS)

    # No exit before the ruling.
    with pytest.raises(ChainError, match=r"Held\(holds=1\)"):
        bench.accused.send("leaving", bench.chain.staking.functions.withdraw())
    receipt_digest = digest(bench.chain.book.staking_domain, claim)
    with pytest.raises(ChainError, match="OutOfTime"):
        bench.stranger.send("ruling", court.rule(receipt_digest, EVIDENCE))
    bench.wait(86_400)
    bench.stranger.send("ruling", court.rule(receipt_digest, EVIDENCE))
    assert (case(bench, id_)["state"], case(bench, id_)["verdict"]) == (State.RULED, Verdict.GUILTY)
    assert case(bench, id_)["slashBps"] == 100
    # Nor before the ruling is enforced.
    with pytest.raises(ChainError, match=r"Held\(holds=1\)"):
        bench.accused.send("leaving", bench.chain.staking.functions.withdraw())
    bench.stranger.send("enforcing", court.enforce(id_))
    assert case(bench, id_)["state"] == State.ENFORCED

    # Silence: what was committed and not shown, in the first round.
    bench.stranger.send("reporting", court.report(id_, 0, bench.jurors[silent].address, first[silent]))
    for round_, seats in enumerate((first, second)):
        for number, juror in enumerate(bench.jurors):
            if seats[number] and not (round_ == 0 and number == silent):
                bench.stranger.send("settling", court.settle(id_, round_, juror.address))

    slashed = 10 * THOUSAND // 100
    agreeing = sum(map(len, first)) - len(first[silent]) + sum(map(len, second))
    pot = slashed // 4 + appealed
    share, fine = pot // agreeing, THOUSAND // 2000
    after = bench.wealth()
    gained = {name: after[name] - before[name] for name in after}
    expected = {"accused": -slashed - appealed, "accuser": slashed // 4, "court": 0, "rest": 0}
    expected["stranger"] = 0  # fines burn
    for number in range(JURORS):
        own = len(second[number]) + (0 if number == silent else len(first[number]))
        expected[f"juror {number}"] = own * share - (len(first[silent]) * fine if number == silent else 0)
    assert gained == expected
    burned = slashed // 2 + pot - share * agreeing + len(first[silent]) * fine
    assert supply - bench.chain.token.functions.totalSupply().call() == burned
    bench.accused.send("leaving", bench.chain.staking.functions.withdraw())


def test_a_cheaters_own_case_with_a_dead_cid_closes_nothing(bench: Bench) -> None:
    claim, court = receipt(bench), bench.chain.court.functions
    id_ = open_case(bench, claim)
    seats = draw(bench, id_)
    vote(bench, id_, seats, [Vote.UNREADABLE] * JURORS)
    if court.standing(id_).call() == Verdict.MISSED:
        bench.stranger.send("drawing anew", court.redraw(id_))
        seats = draw(bench, id_)
        vote(bench, id_, seats, [Vote.UNREADABLE] * JURORS)
    bench.wait(86_400)
    receipt_digest = digest(bench.chain.book.staking_domain, claim)
    bench.stranger.send("ruling", court.rule(receipt_digest, EVIDENCE))
    bench.stranger.send("enforcing", court.enforce(id_))
    assert case(bench, id_)["verdict"] == Verdict.UNREADABLE
    signature = bench.hot.sign_struct(bench.chain.book.staking_domain, claim)
    again = court.open(words(claim), signature, Digest(keccak(b"readable evidence")))
    assert bench.wealth()["court"] == 0  # half of the bond burned
    bench.accuser.send("accusing", again)
    assert bench.wealth()["court"] == 2 * (10 * THOUSAND // 100 // 2)
    assert bench.chain.staking.functions.nodes(bench.accused.address).call()[3] == 1


def test_a_wrong_header_draws_nothing(bench: Bench) -> None:
    id_ = open_case(bench, receipt(bench))
    number = case(bench, id_)["seedBlock"]
    bench.rpc("anvil_mine", hex(number + 2 - bench.chain.web3.eth.block_number))
    other = header_rlp(bench.chain.web3.eth.get_block(number + 1))
    with pytest.raises(ChainError, match="NotTheBlock"):
        bench.stranger.send("drawing", bench.chain.court.functions.draw(id_, other))


def deploy(bench: Bench, out: Path, scale: str, *more: str) -> subprocess.CompletedProcess[str]:
    root = repository()
    node = shutil.which("node", path=f"{root}/.venv/bin:{os.environ['PATH']}")
    assert node is not None, "Node.js is not installed; run scripts/install"
    command = [node, root / "scripts" / "deploy.js", "--rpc", bench.local.rpc, "--out", out, "--scale", scale, *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_test_networks_trials_are_short(bench: Bench, tmp_path: Path) -> None:
    done = deploy(bench, tmp_path / "book.json", "100")
    assert done.returncode == 0, done.stderr
    chain = Chain(bench.local.rpc, load_book(tmp_path / "book.json"))
    chain.check()
    court, staking = chain.court.functions, chain.staking.functions
    assert [court.COMMIT().call(), court.APPEAL().call(), court.EVIDENCE().call()] == [432, 864, 6048]
    assert [court.LOOKAHEAD().call(), court.HEADERS().call()] == [1, 8191]
    assert staking.SLASHER().call() == chain.court.address
    assert chain.token.functions.MINTER().call() == chain.emissions.address
    assert staking.UNBONDING().call() >= 6048 + 6 * 432 + 2 * 864
    assert [staking.EPOCH().call(), staking.STALE().call()] == [864, 1728]


def test_who_proposes_is_named_at_the_deployment(bench: Bench, tmp_path: Path) -> None:
    done = deploy(bench, tmp_path / "book.json", "1", "--proposer", bench.stranger.address)
    assert done.returncode == 0, done.stderr
    for book, proposer in ((tmp_path / "book.json", bench.stranger.address), (bench.local.book, rich_key().address)):
        chain = Chain(bench.local.rpc, load_book(book))
        timelock = chain.web3.eth.contract(chain.book.contracts["Timelock"].address, abi=abi("Timelock")).functions
        role, everybody = timelock.PROPOSER_ROLE().call(), (bench.stranger.address, rich_key().address)
        assert [who for who in everybody if timelock.hasRole(role, who).call()] == [proposer]
        assert timelock.getMinDelay().call() == 7 * 86_400
        assert timelock.COURT().call() == chain.court.address
        assert chain.court.functions.GOVERNOR().call() == chain.book.contracts["Timelock"].address
    done = deploy(bench, tmp_path / "other.json", "1", "--proposer", "0x12")
    assert done.returncode == 1 and "--proposer is not an address" in done.stderr


def test_what_the_proposer_announces_holds_a_week_later(bench: Bench) -> None:
    chain, proposer = bench.chain, Wallet(bench.chain, rich_key())
    timelock = chain.web3.eth.contract(chain.book.contracts["Timelock"].address, abi=abi("Timelock")).functions
    data = chain.court.encode_abi("setRates", [1250, 20_000])
    what = (chain.court.address, 0, data, b"\0" * 32, b"\0" * 32)
    proposer.send("announcing", timelock.schedule(*what, 7 * 86_400))
    with pytest.raises(ChainError):
        bench.stranger.send("carrying out", timelock.execute(*what))
    bench.wait(7 * 86_400)
    bench.stranger.send("carrying out", timelock.execute(*what))
    assert chain.court.functions.rates().call() == [1250, 20_000]


def test_a_scale_that_leaves_no_time_for_a_trial_is_refused(bench: Bench, tmp_path: Path) -> None:
    done = deploy(bench, tmp_path / "book.json", "86400")
    assert done.returncode == 1
    assert "--scale 86400 leaves no time for a trial" in done.stderr
    assert not (tmp_path / "book.json").exists()


def test_a_reward_for_work_is_less_than_what_burned(bench: Bench) -> None:
    chain, node = bench.chain, bench.accused
    paid = Wei(100 * 10**18)
    bench.accuser.fund(bench.accuser.address, [(node.address, paid)])
    voucher = Voucher(bench.accuser.address, node.address, paid)
    signature = bench.accuser.key.sign_struct(chain.book.escrow_domain, voucher)
    before = bench.wealth()
    bench.stranger.redeem(node.address, [(bench.accuser.address, paid, signature)])
    epoch = chain.now() // 86_400
    with pytest.raises(ChainError, match="the epoch is not over yet"):
        bench.stranger.send("claiming", chain.emissions.functions.claim(epoch, node.address))
    bench.wait(86_400)
    bench.stranger.send("claiming", chain.emissions.functions.claim(epoch, node.address))
    after = bench.wealth()
    fee = paid // 20
    assert after["accused"] - before["accused"] == paid - fee + fee * 9 // 10
    assert chain.token.functions.minted().call() == 500_000_000 * 10**18 + fee * 9 // 10
