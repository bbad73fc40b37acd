"""Answers of a trustless gateway, as values."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest

from tallystick_protocol.content.cid import PROBE, Cid, Codec
from tallystick_protocol.content.serving import BlockRequest, PinnedBlocks, Reply, answer
from tallystick_protocol.content.store import LocalStore
from tallystick_protocol.content.unixfs import Profile, build_file
from tallystick_protocol.errors import BlockMissing

SMALL = Profile("small", chunk_bytes=1000, width=8)
CONTENT = b"".join(index.to_bytes(4, "big") for index in range(5000))
RAW = "application/vnd.ipld.raw"
CAR = "application/vnd.ipld.car"


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path, profile=SMALL)


@pytest.fixture
def root(store: LocalStore) -> Cid:
    cid = store.put_file(io.BytesIO(CONTENT))
    store.pin(cid)
    return cid


def ask(
    store: LocalStore, cid: object, method: str = "GET", headers: dict[str, str] | None = None, **query: str
) -> Reply:
    query = {name.replace("_", "-"): value for name, value in query.items()}
    return answer(store, BlockRequest(str(cid), query, headers or {}, method), PinnedBlocks(store))


def read_varint(stream: io.BytesIO) -> int:
    value = shift = 0
    while byte := stream.read(1):
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            break
        shift += 7
    return value


def sections(body: bytes) -> Iterator[tuple[Cid, bytes]]:
    """The blocks of a CAR, by another road than the one that wrote it."""
    stream = io.BytesIO(body)
    stream.read(read_varint(stream))
    while length := read_varint(stream):
        part = stream.read(length)
        yield Cid.from_bytes(part[:36]), part[36:]


def test_a_raw_block_with_every_header_of_the_spec(store: LocalStore, root: Cid) -> None:
    reply = ask(store, root, format="raw")
    body = b"".join(reply.body)
    assert reply.status == 200
    assert body == store.get_block(root)
    assert reply.headers == {
        "Content-Type": RAW,
        "Content-Length": str(len(body)),
        "Content-Disposition": f'attachment; filename="{root}.bin"',
        "Content-Location": f"/ipfs/{root}?format=raw",
        "X-Content-Type-Options": "nosniff",
        "X-Ipfs-Path": f"/ipfs/{root}",
        "X-Ipfs-Roots": str(root),
        "Etag": f'"{root}.raw"',
        "Cache-Control": "public, max-age=29030400, immutable",
        "Accept-Ranges": "none",
    }


def test_head_is_get_without_the_body(store: LocalStore, root: Cid) -> None:
    for form in ("raw", "car"):
        head, get = ask(store, root, "HEAD", format=form), ask(store, root, format=form)
        assert (head.status, head.headers) == (get.status, get.headers)
        assert list(head.body) == []


def test_the_accept_header_chooses_and_the_query_overrules_it(store: LocalStore, root: Cid) -> None:
    assert ask(store, root, headers={"accept": RAW}).headers["Content-Type"] == RAW
    assert ask(store, root, headers={"accept": f"text/html, {CAR};q=0.9"}).headers["Content-Type"].startswith(CAR)
    assert ask(store, root, headers={"accept": CAR}, format="raw").headers["Content-Type"] == RAW


@pytest.mark.parametrize("accept", [None, "", "*/*"])
def test_a_request_that_names_no_format_is_refused(store: LocalStore, root: Cid, accept: str | None) -> None:
    assert ask(store, root, headers={} if accept is None else {"accept": accept}).status == 400


@pytest.mark.parametrize("form", ["dag-json", "dag-cbor", "json", "cbor", "tar", "ipns-record", "html", ""])
def test_nothing_is_converted(store: LocalStore, root: Cid, form: str) -> None:
    assert ask(store, root, format=form).status == 406


def test_an_accept_header_of_other_types_is_406(store: LocalStore, root: Cid) -> None:
    for accept in ("text/html,application/xhtml+xml,*/*;q=0.8", "application/vnd.ipld.dag-json"):
        assert ask(store, root, headers={"accept": accept}).status == 406


@pytest.mark.parametrize(
    "text",
    ["", "x", "../../etc/passwd", "..%2f..%2fetc", "bafk", "bafyaabakaieac", "b" + "a" * 500, "a\r\nSet-Cookie: x"],
)
def test_what_is_no_cid_is_400(store: LocalStore, text: str) -> None:
    reply = ask(store, text, format="raw")
    assert reply.status == 400
    assert all("\n" not in value for value in reply.headers.values())


def test_only_pinned_blocks_are_served(store: LocalStore, root: Cid) -> None:
    private = store.put_block(b"not pinned", Codec.RAW)
    assert ask(store, private, format="raw").status == 404
    assert ask(store, Cid.of_raw(b"a stranger's"), format="raw").status == 404
    for block in build_file(io.BytesIO(CONTENT), SMALL):
        assert ask(store, block.cid, format="raw").status == 200


def test_pins_made_and_removed_later_count(store: LocalStore, root: Cid) -> None:
    allowed = PinnedBlocks(store)
    other = store.put_block(b"later", Codec.RAW)
    assert not allowed(other)
    store.pin(other)
    assert allowed(other)
    store.unpin(root)
    assert not allowed(root)


def test_the_store_is_not_asked_for_strangers_blocks() -> None:
    class Untouchable(LocalStore):
        def __init__(self) -> None:
            pass

        def get_block(self, cid: Cid) -> bytes:
            raise AssertionError(cid)

    reply = answer(Untouchable(), BlockRequest(str(Cid.of_raw(b"x")), {"format": "raw"}), lambda _: False)
    assert reply.status == 404


def test_only_if_cached_is_412_for_what_is_not_here(store: LocalStore, root: Cid) -> None:
    headers = {"cache-control": "only-if-cached"}
    assert ask(store, Cid.of_raw(b"x"), headers=headers, format="raw").status == 412
    assert ask(store, root, headers=headers, format="raw").status == 200


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_the_probe_is_empty_and_ok(store: LocalStore, method: str) -> None:
    reply = ask(store, PROBE, method, format="raw")
    assert (reply.status, b"".join(reply.body), reply.headers["Content-Length"]) == (200, b"", "0")
    car = ask(store, PROBE, "GET", format="car")
    assert b"".join(car.body).hex() == "19a265726f6f747381d82a450001550000" + "6776657273696f6e01"


def test_other_methods_are_405(store: LocalStore, root: Cid) -> None:
    for method in ("POST", "PUT", "DELETE"):
        reply = ask(store, root, method, format="raw")
        assert (reply.status, reply.headers["Allow"]) == (405, "GET, HEAD")


def test_an_etag_that_matches_is_304(store: LocalStore, root: Cid) -> None:
    for form in ("raw", "car"):
        etag = ask(store, root, format=form).headers["Etag"]
        again = ask(store, root, headers={"if-none-match": f'"other", {etag}'}, format=form)
        assert (again.status, list(again.body)) == (304, [])
    assert ask(store, root, headers={"if-none-match": '"other"'}, format="raw").status == 200


def test_a_car_holds_the_whole_file_depth_first(store: LocalStore, root: Cid) -> None:
    reply = ask(store, root, format="car")
    assert reply.headers["Content-Type"] == f"{CAR};version=1;order=dfs;dups=n"
    assert reply.headers["Content-Disposition"] == f'attachment; filename="{root}.car"'
    blocks = list(sections(b"".join(reply.body)))
    assert blocks[0][0] == root
    for cid, block in blocks:
        cid.check(block)
    assert b"".join(block for cid, block in blocks if cid.codec is Codec.RAW) == CONTENT
    assert {cid for cid, _ in blocks} == {block.cid for block in build_file(io.BytesIO(CONTENT), SMALL)}


def test_a_car_header_is_the_known_bytes(store: LocalStore) -> None:
    cid = store.put_block(b"hello world", Codec.RAW)
    store.pin(cid)
    body = b"".join(ask(store, cid, format="car").body)
    header = "3aa265726f6f747381d82a582500" + cid.to_bytes().hex() + "6776657273696f6e01"
    assert body.hex() == header + "2f" + cid.to_bytes().hex() + b"hello world".hex()


def test_duplicates_are_sent_once_unless_asked_for(store: LocalStore) -> None:
    cid = store.put_file(io.BytesIO(bytes(20_000)))
    store.pin(cid)
    once = [c for c, _ in sections(b"".join(ask(store, cid, format="car").body))]
    twice = [c for c, _ in sections(b"".join(ask(store, cid, format="car", car_dups="y").body))]
    assert len(once) == len(set(once)) == len(set(twice))
    assert twice.count(Cid.of_raw(bytes(1000))) == 20


def test_the_scope_of_a_car(store: LocalStore, root: Cid) -> None:
    assert [cid for cid, _ in sections(b"".join(ask(store, root, format="car", dag_scope="block").body))] == [root]
    tags = {ask(store, root, format="car", dag_scope=scope).headers["Etag"] for scope in ("block", "entity", "all")}
    assert len(tags) == 3
    assert ask(store, root, format="car", dag_scope="tree").status == 400


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [
        ("0:*", 0, 19),
        ("0:999", 0, 0),
        ("999:1000", 0, 1),
        ("-1:*", 19, 19),
        ("8500:-10001", 8, 9),
        ("5:99999999", 0, 19),
    ],
)
def test_a_byte_range_brings_only_its_blocks(store: LocalStore, root: Cid, asked: str, first: int, last: int) -> None:
    body = b"".join(ask(store, root, format="car", entity_bytes=asked).body)
    leaves = b"".join(block for cid, block in sections(body) if cid.codec is Codec.RAW)
    assert leaves == CONTENT[first * 1000 : (last + 1) * 1000]


def test_a_byte_range_over_two_equal_subtrees_has_the_blocks_of_both(store: LocalStore) -> None:
    half = CONTENT[:8000]
    cid = store.put_file(io.BytesIO(half + half))
    store.pin(cid)
    body = b"".join(ask(store, cid, format="car", entity_bytes="5000:9999").body)
    wanted = {Cid.of_raw(half[at : at + 1000]) for at in (5000, 6000, 7000, 0, 1000)}
    assert {found for found, _ in sections(body) if found.codec is Codec.RAW} == wanted


@pytest.mark.parametrize("asked", ["", "x", "1", "a:b", "1:", "20000:*", "9" * 50 + ":*"])
def test_a_byte_range_that_makes_no_sense_is_400(store: LocalStore, root: Cid, asked: str) -> None:
    assert ask(store, root, format="car", entity_bytes=asked).status == 400


def test_car_parameters_that_are_not_known_are_refused(store: LocalStore, root: Cid) -> None:
    assert ask(store, root, format="car", car_version="2").status == 406
    assert ask(store, root, format="car", car_order="random").status == 406
    assert ask(store, root, headers={"accept": f"{CAR}; version=2"}).status == 406
    assert ask(store, root, headers={"accept": f"{CAR}; order=dfs; dups=y"}).headers["Content-Type"].endswith("dups=y")


def test_a_car_of_a_damaged_file_breaks_off(store: LocalStore, root: Cid) -> None:
    reply = ask(store, root, format="car")
    (store.root / "files" / str(root)).unlink()
    with pytest.raises(BlockMissing):
        b"".join(reply.body)
