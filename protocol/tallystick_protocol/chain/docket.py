"""The Court's cases as a reader sees them: what was opened, how it stands, who has seats. Call from a thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from eth_abi.abi import encode

from tallystick_protocol import canonical_json
from tallystick_protocol.chain.court import State, Verdict, Vote, header_rlp, winning_seats
from tallystick_protocol.chain.reads import Chain
from tallystick_protocol.content.gateway import check_base_url
from tallystick_protocol.errors import ConfigError, ManifestError
from tallystick_protocol.receipts import Receipt
from tallystick_protocol.signing import keccak
from tallystick_protocol.types import Address, Digest, Wei

MAX_SOURCES = 4
MAX_HINT_BYTES = 512
LAST_ROUND = 2
_OPEN_BYTES = 4 + 32 * 20 + 96
"""Of a call of `open`: selector, a receipt, the signature's offset, the evidence, the signature with its length."""
_LOG_BLOCKS = 2000


@dataclass(frozen=True, slots=True)
class Opening:
    """A case as it was opened. receipt: digest of the accused receipt; evidence: the SHA-256 in its CID."""

    id: Digest
    accused: Address
    accuser: Address
    receipt: Digest
    evidence: Digest
    bond: Wei
    block: int
    transaction: bytes


@dataclass(frozen=True, slots=True)
class Standing:
    """A case as it stands; `contracts/interfaces/ICourt.sol` defines the fields. Times in unix seconds."""

    accuser: Address
    opened_at: int
    accused: Address
    state: State
    verdict: Verdict
    round: int
    units: int
    seed_block: int
    commit_end: int


@dataclass(frozen=True, slots=True)
class Ballot:
    """What a juror has on chain in one round."""

    seats: int
    fined: int
    vote: int
    settled: bool


@dataclass(frozen=True, slots=True)
class Appealed:
    """An appeal against a round's verdict. by: the zero address where there is none."""

    by: Address
    against: Verdict


@dataclass(frozen=True, slots=True)
class Times:
    """The Court's delays: seconds, and blocks for lookahead and headers."""

    commit: int
    reveal: int
    appeal: int
    headers: int


class Docket:
    """Reads of the Court."""

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self._court = chain.court.functions
        self._times: Times | None = None

    def times(self) -> Times:
        """Immutable, so read once."""
        if self._times is None:
            court = self._court
            found = [self._ask(call) for call in (court.COMMIT(), court.REVEAL(), court.APPEAL(), court.HEADERS())]
            self._times = Times(*map(int, found))
        return self._times

    def head(self, tag: str = "latest") -> tuple[int, int]:
        """Number and time of a block."""
        block = self.chain.guard("reading a block", lambda: self.chain.web3.eth.get_block(tag))
        return int(block["number"]), int(block["timestamp"])

    def openings(self, first: int, last: int) -> list[Opening]:
        """The cases opened in the blocks first to last, in their order."""
        found: list[Opening] = []
        for begin in range(first, last + 1, _LOG_BLOCKS):
            end = min(begin + _LOG_BLOCKS - 1, last)
            read = partial(self.chain.court.events.Opened.get_logs, from_block=begin, to_block=end)
            found += [_opening(log) for log in self.chain.guard("reading the Court's cases", read)]
        return found

    def standing(self, id_: Digest) -> Standing:
        names = [member["name"] for member in _members(self.chain.court.abi, "cases")]
        value = dict(zip(names, self._ask(self._court.cases(id_)), strict=True))
        return Standing(
            Address(value["accuser"]), value["openedAt"], Address(value["accused"]), State(value["state"]),
            Verdict(value["verdict"]), value["round"], value["units"], value["seedBlock"], value["commitEnd"],
        )  # fmt: skip

    def verdict_so_far(self, id_: Digest) -> Verdict:
        """What the current round's votes say."""
        return Verdict(self._ask(self._court.standing(id_)))

    def ballot(self, id_: Digest, round_: int, juror: Address) -> Ballot:
        _, seats, fined, vote, settled = self._ask(self._court.ballots(id_, round_, juror))
        return Ballot(seats, fined, vote, settled)

    def appealed(self, id_: Digest, round_: int) -> Appealed:
        by, against = self._ask(self._court.appeals(id_, round_))
        return Appealed(Address(by), Verdict(against))

    def appeal_bond(self, id_: Digest) -> Wei:
        """What an appeal against the current round's verdict takes."""
        return Wei(int(self._ask(self._court.appealBond(id_))))

    def units(self, node: Address, time: int) -> int:
        """A node's units in cases opened at that time."""
        return int(self._ask(self.chain.staking.functions.unitsAt(node, time)))

    def seed(self, id_: Digest, round_: int) -> Digest:
        return Digest(bytes(self._ask(self._court.seeds(id_, round_))))

    def header(self, number: int) -> bytes:
        """A block's header as RLP, as `draw` wants it."""
        return header_rlp(self._block(number))

    def future_seed(self, id_: Digest, round_: int, number: int) -> Digest:
        """The seed that a draw with this block's header makes."""
        randao = bytes(self._block(number)["mixHash"])
        return keccak(encode(["bytes32", "bytes32", "uint256"], [randao, id_, round_]))

    def seats(self, id_: Digest, standing: Standing, round_: int, node: Address, seed: Digest) -> list[int]:
        """A node's seats in a round."""
        if node == standing.accused:
            return []
        expected = int(self._ask(self._court.seatsOf(round_)))
        return winning_seats(seed, node, self.units(node, standing.opened_at), standing.units, expected)

    def staked_nodes(self) -> list[Address]:
        """Every node that has ever declared what it serves."""
        return sorted({Address(told["node"]) for told in self.chain.logs(self.chain.staking, "Serving")})

    def jurors(self, id_: Digest) -> list[Address]:
        """Who has committed to a vote in this case, in any round."""
        return sorted({Address(told["juror"]) for told in self.chain.logs(self.chain.court, "Committed", {"id": id_})})

    def sources(self, opening: Opening) -> list[str]:
        """Where the accuser says that the evidence is: what follows the arguments in the transaction that opened it."""
        transaction = self.chain.guard(
            "reading the accusation",
            lambda: self.chain.web3.eth.get_transaction(opening.transaction),
        )
        called = str(transaction["to"]) == self.chain.court.address
        return parse_sources(bytes(transaction["input"])[_OPEN_BYTES:]) if called else []

    def bond(self, receipt: Receipt, receipt_digest: Digest) -> Wei:
        """What accusing the node of this receipt takes now; 0 when nothing could be won."""
        bond = int(self._ask(self._court.bondFor(receipt.node, receipt.at)))
        return Wei(bond << int(self._ask(self._court.doublings(receipt_digest))))

    def _block(self, number: int) -> Any:
        return self.chain.guard("reading the seed block", lambda: self.chain.web3.eth.get_block(number))

    def _ask(self, call: Any) -> Any:
        read: Callable[[], Any] = call.call
        return self.chain.guard("reading the Court", read)


def receipt_words(receipt: Receipt) -> tuple[Any, ...]:
    """A receipt as `Court.open` takes it."""
    return tuple(getattr(receipt, name) for name in Receipt.__slots__)


def encode_sources(sources: Sequence[str]) -> bytes:
    """What is appended to a call of `open`. Raises ConfigError for what is no source, or too many."""
    data = canonical_json.encode([check_base_url(source) for source in sources]) if sources else b""
    if len(sources) > MAX_SOURCES or len(data) > MAX_HINT_BYTES:
        raise ConfigError(f"at most {MAX_SOURCES} sources, in {MAX_HINT_BYTES} bytes")
    return data


def parse_sources(data: bytes) -> list[str]:
    """The sources in what follows a call of `open`, none where it is anything else: it is a stranger's."""
    if not 0 < len(data) <= MAX_HINT_BYTES:
        return []
    try:
        value = canonical_json.decode(data)
        if not isinstance(value, list) or len(value) > MAX_SOURCES:
            return []
        return [check_base_url(source) for source in value if isinstance(source, str)]
    except (ManifestError, ConfigError):
        return []


def is_silent(seats: int, ballot: Ballot) -> bool:
    """Whether a node can be reported for seats that it revealed nothing for."""
    return seats > ballot.fined + (ballot.seats if ballot.vote else 0)


def is_fined(vote: int, verdict: Verdict) -> bool:
    """Whether a revealed vote said the opposite of the verdict."""
    if verdict is Verdict.CLEAR:
        return vote in (Vote.GUILTY, Vote.FAULT)
    return verdict in (Verdict.GUILTY, Verdict.FAULT) and vote == Vote.CLEAR


def _opening(log: Any) -> Opening:
    told = log["args"]
    return Opening(
        Digest(bytes(told["id"])), Address(told["accused"]), Address(told["accuser"]), Digest(bytes(told["receipt"])),
        Digest(bytes(told["evidence"])), Wei(told["bond"]), int(log["blockNumber"]), bytes(log["transactionHash"]),
    )  # fmt: skip


def _members(contract_abi: Any, function: str) -> list[dict[str, Any]]:
    entry = next(item for item in contract_abi if item.get("name") == function and item["type"] == "function")
    members: list[dict[str, Any]] = entry["outputs"][0]["components"]
    return members
