"""Why a contract refused: our own errors in words, malformed data never an exception."""

from __future__ import annotations

import random
from typing import Any

import pytest
from eth_abi.abi import encode

from tallystick_protocol.chain.book import NAMES
from tallystick_protocol.chain.reads import abi
from tallystick_protocol.chain.reverts import _HINTS, explain
from tallystick_protocol.signing import keccak


class Refused(Exception):
    """What web3 raises, as far as `explain` looks."""

    def __init__(self, *args: Any, **attributes: Any) -> None:
        super().__init__(*args)
        for name, value in attributes.items():
            setattr(self, name, value)


def errors() -> list[dict[str, Any]]:
    return [entry for name in NAMES for entry in abi(name) if entry["type"] == "error"]


def selector(entry: dict[str, Any]) -> bytes:
    kinds = ",".join(argument["type"] for argument in entry["inputs"])
    return keccak(f"{entry['name']}({kinds})".encode())[:4]


def sample(kind: str) -> Any:
    if kind == "address":
        return "0x" + "11" * 20
    return b"\x22" * 32 if kind == "bytes32" else "text" if kind == "string" else b"" if kind == "bytes" else 7


@pytest.mark.parametrize("entry", errors(), ids=lambda entry: entry["name"])
def test_every_error_of_ours_is_told_with_its_values(entry: dict[str, Any]) -> None:
    kinds = [argument["type"] for argument in entry["inputs"]]
    data = "0x" + (selector(entry) + encode(kinds, [sample(kind) for kind in kinds])).hex()
    for error in (
        Refused("reverted", data),
        Refused("reverted", data=data),
        Refused({"code": 3, "data": data}),
        Refused("x", rpc_response={"error": {"data": data}}),
    ):
        text = explain(error)
        assert text.startswith(f"the contract refused: {entry['name']}(")
        assert all(f"{argument['name']}=" in text for argument in entry["inputs"])


def test_every_hint_is_for_an_error_that_exists() -> None:
    assert set(_HINTS) <= {entry["name"] for entry in errors()}


def test_no_two_errors_share_a_selector() -> None:
    names = {(selector(entry), entry["name"]) for entry in errors()}
    assert len({found for found, _ in names}) == len(names)


@pytest.mark.parametrize(
    "error",
    [
        Refused(),
        Refused(""),
        Refused(None),
        Refused("x" * 10_000),
        Refused("0x"),
        Refused("0x123456789"),
        Refused("0xzzzzzzzzzz"),
        Refused("reverted", data=5),
        Refused("reverted", data={"data": {"data": "0x12"}}),
        Refused("x", rpc_response={"error": "text"}),
        Refused("x", rpc_response={"error": None}),
        Refused("x", rpc_response={}),
        Refused("x", rpc_response=[]),
        Refused("x", message=5),
        Refused("x", message=""),
    ],
    ids=lambda error: repr(error)[:40],
)
def test_what_is_no_revert_is_told_in_a_bounded_sentence(error: Exception) -> None:
    assert len(explain(error)) <= 300


def test_damaged_revert_data_is_told_by_name_and_never_raises() -> None:
    coins = random.Random(3)
    for entry in errors():
        for _ in range(20):
            data = selector(entry) + coins.randbytes(coins.choice((0, 1, 31, 32, 33, 64, 96, 200)))
            assert entry["name"] in explain(Refused("0x" + data.hex()))
