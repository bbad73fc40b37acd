"""EIP-712 as the contracts see it: the same digests, one form of signature, nothing else ever raised."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from eth_account import Account
from eth_account.messages import encode_typed_data

from harness import samples
from tallystick_protocol.errors import BadMessage, BadSignature, ConfigError
from tallystick_protocol.messages import Offer, Opened, PushOpen, RelayRegister, Resume, SessionOpen
from tallystick_protocol.receipts import Receipt
from tallystick_protocol.signing import (
    Domain,
    Key,
    address_bytes,
    checksum_address,
    digest,
    from_words,
    keccak,
    recover,
    seal,
    to_words,
    unseal,
)
from tallystick_protocol.types import Address, Digest
from tallystick_protocol.vouchers import Bind, Exit, SetSigner, Voucher

VECTORS: dict[str, Any] = json.loads((Path(__file__).parents[1] / "vectors" / "eip712.json").read_text())
ON_CHAIN = (Voucher, Bind, Receipt, Offer, SessionOpen, Opened)
CLASSES: dict[str, Any] = {cls.__name__: cls for cls in (*ON_CHAIN, PushOpen, Resume, RelayRegister, Exit, SetSigner)}
STRUCTS = [*VECTORS["structs"], *VECTORS["offchain"]]
DOMAINS = {
    name: Domain(d["name"], d["version"], int(d["chainId"]), Address(d["verifyingContract"]))
    for name, d in VECTORS["domains"].items()
}
ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
KEY = samples.key("signer")
SEALED = seal(samples.STAKING, samples.receipt(), KEY)


def snake(name: str) -> str:
    return re.sub(r"[A-Z]", lambda match: "_" + match.group().lower(), name)


def member_value(kind: str, text: str) -> Any:
    if kind == "bool":
        return bool(text)
    if kind == "address":
        return Address(text)
    return bytes.fromhex(text[2:]) if kind == "bytes32" else int(text)


def members(type_string: str) -> list[tuple[str, str]]:
    inner = type_string[type_string.index("(") + 1 : -1]
    return [(kind, name) for kind, name in (member.split(" ") for member in inner.split(","))]


def from_vector(case: dict[str, Any]) -> Any:
    """The vector's struct; its numbers are random, so a span may be none and the class would not make it."""
    values = {snake(name): member_value(kind, case["message"][name]) for kind, name in members(case["type"])}
    return samples.unchecked(CLASSES[case["primary"]], values)


def typed_data(domain: Domain, value: Any) -> dict[str, Any]:
    """The same as eth-account wants it."""
    listed = members(type(value).TYPE)
    return {
        "types": {
            "EIP712Domain": [{"name": name, "type": kind} for kind, name in members(Domain.TYPE)],
            type(value).__name__: [{"name": name, "type": kind} for kind, name in listed],
        },
        "primaryType": type(value).__name__,
        "domain": {
            "name": domain.name,
            "version": domain.version,
            "chainId": domain.chain_id,
            "verifyingContract": domain.contract,
        },
        "message": {name: getattr(value, snake(name)) for _, name in listed},
    }


def test_the_vectors_cover_every_struct_that_contracts_or_documents_name() -> None:
    assert {case["primary"] for case in STRUCTS} == set(CLASSES)


@pytest.mark.parametrize("name", DOMAINS)
def test_domain_separators_are_those_of_the_vectors(name: str) -> None:
    assert "0x" + DOMAINS[name].separator.hex() == VECTORS["domains"][name]["separator"]


@pytest.mark.parametrize("case", STRUCTS, ids=lambda case: case["primary"])
def test_digests_are_those_of_the_vectors(case: dict[str, Any]) -> None:
    cls, value = CLASSES[case["primary"]], from_vector(case)
    assert case["type"] == cls.TYPE
    assert "0x" + keccak(cls.TYPE.encode()).hex() == case["typeHash"]
    assert "0x" + keccak(keccak(cls.TYPE.encode()) + to_words(value)).hex() == case["structHash"]
    assert "0x" + digest(DOMAINS[case["domain"]], value).hex() == case["digest"]


@pytest.mark.parametrize("value", samples.structs(), ids=lambda value: type(value).__name__)
def test_eth_account_computes_the_same_digest_and_recovers_the_same_signer(value: Any) -> None:
    domain = samples.ESCROW if isinstance(value, Voucher | Exit | SetSigner) else samples.STAKING
    theirs = encode_typed_data(full_message=typed_data(domain, value))
    assert keccak(b"\x19" + theirs.version + theirs.header + theirs.body) == digest(domain, value)
    signature = KEY.sign_struct(domain, value)
    assert Account.recover_message(theirs, signature=signature) == KEY.address
    assert recover(digest(domain, value), bytes(Account.sign_message(theirs, KEY.secret).signature)) == KEY.address


@pytest.mark.parametrize("case", VECTORS["signatures"], ids=lambda case: f"{case['primary']}: {case['why']}")
def test_signatures_are_taken_in_the_one_form_that_the_contracts_take(case: dict[str, Any]) -> None:
    message, signature = Digest(bytes.fromhex(case["digest"][2:])), bytes.fromhex(case["signature"][2:])
    if case["malformed"]:
        with pytest.raises(BadSignature):
            recover(message, signature)
    else:
        assert (recover(message, signature) == case["signer"]) is case["valid"]


def test_no_flipped_byte_of_a_sealed_struct_keeps_its_signer() -> None:
    for index in range(len(SEALED)):
        for flip in (0x01, 0x80, 0xFF):
            forged = SEALED[:index] + bytes([SEALED[index] ^ flip]) + SEALED[index + 1 :]
            try:
                _, signer = unseal(samples.STAKING, Receipt, forged)
            except (BadMessage, BadSignature):
                continue
            assert signer != KEY.address, f"byte {index} xor {flip:#x}"


@pytest.mark.parametrize(
    "domain",
    [
        samples.ESCROW,
        Domain("Tallystick", "1", 1, samples.STAKING.contract),
        Domain("Tallystick", "2", samples.CHAIN_ID, samples.STAKING.contract),
        Domain("Tallystick", "1", samples.CHAIN_ID, samples.ESCROW.contract),
        Domain("Tallystack", "1", samples.CHAIN_ID, samples.STAKING.contract),
    ],
    ids=["money", "another chain", "another version", "another contract", "another name"],
)
def test_a_signature_counts_in_its_own_domain_only(domain: Domain) -> None:
    assert unseal(domain, Receipt, SEALED)[1] != KEY.address


def test_a_signature_of_one_struct_counts_for_no_other() -> None:
    bind = Bind(samples.address("node"), 5)
    signature = KEY.sign_struct(samples.STAKING, bind)
    voucher = Voucher(samples.address("node"), samples.address("node"), 5)
    assert recover(digest(samples.STAKING, voucher), signature) != KEY.address


@pytest.mark.parametrize("value", samples.structs(), ids=lambda value: type(value).__name__)
def test_sealed_structs_come_back_as_they_were(value: Any) -> None:
    assert unseal(samples.STAKING, type(value), seal(samples.STAKING, value, KEY)) == (value, KEY.address)


@pytest.mark.parametrize("length", [0, 1, 64, 65, 66, len(SEALED) - 1, len(SEALED) + 1, len(SEALED) + 32])
def test_a_sealed_struct_has_one_length(length: int) -> None:
    with pytest.raises(BadMessage, match="takes 544 bytes"):
        unseal(samples.STAKING, Receipt, (SEALED + bytes(64))[:length])


def test_padding_is_zero() -> None:
    words = to_words(samples.receipt())
    for word, byte in ((0, 11), (4, 27), (5, 29), (16, 25)):  # node, attempt, start, at: the byte before each value
        forged = bytearray(words)
        forged[32 * word + byte] = 1
        with pytest.raises(BadMessage, match="does not fit"):
            from_words(Receipt, bytes(forged))


def test_what_does_not_fit_its_type_is_not_signed() -> None:
    node = samples.address("node")
    for value in (
        Bind(node, -1),
        Bind(node, 1 << 256),
        Bind(node, True),
        Bind(Address("0x12"), 1),
        Bind(Address(node + "\n"), 1),
        Opened(b"short", bytes(32), 1, 1),
        Opened("0" * 32, bytes(32), 1, 1),  # type: ignore[arg-type]
        Opened(bytes(32), bytes(32), 1, 1 << 64),
        samples.receipt(at=1 << 48),
        samples.receipt(end=1 << 16),
        samples.receipt(attempt=1.0),
    ):
        with pytest.raises(BadMessage):
            to_words(value)


def test_addresses_have_one_spelling() -> None:
    for spelled in (
        "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed",
        "0xfB6916095ca1df60bB79Ce92cE3Ea74c37c5d359",
        "0xdbF03B407c01E7cD3CBea99509d93f8DDDC8C6FB",
    ):  # of EIP-55
        assert checksum_address(address_bytes(Address(spelled.lower()))) == spelled


@pytest.mark.parametrize("secret", [b"", bytes(31), bytes(33), bytes(32), ORDER.to_bytes(32, "big"), b"\xff" * 32])
def test_a_number_that_is_no_private_key_is_refused_in_words(secret: bytes) -> None:
    with pytest.raises(ConfigError, match="private key"):
        Key(secret)


def test_a_key_never_prints_itself() -> None:
    assert KEY.secret.hex() not in repr(KEY) + str(KEY) + repr([KEY])
