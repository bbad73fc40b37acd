"""A client that holds tokens and no coin for gas: what it signs, a stranger sends, by the commands of a person."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from web3.types import RPCEndpoint

from tallystick import cli
from tallystick_devnet.localchain import LocalChain, rich_key, start_chain
from tallystick_protocol.chain.papers import from_json, order_signer, to_json
from tallystick_protocol.chain.reads import Chain
from tallystick_protocol.chain.writes import Wallet
from tallystick_protocol.errors import ChainError
from tallystick_protocol.keystore import create_keystore
from tallystick_protocol.signing import Key
from tallystick_protocol.types import Wei

PASSWORD = "of the papers"
CLIENT, SENDER, NODE, SIGNER = (Key(number.to_bytes(32, "big")) for number in (701, 702, 703, 704))
Command = Callable[..., str]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalChain]:
    local = start_chain(tmp_path_factory.mktemp("papers"))
    try:
        yield local
    finally:
        local.process.stop()


@pytest.fixture
def chain(local: LocalChain) -> Chain:
    return local.chain()


@pytest.fixture
def type_in(local: LocalChain, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    (tmp_path / "password").write_text(PASSWORD + "\n")
    (tmp_path / "password").chmod(0o600)

    def run(key: Key, *words: str, status: int = 0) -> str:
        keystore = tmp_path / f"{key.address}.json"
        if not keystore.exists():
            create_keystore(keystore, PASSWORD, key.secret, fast=True)
        before = ["--rpc", local.rpc, "--book", str(local.book), "--key", str(keystore)]
        assert cli.main([*before, "--password-file", str(tmp_path / "password"), *words]) == status
        said = capsys.readouterr()
        return said.out if status == 0 else said.err

    return run


def rpc(chain: Chain, method: str, *params: Any) -> None:
    assert "error" not in chain.web3.provider.make_request(RPCEndpoint(method), list(params))


def test_money_goes_into_a_channel_and_back_without_a_coin_of_the_client(
    local: LocalChain, chain: Chain, type_in: Command, tmp_path: Path
) -> None:
    local.give(SENDER.address, tokens=Wei(0))
    Wallet(chain, rich_key()).transfer(CLIENT.address, Wei(1000))
    assert chain.web3.eth.get_balance(CLIENT.address) == 0
    paper = tmp_path / "paper.json"
    node = NODE.address

    paper.write_text(type_in(CLIENT, "fund", "--node", node, "--amount", "700", "--sign"))
    assert chain.balance(CLIENT.address) == 1000, "signing moves nothing"
    assert "sent: fund" in type_in(SENDER, "send", str(paper))
    assert chain.funds(CLIENT.address, node).latest == 700
    assert chain.balance(CLIENT.address) == 300
    assert "used already" in type_in(SENDER, "send", str(paper), status=1)

    turned = json.loads(paper.read_text())
    turned["deposits"] = [[SENDER.address, "300"]]
    paper.write_text(json.dumps(turned))
    assert "signed for something else" in type_in(SENDER, "send", str(paper), status=1)

    paper.write_text(type_in(CLIENT, "exit", "--node", node, "--amount", "500", "--sign"))
    type_in(SENDER, "send", str(paper))
    assert chain.funds(CLIENT.address, node).latest == 200, "money that leaves is no money"
    assert "nonce was used" in type_in(SENDER, "send", str(paper), status=1)
    assert "NotReady" in type_in(SENDER, "withdraw", "--node", node, "--client", CLIENT.address, status=1)
    rpc(chain, "evm_increaseTime", 3 * 86_400)
    rpc(chain, "evm_mine")
    said = type_in(SENDER, "withdraw", "--node", node, "--client", CLIENT.address)
    assert said == f"500 are back at {CLIENT.address}\n"
    assert chain.balance(CLIENT.address) == 800

    paper.write_text(type_in(CLIENT, "signer", SIGNER.address, "--sign"))
    type_in(SENDER, "send", str(paper))
    assert chain.may_sign(CLIENT.address, SIGNER.address)
    assert chain.web3.eth.get_balance(CLIENT.address) == 0


def test_with_gas_of_its_own_a_client_sends_itself(local: LocalChain, chain: Chain, type_in: Command) -> None:
    own = Key((705).to_bytes(32, "big"))
    local.give(own.address, tokens=Wei(100))
    type_in(own, "fund", "--node", NODE.address, "--amount", "90")
    assert "50 leave the channel" in type_in(own, "exit", "--node", NODE.address, "--amount", "50")
    assert type_in(own, "exit", "--node", NODE.address, "--amount", "0") == "nothing leaves now\n"
    assert "NotExiting" in type_in(own, "withdraw", "--node", NODE.address, status=1)
    type_in(own, "signer", SIGNER.address)
    assert chain.may_sign(own.address, SIGNER.address)
    assert "after the exit delay" in type_in(own, "signer", SIGNER.address, "--off")
    assert chain.may_sign(own.address, SIGNER.address), "until the delay is over"


def test_an_expired_order_and_one_of_another_chain_are_refused(local: LocalChain, chain: Chain) -> None:
    local.give(SENDER.address, tokens=Wei(0))
    wallet = Wallet(chain, SENDER)
    client = Key((706).to_bytes(32, "big"))
    late = order_signer(chain.book, client, SIGNER.address, True, 0, chain.now() - 1)
    with pytest.raises(ChainError, match="Expired"):
        wallet.send_paper(late)
    good = order_signer(chain.book, client, SIGNER.address, True, 0, chain.now() + 600)
    assert from_json(json.loads(json.dumps(to_json(good)))) == good
    wallet.send_paper(good)
    assert chain.may_sign(client.address, SIGNER.address)
