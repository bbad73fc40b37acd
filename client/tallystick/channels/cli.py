"""`tallystick fund`, `exit`, `withdraw`, `signer`, `send`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tallystick_protocol.chain.papers import Paper, authorize, from_json, order_exit, order_signer, to_json
from tallystick_protocol.chain.reads import Chain
from tallystick_protocol.chain.writes import Wallet
from tallystick_protocol.errors import BadMessage, ConfigError
from tallystick_protocol.signing import Key, address_bytes, checksum_address
from tallystick_protocol.types import Address, Wei

PAPER_LIFETIME_S = 24 * 3600
MAX_PAPER_BYTES = 1 << 16


def add(
    commands: Any, open_chain: Callable[[argparse.Namespace], Chain], open_key: Callable[[argparse.Namespace], Key]
) -> None:
    """Add the commands. open_chain, open_key: what the parsed options name."""

    def command(name: str, summary: str, run: Callable[[argparse.Namespace, Chain, Key], int]) -> Any:
        parser = commands.add_parser(name, help=summary)
        parser.set_defaults(command=lambda options: run(options, open_chain(options), open_key(options)))
        return parser

    fund = command("fund", "put tokens into the channel to a node", _fund)
    leave = command("exit", "begin to take tokens out of the channel to a node; 0 calls it off", _exit)
    withdraw = command("withdraw", "end an exit, when its delay is over", _withdraw)
    signer = command("signer", "let another key sign vouchers for this one, or stop it", _signer)
    send = command("send", "send what another key has signed with --sign, and pay its gas", _send)
    for parser in (fund, leave, withdraw):
        parser.add_argument("--node", required=True)
    for parser in (fund, leave):
        parser.add_argument("--amount", type=int, required=True, help="token base units (1e-18)")
    for parser in (fund, leave, signer):
        parser.add_argument(
            "--sign", action="store_true",
            help="send nothing: print a signed paper that anybody can `send` within a day, for a key without gas",
        )  # fmt: skip
    withdraw.add_argument("--client", help="whose exit it is; this key's own by default. The money goes there")
    signer.add_argument("signer", help="the other key's address")
    signer.add_argument("--off", action="store_true", help="stop it, after the exit delay")
    send.add_argument("paper", type=Path, help="a file with the paper; - for stdin")


def _fund(options: argparse.Namespace, chain: Chain, key: Key) -> int:
    node = _address("--node", options.node)
    if options.amount <= 0:
        raise ConfigError(f"--amount {options.amount} is not a positive number of token base units")
    deposits = [(node, Wei(options.amount))]
    if options.sign:
        have = chain.balance(key.address)
        if have < options.amount:
            raise ConfigError(f"{key.address} holds {have} token units, --amount is {options.amount}")
        return _print(authorize(chain.book, key, key.address, deposits, chain.now() + PAPER_LIFETIME_S))
    Wallet(chain, key).fund(key.address, deposits)
    funds = chain.funds(key.address, node)
    print(f"the channel to {node} holds {funds.latest - funds.paid} not yet paid out")
    return 0


def _exit(options: argparse.Namespace, chain: Chain, key: Key) -> int:
    node = _address("--node", options.node)
    if not 0 <= options.amount < 1 << 128:
        raise ConfigError(f"--amount {options.amount} is not a number of token base units")
    if options.sign:
        nonce, deadline = chain.order_nonce(key.address), chain.now() + PAPER_LIFETIME_S
        return _print(order_exit(chain.book, key, node, Wei(options.amount), nonce, deadline))
    Wallet(chain, key).exit(node, Wei(options.amount))
    amount, ready_at = chain.exiting(key.address, node)
    when = datetime.fromtimestamp(ready_at, UTC).isoformat(timespec="seconds")
    print(f"{amount} leave the channel to {node}; withdraw them from {when} on" if amount else "nothing leaves now")
    return 0


def _withdraw(options: argparse.Namespace, chain: Chain, key: Key) -> int:
    node = _address("--node", options.node)
    client = _address("--client", options.client) if options.client else key.address
    print(f"{Wallet(chain, key).withdraw(client, node)} are back at {client}")
    return 0


def _signer(options: argparse.Namespace, chain: Chain, key: Key) -> int:
    signer = _address("the signer", options.signer)
    if options.sign:
        nonce, deadline = chain.order_nonce(key.address), chain.now() + PAPER_LIFETIME_S
        return _print(order_signer(chain.book, key, signer, not options.off, nonce, deadline))
    Wallet(chain, key).set_signer(signer, not options.off)
    print(f"{signer} {'signs vouchers no more after the exit delay' if options.off else 'may sign vouchers'}")
    return 0


def _send(options: argparse.Namespace, chain: Chain, key: Key) -> int:
    paper = _read(options.paper)
    Wallet(chain, key).send_paper(paper)
    print(f"sent: {paper.kind} for {paper.client}")
    return 0


def _read(path: Path) -> Paper:
    """Raises ConfigError: a file that cannot be read, or holds something else."""
    try:
        with sys.stdin.buffer if str(path) == "-" else path.open("rb") as file:
            raw = file.read(MAX_PAPER_BYTES + 1)
        if len(raw) > MAX_PAPER_BYTES:
            raise ConfigError(f"{path} is no paper: it has more than {MAX_PAPER_BYTES} bytes")
        return from_json(json.loads(raw))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no paper: {error}") from None
    except BadMessage as error:
        raise ConfigError(f"{path} is no paper: {error.message}") from None


def _print(paper: Paper) -> int:
    print(json.dumps(to_json(paper)))
    return 0


def _address(what: str, text: str) -> Address:
    try:
        return checksum_address(address_bytes(Address(text)))
    except BadMessage:
        raise ConfigError(f"{what} {text!r} is not an address (0x and 40 hex digits)") from None
