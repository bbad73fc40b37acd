"""Every function of the contracts that changes anything: nothing to pause, upgrade or confiscate came in by the way."""

from __future__ import annotations

import json

import pytest

from tallystick_devnet.localchain import repository
from tallystick_protocol.chain.book import NAMES
from tallystick_protocol.chain.reads import abi

ESCROW = "exit exitWithSig fund fundWithAuthorization redeem refund"
TOKEN = "approve burn burnFrom cancelAuthorization mint permit receiveWithAuthorization transfer transferFrom"
TIMELOCK = "cancel execute executeBatch grantRole renounceRole revokeRole schedule scheduleBatch updateDelay"
CHANGES = {
    "Token": f"{TOKEN} transferWithAuthorization",
    "Models": "add",
    "Staking": "beat bind hold jail serve setPayee slash stake unbond withdraw",
    "Escrow": f"{ESCROW} setSigner setSignerWithSig withdraw withdrawFor",
    "Beacon": "",
    "Timelock": f"{TIMELOCK} onERC1155BatchReceived onERC1155Received onERC721Received",
    "Court": "appeal commit draw enforce open redraw report retarget reveal rule setBeacon setRates settle",
    "Emissions": "claim",
}


def changing(name: str) -> list[str]:
    return sorted(
        entry["name"]
        for entry in abi(name)
        if entry["type"] == "function" and entry["stateMutability"] not in ("view", "pure")
    )


@pytest.mark.parametrize("name", CHANGES)
def test_nothing_else_changes_anything(name: str) -> None:
    assert changing(name) == sorted(CHANGES[name].split())


def test_every_contract_is_listed_once() -> None:
    listed = json.loads((repository() / "contracts" / "names.json").read_text())
    assert sorted(CHANGES) == sorted(NAMES) == sorted(listed)


@pytest.mark.parametrize("name", sorted(set(CHANGES) - {"Court", "Timelock"}))
def test_nobody_but_the_court_knows_a_governor(name: str) -> None:
    words = {entry.get("name", "").lower() for entry in abi(name)}
    assert not [word for word in words for part in ("govern", "admin", "pause", "upgrade") if part in word]
