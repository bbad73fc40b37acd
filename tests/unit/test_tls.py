"""Connections under TLS: the node's key, a handshake with anybody else, and what happens to those who will not."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from harness import samples
from harness.tls_server import TlsServer, tls_server, until_closed
from tallystick_node import listener as listener_module
from tallystick_node.config import load_config
from tallystick_node.listener import bind
from tallystick_node.reach.places import direct_addrs, parse_relay
from tallystick_node.reach.tls import TlsKeys
from tallystick_protocol.content import gateway
from tallystick_protocol.errors import BadMessage, BlockMissing, ConfigError, Unreachable
from tallystick_protocol.frames import DType, Frame, Kind, rows_frame
from tallystick_protocol.peer import Peers
from tallystick_protocol.transport.contact import Addr, Contact
from tallystick_protocol.transport.pins import any_key_context, pinned_context, spki_of
from tallystick_protocol.transport.scopes import like
from tallystick_protocol.types import ZERO32

NODE, OTHER = samples.address("node"), samples.address("other")


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[TlsServer]:
    async with tls_server(NODE, tmp_path / "tls") as running:
        yield running


@pytest.fixture
async def peers() -> AsyncIterator[Peers]:
    made = Peers()
    yield made
    await made.close()


async def test_frames_and_requests_go_to_a_node_whose_key_is_pinned(server: TlsServer, peers: Peers) -> None:
    assert await peers.ask(server.contact, "/health", 100, 5.0) == b'{"status":"ok"}'
    channel = await peers.connect(server.contact, NODE)
    for frame in (Frame(Kind.OPEN, {"a": 1}), rows_frame(Kind.STEP, DType.F32, [bytes(1 << 20)], 5, {})):
        await channel.send(frame)
        back = await channel.receive()
        assert (back.kind, bytes(back.tensor)) == (frame.kind, bytes(frame.tensor))
    assert server.spki == [channel.spki] == [server.keys.pins[0]]
    await channel.close()


async def test_a_wrong_key_ends_the_handshake_before_a_byte_of_request(server: TlsServer, peers: Peers) -> None:
    wrong = replace(server.contact, pins=(samples.digest("a"), samples.digest("b")))
    for use in (peers.ask(wrong, "/health", 100, 5.0), peers.connect(wrong, NODE), peers.handshake(wrong)):
        with pytest.raises(Unreachable, match="another TLS key") as raised:
            await use
        assert raised.value.fields["hop"] == NODE
    assert await peers.ask(server.contact, "/health", 100, 5.0)
    assert server.requests == ["/health"]


async def test_any_key_will_do_where_what_comes_proves_itself(server: TlsServer, peers: Peers) -> None:
    unknown = replace(server.contact, pins=())
    with pytest.raises(Unreachable):
        await peers.ask(unknown, "/health", 100, 5.0)
    assert await peers.ask(unknown, "/health", 100, 5.0, any_key=True)
    async with gateway.open_session(1) as session:
        with pytest.raises(BlockMissing):  # the app has no such route: what matters is that it was asked
            await gateway.get_block(session, server.contact.sources[0], samples.manifest().cid)


@pytest.mark.parametrize("name", [None, "0" * 40 + ".node", "localhost"])
async def test_who_asks_for_another_name_or_for_none_is_refused(server: TlsServer, name: str | None) -> None:
    context = pinned_context(frozenset(server.keys.pins))

    def shake() -> None:
        raw = socket.create_connection(("127.0.0.1", server.port))
        with pytest.raises(OSError):  # an alert, or the end
            context.wrap_socket(raw, server_hostname=name)

    await asyncio.to_thread(shake)


async def test_tls_1_2_is_refused(server: TlsServer) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(OSError):
        await asyncio.open_connection("127.0.0.1", server.port, ssl=context, server_hostname=server.contact.label)


async def test_a_server_that_speaks_tls_1_2_is_refused(tmp_path: Path) -> None:
    keys = TlsKeys(tmp_path, frozenset())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(next(tmp_path.glob("1.pem")))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0, ssl=context)
    peers = Peers()
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(Unreachable):
        await peers.handshake(Contact(NODE, (Addr("tcp", "127.0.0.1", port),), keys.pins))
    await peers.close()
    server.close()


async def test_plain_http_gets_nothing_from_a_tls_port(server: TlsServer, peers: Peers) -> None:
    with pytest.raises(Unreachable):
        await peers.ask(f"http://127.0.0.1:{server.port}", "/health", 100, 5.0)
    assert server.requests == []


async def test_who_does_not_shake_hands_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "HANDSHAKE_TIMEOUT_S", 0.3)
    async with tls_server(NODE, tmp_path / "tls") as server:
        for sent in (b"", b"\x16\x03\x01\x40\x00"):
            with socket.create_connection(("127.0.0.1", server.port)) as raw:
                raw.setblocking(False)
                await asyncio.get_running_loop().sock_sendall(raw, sent)
                assert len(await until_closed(raw, 5.0)) < 100


async def test_a_key_is_rotated_without_anybody_noticing(server: TlsServer, peers: Peers) -> None:
    before = server.contact
    open_channel = await peers.connect(before, NODE)
    await open_channel.send(Frame(Kind.OPEN))
    await open_channel.receive()
    server.keys.rotate()
    assert server.keys.pins[0] == before.pins[1] != before.pins[0]
    again = await peers.connect(before, NODE)  # with the record of before: the next key is named in it
    assert again.spki == server.keys.pins[0]
    await open_channel.send(Frame(Kind.STEP))
    assert (await open_channel.receive()).kind is Kind.STEP
    server.keys.rotate()
    with pytest.raises(Unreachable, match="another TLS key"):
        await peers.connect(before, NODE)
    assert (await peers.connect(server.contact, NODE)).spki == server.keys.pins[0]


def test_keys_are_kept_over_restarts_and_private(tmp_path: Path) -> None:
    first = TlsKeys(tmp_path / "tls", frozenset())
    again = TlsKeys(tmp_path / "tls", frozenset())
    assert first.pins == again.pins and len(set(first.pins)) == 2 and 0 <= first.age_s < 60
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "tls").iterdir()} == {0o600}
    again.rotate()
    assert TlsKeys(tmp_path / "tls", frozenset()).pins == again.pins
    (tmp_path / "tls" / "9.pem").write_text("nonsense")
    with pytest.raises(ConfigError, match="remove it"):
        TlsKeys(tmp_path / "tls", frozenset())


def test_the_hash_of_a_key_is_not_the_certificates(tmp_path: Path) -> None:
    keys = TlsKeys(tmp_path, frozenset())
    pem = (tmp_path / "1.pem").read_bytes()
    certificate = x509.load_pem_x509_certificate(pem)
    assert isinstance(certificate.public_key(), ec.EllipticCurvePublicKey)
    assert spki_of(ssl.PEM_cert_to_DER_cert(pem[pem.index(b"-----BEGIN CERT") :].decode())) == keys.pins[0]
    with pytest.raises(ValueError):
        spki_of(b"nonsense")


# -- where plain sockets exist


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "192.0.2.1"])
def test_beyond_loopback_nothing_is_bound_without_tls(host: str) -> None:
    with pytest.raises(ConfigError, match="plain sockets exist on loopback only"):
        bind(host, 0, encrypted=False)


@pytest.mark.parametrize(
    "url", ["http://10.0.0.1:80", "http://example.org", "https://8.8.8.8", "file:///etc/passwd", ""]
)
async def test_plain_urls_lead_to_loopback_or_nowhere(peers: Peers, url: str) -> None:
    with pytest.raises(Unreachable):
        await peers.ask(url, "/health", 100, 1.0)
    plain = Contact(NODE, (Addr("tcp", "10.0.0.1", 80), Addr("relay", "127.0.0.1", 80)))
    with pytest.raises(Unreachable, match="no address"):
        await peers.connect(plain, NODE)


async def test_a_server_dials_nobody_into_a_network_that_is_not_its_own(server: TlsServer) -> None:
    peers = Peers(like(["8.8.4.4"]))
    with pytest.raises(Unreachable, match="no address that may be dialled"):
        await peers.handshake(server.contact)
    named = replace(server.contact, addrs=(Addr("tcp", "localhost", server.port),))
    with pytest.raises(Unreachable, match="no address that may be dialled"):
        await peers.handshake(named)
    await peers.close()
    assert server.requests == []


SETTINGS: dict[str, Any] = {"hot_key": "hot.json"}
RELAY = f"{OTHER}@127.0.0.1:443"


@pytest.mark.parametrize(
    ("settings", "encrypted"),
    [
        ({}, False),
        ({"tls": "on"}, True),
        ({"host": "0.0.0.0", "announce": ["a.example:1"]}, True),
        ({"host": "none", "relays": [RELAY]}, True),
        ({"relays": [RELAY]}, True),
        ({"host": "0.0.0.0", "tls": "off"}, False),
    ],
)
def test_a_node_speaks_tls_everywhere_but_on_loopback(settings: dict[str, Any], encrypted: bool) -> None:
    assert load_config(None, {**SETTINGS, **settings}).is_encrypted is encrypted


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"host": "none"}, "takes relays"),
        ({"tls": "off", "relays": [RELAY]}, "for loopback alone"),
        ({"relays": [RELAY] * 4}, "four addresses"),
        ({"tls": "maybe"}, "tls"),
    ],
)
def test_settings_that_let_nobody_in_are_refused(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        load_config(None, {**SETTINGS, **settings})


def test_a_port_on_every_address_takes_an_address_for_others() -> None:
    with bind("0.0.0.0", 0, encrypted=True) as listening:
        with pytest.raises(ConfigError, match="set announce"):
            direct_addrs(listening, [])
        assert direct_addrs(listening, ["node.example:9"]) == (Addr("tcp", "node.example", 9),)
    assert parse_relay(RELAY) == Contact(OTHER, (Addr("tcp", "127.0.0.1", 443),))
    for text in ("", "127.0.0.1:443", "0x12@127.0.0.1:443", f"{OTHER}@nowhere"):
        with pytest.raises(ConfigError):
            parse_relay(text)


async def test_answers_are_bounded_as_ever(server: TlsServer, peers: Peers) -> None:
    with pytest.raises(BadMessage, match="more than 5 bytes"):
        await peers.ask(server.contact, "/health", 5, 5.0)
    with pytest.raises(BadMessage, match="404"):
        await peers.ask(server.contact, "/elsewhere", 5, 5.0)
    async with aiohttp.ClientSession() as session:
        asked = session.get(
            f"https://127.0.0.1:{server.port}/health", ssl=any_key_context(), server_hostname=server.contact.label
        )
        async with asked as response:
            assert response.status == 200
    assert ZERO32 not in server.spki
