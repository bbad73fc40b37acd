"""Where nodes are: endpoint bytes on chain, Reach records, and the directory that keeps them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from harness import samples
from tallystick_protocol.errors import BadMessage, ConfigError
from tallystick_protocol.transport.contact import Addr, Contact, decode_endpoint, encode_endpoint

NODE = samples.address("node")


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def addrs(*entries: dict[str, Any]) -> bytes:
    return canonical({"addrs": list(entries)})


def test_an_endpoint_comes_back_as_it_was() -> None:
    places = (Addr("tcp", "127.0.0.1", 9000), Addr("tcp", "::1", 65535), Addr("tcp", "node.example", 1))
    plain = Contact(NODE, places)
    assert decode_endpoint(NODE, encode_endpoint(plain)) == plain
    assert plain.sources == ["http://127.0.0.1:9000", "http://[::1]:65535", "http://node.example:1"]
    pinned = Contact(NODE, (Addr("relay", "203.0.113.9", 443), places[0]), (samples.digest("now"),), 7)
    assert decode_endpoint(NODE, encode_endpoint(pinned)) == pinned
    assert pinned.sources[0] == f"https://{NODE[2:].lower()}.node@203.0.113.9:443"


def test_what_does_not_fit_the_chain_is_left_out_from_the_back() -> None:
    places = tuple(Addr("tcp", f"203.0.113.{at}", 40000) for at in range(8))
    contact = Contact(NODE, places, (samples.digest("now"), samples.digest("next")), 1_700_000_000)
    data = encode_endpoint(contact)
    found = decode_endpoint(NODE, data)
    assert len(data) <= 256 and found.pins == contact.pins[:1] and found.addrs == places[: len(found.addrs)] != ()
    with pytest.raises(ConfigError, match="a shorter name"):
        encode_endpoint(Contact(NODE, (Addr("tcp", "a" * 250, 1),)))


def test_unknown_kinds_are_skipped_whatever_they_hold() -> None:
    good = {"kind": "tcp", "host": "127.0.0.1", "port": 9000}
    found = decode_endpoint(NODE, addrs({"kind": "punch", "via": 5}, {"kind": "quic", "host": 5, "port": []}, good))
    assert found.addrs == (Addr("tcp", "127.0.0.1", 9000),)


@pytest.mark.parametrize(
    "host",
    [
        "",
        "127.0.0.1/rpc?",
        "127.0.0.1:8545/rpc?",
        "user@127.0.0.1",
        "127.0.0.1#",
        "a b",
        "a\r\nHost: b",
        "exämple",
        "a" * 254,
        "::1%lo",
        "[::1]",
        "\x1b[2J",
    ],
)
def test_a_host_that_would_lead_elsewhere_is_no_endpoint(host: str) -> None:
    data = json.dumps(
        {"addrs": [{"host": host, "kind": "tcp", "port": 80}]},
        separators=(",", ":"),
        ensure_ascii=False,
    ).encode()
    assert decode_endpoint(NODE, data).addrs == ()


@pytest.mark.parametrize("port", [0, -1, 65536, 2**70, True, 80.0, "80", None, []])
def test_a_port_that_is_none_is_no_endpoint(port: Any) -> None:
    assert decode_endpoint(NODE, addrs({"kind": "tcp", "host": "127.0.0.1", "port": port})).addrs == ()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        b"null",
        b"[]",
        b"{}",
        b'{"addrs":null}',
        b'{"addrs":5}',
        b'{"addrs":[null]}',
        b'{"addrs":[{}]}',
        b'{"addrs":["tcp"]}',
        b'{"addrs":[{"kind":"tcp"}]}',
        b'{"addrs":[{"host":5,"kind":"tcp","port":80}]}',
        b'{"addrs": []}',
        b'{"addrs":[],"addrs":[]}',
        b"[" * 4096,
        b'{"a":' * 800,
        b"\xff\xfe",
    ],
    ids=lambda data: repr(data[:24]),
)
def test_malformed_endpoints_are_a_bad_message_and_nothing_else(data: bytes) -> None:
    with pytest.raises(BadMessage):
        decode_endpoint(NODE, data)


def test_at_most_eight_addresses_are_taken() -> None:
    many = [{"kind": "tcp", "host": "127.0.0.1", "port": port} for port in range(1, 20)]
    assert [addr.port for addr in decode_endpoint(NODE, addrs(*many)).addrs] == list(range(1, 9))


@pytest.mark.parametrize("keys", [["00"], ["zz" * 32], [5], 5, ["00" * 32] * 3, {"a": 1}])
def test_malformed_keys_are_a_bad_message(keys: Any) -> None:
    with pytest.raises(BadMessage):
        decode_endpoint(NODE, canonical({"addrs": [], "seq": 1, "spki": keys}))
