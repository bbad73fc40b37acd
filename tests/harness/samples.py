"""Small valid values to start from: keys, domains, a manifest, a receipt, offers and candidates."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

from tallystick.routing.candidates import Candidate
from tallystick_protocol.content.cid import Cid
from tallystick_protocol.manifest import Canary, FileRef, Manifest, Piece, PieceKind, Pooling, TensorSpec
from tallystick_protocol.messages import Offer, Opened, PushOpen, RelayRegister, SessionOpen
from tallystick_protocol.receipts import Receipt
from tallystick_protocol.signing import Key, checksum_address, escrow_domain, keccak, staking_domain
from tallystick_protocol.types import ZERO32, ZERO_ADDRESS, Address, Digest, ModelId, SessionId, Wei
from tallystick_protocol.vouchers import Bind, Voucher

T = TypeVar("T")
CHAIN_ID = 31337
STAKING = staking_domain(CHAIN_ID, Address("0x57a457A457A457a457A457a457a457A457A457a4"))
ESCROW = escrow_domain(CHAIN_ID, Address("0xe5c0E5C0E5C0e5c0E5c0e5c0e5c0e5C0E5C0E5c0"))


def key(name: str) -> Key:
    return Key(keccak(name.encode()))


def address(name: str) -> Address:
    """An address nobody has the key of, different for every name."""
    return checksum_address(keccak(name.encode())[12:])


def digest(name: str) -> Digest:
    return keccak(name.encode())


def manifest(**changes: Any) -> Manifest:
    """A two-layer model whose pieces exist only by name."""

    def piece(kind: PieceKind, index: int, *tensors: str) -> Piece:
        specs = {tensor: TensorSpec("F32", (4, 3)) for tensor in tensors}
        return Piece(kind, index, Cid.of_raw(f"{kind}{index}".encode()), 200, specs)

    cids = tuple(Cid.of_raw(bytes([i])) for i in range(3))
    values: dict[str, Any] = {
        "name": "small",
        "licence": "Apache-2.0",
        "architecture": "LlamaForCausalLM",
        "config": {"hidden_size": 3, "rope": {"theta": 10000.0}},
        "output": "logits",
        "causal": True,
        "task": "text-generation",
        "labels": (),
        "numerics": "fp32",
        "quantization": None,
        "encoder_layers": 0,
        "layers": 2,
        "width": 3,
        "vocab": 4,
        "max_length": 64,
        "pieces": (
            piece("embed", 0, "tokens"),
            piece("layer", 0, "l0"),
            piece("layer", 1, "l1"),
            piece("shared", 0, "shared"),
            piece("head", 0, "norm"),
        ),
        "tied": {"head": "tokens"},
        "tokenizer": {"tokenizer.json": FileRef(Cid.of_raw(b"tokenizer"), 100)},
        "generation": {"eos": [1, 3], "bos": 0},
        "pooling": Pooling("mean", True),
        "norms": ((0.0, 1.5), (0.25, 2.0), (0.5, 1e9)),
        "canary": Canary((0, 3, 2), cids, Cid.of_raw(b"output")),
    }
    return Manifest(**{**values, **changes})


def receipt(**changes: Any) -> Receipt:
    values: dict[str, Any] = {
        "node": key("node").address,
        "model": digest("model"),
        "numeric_class": digest("class"),
        "session": SessionId(digest("session")),
        "attempt": 0,
        "start": 0,
        "end": 2,
        "first": 0,
        "last": 32,
        "revision": 0,
        "context": digest("context"),
        "input": digest("input"),
        "output": digest("output"),
        "previous": ZERO32,
        "challenge": ZERO32,
        "sketches": ZERO32,
        "at": 1_700_000_000,
    }
    return Receipt(**{**values, **changes})


def offer(node: str = "node", start: int = 0, end: int = 2, **changes: Any) -> Offer:
    values: dict[str, Any] = {
        "node": address(node),
        "model": digest("model"),
        "numeric_class": digest("class"),
        "start": start,
        "end": end,
        "price": 10,
        "credit": 10**6,
        "max_length": 4096,
        "seq": 1,
        "expires": 2_000_000_000,
    }
    return Offer(**{**values, **changes})


def candidate(
    node: str, start: int, end: int, *, rtt_s: float = 0.01, operator: str = "", payee: str = "", **changes: Any
) -> Candidate:
    """changes: to fields of the candidate or of its offer."""
    own = {name: changes.pop(name) for name in ("serves_parts", "claimed", "expected", "links") if name in changes}
    made = offer(node, start, end, **changes)
    return Candidate(
        offer=made,
        offer_digest=digest(f"offer of {node}"),
        operator=address(operator or node),
        payee=address(payee or node),
        signer=key(node).address,
        stake=Wei(10**21),
        url=f"http://127.0.0.1/{node}",
        rtt_s=rtt_s,
        **own,
    )


def structs() -> list[Any]:
    """One valid value of every signed struct."""
    node, client = key("node").address, key("client").address
    opening = SessionOpen(
        node=node,
        spki=ZERO32,
        offer=digest("offer"),
        client=client,
        nonce=digest("nonce"),
        model=digest("model"),
        start=0,
        end=2,
        attempt=1,
        previous=ZERO_ADDRESS,
        next=address("next"),
        max_length=512,
        top_k=64,
        issued=1_700_000_000,
        expires=1_700_003_600,
    )
    push = PushOpen(node, digest("session"), 1, address("previous"), ZERO32, digest("nonce"), 1_700_000_000)
    return [
        Voucher(client, node, 10**24),
        Bind(node, 1_700_000_000),
        receipt(),
        offer(),
        opening,
        Opened(digest("open"), ZERO32, 10**6, 1_700_003_600),
        push,
        RelayRegister(address("relay"), digest("spki"), node, digest("nonce"), 1_700_000_000),
    ]


def unchecked(cls: type[T], values: dict[str, Any]) -> T:
    """An instance of a frozen dataclass that its own __post_init__ might refuse."""
    made = object.__new__(cls)
    for member in fields(cls):  # type: ignore[arg-type]
        object.__setattr__(made, member.name, values[member.name])
    return made


MODEL = ModelId(digest("model"))
