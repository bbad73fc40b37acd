"""What one key signs and another one sends: deposits, exits and signers of channels. Who sends pays the gas and decides
nothing. `contracts/interfaces/IEscrow.sol` is the reference."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from eth_abi.abi import encode

from tallystick_protocol.chain.book import AddressBook
from tallystick_protocol.errors import BadMessage
from tallystick_protocol.signing import SIGNATURE_BYTES, Key, address_bytes, checksum_address, keccak
from tallystick_protocol.types import Address, Digest, Wei
from tallystick_protocol.vouchers import Exit, ReceiveWithAuthorization, SetSigner

MAX_DEPOSITS = 64
_AMOUNT = 1 << 128
_NUMBER = 1 << 256


@dataclass(frozen=True, slots=True)
class Funding:
    """A payer's authorization to put its tokens into a client's channels, once, in blocks before `valid_before`."""

    client: Address
    deposits: tuple[tuple[Address, Wei], ...]
    payer: Address
    salt: bytes
    valid_before: int
    signature: bytes
    kind: Literal["fund"] = "fund"

    def call(self, escrow: Any) -> Any:
        return escrow.functions.fundWithAuthorization(
            self.client, list(self.deposits), (self.payer, self.salt, self.valid_before, *_vrs(self.signature))
        )


@dataclass(frozen=True, slots=True)
class Leaving:
    """A client's order to begin to take `amount` out of its channel with a node; 0 calls an exit off."""

    client: Address
    node: Address
    amount: Wei
    nonce: int
    deadline: int
    signature: bytes
    kind: Literal["exit"] = "exit"

    def call(self, escrow: Any) -> Any:
        return escrow.functions.exitWithSig(self.node, self.amount, _order(self))


@dataclass(frozen=True, slots=True)
class Signing:
    """A client's order to let `signer` sign its vouchers, or (`on` false) to stop that."""

    client: Address
    signer: Address
    on: bool
    nonce: int
    deadline: int
    signature: bytes
    kind: Literal["signer"] = "signer"

    def call(self, escrow: Any) -> Any:
        return escrow.functions.setSignerWithSig(self.signer, self.on, _order(self))


Paper = Funding | Leaving | Signing


def authorize(
    book: AddressBook, payer: Key, client: Address, deposits: list[tuple[Address, Wei]], valid_before: int
) -> Funding:
    """Sign for deposits of the payer's tokens. valid_before: unix seconds."""
    salt = secrets.token_bytes(32)
    consent = ReceiveWithAuthorization(
        from_=payer.address,
        to=book.contracts["Escrow"].address,
        value=sum(amount for _, amount in deposits),
        valid_after=0,
        valid_before=valid_before,
        nonce=funding_nonce(client, deposits, salt),
    )
    signature = payer.sign_struct(book.token_domain, consent)
    return Funding(client, tuple(deposits), payer.address, salt, valid_before, signature)


def funding_nonce(client: Address, deposits: list[tuple[Address, Wei]], salt: bytes) -> Digest:
    """keccak256(abi.encode(client, deposits, salt)): what is authorized is these deposits and no others."""
    return keccak(encode(["address", "(address,uint128)[]", "bytes32"], [client, deposits, salt]))


def order_exit(book: AddressBook, client: Key, node: Address, amount: Wei, nonce: int, deadline: int) -> Leaving:
    """nonce: `Escrow.nonces(client)`, one more for each order signed and not sent yet. deadline: unix seconds."""
    order = Exit(client.address, node, amount, nonce, deadline)
    return Leaving(client.address, node, amount, nonce, deadline, client.sign_struct(book.escrow_domain, order))


def order_signer(book: AddressBook, client: Key, signer: Address, on: bool, nonce: int, deadline: int) -> Signing:
    order = SetSigner(client.address, signer, on, nonce, deadline)
    return Signing(client.address, signer, on, nonce, deadline, client.sign_struct(book.escrow_domain, order))


def to_json(paper: Paper) -> dict[str, Any]:
    """As it travels: amounts in decimal text, bytes in hex."""
    values: dict[str, Any] = {}
    for name in type(paper).__dataclass_fields__:
        value = getattr(paper, name)
        if name == "deposits":
            value = [[node, str(amount)] for node, amount in value]
        elif isinstance(value, bytes):
            value = "0x" + value.hex()
        elif name in ("amount", "nonce", "deadline", "valid_before"):
            value = str(value)
        values[name] = value
    return values


def from_json(values: Any) -> Paper:
    """Raises BadMessage for anything that `to_json` does not write."""
    if not isinstance(values, dict):
        raise BadMessage("a paper is a JSON object")
    classes: dict[Any, type[Paper]] = {"fund": Funding, "exit": Leaving, "signer": Signing}
    kind = values.get("kind")
    cls = classes.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise BadMessage("a paper is of the kind fund, exit or signer")
    if values.keys() != set(cls.__dataclass_fields__):
        raise BadMessage(f"a paper of the kind {kind} has the fields {', '.join(cls.__dataclass_fields__)}")
    return cls(**{name: _read(name, values) for name in values})


def _read(name: str, values: Mapping[str, Any]) -> Any:
    value = values[name]
    if name == "deposits":
        if not isinstance(value, list) or not 0 < len(value) <= MAX_DEPOSITS:
            raise BadMessage(f"a paper has 1 to {MAX_DEPOSITS} deposits")
        if not all(isinstance(one, list) and len(one) == 2 for one in value):
            raise BadMessage("a deposit is a node and an amount")
        return tuple((_address(node), Wei(_decimal(amount, _AMOUNT))) for node, amount in value)
    if name == "on":
        if not isinstance(value, bool):
            raise BadMessage("`on` is true or false")
        return value
    if name in ("salt", "signature"):
        return _bytes(value, 32 if name == "salt" else SIGNATURE_BYTES)
    if name in ("amount", "nonce", "deadline", "valid_before"):
        return _decimal(value, _AMOUNT if name == "amount" else _NUMBER)
    return value if name == "kind" else _address(value)


def _address(value: Any) -> Address:
    if not isinstance(value, str):
        raise BadMessage("an address is text")
    return checksum_address(address_bytes(Address(value)))


def _decimal(value: Any, bound: int) -> int:
    if not isinstance(value, str) or len(value) > 78 or not (value.isascii() and value.isdecimal()):
        raise BadMessage("amounts, nonces and times are decimal text")
    if int(value) >= bound:
        raise BadMessage("a number is too large")
    return int(value)


def _bytes(value: Any, length: int) -> bytes:
    try:
        found = bytes.fromhex(value.removeprefix("0x"))
    except (AttributeError, ValueError):
        raise BadMessage("bytes are hex") from None
    if len(found) != length:
        raise BadMessage(f"{length} bytes are due, got {len(found)}")
    return found


def _vrs(signature: bytes) -> tuple[int, bytes, bytes]:
    return signature[64], signature[:32], signature[32:64]


def _order(paper: Leaving | Signing) -> tuple[Address, int, int, bytes, bytes]:
    return paper.client, paper.nonce, paper.deadline, paper.signature[:32], compact(paper.signature)


def compact(signature: bytes) -> bytes:
    """ERC-2098: s with v's parity in its top bit."""
    s = int.from_bytes(signature[32:64], "big") | (signature[64] - 27) << 255
    return s.to_bytes(32, "big")
