"""Where nodes are: endpoint bytes on chain, Reach records, and the directory that keeps them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from eth_account.messages import encode_typed_data

from harness import samples
from tallystick_protocol import canonical_json
from tallystick_protocol.errors import BadMessage, BadSignature, ConfigError, TallystickError, Unreachable
from tallystick_protocol.signing import keccak
from tallystick_protocol.transport.contact import Addr, Contact, decode_endpoint, encode_endpoint, parse_addr
from tallystick_protocol.transport.directory import Directory
from tallystick_protocol.transport.reach import MAX_REACH, Reach, reach_digest, seal_reach, unseal_reach
from tallystick_protocol.transport.scopes import anywhere, like, scope_of
from tallystick_protocol.types import Address

VECTORS: dict[str, Any] = json.loads((Path(__file__).parents[1] / "vectors" / "eip712.json").read_text())
NODE = samples.address("node")


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def addrs(*entries: dict[str, Any]) -> bytes:
    return canonical({"addrs": list(entries)})


def test_an_endpoint_comes_back_as_it_was() -> None:
    places = (Addr("tcp", "127.0.0.1", 9000), Addr("tcp", "::1", 65535), Addr("tcp", "node.example", 1))
    plain = Contact(NODE, places)
    assert decode_endpoint(NODE, encode_endpoint(plain)) == plain
    assert plain.sources == ["http://127.0.0.1:9000", "http://[::1]:65535"], "plain sockets exist on loopback only"
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


@pytest.mark.parametrize(
    ("text", "addr"),
    [
        ("203.0.113.5:9000", Addr("tcp", "203.0.113.5", 9000)),
        ("[2001:db8::5]:1", Addr("tcp", "2001:db8::5", 1)),
        ("node.example:443/name.example", Addr("tcp", "node.example", 443, "name.example")),
    ],
)
def test_a_setting_names_an_address(text: str, addr: Addr) -> None:
    assert parse_addr(text) == addr


@pytest.mark.parametrize(
    "text", ["", "host", ":1", "host:0", "host:65536", "::1:80", "h st:1", "host:1/a b", "host:1x"]
)
def test_a_setting_that_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        parse_addr(text)


# -- records


def from_vector(message: dict[str, Any]) -> Reach:
    addrs = tuple(Addr(a["kind"], a["host"], int(a["port"]), a["sni"], Address(a["via"])) for a in message["addrs"])
    spki = tuple(bytes.fromhex(pin[2:]) for pin in message["spki"])
    return Reach(Address(message["node"]), int(message["seq"]), int(message["expires"]), spki, addrs)


@pytest.mark.parametrize("case", VECTORS["reach"])
def test_a_reach_has_the_digest_that_ethers_and_eth_account_compute(case: dict[str, Any]) -> None:
    reach = from_vector(case["message"])
    assert "0x" + reach_digest(samples.STAKING, reach).hex() == case["digest"]
    types = {
        "EIP712Domain": [
            ("string", "name"),
            ("string", "version"),
            ("uint256", "chainId"),
            ("address", "verifyingContract"),
        ],
        "Reach": [
            ("address", "node"),
            ("uint64", "seq"),
            ("uint64", "expires"),
            ("bytes32[]", "spki"),
            ("Addr[]", "addrs"),
        ],
        "Addr": [("string", "kind"), ("string", "host"), ("uint16", "port"), ("string", "sni"), ("address", "via")],
    }
    theirs = encode_typed_data(
        full_message={
            "types": {name: [{"type": kind, "name": of} for kind, of in members] for name, members in types.items()},
            "primaryType": "Reach",
            "domain": {
                "name": "Tallystick",
                "version": "1",
                "chainId": samples.CHAIN_ID,
                "verifyingContract": samples.STAKING.contract,
            },
            "message": {
                **case["message"],
                "seq": reach.seq,
                "expires": reach.expires,
                "addrs": [{**a, "port": int(a["port"])} for a in case["message"]["addrs"]],
            },
        }
    )
    assert keccak(b"\x19" + theirs.version + theirs.header + theirs.body).hex() == case["digest"][2:]


KEY = samples.key("hot")
PINS = (samples.digest("current"), samples.digest("next"))
PLACE = Addr("tcp", "127.0.0.1", 9000)


def reach(seq: int = 10, node: Address = NODE, lasts_s: int = 3600, **changes: Any) -> Reach:
    values = {"spki": PINS, "addrs": (PLACE, Addr("punch", "?", 0), Addr("relay", "203.0.113.9", 443)), **changes}
    return Reach(node, seq, int(time.time()) + lasts_s, **values)


def test_a_reach_comes_back_as_it_was_and_names_its_signer() -> None:
    sent = reach()
    assert unseal_reach(samples.STAKING, seal_reach(samples.STAKING, sent, KEY)) == (sent, KEY.address)
    assert [addr.kind for addr in sent.contact.addrs] == ["tcp", "relay"], "unknown kinds are skipped, not dropped"


def forged(**changes: Any) -> bytes:
    """A signed record with fields changed afterwards."""
    value = canonical_json.parse(seal_reach(samples.STAKING, reach(), KEY))
    return canonical_json.encode({**value, **changes})


def test_every_field_is_signed() -> None:
    addr = {"host": "203.0.113.1", "kind": "tcp", "port": 1, "sni": "", "via": samples.address("x")}
    changes: list[dict[str, Any]] = [
        {"node": samples.address("other")},
        {"seq": 11},
        {"expires": 5},
        {"spki": [PINS[1].hex()]},
        {"addrs": [addr]},
        {"addrs": [{**addr, "sni": "a"}]},
        {"addrs": []},
    ]
    for change in changes:
        try:
            _, signer = unseal_reach(samples.STAKING, forged(**change))
        except BadSignature:
            continue
        assert signer != KEY.address, change


@pytest.mark.parametrize(
    "change",
    [
        {"seq": True},
        {"seq": -1},
        {"seq": 1 << 64},
        {"expires": "5"},
        {"spki": []},
        {"spki": ["00"]},
        {"spki": ["00" * 32] * 3},
        {"spki": 5},
        {"addrs": None},
        {"addrs": [5]},
        {"addrs": [{}]},
        {"signature": "zz"},
        {"node": "0x12"},
        {"more": 1},
        {"addrs": [{"host": "a" * 300, "kind": "tcp", "port": 1}]},
        {"addrs": [{"host": "a", "kind": "tcp", "port": 1}] * 9},
        {"addrs": [{"host": 5, "kind": "tcp", "port": 1}]},
        {"addrs": [{"host": "a", "kind": "tcp", "port": 1, "via": "?"}]},
    ],
    ids=str,
)
def test_a_malformed_reach_is_a_bad_message(change: dict[str, Any]) -> None:
    with pytest.raises((BadMessage, BadSignature)):
        unseal_reach(samples.STAKING, forged(**change))


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"\xff", b"[" * 4000, b"{" + b" " * MAX_REACH], ids=len)
def test_what_is_no_reach_is_a_bad_message(data: bytes) -> None:
    with pytest.raises(BadMessage):
        unseal_reach(samples.STAKING, data)


# -- the directory


class Answers:
    """What nodes answer when they are asked for a Reach: bytes by (who, whether any key will do)."""

    def __init__(self, *known: tuple[Address, bool, bytes], wrong_key: bool = False) -> None:
        self.failure = {"wrong_key": 1} if wrong_key else {}
        self.known = {(node, any_key): data for node, any_key, data in known}
        self.asked: list[tuple[Address, str, bool]] = []

    async def ask(self, to: Contact, path: str, *_: Any, any_key: bool = False) -> bytes:
        self.asked.append((to.node, path.rsplit("/", 1)[1], any_key))
        if (to.node, any_key) not in self.known:
            raise Unreachable(f"{to.node} does not answer", **self.failure)
        return self.known[to.node, any_key]


def directory(answers: Answers | None = None, located: Contact | None = None) -> Directory:
    peers: Any = answers or Answers()
    bound = {KEY.address: NODE, samples.key("other hot").address: samples.address("other")}
    return Directory(peers, samples.STAKING, bound.get, lambda node: located)


def sealed(signer: str = "hot", **changes: Any) -> bytes:
    return seal_reach(samples.STAKING, reach(**changes), samples.key(signer))


async def test_the_highest_seq_wins_whatever_comes_last() -> None:
    book = directory()
    for seq in (10, 12, 11):
        await book.learn(sealed(seq=seq))
    known = book.known(NODE)
    assert known is not None and known.seq == 12
    assert unseal_reach(samples.STAKING, book.sealed(NODE) or b"")[0].seq == 12


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (sealed(lasts_s=-1), "expired"),
        (sealed(lasts_s=25 * 3600), "more than a day"),
        (sealed(signer="stranger"), "may not sign"),
        (sealed(signer="other hot"), "may not sign"),
        (sealed(node=samples.address("other"), signer="other hot"), "not"),
    ],
)
async def test_a_record_that_does_not_hold_is_not_kept(data: bytes, why: str) -> None:
    book = directory()
    with pytest.raises(TallystickError, match=why):
        await book.learn(data, NODE)
    assert book.known(NODE) is None


async def test_a_node_may_sign_with_its_own_key() -> None:
    own = samples.key("cold")
    assert (await directory().learn(seal_reach(samples.STAKING, reach(node=own.address), own))).node == own.address


async def test_a_record_is_forgotten_when_it_expires() -> None:
    now = [time.time()]
    peers: Any = Answers()
    book = Directory(peers, samples.STAKING, lambda _: NODE, lambda _: None, lambda: now[0])
    await book.learn(sealed(lasts_s=100))
    now[0] += 101
    assert book.known(NODE) is None and book.sealed(NODE) is None


FIRST = Contact(NODE, (PLACE,), PINS[:1], 10)


async def test_the_chains_keys_are_pinned_and_after_a_rotation_any_key_may_bring_the_record() -> None:
    answers = Answers((NODE, False, sealed()))
    assert (await directory(answers).contact(FIRST)).pins == PINS
    assert answers.asked == [(NODE, NODE, False)]
    rotated = Answers((NODE, True, sealed(seq=11)), wrong_key=True)
    assert (await directory(rotated).contact(FIRST)).seq == 11
    assert rotated.asked == [(NODE, NODE, False), (NODE, NODE, True)]


async def test_a_node_that_moved_is_found_through_others_that_have_seen_it() -> None:
    other = samples.address("other")
    answers = Answers((other, False, sealed(seq=12)))
    book = directory(answers, FIRST)
    await book.learn(sealed(node=other, signer="other hot"))
    assert (await book.find(NODE)).seq == 12
    assert (other, NODE, False) in answers.asked


async def test_a_record_that_leads_nowhere_is_used_only_when_there_is_no_newer_one() -> None:
    answers = Answers((NODE, False, sealed(seq=11)))
    book = directory(answers, FIRST)
    await book.learn(sealed(seq=10))
    assert (await book.find(NODE)).seq == 10 and not answers.asked
    book.doubt(NODE)
    assert (await book.find(NODE)).seq == 11
    book.doubt(NODE)
    answers.known.clear()
    assert (await book.find(NODE)).seq == 11, "it is better than nothing"


async def test_a_record_older_than_the_chains_is_not_used() -> None:
    with pytest.raises(Unreachable):
        await directory(Answers((NODE, False, sealed(seq=9)), (NODE, True, sealed(seq=9)))).contact(FIRST)


async def test_plain_contacts_stay_plain_and_unknown_nodes_are_unreachable() -> None:
    plain = Contact(NODE, (PLACE,))
    assert await directory(located=plain).find(NODE) == plain
    with pytest.raises(Unreachable, match="the chain knows no address"):
        await directory().find(NODE)


# -- what may be dialled


@pytest.mark.parametrize(
    ("ip", "scope"),
    [
        ("127.0.0.1", "loopback"),
        ("::1", "loopback"),
        ("::ffff:127.0.0.1", "loopback"),
        ("10.0.0.1", "private"),
        ("192.168.1.1", "private"),
        ("100.64.0.1", "private"),
        ("fd00::1", "private"),
        ("8.8.8.8", "global"),
        ("2a00:1450::1", "global"),
        ("169.254.169.254", "none"),
        ("0.0.0.0", "none"),
        ("::", "none"),
        ("224.0.0.1", "none"),
        ("fe80::1", "none"),
        ("255.255.255.255", "none"),
        ("localhost", "none"),
        ("0x7f000001", "none"),
        ("127.1", "none"),
    ],
)
def test_addresses_lead_where_they_lead(ip: str, scope: str) -> None:
    assert scope_of(ip) == scope


def test_a_server_dials_global_addresses_and_those_like_its_own() -> None:
    public, lan, local = like(["8.8.4.4", "node.example"]), like(["10.0.0.2"]), like(["127.0.0.1"])
    assert [may("8.8.8.8") for may in (public, lan, local)] == [True] * 3
    assert [may("10.9.9.9") for may in (public, lan, local)] == [False, True, False]
    assert [may("127.0.0.1") for may in (public, lan, local)] == [False, False, True]
    assert not any(may("169.254.169.254") for may in (public, lan, local, anywhere))
