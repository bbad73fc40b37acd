"""A chain of one's own: anvil on loopback, the contracts deployed by scripts/deploy.js."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from eth_account import Account
from web3.types import RPCEndpoint

from tallystick_devnet.processes import Process, ProcessFailed, start
from tallystick_protocol.chain.book import load_book
from tallystick_protocol.chain.reads import Chain
from tallystick_protocol.errors import ConfigError
from tallystick_protocol.signing import Key
from tallystick_protocol.types import Address, Wei

CHAIN_ID = 31337
MNEMONIC = "test test test test test test test test test test test junk"
ETHER = 10**18


def repository() -> Path:
    """The checkout this package runs from: anvil and the deploy script lie in it. Raises ConfigError elsewhere."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "scripts" / "deploy.js").exists():
        raise ConfigError("the local network runs from a checkout of the repository: clone it and run scripts/devnet")
    return root


def rich_key() -> Key:
    """Account 0 of the public test mnemonic: deployer and treasury of the local chain."""
    Account.enable_unaudited_hdwallet_features()
    return Key(bytes(Account.from_mnemonic(MNEMONIC).key))


@dataclass(frozen=True, slots=True)
class LocalChain:
    process: Process
    rpc: str
    book: Path

    def chain(self) -> Chain:
        return Chain(self.rpc, load_book(self.book))

    def give(self, *to: Address, tokens: Wei) -> None:
        """Ether for gas, and tokens from the treasury, to everybody in one block or two."""
        chain = self.chain()
        treasury = rich_key().address  # unlocked on a development chain
        sent = []
        for address in to:
            chain.guard(
                "giving ether",
                partial(chain.web3.provider.make_request, RPCEndpoint("anvil_setBalance"), [address, hex(10 * ETHER)]),
            )
            if tokens:
                transfer = chain.token.functions.transfer(address, tokens)
                sent.append(chain.guard("giving tokens", partial(transfer.transact, {"from": treasury})))
        for digest in sent:
            chain.guard("giving tokens", partial(chain.web3.eth.wait_for_transaction_receipt, digest, 30, 0.05))


def start_chain(folder: Path, port: int = 0) -> LocalChain:
    """Start anvil on 127.0.0.1 and deploy. Raises ProcessFailed, ConfigError."""
    root = repository()
    anvil = next(iter(sorted((root / "node_modules").glob("@foundry-rs/anvil-*/bin/anvil"))), None)
    node = shutil.which("node", path=f"{root}/.venv/bin:{_path()}")
    if anvil is None or node is None:
        raise ConfigError("anvil or Node.js is not installed; run scripts/install")
    command = [
        str(anvil), "--host", "127.0.0.1", "--port", str(port), "--chain-id", str(CHAIN_ID),
        "--block-time", "1", "--slots-in-an-epoch", "1", "--no-cors", "--mnemonic", MNEMONIC,
    ]  # fmt: skip
    process = start("anvil", command, folder / "anvil.log")
    try:
        rpc = "http://" + process.wait_for(r"Listening on (127\.0\.0\.1:\d+)", 20)
        book = folder / f"{CHAIN_ID}.json"
        deploy = [node, str(root / "scripts" / "deploy.js"), "--rpc", rpc, "--out", str(book)]
        done = subprocess.run(deploy, cwd=root, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode:
            raise ProcessFailed(f"deploying failed: {(done.stderr or done.stdout).strip()[-500:]}")
    except BaseException:
        process.stop()
        raise
    return LocalChain(process, rpc, book)


def _path() -> str:
    import os

    return os.environ.get("PATH", "")
