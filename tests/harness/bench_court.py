"""A chain of one's own for cases in Court: wallets, stakes, time that is moved, and who has how much."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from web3.types import RPCEndpoint

from tallystick_devnet.localchain import LocalChain
from tallystick_protocol.chain.docket import Docket
from tallystick_protocol.chain.writes import Wallet
from tallystick_protocol.signing import Key
from tallystick_protocol.transport.contact import Contact
from tallystick_protocol.types import Digest, ModelId, Span, Wei

THOUSAND = 1000 * 10**18


def key(number: int) -> Key:
    return Key(number.to_bytes(32, "big"))


@dataclass(slots=True)
class CourtBench:
    """An accused node, an accuser without stake, and jurors with 20,000 tokens each, an epoch after they staked."""

    local: LocalChain
    manifest: Digest
    weights: Digest
    layers: int
    num_jurors: int = 3
    model: ModelId = field(init=False)
    hot: Key = field(default_factory=lambda: key(900))
    accused: Wallet = field(init=False)
    accuser: Wallet = field(init=False)
    jurors: list[Wallet] = field(init=False)
    docket: Docket = field(init=False)

    def __post_init__(self) -> None:
        chain = self.local.chain()
        self.docket = Docket(chain)
        self.rpc("evm_setIntervalMining", 0)
        self.rpc("evm_setAutomine", True)
        self.accused, self.accuser = Wallet(chain, key(901)), Wallet(chain, key(902))
        self.jurors = [Wallet(chain, key(910 + number)) for number in range(self.num_jurors)]
        everybody = [self.accused, self.accuser, *self.jurors]
        self.local.give(*(wallet.address for wallet in everybody), tokens=Wei(25 * THOUSAND))
        add = chain.models.functions.add(self.manifest, self.weights, self.layers)
        self.model = ModelId(bytes(add.call({"from": self.accuser.address})))
        self.accuser.add_model(self.manifest, self.weights, self.layers)
        for wallet, thousands in [(self.accused, 10), *((juror, 20) for juror in self.jurors)]:
            wallet.stake(wallet.address, Wei(thousands * THOUSAND))
            wallet.serve(self.model, Span(0, self.layers), Wei(1), Contact(wallet.address, ()), wallet.address)
        self.accused.bind(self.hot)
        self.accuser.send("approving", chain.token.functions.approve(chain.court.address, 10 * THOUSAND))
        self.wait(86_400)

    def rpc(self, method: str, *params: Any) -> Any:
        answer = self.local.chain().web3.provider.make_request(RPCEndpoint(method), list(params))
        assert "error" not in answer, answer
        return answer["result"]

    def wait(self, seconds: int) -> None:
        self.rpc("evm_increaseTime", seconds)
        self.rpc("evm_mine")

    def wealth(self) -> dict[str, int]:
        """Tokens of everybody, stakes included, and of the Court; nobody's stake is leaving."""
        chain = self.docket.chain
        named = {"accused": self.accused.address, "accuser": self.accuser.address}
        named |= {f"juror {number}": juror.address for number, juror in enumerate(self.jurors)}
        found = {name: chain.balance(address) + chain.node(address).active for name, address in named.items()}
        return {
            **found,
            "court": chain.balance(chain.court.address),
            "supply": chain.token.functions.totalSupply().call(),
        }
