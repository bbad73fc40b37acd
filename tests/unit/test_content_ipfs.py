"""The daemon store against a daemon that misbehaves; the real one is in integration/test_ipfs_daemon.py."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tallystick_protocol.content.cid import Cid, Codec
from tallystick_protocol.content.ipfs import DaemonStore
from tallystick_protocol.errors import BadBlock, BlockMissing, ConfigError, ContentTooLarge, SourceFailed

BLOCK = b"the very block"
CID = Cid.of_raw(BLOCK)

Answer = Callable[[BaseHTTPRequestHandler], None]


@contextmanager
def daemon(answer: Answer) -> Iterator[DaemonStore]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            answer(self)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        addr = f"/ip4/127.0.0.1/tcp/{server.server_address[1]}"
        yield DaemonStore(addr, deadline_s=0.3, glance_s=0.2, pause=lambda _: None)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def say(status: int, body: bytes, content_type: str = "application/octet-stream") -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        length = int(handler.headers.get("Content-Length", 0))
        handler.rfile.read(length)
        handler.send_response(status)
        handler.send_header("Content-Type", content_type)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def test_wrong_bytes_are_never_returned(tmp_path: Path) -> None:
    with daemon(say(200, b"something else")) as store:
        with pytest.raises(BadBlock):
            store.get_block(CID)
        with pytest.raises(BadBlock):
            store.read_file(CID, tmp_path / "out", 1000)
    assert list(tmp_path.iterdir()) == []


def test_more_than_a_block_is_refused() -> None:
    with daemon(say(200, bytes(2 * 1024 * 1024 + 1))) as store, pytest.raises(ContentTooLarge):
        store.get_block(CID)


def _wait(release: threading.Event) -> None:
    release.wait(10)


def test_a_daemon_that_says_nothing_is_given_up() -> None:
    release = threading.Event()
    with daemon(lambda _: _wait(release)) as store:
        started = time.monotonic()
        with pytest.raises(BlockMissing, match="no answer in time"):
            store.get_block(CID)
        assert not store.has(CID)
        with pytest.raises(SourceFailed, match="no answer in time"):
            store.pins()
        assert time.monotonic() - started < 3
        release.set()


def test_a_daemon_that_drips_is_given_up() -> None:
    def drip(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        try:
            for _ in range(100):
                handler.wfile.write(b"1\r\nx\r\n")
                handler.wfile.flush()
                time.sleep(0.1)
        except OSError:
            pass

    with daemon(drip) as store:
        started = time.monotonic()
        with pytest.raises(BlockMissing, match="not complete after"):
            store.get_block(CID)
        assert time.monotonic() - started < 2


def test_its_own_error_is_passed_on() -> None:
    body = b'{"Message": "block was not found locally (offline)", "Code": 0, "Type": "error"}'
    with daemon(say(500, body, "application/json")) as store:
        with pytest.raises(BlockMissing, match="not found locally"):
            store.get_block(CID)
        with pytest.raises(SourceFailed, match="not found locally"):
            store.put_block(BLOCK, Codec.RAW)


@pytest.mark.parametrize("status", [200, 403, 404, 502])
def test_a_web_site_is_no_daemon(status: int) -> None:
    with daemon(say(status, b"<html>", "text/html")) as store, pytest.raises(SourceFailed, match="check the address"):
        store.put_block(BLOCK, Codec.RAW)


def test_a_block_stored_under_another_name_is_a_failure() -> None:
    other = str(Cid.of_raw(b"other")).encode()
    with daemon(say(200, b'{"Key": "' + other + b'", "Size": 14}', "application/json")) as store:
        with pytest.raises(SourceFailed, match="stored block"):
            store.put_block(BLOCK, Codec.RAW)
    with daemon(say(200, b'{"Key": "../../x", "Size": 14}', "application/json")) as store:
        with pytest.raises(SourceFailed, match="gave no CID"):
            store.put_block(BLOCK, Codec.RAW)


def test_a_daemon_that_is_down_is_retried_then_named_with_the_next_command() -> None:
    pauses: list[float] = []
    store = DaemonStore("/ip4/127.0.0.1/tcp/1", pause=pauses.append)
    with pytest.raises(SourceFailed, match="ipfs daemon"):
        store.get_block(CID)
    assert pauses == [0.2, 0.5, 1.0, 2.0]


@pytest.mark.parametrize("addr", ["", "127.0.0.1:5001", "http://127.0.0.1:5001", "/ip4/x"])
def test_what_is_no_address(addr: str) -> None:
    with pytest.raises(ConfigError, match="/ip4/127"):
        DaemonStore(addr)
