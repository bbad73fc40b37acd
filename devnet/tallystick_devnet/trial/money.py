"""Where every token is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tallystick_devnet.localchain import rich_key
from tallystick_protocol.chain.reads import Chain
from tallystick_protocol.types import Address


@dataclass(frozen=True, slots=True)
class Wealth:
    """Token base units: in hand, at stake and in channels of each person, in the contracts, and in all."""

    hand: Mapping[str, int]
    stake: Mapping[str, int]
    channels: Mapping[str, int]
    contracts: Mapping[str, int]
    supply: int

    @property
    def adds_up(self) -> bool:
        """Whether nobody else has any, and the Escrow holds what is in the channels."""
        held = sum(self.hand.values()) + sum(self.stake.values()) + sum(self.contracts.values())
        return held == self.supply and sum(self.channels.values()) == self.contracts["Escrow"]

    def of(self, name: str) -> int:
        return self.hand[name] + self.stake.get(name, 0) + self.channels.get(name, 0)


def wealth(chain: Chain, people: Mapping[str, Address], nodes: Sequence[str]) -> Wealth:
    """nodes: the names of those that have a stake; the others may have channels to them."""
    channels = {
        name: sum(_left(chain, address, people[node]) for node in nodes)
        for name, address in people.items()
        if name not in nodes
    }
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
    return Wealth(hand, stake, channels, contracts, supply)


def _left(chain: Chain, client: Address, node: Address) -> int:
    """What a channel holds that was not paid out."""
    channel = chain.guard("reading a channel", lambda: chain.escrow.functions.channels(client, node).call())
    return int(channel[0] - channel[1])
