"""Fetching from real HTTP servers on loopback: honest ones, broken ones and liars."""

from __future__ import annotations

import asyncio
import gzip
import io
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from tallystick_protocol.content import gateway
from tallystick_protocol.content.cid import Cid, Codec
from tallystick_protocol.content.dag_pb import FileNode, Link
from tallystick_protocol.content.fetch import fetch_file
from tallystick_protocol.content.serving import BlockRequest, PinnedBlocks, answer
from tallystick_protocol.content.sources import Patience
from tallystick_protocol.content.store import LocalStore
from tallystick_protocol.content.unixfs import Profile
from tallystick_protocol.errors import BadBlock, BlockMissing, ConfigError, ContentTooLarge, SourceFailed

SMALL = Profile("small", chunk_bytes=10_000, width=8)
CONTENT = b"".join(index.to_bytes(4, "big") for index in range(100_000))
BLOCK = b"the very block"
CID = Cid.of_raw(BLOCK)
ANY = 1 << 30
RAW_TYPE = {"Content-Type": "application/vnd.ipld.raw"}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", handler)
    async with TestServer(app, host="127.0.0.1") as server:
        yield str(server.make_url("")).rstrip("/")


def honest(store: LocalStore, asked: Counter[str] | None = None) -> Handler:
    allowed = PinnedBlocks(store)

    async def handle(request: web.Request) -> web.StreamResponse:
        cid_text = request.path.removeprefix("/ipfs/")
        if asked is not None:
            asked[cid_text] += 1
        headers = {name.lower(): value for name, value in request.headers.items()}
        reply = answer(store, BlockRequest(cid_text, request.query, headers, request.method), allowed)
        return web.Response(status=reply.status, headers=reply.headers, body=b"".join(reply.body))

    return handle


async def get_one(handler: Handler) -> bytes:
    async with serving(handler) as base, gateway.open_session(2) as session:
        return await asyncio.wait_for(gateway.get_block(session, base, CID), 5)


@pytest.fixture
def origin(tmp_path: Path) -> tuple[LocalStore, Cid]:
    store = LocalStore(tmp_path / "origin", profile=SMALL)
    cid = store.put_file(io.BytesIO(CONTENT))
    store.pin(cid)
    return store, cid


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


async def test_a_block_is_asked_for_by_the_spec_and_verified() -> None:
    async def handle(request: web.Request) -> web.StreamResponse:
        assert request.path_qs == f"/ipfs/{CID}?format=raw"
        assert request.headers["Accept"] == "application/vnd.ipld.raw"
        assert request.headers["Accept-Encoding"] == "identity"
        return web.Response(body=BLOCK, headers=RAW_TYPE)

    assert await get_one(handle) == BLOCK


async def test_a_lie_is_a_bad_block() -> None:
    async def handle(_: web.Request) -> web.StreamResponse:
        return web.Response(body=b"the very blocK", headers=RAW_TYPE)

    with pytest.raises(BadBlock, match="not block"):
        await get_one(handle)


async def test_html_with_status_200_is_no_block() -> None:
    async def handle(_: web.Request) -> web.StreamResponse:
        return web.Response(text="<html>log in to the hotel's network", content_type="text/html")

    with pytest.raises(SourceFailed, match="text/html"):
        await get_one(handle)


async def test_a_redirect_is_not_followed() -> None:
    seen: list[str] = []

    async def handle(request: web.Request) -> web.StreamResponse:
        seen.append(request.path)
        raise web.HTTPFound("/elsewhere")

    with pytest.raises(SourceFailed, match="redirects"):
        await get_one(handle)
    assert seen == [f"/ipfs/{CID}"]


async def test_compression_is_refused_before_it_is_expanded() -> None:
    bomb = gzip.compress(bytes(50_000_000))

    async def handle(_: web.Request) -> web.StreamResponse:
        return web.Response(body=bomb, headers={**RAW_TYPE, "Content-Encoding": "gzip"})

    with pytest.raises(SourceFailed, match="compresses"):
        await get_one(handle)


async def test_an_endless_body_is_cut_at_two_mebibytes() -> None:
    sent = 0

    async def handle(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse(headers=RAW_TYPE)
        await response.prepare(request)
        try:
            while sent < 100 << 20:
                await response.write(bytes(65536))
                sent += 65536
        except ConnectionError:
            pass
        return response

    with pytest.raises(BadBlock, match="more than the 2097152 bytes"):
        await get_one(handle)
    assert sent < 20 << 20


async def test_a_length_beyond_the_cap_is_refused_at_once() -> None:
    async def handle(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={**RAW_TYPE, "Content-Length": str(1 << 40)})
        await response.prepare(request)
        await asyncio.sleep(30)
        return response

    with pytest.raises(BadBlock, match="announces"):
        await get_one(handle)


async def test_a_truncated_body_is_a_failure() -> None:
    async def handle(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={**RAW_TYPE, "Content-Length": str(len(BLOCK))})
        await response.prepare(request)
        await response.write(BLOCK[:5])
        assert request.transport is not None
        request.transport.close()
        return response

    with pytest.raises(SourceFailed):
        await get_one(handle)


@pytest.mark.parametrize(
    ("status", "error"), [(404, BlockMissing), (410, BlockMissing), (500, SourceFailed), (206, SourceFailed)]
)
async def test_only_200_brings_a_block(status: int, error: type[Exception]) -> None:
    async def handle(_: web.Request) -> web.StreamResponse:
        return web.Response(status=status, body=BLOCK, headers=RAW_TYPE)

    with pytest.raises(error):
        await get_one(handle)


async def test_what_does_not_speak_http() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"\x00\xffSSH-2.0\r\n" * 100)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, gateway.open_session(1) as session:
        with pytest.raises(SourceFailed):
            await gateway.get_block(session, f"http://127.0.0.1:{port}", CID)


async def test_the_probe_tells_a_gateway_from_a_web_site(origin: tuple[LocalStore, Cid]) -> None:
    async def site(_: web.Request) -> web.StreamResponse:
        return web.Response(text="welcome", headers=RAW_TYPE)

    async with gateway.open_session(1) as session, serving(honest(origin[0])) as good, serving(site) as bad:
        await gateway.probe(session, good)
        with pytest.raises(SourceFailed, match="no trustless gateway"):
            await gateway.probe(session, bad)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "host",
        "ftp://host",
        "file:///etc/passwd",
        "http://",
        "http://u:p@host",
        "http://h/?q",
        "http://h/#f",
        "http://h h",
        "http://h:x",
        "http://h\n",
    ],
)
def test_what_is_no_base_url(text: str) -> None:
    with pytest.raises(ConfigError, match="http://host:port"):
        gateway.check_base_url(text)


def test_a_base_url_loses_its_slash() -> None:
    assert gateway.check_base_url("https://h:1/gw/") == "https://h:1/gw"


async def test_a_file_is_fetched_pinned_and_put_in_place(
    origin: tuple[LocalStore, Cid], store: LocalStore, tmp_path: Path
) -> None:
    seen: list[tuple[int, int]] = []
    async with serving(honest(origin[0])) as base:
        size = await fetch_file(
            origin[1], tmp_path / "f", [base], store=store, max_bytes=ANY, progress=lambda *both: seen.append(both)
        )
    assert size == len(CONTENT)
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert store.pins() == (origin[1],)
    assert seen[-1] == (len(CONTENT), len(CONTENT))


async def test_no_block_is_fetched_twice(origin: tuple[LocalStore, Cid], store: LocalStore, tmp_path: Path) -> None:
    source, cid = origin
    asked: Counter[str] = Counter()
    real = honest(source, asked)

    async def failing(request: web.Request) -> web.StreamResponse:
        return web.Response(status=500) if asked.total() >= 20 else await real(request)

    async with serving(failing) as base:
        with pytest.raises(BlockMissing) as missing:
            await fetch_file(cid, tmp_path / "f", [base], store=store, max_bytes=ANY, num_parallel=2)
    assert f"{base}: answers with status 500" in missing.value.tried
    assert not (tmp_path / "f").exists()
    arrived = {text for text in asked if store.has(Cid.parse(text))}
    assert len(arrived) >= 18
    again: Counter[str] = Counter()
    async with serving(honest(source, again)) as base:
        await fetch_file(cid, tmp_path / "f", [base], store=store, max_bytes=ANY)
    assert not arrived & set(again)
    async with serving(honest(source, again)) as base:
        before = again.total()
        await fetch_file(cid, tmp_path / "g", [base], store=store, max_bytes=ANY)
        assert again.total() == before
    assert (tmp_path / "g").read_bytes() == CONTENT


async def test_a_liar_costs_one_block_and_then_stands_aside(
    origin: tuple[LocalStore, Cid], store: LocalStore, tmp_path: Path
) -> None:
    lies = 0

    async def lie(_: web.Request) -> web.StreamResponse:
        nonlocal lies
        lies += 1
        return web.Response(body=b"trust me", headers=RAW_TYPE)

    async with serving(lie) as liar, serving(honest(origin[0])) as good:
        await fetch_file(origin[1], tmp_path / "f", [liar, good], store=store, max_bytes=ANY)
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert 1 <= lies <= 8


async def test_a_source_of_a_kilobyte_a_second_is_raced(
    origin: tuple[LocalStore, Cid], store: LocalStore, tmp_path: Path
) -> None:
    begun = 0

    async def drip(request: web.Request) -> web.StreamResponse:
        nonlocal begun
        begun += 1
        response = web.StreamResponse(headers={**RAW_TYPE, "Content-Length": "10000"})
        await response.prepare(request)
        for _ in range(100):
            await response.write(bytes(100))
            await asyncio.sleep(0.1)
        return response

    patience = Patience(race_after_s=0.1, deadline_s=5)
    async with serving(drip) as slow, serving(honest(origin[0])) as good:
        await asyncio.wait_for(
            fetch_file(origin[1], tmp_path / "f", [slow, good], store=store, max_bytes=ANY, patience=patience), 5
        )
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert begun >= 1


async def test_a_cid_nobody_has_fails_within_the_deadline(store: LocalStore, tmp_path: Path) -> None:
    async def hang(_: web.Request) -> web.StreamResponse:
        await asyncio.sleep(30)
        raise AssertionError

    async with serving(hang) as silent, serving(honest(store)) as without:
        with pytest.raises(BlockMissing) as missing:
            patience = Patience(race_after_s=0.05, deadline_s=0.3)
            await fetch_file(CID, tmp_path / "f", [silent, without], store=store, max_bytes=ANY, patience=patience)
    assert str(CID) in str(missing.value)
    assert sorted(missing.value.tried) == sorted([f"{silent}: no answer within 0.3 s", f"{without}: does not hold it"])


async def test_a_file_larger_than_agreed_is_stopped_at_its_root(
    origin: tuple[LocalStore, Cid], store: LocalStore, tmp_path: Path
) -> None:
    asked: Counter[str] = Counter()
    async with serving(honest(origin[0], asked)) as base:
        with pytest.raises(ContentTooLarge):
            await fetch_file(origin[1], tmp_path / "f", [base], store=store, max_bytes=len(CONTENT) - 1)
    assert asked.total() == 1


async def test_a_tree_that_lies_about_a_child_is_refused(store: LocalStore, tmp_path: Path) -> None:
    node = FileNode((Link(CID, 5, 5),)).encode()
    root = Cid.of(node, Codec.DAG_PB)
    blocks = {str(root): node, str(CID): BLOCK}

    async def handle(request: web.Request) -> web.StreamResponse:
        return web.Response(body=blocks[request.path.removeprefix("/ipfs/")], headers=RAW_TYPE)

    async with serving(handle) as base:
        with pytest.raises(BadBlock, match="its parent says 5"):
            await fetch_file(root, tmp_path / "f", [base], store=store, max_bytes=ANY)
    assert not store.has(CID)


async def test_a_damaged_file_is_mended_from_the_network(
    origin: tuple[LocalStore, Cid], store: LocalStore, tmp_path: Path
) -> None:
    source, cid = origin
    async with serving(honest(source)) as base:
        await fetch_file(cid, tmp_path / "f", [base], store=store, max_bytes=ANY)
        whole = store.root / "files" / str(cid)
        whole.chmod(0o644)
        with whole.open("r+b") as opened:
            opened.seek(123_456)
            opened.write(b"\xff\xff\xff")
        asked: Counter[str] = Counter()
        async with serving(honest(source, asked)) as second:
            await fetch_file(cid, tmp_path / "f", [second], store=store, max_bytes=ANY)
    assert asked.total() == 1
    assert (tmp_path / "f").read_bytes() == whole.read_bytes() == CONTENT


async def test_two_nodes_may_fetch_the_same_file_into_one_store(
    origin: tuple[LocalStore, Cid], store: LocalStore, tmp_path: Path
) -> None:
    other = LocalStore(store.root)
    async with serving(honest(origin[0])) as base:
        await asyncio.gather(
            fetch_file(origin[1], tmp_path / "f", [base], store=store, max_bytes=ANY),
            fetch_file(origin[1], tmp_path / "g", [base], store=other, max_bytes=ANY),
        )
    assert (tmp_path / "f").read_bytes() == (tmp_path / "g").read_bytes() == CONTENT
