"""The address book: what the deployment wrote, or a sentence on what is wrong with it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from harness import samples
from tallystick_protocol.chain.book import NAMES, load_book
from tallystick_protocol.errors import ConfigError
from tallystick_protocol.signing import address_bytes

BOOK: dict[str, Any] = {
    "chainId": 31337,
    "genesis": "0x" + "11" * 32,
    "blockTag": "safe",
    "contracts": {
        name: {"address": samples.address(name), "deployBlock": 3, "bytecodeHash": "0x" + "22" * 32} for name in NAMES
    },
}


def write(tmp_path: Path, value: Any) -> Path:
    path = tmp_path / "31337.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_a_book_is_read_and_names_the_domains(tmp_path: Path) -> None:
    book = load_book(write(tmp_path, BOOK))
    assert (book.chain_id, book.block_tag, book.contracts["Token"].deploy_block) == (31337, "safe", 3)
    assert book.staking_domain.contract == samples.address("Staking")
    assert (book.escrow_domain.name, book.escrow_domain.contract) == ("Tallystick Escrow", samples.address("Escrow"))


def test_addresses_in_any_case_are_kept_in_one(tmp_path: Path) -> None:
    lower = copy.deepcopy(BOOK)
    for entry in lower["contracts"].values():
        entry["address"] = entry["address"].lower()
    assert load_book(write(tmp_path, lower)) == load_book(write(tmp_path, BOOK))


def test_a_missing_book_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="scripts/devnet"):
        load_book(tmp_path / "none.json")


@pytest.mark.parametrize("key", ["chainId", "genesis", "blockTag", "contracts"])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        load_book(write(tmp_path, {name: value for name, value in BOOK.items() if name != key}))


@pytest.mark.parametrize(
    "address", ["", "0x12", "zz", 5, None, [], samples.address("x") + "\n", samples.address("x")[2:]]
)
def test_what_is_no_address_is_refused_before_anything_is_signed_for_it(tmp_path: Path, address: Any) -> None:
    broken = copy.deepcopy(BOOK)
    broken["contracts"]["Escrow"]["address"] = address
    with pytest.raises(ConfigError, match="malformed"):
        load_book(write(tmp_path, broken))


@pytest.mark.parametrize("text", ["", "[]", "null", "5", '"x"', '{"contracts":[]}', '{"contracts":{"Token":5}}'])
def test_a_malformed_book_is_a_config_error_and_nothing_else(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError):
        load_book(write(tmp_path, text))
    with pytest.raises(ConfigError):
        load_book(tmp_path)


def test_the_sample_addresses_are_addresses() -> None:
    assert all(len(address_bytes(entry["address"])) == 20 for entry in BOOK["contracts"].values())
