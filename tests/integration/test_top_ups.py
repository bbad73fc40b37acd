"""Money that is put into a channel is counted once, by client and node: what counts is what the chain says it holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import requests
from web3.types import RPCEndpoint

from harness.bench_court import THOUSAND, key
from tallystick.payments import Need, Purse
from tallystick_devnet.localchain import LocalChain, start_chain
from tallystick_node.stake import Lookups
from tallystick_protocol.chain import writes
from tallystick_protocol.chain.reads import Chain
from tallystick_protocol.errors import ChainError, ConfigError
from tallystick_protocol.types import Wei

NODE, CLIENT = key(901).address, key(950)
NEED = Wei(5 * 10**18)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalChain]:
    chain = start_chain(tmp_path_factory.mktemp("channels"))
    chain.give(CLIENT.address, tokens=Wei(THOUSAND))
    try:
        rpc(chain.chain(), "evm_setIntervalMining", 0)
        rpc(chain.chain(), "evm_setAutomine", True)
        yield chain
    finally:
        chain.process.stop()


def rpc(chain: Chain, method: str, *params: Any) -> Any:
    answer = chain.web3.provider.make_request(RPCEndpoint(method), list(params))
    assert "error" not in answer, answer
    return answer["result"]


def look(chain: Chain) -> Wei:
    """What a node sees that has just started."""
    return Lookups(chain, NODE).funds(CLIENT.address, Wei(1)).latest


def test_a_top_up_that_is_believed_lost_is_not_made_again_and_is_spent(
    local: LocalChain, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = local.chain()
    purse = Purse(chain, CLIENT, Wei(2 * NEED - 1))
    send = purse._wallet.send

    def late(what: str, call: Any) -> dict[str, Any]:
        if what == "funding channels":
            rpc(chain, "evm_setAutomine", False)
            monkeypatch.setattr(writes, "RECEIPT_TIMEOUT_S", 0.2)
        return send(what, call)

    monkeypatch.setattr(purse._wallet, "send", late)
    with pytest.raises(ChainError, match=r"funding channels: not mined within 0\.2 s"):
        purse.reserve([Need(NODE, NEED)])
    monkeypatch.undo()
    rpc(chain, "evm_setAutomine", True)
    rpc(chain, "evm_mine")
    assert look(chain) == NEED
    assert purse.reserve([Need(NODE, NEED)]) == 0
    assert purse.cover(NODE, NEED) == 0, "a node that asks for what is there"
    assert [look(chain) for _ in range(3)] == [NEED] * 3
    with pytest.raises(ConfigError, match=f"may spend {NEED - 1}"):
        purse.cover(NODE, Wei(NEED + 1))


def test_an_approval_that_is_not_mined_spends_nothing(local: LocalChain, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = local.chain()
    before, purse = look(chain), Purse(chain, CLIENT, NEED)
    monkeypatch.setattr(writes, "RECEIPT_TIMEOUT_S", 0.2)
    rpc(chain, "evm_setAutomine", False)
    try:
        with pytest.raises(ChainError, match="approving the channel: not mined"):
            purse.reserve([Need(NODE, Wei(before + NEED))])
    finally:
        monkeypatch.undo()
        rpc(chain, "evm_setAutomine", True)
        rpc(chain, "evm_mine")
    snapshot = rpc(chain, "evm_snapshot")
    assert purse.reserve([Need(NODE, Wei(before + NEED))]) == NEED
    rpc(chain, "evm_revert", snapshot)
    rpc(chain, "evm_mine")


def test_a_transaction_whose_answer_is_lost_is_waited_for(local: LocalChain, monkeypatch: pytest.MonkeyPatch) -> None:
    chain, snapshot = local.chain(), rpc(local.chain(), "evm_snapshot")
    before, purse = look(chain), Purse(chain, CLIENT, NEED)
    submit = chain.web3.eth.send_raw_transaction

    def unheard(raw: Any) -> None:
        submit(raw)
        raise requests.ConnectionError("reset by peer")

    monkeypatch.setattr(chain.web3.eth, "send_raw_transaction", unheard)
    assert purse.reserve([Need(NODE, Wei(before + NEED))]) == NEED
    assert look(chain) == before + NEED
    rpc(chain, "evm_revert", snapshot)
    rpc(chain, "evm_mine")


def test_a_top_up_that_a_reorganisation_takes_back_is_gone(local: LocalChain) -> None:
    chain = local.chain()
    before = look(chain)
    lookups = Lookups(chain, NODE)
    snapshot = rpc(chain, "evm_snapshot")
    purse = Purse(chain, CLIENT, Wei(NEED))
    purse.reserve([Need(NODE, Wei(before + NEED))])
    assert lookups.funds(CLIENT.address, Wei(before + NEED)).latest == before + NEED
    rpc(chain, "evm_revert", snapshot)
    rpc(chain, "evm_mine")
    assert lookups.funds(CLIENT.address, Wei(before + NEED)).latest == before
    with pytest.raises(ConfigError, match="max_cost"):
        purse.cover(NODE, Wei(before + NEED))  # what was paid once is spent, as far as this process knows
