"""A store behind an IPFS daemon's RPC (Kubo or js-ipfs), with nothing the daemon says believed.

Files are cut and linked here and sent block by block: a daemon's own `add` gives the same tree only while the daemon
knows our profile (js-ipfs cannot be told a width of 1,024), and blocks that arrived need not be sent twice. Every CID
it returns is read back in any base, every block it returns is checked.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import ipfshttpclient
import requests

from tallystick_protocol.content.cid import Cid, Codec
from tallystick_protocol.content.dag import Progress, write_file
from tallystick_protocol.content.dag_pb import MAX_BLOCK_BYTES, parse_file_node
from tallystick_protocol.content.unixfs import UNIXFS_V1_2025, ByteSource, Profile, build_file
from tallystick_protocol.errors import BadCid, BlockMissing, ConfigError, ContentTooLarge, SourceFailed

_NAMES: Final = {Codec.RAW: "raw", Codec.DAG_PB: "dag-pb"}
_PAUSES_S: Final = (0.2, 0.5, 1.0, 2.0)
"""Between tries when the daemon is down: long enough for a restart, short enough for a person."""

T = TypeVar("T")


class DaemonStore:
    """`Store` over a daemon at a multiaddr such as `/ip4/127.0.0.1/tcp/5001`. Usable from any thread.

    deadline_s: for each request; a block that the daemon cannot find within it is missing.
    Every method also raises SourceFailed when the daemon is down or answers nonsense.
    """

    def __init__(
        self,
        addr: str,
        *,
        deadline_s: float = 30.0,
        glance_s: float = 1.0,
        profile: Profile = UNIXFS_V1_2025,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        try:
            # Not `connect()`: it refuses every daemon newer than itself.
            self._client: Any = ipfshttpclient.Client(addr)
        except ipfshttpclient.exceptions.AddressError as error:
            raise ConfigError(f"{addr!a} is not a daemon's address: write it as /ip4/127.0.0.1/tcp/5001") from error
        self._addr = addr
        self._deadline_s = deadline_s
        self._glance_s = glance_s
        self._profile = profile
        self._pause = pause

    def put_file(self, source: Path | ByteSource) -> Cid:
        """As in `Store`; also pins the file. Safe to repeat after a failure."""
        if isinstance(source, Path):
            with source.open("rb") as opened:
                return self.put_file(opened)
        root = Cid.of_raw(b"")
        for block in build_file(source, self._profile):
            root = self._put(block.content, block.cid)
        self.pin(root)
        return root

    def put_block(self, block: bytes, codec: Codec) -> Cid:
        if len(block) > MAX_BLOCK_BYTES:
            raise ContentTooLarge(f"a block of {len(block)} bytes; at most {MAX_BLOCK_BYTES} are kept")
        if codec is Codec.DAG_PB:
            parse_file_node(block)
        return self._put(block, Cid.of(block, codec))

    def has(self, cid: Cid) -> bool:
        """As in `Store`; a daemon that has to think longer than `glance_s` does not have it (js-ipfs never answers)."""
        try:
            self._ask(cid, lambda options: self._client.block.stat(str(cid), **options), self._glance_s, offline="true")
        except BlockMissing:
            return False
        return True

    def get_block(self, cid: Cid) -> bytes:
        """As in `Store`; raises BadBlock when the daemon returns other bytes.

        Size and deadline are watched between the chunks of a chunked answer; ipfshttpclient reads any other in one go.
        """

        def read(options: dict[str, Any]) -> bytes:
            body, deadline = bytearray(), time.monotonic() + self._deadline_s
            with self._client.block.get(str(cid), stream=True, **options) as parts:
                for part in parts:
                    body += part
                    if len(body) > MAX_BLOCK_BYTES:
                        raise ContentTooLarge(f"the daemon sends more than {MAX_BLOCK_BYTES} bytes for block {cid}")
                    if time.monotonic() > deadline:
                        raise BlockMissing(cid, [f"{self._addr}: not complete after {self._deadline_s:g} s"])
            return bytes(body)

        block = self._ask(cid, read, self._deadline_s)
        cid.check(block)
        return block

    def read_file(self, cid: Cid, to_path: Path, max_bytes: int, progress: Progress | None = None) -> int:
        return write_file(cid, self.get_block, to_path, max_bytes, progress)

    def pin(self, cid: Cid) -> None:
        self._ask(cid, lambda options: self._client.pin.add(str(cid), **options), self._deadline_s)

    def unpin(self, cid: Cid) -> None:
        if cid in self.pins():
            self._ask(cid, lambda options: self._client.pin.rm(str(cid), **options), self._deadline_s)

    def pins(self) -> tuple[Cid, ...]:
        """As in `Store`; the daemon's pins that are no file's (other codecs, other hashes) are left out."""
        listing = self._retry(lambda: self._client.pin.ls(type="recursive", timeout=self._deadline_s), None)
        found = []
        for text in listing["Keys"] or ():
            try:
                found.append(Cid.parse(text))
            except BadCid:
                continue
        return tuple(sorted(found))

    def _put(self, block: bytes, cid: Cid) -> Cid:
        # Kubo reads `format` and defaults to version 1, js-ipfs needs both; neither may choose the hash.
        options = {"format": _NAMES[cid.codec], "version": "1", "mhtype": "sha2-256"}
        answer = self._retry(
            lambda: self._client.block.put(io.BytesIO(block), opts=options, timeout=self._deadline_s), None
        )
        try:
            stored = Cid.parse(str(answer["Key"]))
        except (BadCid, KeyError) as error:
            raise SourceFailed(f"the IPFS daemon at {self._addr} gave no CID for block {cid}") from error
        if stored != cid:
            raise SourceFailed(f"the IPFS daemon at {self._addr} stored block {cid} as {stored}")
        return cid

    def _ask(self, cid: Cid, call: Callable[[dict[str, Any]], T], timeout_s: float, **options: str) -> T:
        """Ask for something the daemon may have to search for; silence and an error of its own mean: missing."""
        arguments = {"opts": {"timeout": f"{timeout_s:g}s", **options}, "timeout": timeout_s + self._glance_s}
        return self._retry(lambda: call(arguments), cid)

    def _retry(self, call: Callable[[], T], cid: Cid | None) -> T:
        for pause_s in (*_PAUSES_S, None):
            try:
                return call()
            except (ipfshttpclient.exceptions.TimeoutError, requests.Timeout) as error:
                raise self._missing(cid, "no answer in time") from error
            except ipfshttpclient.exceptions.ErrorResponse as error:
                raise self._missing(cid, str(error)[:200]) from error
            except (ipfshttpclient.exceptions.StatusError, ipfshttpclient.exceptions.DecodingError) as error:
                raise SourceFailed(
                    f"{self._addr} does not answer like an IPFS daemon ({str(error)[:200]}): check the address"
                ) from error
            except (ipfshttpclient.exceptions.CommunicationError, requests.RequestException) as error:
                if pause_s is None:
                    raise SourceFailed(
                        f"the IPFS daemon at {self._addr} is down: start it with `ipfs daemon`, or run without --ipfs"
                    ) from error
            self._pause(pause_s)
        raise AssertionError("unreachable")

    def _missing(self, cid: Cid | None, reason: str) -> BlockMissing | SourceFailed:
        if cid is not None:
            return BlockMissing(cid, [f"{self._addr}: {reason}"])
        return SourceFailed(f"the IPFS daemon at {self._addr} failed: {reason}")
