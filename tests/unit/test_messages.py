"""Session ids, offers and endpoints."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest

from harness import samples
from tallystick_protocol.errors import BadMessage
from tallystick_protocol.messages import (
    Endpoint,
    Offer,
    SessionOpen,
    decode_endpoints,
    encode_endpoints,
    session_id,
)
from tallystick_protocol.signing import address_bytes, from_words, to_words
from tallystick_protocol.types import ModelId


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def addrs(*entries: dict[str, Any]) -> bytes:
    return canonical({"addrs": list(entries)})


def test_a_session_id_is_the_hash_that_the_rulings_say() -> None:
    client, nonce = samples.address("client"), samples.digest("nonce")
    expected = hashlib.sha256((31337).to_bytes(32, "big") + address_bytes(client) + nonce + samples.MODEL).digest()
    assert session_id(31337, client, nonce, samples.MODEL) == expected


def test_a_session_id_differs_for_every_chain_client_nonce_and_model() -> None:
    ids = {
        session_id(chain, samples.address(client), samples.digest(nonce), ModelId(samples.digest(model)))
        for chain in (1, 31337)
        for client in ("a", "b")
        for nonce in ("a", "b")
        for model in ("a", "b")
    }
    assert len(ids) == 16


@pytest.mark.parametrize("cls", [Offer, SessionOpen])
def test_an_offer_or_opening_for_no_layers_is_refused_at_the_edge(cls: type) -> None:
    value = next(value for value in samples.structs() if type(value) is cls)
    values = {name: getattr(value, name) for name in cls.__slots__}  # type: ignore[attr-defined]
    for start, end in ((2, 2), (3, 2), (0, 0)):
        with pytest.raises(BadMessage, match="not a span"):
            from_words(cls, to_words(samples.unchecked(cls, {**values, "start": start, "end": end})))


def test_endpoints_come_back_as_they_were() -> None:
    endpoints = (Endpoint("tcp", "127.0.0.1", 9000), Endpoint("tcp", "::1", 65535), Endpoint("tcp", "node.example", 1))
    assert decode_endpoints(encode_endpoints(endpoints)) == endpoints
    assert [endpoint.url for endpoint in endpoints] == [
        "http://127.0.0.1:9000",
        "http://[::1]:65535",
        "http://node.example:1",
    ]


def test_unknown_kinds_are_skipped_whatever_they_hold() -> None:
    good = {"kind": "tcp", "host": "127.0.0.1", "port": 9000}
    found = decode_endpoints(addrs({"kind": "relay", "via": "0x12"}, {"kind": "quic", "host": 5, "port": []}, good))
    assert found == (Endpoint("tcp", "127.0.0.1", 9000),)


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
    assert decode_endpoints(data) == ()


@pytest.mark.parametrize("port", [0, -1, 65536, 2**70, True, 80.0, "80", None, []])
def test_a_port_that_is_none_is_no_endpoint(port: Any) -> None:
    assert decode_endpoints(addrs({"kind": "tcp", "host": "127.0.0.1", "port": port})) == ()


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
        decode_endpoints(data)


def test_at_most_eight_endpoints_are_taken() -> None:
    many = tuple(Endpoint("tcp", "127.0.0.1", port) for port in range(1, 20))
    assert decode_endpoints(encode_endpoints(many)) == many[:8]
