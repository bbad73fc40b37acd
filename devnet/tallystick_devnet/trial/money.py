"""Where every token is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tallystick_devnet.localchain import rich_key
from tallystick_protocol.chain.reads import Chain
from tallystick_protocol.types import Address


@dataclass(frozen=True, slots=True)
class Wealth:
    """Token base units: in hand and at stake of each person, in the contracts, and in all."""

    hand: Mapping[str, int]
    stake: Mapping[str, int]
    contracts: Mapping[str, int]
    supply: int

    @property
    def adds_up(self) -> bool:
        """Whether nobody else has any."""
        held = sum(self.hand.values()) + sum(self.stake.values()) + sum(self.contracts.values())
        return held == self.supply

    def of(self, name: str) -> int:
        return self.hand[name] + self.stake.get(name, 0)


def wealth(chain: Chain, people: Mapping[str, Address], nodes: Sequence[str]) -> Wealth:
    """nodes: the names of those that have a stake."""
    hand = {name: int(chain.balance(address)) for name, address in people.items()}
    hand["treasury"] = int(chain.balance(rich_key().address))
    records = {name: chain.node(people[name]) for name in nodes}
    stake = {name: int(record.active + record.leaving) for name, record in records.items()}
    staked = int(chain.balance(chain.book.contracts["Staking"].address))
    contracts = {
        name: int(chain.balance(chain.book.contracts[name].address)) for name in ("Escrow", "Court", "Emissions")
    }
    assert staked == sum(stake.values()), "somebody else has a stake"
    supply = int(chain.guard("reading the supply", lambda: chain.token.functions.totalSupply().call()))
    return Wealth(hand, stake, contracts, supply)
