"""Content under generated input: round trips, and parsers that fail in one way only."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from tallystick_protocol.content.cid import Cid, Codec
from tallystick_protocol.content.dag import walk
from tallystick_protocol.content.dag_pb import FileNode, Link, encode_varint, parse_file_node
from tallystick_protocol.content.serving import BlockRequest, PinnedBlocks, answer
from tallystick_protocol.content.store import LocalStore
from tallystick_protocol.content.unixfs import Profile, build_file
from tallystick_protocol.errors import BadBlock, BadCid, ContentError

digests = st.binary(min_size=32, max_size=32)
cids = st.builds(Cid, st.sampled_from(Codec), digests)
profiles = st.builds(Profile, st.just("drawn"), st.integers(1, 40), st.integers(2, 6))
links = st.builds(
    lambda cid, size, more: Link(cid, size, size + more), cids, st.integers(1, 1 << 40), st.integers(0, 1 << 20)
)


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return encode_varint(number << 3) + encode_varint(value)
    return encode_varint(number << 3 | 2) + encode_varint(len(value)) + value


def _message(inner: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """Messages shaped like dag-pb: known field numbers, plausible values, any order."""
    values = st.one_of(st.integers(0, 6), st.integers(0, 1 << 62), inner)
    return st.lists(st.builds(_field, st.integers(0, 9), values), max_size=6).map(b"".join)


binary_cids = st.one_of(cids.map(Cid.to_bytes), digests.map(b"\x12\x20".__add__), st.binary(max_size=40))
node_shaped = _message(st.one_of(_message(binary_cids), _message(st.binary(max_size=4))))


@given(cids)
def test_a_cid_is_read_as_it_is_written(cid: Cid) -> None:
    assert Cid.parse(str(cid)) == Cid.from_bytes(cid.to_bytes()) == cid


@given(cids, st.integers(0, 58), st.characters())
def test_one_changed_character_gives_another_cid_or_none(cid: Cid, at: int, letter: str) -> None:
    text = str(cid)
    changed = text[:at] + letter + text[at + 1 :]
    try:
        other = Cid.parse(changed)
    except BadCid:
        return
    assert (other == cid) == (changed == text)
    assert str(other) == changed


@given(st.text(max_size=80) | st.text("123456789abcdefghijkmnopqrstuvwxyzQZB/.", max_size=70))
def test_any_text_is_a_cid_or_a_bad_cid(text: str) -> None:
    try:
        cid = Cid.parse(text)
    except BadCid:
        return
    assert Cid.parse(str(cid)) == cid


@given(st.lists(links, max_size=12))
def test_a_node_is_read_as_it_is_written(children: list[Link]) -> None:
    node = FileNode(tuple(children))
    assert parse_file_node(node.encode()) == node


@settings(max_examples=400)
@given(node_shaped | st.binary(max_size=80))
def test_any_bytes_are_a_file_node_or_a_bad_block(block: bytes) -> None:
    try:
        node = parse_file_node(block)
    except BadBlock:
        return
    assert parse_file_node(node.encode()) == node


@settings(max_examples=300)
@given(st.lists(links, min_size=1, max_size=4), st.data())
def test_a_changed_node_is_refused_or_means_something_else(children: list[Link], data: st.DataObject) -> None:
    block = FileNode(tuple(children)).encode()
    at = data.draw(st.integers(0, len(block) - 1))
    cut = data.draw(st.integers(0, 2))
    changed = block[:at] + data.draw(st.binary(max_size=2)) + block[at + cut :]
    try:
        node = parse_file_node(changed)
    except BadBlock:
        return
    # The one freedom of the format: an empty name may be left out.
    assert changed == block or node != FileNode(tuple(children)) or len(changed) < len(block)


@given(st.binary(max_size=600), profiles)
def test_a_file_is_read_as_it_was_built(content: bytes, profile: Profile) -> None:
    blocks = {block.cid: block.content for block in build_file(io.BytesIO(content), profile)}
    *_, last = (block.cid for block in build_file(io.BytesIO(content), profile))
    visits = list(walk(last, blocks.__getitem__, max_bytes=1 << 30))
    assert b"".join(visit.content for visit in visits) == content
    assert visits[0].size_bytes == len(content)


@given(st.binary(min_size=1, max_size=300), profiles, st.data())
def test_a_dag_with_one_foreign_block_never_reads_as_something_else(
    content: bytes, profile: Profile, data: st.DataObject
) -> None:
    blocks = {block.cid: block.content for block in build_file(io.BytesIO(content), profile)}
    *_, root = (block.cid for block in build_file(io.BytesIO(content), profile))
    victim = data.draw(st.sampled_from(sorted(blocks)))
    blocks[victim] = data.draw(st.binary(max_size=60))
    read = b""
    try:
        for visit in walk(root, blocks.__getitem__, max_bytes=1 << 30):
            read += visit.content
    except ContentError:
        assert content.startswith(read)
        return
    assert read == content


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=400), profiles)
def test_a_store_returns_what_it_was_given(content: bytes, profile: Profile) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = LocalStore(Path(folder) / "store", profile=profile)
        cid = store.put_file(io.BytesIO(content))
        store.pin(cid)
        store.collect_garbage()
        assert store.read_file(cid, Path(folder) / "out", max_bytes=len(content) + (1 << 24)) == len(content)
        assert (Path(folder) / "out").read_bytes() == content


header_values = st.sampled_from(
    ["", "*/*", "text/html", "application/vnd.ipld.raw", "application/vnd.ipld.car; version=1; order=dfs; dups=y"]
) | st.text(max_size=30)
query_values = st.sampled_from(["raw", "car", "tar", "block", "all", "0:*", "-5:3", "1", "dfs", "y"]) | st.text(
    max_size=12
)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["GET", "HEAD", "POST", ""]),
    st.text(max_size=70) | cids.map(str) | st.sampled_from(["bafkqaaa", "PINNED"]),
    st.dictionaries(
        st.sampled_from(["format", "dag-scope", "entity-bytes", "car-version", "car-order", "car-dups", "x"]),
        query_values,
    ),
    st.dictionaries(st.sampled_from(["accept", "cache-control", "if-none-match", "range"]), header_values),
)
def test_every_request_gets_an_answer(method: str, text: str, query: dict[str, str], headers: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = LocalStore(Path(folder), profile=Profile("drawn", 10, 3))
        root = store.put_file(io.BytesIO(bytes(range(100))))
        store.pin(root)
        cid_text = str(root) if text == "PINNED" else text
        reply = answer(store, BlockRequest(cid_text, query, headers, method), PinnedBlocks(store))
        body = b"".join(reply.body)
    assert reply.status in (200, 304, 400, 404, 405, 406, 412)
    assert all(name.isascii() and value.isascii() and value.isprintable() for name, value in reply.headers.items())
    assert reply.headers["X-Content-Type-Options"] == "nosniff"
    if "Content-Length" in reply.headers and method == "GET":
        assert int(reply.headers["Content-Length"]) == len(body)
