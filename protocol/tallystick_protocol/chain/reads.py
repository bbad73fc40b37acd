"""What the contracts know, read with a deadline and told in our types."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from typing import Any, TypeVar

import requests
from eth_abi.abi import decode
from web3 import Web3
from web3.exceptions import Web3Exception
from web3.types import RPCEndpoint

from tallystick_protocol.chain.book import AddressBook
from tallystick_protocol.chain.reverts import explain
from tallystick_protocol.errors import BadMessage, ChainError, UnknownModel
from tallystick_protocol.signing import address_bytes, checksum_address, keccak
from tallystick_protocol.transport.contact import Contact, decode_endpoint
from tallystick_protocol.types import Address, Digest, ModelId, Span, Wei

T = TypeVar("T")
CALL_TIMEOUT_S = 10.0
BATCH_CALLS = 100
"""Reads in one request."""


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """A model on chain: the SHA-256 of its manifest, the root over its pieces, its number of layers."""

    id: ModelId
    manifest: Digest
    weights: Digest
    layers: int


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """A node on chain. active: stake less what is leaving, in token base units; span is None until it serves.

    seen_at: its last sign of life on chain, unix seconds; jailed: silent for too long, no node to send work to.
    """

    node: Address
    active: Wei
    leaving: Wei
    model: ModelId
    span: Span | None
    payee: Address
    seen_at: int = 0
    jailed: bool = False

    def why_gone(self, model: ModelId) -> str:
        """Why nothing stands behind what it signs for a model; empty where its stake does."""
        if self.active == 0:
            return f"its stake of {self.leaving} token units is leaving" if self.leaving else "it has no stake"
        return "" if self.model == model else "it serves another model now"


@dataclass(frozen=True, slots=True)
class Serving:
    """A node that serves a model: what it declared last, and its record as it stands."""

    record: NodeRecord
    span: Span
    operator: Address
    price: Wei
    contact: Contact


@dataclass(frozen=True, slots=True)
class ChannelFunds:
    """A channel since the beginning of time: what a voucher's total may reach, at the safe and at the newest block."""

    confirmed: Wei
    latest: Wei
    paid: Wei


def abi(name: str) -> list[dict[str, Any]]:
    """The ABI that ships with this package; `scripts/export_abi --check` keeps it equal to the artifact."""
    value: list[dict[str, Any]] = json.loads((files("tallystick_protocol.chain") / "abi" / f"{name}.json").read_text())
    return value


class Chain:
    """Reads. Blocking: call from a thread."""

    def __init__(self, rpc_url: str, book: AddressBook) -> None:
        self.rpc_url = rpc_url
        self.book = book
        provider = Web3.HTTPProvider(
            rpc_url, request_kwargs={"timeout": CALL_TIMEOUT_S}, exception_retry_configuration=None
        )
        self.web3 = Web3(provider)
        contracts = {
            name: self.web3.eth.contract(Web3.to_checksum_address(deployed.address), abi=abi(name))
            for name, deployed in book.contracts.items()
        }
        self.token, self.models = contracts["Token"], contracts["Models"]
        self.staking, self.escrow = contracts["Staking"], contracts["Escrow"]
        self.court, self.emissions = contracts["Court"], contracts["Emissions"]

    def guard(self, what: str, call: Callable[[], T]) -> T:
        """Run a call; every failure becomes a ChainError that says what was tried and what to look at."""
        try:
            return call()
        except requests.RequestException as error:
            raise ChainError(
                f"{what}: the RPC at {self.rpc_url} does not answer ({type(error).__name__}); is the chain running?"
            ) from None
        except Web3Exception as error:
            raise ChainError(f"{what}: {explain(error)}") from None
        except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
            raise ChainError(f"{what}: the RPC at {self.rpc_url} answered nonsense ({error})") from None

    def check(self) -> None:
        """Raises ChainError unless this is the chain and these are the contracts of the address book."""
        chain_id = self.guard("reading the chain id", lambda: self.web3.eth.chain_id)
        if chain_id != self.book.chain_id:
            raise ChainError(f"{self.rpc_url} is chain {chain_id}, the address book is for {self.book.chain_id}")
        genesis = self.guard("reading block 0", lambda: self.web3.eth.get_block(0)["hash"])
        if genesis is not None and "0x" + bytes(genesis).hex() != self.book.genesis:
            raise ChainError("the chain was started anew since the address book was written; deploy again")
        for name, deployed in self.book.contracts.items():
            code = self.guard(f"reading the code of {name}", partial(self.web3.eth.get_code, deployed.address))
            if "0x" + keccak(bytes(code)).hex() != deployed.bytecode_hash:
                raise ChainError(f"{name} at {deployed.address} is not the contract that the address book names")

    def now(self) -> int:
        """The newest block's time, unix seconds."""
        return int(self.guard("reading the newest block", lambda: self.web3.eth.get_block("latest")["timestamp"]))

    def model(self, model: ModelId) -> ModelRecord:
        """Raises UnknownModel."""
        found = self.guard("reading the model", lambda: self.models.functions.models(model).call())
        if int(found[3]) == 0:
            raise UnknownModel(
                f"no model 0x{model.hex()} on this chain; list them: tallystick models", model="0x" + model.hex()
            )
        return ModelRecord(model, Digest(bytes(found[0])), Digest(bytes(found[1])), int(found[2]))

    def all_models(self) -> list[ModelRecord]:
        """Every model ever added, oldest first."""
        logs = self.logs(self.models, "Added", None)
        return [
            ModelRecord(
                ModelId(bytes(log["id"])), Digest(bytes(log["manifest"])), Digest(bytes(log["weights"])), log["layers"]
            )
            for log in logs
        ]

    def node(self, node: Address) -> NodeRecord:
        found = self.guard("reading the node", lambda: self.staking.functions.nodes(node).call())
        return self._record(node, found)

    def nodes(self, nodes: Sequence[Address]) -> list[NodeRecord]:
        """The records of many nodes, many in one request; one by one where the RPC takes no such requests."""
        records = []
        for first in range(0, len(nodes), BATCH_CALLS):
            some = nodes[first : first + BATCH_CALLS]
            try:
                records += self.guard("reading nodes", partial(self._nodes_at_once, some))
            except ChainError:
                records += [self.node(node) for node in some]
        return records

    def _nodes_at_once(self, nodes: Sequence[Address]) -> list[NodeRecord]:
        """One JSON-RPC batch, encoded and decoded here: web3's own objects take milliseconds a call."""
        members = _output(self.staking.abi, "nodes")
        selector = keccak(b"nodes(address)")[:4]
        calls = [
            {"to": self.staking.address, "data": "0x" + (selector + b"\0" * 12 + address_bytes(node)).hex()}
            for node in nodes
        ]
        asked = [(RPCEndpoint("eth_call"), [call, "latest"]) for call in calls]
        answers: Any = self.web3.provider.make_batch_request(asked)
        found = sorted(answers, key=lambda answer: int(answer["id"]))
        types = [member["type"] for member in members]
        return [
            self._record(node, decode(types, bytes.fromhex(answer["result"][2:])))
            for node, answer in zip(nodes, found, strict=True)
        ]

    def _record(self, node: Address, found: Any) -> NodeRecord:
        fields = [member["name"] for member in _output(self.staking.abi, "nodes")]
        value = dict(zip(fields, found, strict=True))
        payee = checksum_address(address_bytes(value["payee"])) if int(value["payee"], 16) else node
        span = Span(value["start"], value["end"]) if value["end"] else None
        active = Wei(value["stake"] - value["leaving"])
        model, seen_at, jailed = ModelId(bytes(value["model"])), int(value["seenAt"]), bool(value["jailed"])
        return NodeRecord(node, active, Wei(value["leaving"]), model, span, payee, seen_at, jailed)

    def node_of(self, signer: Address) -> Address | None:
        """The node that a hot key signs for, or None."""
        found = self.guard("reading a signer", lambda: self.staking.functions.nodeOf(signer).call())
        return Address(found) if int(found, 16) else None

    def serving(self, model: ModelId) -> list[Serving]:
        """Every staked node that serves the model now, and is not in jail."""
        latest = {Address(log["node"]): log for log in self.logs(self.staking, "Serving", {"model": model})}
        records = self.nodes(list(latest))
        found = [_serving(record, latest[record.node]) for record in records]
        return [entry for entry in found if entry is not None and entry.record.model == model]

    def locate(self, node: Address) -> Contact | None:
        """How to dial a staked node, as it has put it on chain."""
        logs = self.logs(self.staking, "Serving", {"node": node})
        entry = _serving(self.node(node), logs[-1]) if logs else None
        return entry.contact if entry else None

    def weight(self, model: ModelId) -> Wei:
        """The active stake behind a model, as the contract sums it."""
        return Wei(self.guard("reading the weight", lambda: self.staking.functions.weights(model).call()))

    def min_stake(self) -> Wei:
        return Wei(self.guard("reading the minimum stake", lambda: self.staking.functions.MIN_STAKE().call()))

    def beating(self) -> tuple[int, int]:
        """Seconds between two beats of a node, and seconds of silence after which it can be jailed."""
        functions = self.staking.functions
        epoch, stale = (self.guard("reading a delay", call.call) for call in (functions.EPOCH(), functions.STALE()))
        return int(epoch), int(stale)

    def balance(self, owner: Address) -> Wei:
        return Wei(self.guard("reading a balance", lambda: self.token.functions.balanceOf(owner).call()))

    def funds(self, client: Address, node: Address) -> ChannelFunds:
        """The channel from client to node; money that is exiting is no money."""
        confirmed, _ = self._channel(client, node, self.book.block_tag)
        latest, paid = self._channel(client, node, "latest")
        return ChannelFunds(min(confirmed, latest), latest, paid)

    def exiting(self, client: Address, node: Address) -> tuple[Wei, int]:
        """What leaves a channel, and from when on (unix seconds); (0, 0) where nothing does."""
        found = self.guard("reading an exit", lambda: self.escrow.functions.exits(client, node).call())
        return Wei(int(found[0])), int(found[1])

    def order_nonce(self, client: Address) -> int:
        """The nonce of the client's next order (chain/papers.py)."""
        return int(self.guard("reading a nonce", lambda: self.escrow.functions.nonces(client).call()))

    def may_sign(self, client: Address, signer: Address) -> bool:
        """May this key sign vouchers for the client?"""
        if signer == client:
            return True
        until = self.guard("reading a signer", lambda: self.escrow.functions.signers(client, signer).call())
        return int(until) > self.now()

    def _channel(self, client: Address, node: Address, tag: str) -> tuple[Wei, Wei]:
        functions = self.escrow.functions
        available = self.guard(
            "reading a channel", lambda: functions.available(client, node).call(block_identifier=tag)
        )
        paid = self.guard("reading a channel", lambda: functions.channels(client, node).call(block_identifier=tag))[1]
        return Wei(available + paid), Wei(paid)

    def logs(self, contract: Any, event: str, filters: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """What a contract's events of one kind say, oldest first."""
        first = min(deployed.deploy_block for deployed in self.book.contracts.values())
        entries = self.guard(
            f"reading {event} events",
            lambda: contract.events[event].get_logs(from_block=first, argument_filters=filters),
        )
        return [dict(entry["args"]) for entry in entries]


def _serving(record: NodeRecord, log: dict[str, Any]) -> Serving | None:
    """A node's record and its last declaration; None when it does not serve, or says nothing that can be read."""
    if record.span is None or record.active == 0 or record.jailed:
        return None
    try:
        contact = decode_endpoint(record.node, bytes(log["endpoint"]))
    except BadMessage:
        return None
    return Serving(record, record.span, Address(log["operator"]), Wei(log["price"]), contact)


def _output(contract_abi: Any, function: str) -> list[dict[str, Any]]:
    """The members of the struct that a getter returns."""
    entry = next(item for item in contract_abi if item.get("name") == function and item["type"] == "function")
    members: list[dict[str, Any]] = entry["outputs"][0]["components"]
    return members
