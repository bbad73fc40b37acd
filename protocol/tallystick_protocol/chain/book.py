"""The address book: which contracts on which chain, as `scripts/deploy.js` writes it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from tallystick_protocol.errors import BadMessage, ConfigError
from tallystick_protocol.signing import (
    Domain,
    address_bytes,
    checksum_address,
    escrow_domain,
    staking_domain,
    token_domain,
)
from tallystick_protocol.types import Address

NAMES = tuple(sorted(path.name[:-5] for path in (files(__package__) / "abi").iterdir() if path.name.endswith(".json")))
"""The contracts; `scripts/export_abi` ships an ABI of each."""
LOCAL_CHAINS = (31337, 1337)


@dataclass(frozen=True, slots=True)
class Deployment:
    """One contract: where it is, since which block, and keccak256 of the code found there."""

    address: Address
    deploy_block: int
    bytecode_hash: str


@dataclass(frozen=True, slots=True)
class AddressBook:
    """block_tag: the block at which money is believed (`safe`); genesis: the hash of block 0."""

    chain_id: int
    genesis: str
    block_tag: str
    contracts: dict[str, Deployment]

    @property
    def escrow_domain(self) -> Domain:
        return escrow_domain(self.chain_id, self.contracts["Escrow"].address)

    @property
    def staking_domain(self) -> Domain:
        return staking_domain(self.chain_id, self.contracts["Staking"].address)

    @property
    def token_domain(self) -> Domain:
        return token_domain(self.chain_id, self.contracts["Token"].address)


def load_book(path: Path) -> AddressBook:
    """Raises ConfigError naming the file and what to run."""
    try:
        value: dict[str, Any] = json.loads(path.read_text())
        contracts = {
            name: Deployment(
                checksum_address(address_bytes(value["contracts"][name]["address"])),
                int(value["contracts"][name]["deployBlock"]),
                str(value["contracts"][name]["bytecodeHash"]),
            )
            for name in NAMES
        }
        return AddressBook(int(value["chainId"]), str(value["genesis"]), str(value["blockTag"]), contracts)
    except FileNotFoundError:
        raise ConfigError(
            f"there is no address book at {path}; start a local network (scripts/devnet) or deploy (scripts/deploy.js)"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, BadMessage) as error:
        raise ConfigError(f"the address book {path} is malformed ({type(error).__name__}: {error})") from None
