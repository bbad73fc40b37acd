"""Asking one trustless gateway for one block: `GET {base}/ipfs/{cid}?format=raw`.

A node of this network answers it as public gateways do. Nothing the other side says is believed but the bytes, and
those only when they hash to the CID.
"""

from __future__ import annotations

import re
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp

from tallystick_protocol.content.cid import PROBE, Cid
from tallystick_protocol.content.dag_pb import MAX_BLOCK_BYTES
from tallystick_protocol.errors import BadBlock, BlockMissing, ConfigError, SourceFailed
from tallystick_protocol.transport.pins import any_key_context

RAW: Final = "application/vnd.ipld.raw"
_HEADERS: Final = {"Accept": RAW, "Accept-Encoding": "identity"}
_READ_BYTES: Final = 64 * 1024
_SOCK_CONNECT_S: Final = 10.0
_NAME: Final = re.compile(r"[A-Za-z0-9.-]{1,253}")


def check_base_url(text: str) -> str:
    """A gateway's address without a trailing slash. Raises ConfigError unless it is plain http(s)://host[:port][/path].

    A node that speaks TLS is https://<40 hex>.node@host:port: its key is not pinned, for blocks are checked by hash.
    """
    url = urlsplit(text)
    try:
        plain = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        plain = False
    if url.username is not None:
        plain = plain and url.scheme == "https" and url.password is None and not url.path.strip("/")
        plain = plain and _NAME.fullmatch(url.username) is not None
    if not plain or url.query or url.fragment or any(c <= " " for c in text):
        raise ConfigError(f"{text!a} is not a gateway: write it as http://host:port")
    return text.rstrip("/")


def open_session(num_parallel: int) -> aiohttp.ClientSession:
    """A session that keeps no cookies, decompresses nothing and reads no proxy from the environment."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=num_parallel, limit_per_host=num_parallel),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        trust_env=False,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=_SOCK_CONNECT_S),
    )


class _NotHere(Exception):
    """404."""


async def get_block(session: aiohttp.ClientSession, base_url: str, cid: Cid, max_bytes: int = MAX_BLOCK_BYTES) -> bytes:
    """The block, verified. Has no deadline of its own: wrap it in one.

    Raises BlockMissing when the gateway says it does not hold it, which is no fault; BadBlock for bytes that are not
    the block; SourceFailed for everything else that is not an answer.
    """
    try:
        block = await _get(session, base_url, f"/ipfs/{cid}", min(max_bytes, MAX_BLOCK_BYTES))
    except _NotHere:
        raise BlockMissing(cid, [base_url]) from None
    # A megabyte takes under a millisecond with SHA extensions and five without: not worth a thread.
    cid.check(block)
    return block


async def probe(session: aiohttp.ClientSession, base_url: str) -> None:
    """Raises SourceFailed unless a trustless gateway answers there."""
    try:
        await _get(session, base_url, f"/ipfs/{PROBE}", max_bytes=0)
    except (_NotHere, BadBlock) as error:
        raise SourceFailed(f"{base_url} is no trustless gateway: its probe is not empty") from error


async def _get(session: aiohttp.ClientSession, base_url: str, path: str, max_bytes: int) -> bytes:
    parts = urlsplit(base_url)
    tls: dict[str, Any] = {}
    if parts.username is not None:
        base_url = base_url.replace(f"{parts.username}@", "", 1)
        tls = {"ssl": any_key_context(), "server_hostname": parts.username}
    asked = session.get(base_url + path, params={"format": "raw"}, headers=_HEADERS, allow_redirects=False, **tls)
    try:
        async with asked as response:
            _check_head(response, max_bytes)
            return await _read_body(response, max_bytes)
    except (TimeoutError, aiohttp.ClientError, OSError) as error:
        raise SourceFailed(str(error) or type(error).__name__) from error


def _check_head(response: aiohttp.ClientResponse, max_bytes: int) -> None:
    if response.status in (404, 410, 412):
        raise _NotHere
    if 300 <= response.status < 400:
        raise SourceFailed("redirects elsewhere")
    if response.status != 200:
        raise SourceFailed(f"answers with status {response.status}")
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise SourceFailed("compresses blocks")
    if response.content_type != RAW:
        raise SourceFailed(f"answers with {ascii(response.content_type)[:60]} instead of a raw block")
    if (response.content_length or 0) > max_bytes:
        raise BadBlock(f"announces {response.content_length} bytes, where {max_bytes} at most are expected")


async def _read_body(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    body = bytearray()
    async for part in response.content.iter_chunked(_READ_BYTES):
        body += part
        if len(body) > max_bytes:
            raise BadBlock(f"sends more than the {max_bytes} bytes expected")
    return bytes(body)
