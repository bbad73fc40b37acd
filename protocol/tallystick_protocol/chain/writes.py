"""Transactions: one nonce allocator per key, estimated gas, awaited receipts."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import requests
from eth_account import Account
from web3.exceptions import TransactionNotFound
from web3.logs import DISCARD

from tallystick_protocol.chain.book import LOCAL_CHAINS
from tallystick_protocol.chain.papers import Paper, compact
from tallystick_protocol.chain.reads import Chain
from tallystick_protocol.errors import ChainError, ConfigError
from tallystick_protocol.signing import Key
from tallystick_protocol.transport.contact import Contact, encode_endpoint
from tallystick_protocol.types import Address, Digest, ModelId, Span, Wei
from tallystick_protocol.vouchers import Bind

log = logging.getLogger(__name__)

RECEIPT_TIMEOUT_S = 60.0
BIND_DEADLINE_S = 3600
# Anybody can spend what these hold: accounts 0 to 19 of the test mnemonic "test test … junk", and private key 1.
_PUBLIC_ADDRESSES = {
    "0xf39Fd6e51aad88F6F4ce6aB8827279cffFb92266",
    "0x70997970C51812dc3A010C7d01b50e0d17dc79C8",
    "0x3C44CdDdB6a900fa2b585dd299e03d12FA4293BC",
    "0x90F79bf6EB2c4f870365E785982E1f101E93b906",
    "0x15d34AAf54267DB7D7c367839AAf71A00a2C6A65",
    "0x9965507D1a55bcC2695C58ba16FB37d819B0A4dc",
    "0x976EA74026E726554dB657fA54763abd0C3a0aa9",
    "0x14dC79964da2C08b23698B3D3cc7Ca32193d9955",
    "0x23618e81E3f5cdF7f54C3d65f7FBc0aBf5B21E8f",
    "0xa0Ee7A142d267C1f36714E4a8F75612F20a79720",
    "0xBcd4042DE499D14e55001CcbB24a551F3b954096",
    "0x71bE63f3384f5fb98995898A86B02Fb2426c5788",
    "0xFABB0ac9d68B0B445fB7357272Ff202C5651694a",
    "0x1CBd3b2770909D4e10f157cABC84C7264073C9Ec",
    "0xdF3e18d64BC6A983f673Ab319CCaE4f1a57C7097",
    "0xcd3B766CCDd6AE721141F452C550Ca635964ce71",
    "0x2546BcD3c84621e976D8185a91A922aE77ECEc30",
    "0xbDA5747bFD65F08deb54cb465eB87D40e51B197E",
    "0xdD2FD4581271e230360230F9337D5c0430Bf44C0",
    "0x8626f6940E2eb28930eFb4CeF49B2d1F2C9C1199",
    "0x7E5F4552091A69125d5DfCb7b8C2659029395Bdf",
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

    def send(self, what: str, call: Any, appendix: bytes = b"") -> dict[str, Any]:
        """Send a contract call and wait until it is mined. Raises ChainError saying why it would not work; with the
        field `transaction` where it may be mined yet.

        appendix: bytes behind the arguments, which the contract ignores.
        """
        web3 = self.chain.web3

        def broadcast() -> Any:
            transaction = call.build_transaction(
                {"from": self.address, "nonce": web3.eth.get_transaction_count(self.address, "pending")}
            )
            transaction["gas"] = transaction["gas"] * 5 // 4  # storage that others touch in between may cost more
            transaction["data"] += appendix.hex()
            transaction["gas"] += 40 * len(appendix)  # EIP-7623's floor for a byte
            signed = Account.sign_transaction(transaction, self.key.secret)
            try:
                web3.eth.send_raw_transaction(signed.raw_transaction)
            except requests.RequestException as error:
                log.warning("%s: no answer to the transaction (%s), which may have arrived", what, error)
            return signed.hash

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

    def serve(self, model: ModelId, span: Span, price: Wei, contact: Contact, operator: Address) -> None:
        data = encode_endpoint(contact)
        call = self.chain.staking.functions.serve(model, span.start, span.end, price, data, operator)
        self.send("registering the span", call)

    def beat(self) -> None:
        """Say on chain that the node lives that this wallet's (hot or cold) key belongs to; frees it from jail."""
        self.send("beating", self.chain.staking.functions.beat())

    def jail(self, node: Address) -> None:
        """Jail a node that nobody has seen for too long."""
        self.send(f"jailing {node}", self.chain.staking.functions.jail(node))

    def appeal(self, case: Digest, bond: Wei) -> None:
        """Approve the bond and appeal against what the case's round says. Raises ChainError."""
        self.send("approving the bond", self.chain.token.functions.approve(self.chain.court.address, bond))
        self.send("appealing", self.chain.court.functions.appeal(case))

    def fund(self, client: Address, deposits: list[tuple[Address, Wei]]) -> None:
        """Approve and put tokens of this wallet into a client's channels. Raises ChainError, with `transaction` where
        the deposit may be mined yet."""
        total = sum(amount for _, amount in deposits)
        have = self.chain.balance(self.address)
        if have < total:
            raise ChainError(f"funding channels: {self.address} holds {have} token units, {total} are needed")
        approve = self.chain.token.functions.approve(self.chain.escrow.address, total)
        try:
            self.send("approving the channel", approve)
        except ChainError as error:
            raise ChainError(error.message) from None  # whatever becomes of the approval, it deposits nothing
        self.send("funding channels", self.chain.escrow.functions.fund(client, deposits))

    def exit(self, node: Address, amount: Wei) -> None:
        """Begin to take money out of this wallet's channel with a node; 0 calls it off."""
        self.send("beginning an exit", self.chain.escrow.functions.exit(node, amount))

    def withdraw(self, client: Address, node: Address) -> Wei:
        """End an exit, once its delay is over: the money goes to the client. Returns it."""
        receipt = self.send("withdrawing", self.chain.escrow.functions.withdrawFor(client, node))
        logs = self.chain.escrow.events.Withdrawn().process_receipt(receipt, errors=DISCARD)
        return Wei(sum(int(log["args"]["amount"]) for log in logs))

    def set_signer(self, signer: Address, on: bool) -> None:
        """Let a key sign vouchers for this wallet, or stop it, EXIT_DELAY from now."""
        self.send("setting a signer", self.chain.escrow.functions.setSigner(signer, on))

    def send_paper(self, paper: Paper) -> None:
        """Send what another key has signed; this one pays the gas."""
        self.send(f"sending a signed {paper.kind}", paper.call(self.chain.escrow))

    def transfer(self, to: Address, amount: Wei) -> None:
        self.send("sending tokens", self.chain.token.functions.transfer(to, amount))

    def redeem(self, node: Address, vouchers: list[tuple[Address, Wei, bytes]]) -> Wei:
        """Redeem (client, total, signature) rows for a node; returns what left the channels, fee included."""
        rows = [(client, total, signature[:32], compact(signature)) for client, total, signature in vouchers]
        receipt = self.send("redeeming vouchers", self.chain.escrow.functions.redeem(node, rows))
        logs = self.chain.escrow.events.Redeemed().process_receipt(receipt, errors=DISCARD)
        return Wei(sum(int(log["args"]["amount"]) for log in logs))

    def _wait(self, what: str, digest: Any) -> dict[str, Any]:
        deadline, hexadecimal = time.monotonic() + RECEIPT_TIMEOUT_S, "0x" + bytes(digest).hex()

        def mined() -> dict[str, Any] | None:
            try:
                return dict(self.chain.web3.eth.get_transaction_receipt(digest))
            except TransactionNotFound:
                return None

        while time.monotonic() < deadline:
            try:
                receipt = self.chain.guard(f"{what}: waiting for {hexadecimal}", mined)
            except ChainError as error:
                raise ChainError(error.message, transaction=hexadecimal) from None
            if receipt is not None:
                return receipt
            time.sleep(0.05)
        raise ChainError(
            f"{what}: not mined within {RECEIPT_TIMEOUT_S:g} s; the transaction is {hexadecimal}",
            transaction=hexadecimal,
        )
