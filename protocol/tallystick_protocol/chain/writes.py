"""Transactions: one nonce allocator per key, estimated gas, awaited receipts."""

from __future__ import annotations

import threading
import time
from typing import Any

from eth_account import Account
from web3.exceptions import TransactionNotFound

from tallystick_protocol.chain.book import LOCAL_CHAINS
from tallystick_protocol.chain.reads import Chain
from tallystick_protocol.errors import ChainError, ConfigError
from tallystick_protocol.messages import Endpoint, encode_endpoints
from tallystick_protocol.signing import Key
from tallystick_protocol.types import Address, Digest, ModelId, Span, Wei
from tallystick_protocol.vouchers import Bind

RECEIPT_TIMEOUT_S = 60.0
BIND_DEADLINE_S = 3600
# Private keys of the public test mnemonic "test test … junk", accounts 0 to 2: anybody can spend what they hold.
_PUBLIC_ADDRESSES = {
    "0xf39Fd6e51aad88F6F4ce6aB8827279cffFb92266",
    "0x70997970C51812dc3A010C7d01b50e0d17dc79C8",
    "0x3C44CdDdB6a900fa2b585dd299e03d12FA4293BC",
}


class Wallet:
    """One key's transactions. Blocking: call from a thread."""

    def __init__(self, chain: Chain, key: Key) -> None:
        """Raises ConfigError for a key that is public knowledge, unless the chain is a local one."""
        if key.address in _PUBLIC_ADDRESSES and chain.book.chain_id not in LOCAL_CHAINS:
            raise ConfigError(f"{key.address} is a public test key: never use it on chain {chain.book.chain_id}")
        self.chain = chain
        self.key = key
        self._lock = threading.Lock()

    @property
    def address(self) -> Address:
        return self.key.address

    def send(self, what: str, call: Any) -> dict[str, Any]:
        """Send a contract call and wait until it is mined. Raises ChainError saying why it would not work."""
        web3 = self.chain.web3

        def broadcast() -> Any:
            transaction = call.build_transaction(
                {"from": self.address, "nonce": web3.eth.get_transaction_count(self.address, "pending")}
            )
            transaction["gas"] = transaction["gas"] * 5 // 4  # storage that others touch in between may cost more
            signed = Account.sign_transaction(transaction, self.key.secret)
            return web3.eth.send_raw_transaction(signed.raw_transaction)

        with self._lock:
            digest = self.chain.guard(what, broadcast)
            receipt = self._wait(what, digest)
        if receipt["status"] != 1:
            raise ChainError(f"{what}: the transaction 0x{bytes(digest).hex()} was reverted")
        return receipt

    def add_model(self, manifest: Digest, weights: Digest, layers: int) -> None:
        self.send("adding the model", self.chain.models.functions.add(manifest, weights, layers))

    def stake(self, node: Address, amount: Wei) -> None:
        """Approve and stake tokens of this wallet for a node."""
        spender = self.chain.staking.address
        self.send("approving the stake", self.chain.token.functions.approve(spender, amount))
        self.send("staking", self.chain.staking.functions.stake(node, amount))

    def bind(self, signer: Key) -> None:
        """Let a hot key sign for this (cold) key's node, with the hot key's consent."""
        deadline = self.chain.now() + BIND_DEADLINE_S
        consent = signer.sign_struct(self.chain.book.staking_domain, Bind(self.address, deadline))
        self.send("binding the hot key", self.chain.staking.functions.bind(signer.address, deadline, consent))

    def serve(self, model: ModelId, span: Span, price: Wei, endpoints: tuple[Endpoint, ...], operator: Address) -> None:
        data = encode_endpoints(endpoints)
        call = self.chain.staking.functions.serve(model, span.start, span.end, price, data, operator)
        self.send("registering the span", call)

    def fund(self, client: Address, deposits: list[tuple[Address, Wei]]) -> None:
        """Approve and put tokens of this wallet into a client's channels. Raises ChainError."""
        total = sum(amount for _, amount in deposits)
        have = self.chain.balance(self.address)
        if have < total:
            raise ChainError(f"funding channels: {self.address} holds {have} token units, {total} are needed")
        approve = self.chain.token.functions.approve(self.chain.escrow.address, total)
        self.send("approving the channel", approve)
        self.send("funding channels", self.chain.escrow.functions.fund(client, deposits))

    def transfer(self, to: Address, amount: Wei) -> None:
        self.send("sending tokens", self.chain.token.functions.transfer(to, amount))

    def redeem(self, node: Address, vouchers: list[tuple[Address, Wei, bytes]]) -> Wei:
        """Redeem (client, total, signature) rows for a node; returns what left the channels, fee included."""
        rows = [(client, total, signature[:32], _compact(signature)) for client, total, signature in vouchers]
        receipt = self.send("redeeming vouchers", self.chain.escrow.functions.redeem(node, rows))
        logs = self.chain.escrow.events.Redeemed().process_receipt(receipt)
        return Wei(sum(int(log["args"]["amount"]) for log in logs))

    def _wait(self, what: str, digest: Any) -> dict[str, Any]:
        deadline = time.monotonic() + RECEIPT_TIMEOUT_S
        while time.monotonic() < deadline:
            try:
                return dict(self.chain.web3.eth.get_transaction_receipt(digest))
            except TransactionNotFound:
                time.sleep(0.05)
        raise ChainError(
            f"{what}: not mined within {RECEIPT_TIMEOUT_S:g} s; the transaction is 0x{bytes(digest).hex()}"
        )


def _compact(signature: bytes) -> bytes:
    """EIP-2098: s with v's parity in its top bit."""
    s = int.from_bytes(signature[32:64], "big") | (signature[64] - 27) << 255
    return s.to_bytes(32, "big")
