"""Reads from an RPC that is down, slow, hostile or another chain's: always a ChainError that says what to look at."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest

from harness import samples
from tallystick_protocol.chain import writes
from tallystick_protocol.chain.book import NAMES, AddressBook, Deployment
from tallystick_protocol.chain.papers import compact
from tallystick_protocol.chain.reads import Chain
from tallystick_protocol.chain.writes import Wallet
from tallystick_protocol.errors import ChainError, ConfigError
from tallystick_protocol.signing import Key, recover
from tallystick_protocol.types import Digest

Serve = Callable[[int, bytes], Chain]


def book(chain_id: int = 31337) -> AddressBook:
    contracts = {name: Deployment(samples.address(name), 0, "0x" + "22" * 32) for name in NAMES}
    return AddressBook(chain_id, "0x" + "11" * 32, "latest", contracts)


@pytest.fixture
def serve() -> Iterator[Serve]:
    """serve(status, body): a chain whose RPC gives this answer to everything."""
    servers = []

    def start(status: int, body: bytes) -> Chain:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None: ...

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        return Chain(f"http://127.0.0.1:{server.server_address[1]}", book())

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def result(text: str) -> bytes:
    return b'{"jsonrpc":"2.0","id":1,"result":' + text.encode() + b"}"


READS: dict[str, Callable[[Chain], object]] = {
    "check": lambda chain: chain.check(),
    "now": lambda chain: chain.now(),
    "model": lambda chain: chain.model(samples.MODEL),
    "all models": lambda chain: chain.all_models(),
    "node": lambda chain: chain.node(samples.address("n")),
    "node of": lambda chain: chain.node_of(samples.address("n")),
    "serving": lambda chain: chain.serving(samples.MODEL),
    "funds": lambda chain: chain.funds(samples.address("c"), samples.address("n")),
    "balance": lambda chain: chain.balance(samples.address("c")),
}
ANSWERS: dict[str, tuple[int, bytes]] = {
    "too many requests": (429, b"slow down"),
    "a server error": (500, b"{}"),
    "a web page": (200, b"<html>hello</html>"),
    "nothing": (200, b""),
    "half an answer": (200, b'{"jsonrpc":"2.0","id":1,"res'),
    "a list": (200, b"[]"),
    "a number": (200, b"5"),
    "null": (200, b"null"),
    "an empty object": (200, b"{}"),
    "a null result": (200, result("null")),
    "a number as result": (200, result("5")),
    "a list as result": (200, result("[]")),
    "an object as result": (200, result("{}")),
    "a list of numbers as result": (200, result("[1,2]")),
    "text as result": (200, result('"0xzz"')),
    "short bytes as result": (200, result('"0x12"')),
    "an error": (200, b'{"jsonrpc":"2.0","id":1,"error":{"code":-32000,"message":"no"}}'),
    "an error that is text": (200, b'{"jsonrpc":"2.0","id":1,"error":"no"}'),
    "an error that is null": (200, b'{"jsonrpc":"2.0","id":1,"error":null}'),
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_hostile_rpc_is_a_chain_error_and_nothing_else(serve: Serve, answer: str) -> None:
    chain = serve(*ANSWERS[answer])
    for name, read in READS.items():
        try:
            read(chain)
        except ChainError as error:
            assert error.message
        except Exception as error:
            raise AssertionError(f"{name}: {error!r}") from error


def test_an_rpc_that_is_down_is_named_with_what_to_look_at() -> None:
    with pytest.raises(ChainError, match=r"the RPC at http://127\.0\.0\.1:1 does not answer.*is the chain running"):
        Chain("http://127.0.0.1:1", book()).check()


def test_another_chain_is_refused(serve: Serve) -> None:
    with pytest.raises(ChainError, match="is chain 1, the address book is for 31337"):
        serve(200, result('"0x1"')).check()


def test_an_rpc_that_goes_down_while_a_transaction_is_awaited_is_a_chain_error_that_names_it() -> None:
    chain: Any = Chain("http://127.0.0.1:1", book())
    wallet = Wallet(chain, samples.key("payer"))
    with pytest.raises(ChainError, match=r"staking: waiting for 0x0101"):
        wallet._wait("staking", b"\1" * 32)


FIRST_ACCOUNT = bytes.fromhex("ac0974bec39a17e36ba4a6b4d238ff944bacb478cbed5efcae784d7bf4f2ff80")
PUBLIC = [Key(bytes(31) + b"\1"), Key(FIRST_ACCOUNT)]


@pytest.mark.parametrize("key", PUBLIC, ids=["key 1", "account 0 of the test mnemonic"])
def test_a_key_that_everybody_knows_is_refused_outside_local_chains(key: Key) -> None:
    for chain_id in (31337, 1337):
        Wallet(SimpleNamespace(book=book(chain_id)), key)  # type: ignore[arg-type]
    for chain_id in (1, 11155111, 31338):
        with pytest.raises(ConfigError, match="public test key"):
            Wallet(SimpleNamespace(book=book(chain_id)), key)  # type: ignore[arg-type]


def test_all_twenty_accounts_of_the_test_mnemonic_are_known() -> None:
    from eth_account import Account

    Account.enable_unaudited_hdwallet_features()
    words = "test " * 11 + "junk"
    found = {Account.from_mnemonic(words, account_path=f"m/44'/60'/0'/0/{i}").address for i in range(20)}
    assert found | {PUBLIC[0].address} == writes._PUBLIC_ADDRESSES


@pytest.mark.parametrize("number", range(8))
def test_a_compact_signature_keeps_the_parity_in_the_top_bit(number: int) -> None:
    message = Digest(samples.digest(f"message {number}"))
    key = samples.key("signer")
    signature = key.sign(message)
    packed = compact(signature)
    v, s = 27 + (packed[0] >> 7), bytes([packed[0] & 0x7F]) + packed[1:]
    assert recover(message, signature[:32] + s + bytes([v])) == key.address
