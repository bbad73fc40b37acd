"""Answering as a trustless gateway (specs.ipfs.tech, 2026-03-05), without a web framework: values in, values out.

| request                        | answer                                                                        |
|--------------------------------|-------------------------------------------------------------------------------|
| GET /ipfs/{cid}?format=raw     | 200, the block                                                                |
| GET /ipfs/{cid}?format=car     | 200, CARv1 of the file, depth first, read as it is sent                       |
|   dag-scope=block              | the root block only; `entity` and `all` are the whole file                    |
|   entity-bytes=first:last      | only the blocks those bytes need                                              |
|   car-dups=y                   | a block as often as it is linked; once by default                             |
| GET /ipfs/bafkqaaa             | 200, empty (or a CAR without blocks): this is a gateway                       |
| HEAD                           | the same without the body                                                     |
| any other format               | 406: nothing is converted                                                     |
| a block not allowed, not here  | 404, or 412 if `Cache-Control: only-if-cached` was asked                      |
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from tallystick_protocol.content.car import PROBE_BINARY, encode_header, encode_section
from tallystick_protocol.content.cid import PROBE, Cid, Codec
from tallystick_protocol.content.dag import Branch, Visit, open_block, walk
from tallystick_protocol.content.gateway import RAW
from tallystick_protocol.content.store import LocalStore, Store
from tallystick_protocol.errors import BadBlock, BadCid, BlockMissing

CAR: Final = "application/vnd.ipld.car"
_ANY_SIZE: Final = 1 << 60
_FOREVER: Final = "public, max-age=29030400, immutable"
_FORMATS: Final = {"raw": RAW, "car": CAR}

Allowed = Callable[[Cid], bool]


@dataclass(frozen=True, slots=True)
class BlockRequest:
    """A request for `/ipfs/{cid}`; header names in lower case, both mappings as they came from the peer."""

    cid_text: str
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    method: str = "GET"


@dataclass(frozen=True, slots=True)
class Reply:
    """What to send back. `body` reads from disk as it goes and may raise: then cut the connection, do not end it."""

    status: int
    headers: dict[str, str]
    body: Iterable[bytes] = ()


@dataclass(frozen=True, slots=True)
class _Refusal(Exception):
    status: int
    reason: str


@dataclass(frozen=True, slots=True)
class _Shape:
    """Which blocks of a DAG a CAR holds."""

    scope: str = "all"
    first: int = 0
    last: int | None = None
    dups: bool = False

    @property
    def tag(self) -> str:
        """For the Etag."""
        return f"{self.scope}.{self.first}-{'' if self.last is None else self.last}.{'y' if self.dups else 'n'}"


def answer(store: Store, request: BlockRequest, allowed: Allowed) -> Reply:
    """Answer from the store; `allowed` says which CIDs are anyone's to ask for (`PinnedBlocks`, as a rule)."""
    try:
        return _answer(store, request, allowed)
    except _Refusal as refusal:
        body = b"" if request.method == "HEAD" else (refusal.reason + "\n").encode()
        headers = {
            "Content-Type": "text/plain; charset=utf-8",
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "no-store",
        }
        if refusal.status == 405:
            headers["Allow"] = "GET, HEAD"
        return Reply(refusal.status, headers, (body,) if body else ())


def _answer(store: Store, request: BlockRequest, allowed: Allowed) -> Reply:
    if request.method not in ("GET", "HEAD"):
        raise _Refusal(405, "only GET and HEAD")
    media_type = _negotiate(request)
    shape = _shape(request.query, request.headers.get("accept", "")) if media_type == CAR else _Shape()
    if request.cid_text == PROBE:
        body = encode_header(PROBE_BINARY) if media_type == CAR else b""
        return _reply(request, PROBE, media_type, shape, (body,), len(body))
    try:
        cid = Cid.parse(request.cid_text)
    except BadCid as error:
        raise _Refusal(400, error.message) from error
    # Asked before the store is, so that strangers' CIDs cost no disk access.
    block = _root_block(store, cid) if allowed(cid) else None
    if block is None:
        only_cached = "only-if-cached" in request.headers.get("cache-control", "").lower()
        raise _Refusal(412 if only_cached else 404, f"this node does not serve {cid}")
    if media_type == RAW:
        return _reply(request, str(cid), media_type, shape, (block,), len(block))
    root = open_block(Branch(cid), block)
    if shape.first and shape.first >= root.size_bytes:
        raise _Refusal(400, f"entity-bytes starts beyond the file's {root.size_bytes} bytes")
    return _reply(request, str(cid), media_type, shape, _car(store, root, shape), None)


def _root_block(store: Store, cid: Cid) -> bytes | None:
    try:
        return store.get_block(cid)
    except (BlockMissing, BadBlock):
        return None


def _negotiate(request: BlockRequest) -> str:
    wanted = request.query.get("format")
    if wanted is not None:
        if wanted not in _FORMATS:
            raise _Refusal(406, "only format=raw and format=car: this gateway converts nothing")
        return _FORMATS[wanted]
    accepted = [part.split(";")[0].strip().lower() for part in request.headers.get("accept", "").split(",")]
    for media_type in accepted:
        if media_type in (RAW, CAR):
            return media_type
    if all(media_type in ("", "*/*") for media_type in accepted):
        raise _Refusal(400, "say format=raw or format=car")
    raise _Refusal(406, f"only {RAW} and {CAR}: this gateway converts nothing")


def _shape(query: Mapping[str, str], accept: str) -> _Shape:
    asked = dict(_car_parameters(accept))
    asked |= {name: query[f"car-{name}"] for name in ("version", "order", "dups") if f"car-{name}" in query}
    for name, known in (("version", "1"), ("order", "dfs unk"), ("dups", "y n")):
        if asked.get(name, known.split()[0]) not in known.split():
            raise _Refusal(406, f"CAR {name} is one of: {known}")
    scope = query.get("dag-scope", "all")
    if scope not in ("block", "entity", "all"):
        raise _Refusal(400, "dag-scope is one of: block entity all")
    first, last = _byte_range(query["entity-bytes"]) if "entity-bytes" in query else (0, None)
    return _Shape(scope, first, last, asked.get("dups") == "y")


def _car_parameters(accept: str) -> Iterator[tuple[str, str]]:
    for part in accept.split(","):
        media_type, *parameters = part.split(";")
        if media_type.strip().lower() == CAR:
            for name, equals, value in (parameter.strip().lower().partition("=") for parameter in parameters):
                if equals:
                    yield name, value
            return


def _byte_range(text: str) -> tuple[int, int | None]:
    first, colon, last = text.partition(":")
    try:
        if not colon or len(text) > 40:
            raise ValueError(text)
        return int(first), None if last == "*" else int(last)
    except ValueError:
        raise _Refusal(400, "entity-bytes is first:last, or first:*") from None


def _car(store: Store, root: Visit, shape: _Shape) -> Iterator[bytes]:
    size = root.size_bytes
    first = shape.first if shape.first >= 0 else max(0, size + shape.first)
    last = size - 1 if shape.last is None else shape.last if shape.last >= 0 else size + shape.last
    ranged = first > 0 or last < size - 1
    sent: set[Cid] = set()

    def wanted(branch: Branch) -> bool:
        if shape.scope == "block" or not (branch.offset <= last and branch.offset + (branch.size_bytes or 0) > first):
            return False
        # A node met again leads to the very blocks already sent, unless a range cut some of them off.
        return shape.dups or branch.cid not in sent or (ranged and branch.cid.codec is Codec.DAG_PB)

    yield encode_header(root.branch.cid.to_bytes())
    for visit in walk(root.branch.cid, store.get_block, _ANY_SIZE, wanted):
        if shape.dups or visit.branch.cid not in sent:
            sent.add(visit.branch.cid)
            yield encode_section(visit.branch.cid, visit.block)


def _reply(
    request: BlockRequest, name: str, media_type: str, shape: _Shape, body: Iterable[bytes], length: int | None
) -> Reply:
    is_car = media_type == CAR
    etag = f'W/"{name}.car.{shape.tag}"' if is_car else f'"{name}.raw"'
    headers = {
        "Content-Type": f"{CAR};version=1;order=dfs;dups={'y' if shape.dups else 'n'}" if is_car else RAW,
        "Content-Disposition": f'attachment; filename="{name}.{"car" if is_car else "bin"}"',
        "Content-Location": f"/ipfs/{name}?format={'car' if is_car else 'raw'}",
        "X-Content-Type-Options": "nosniff",
        "X-Ipfs-Path": f"/ipfs/{name}",
        "X-Ipfs-Roots": name,
        "Etag": etag,
        "Cache-Control": _FOREVER,
        "Accept-Ranges": "none",
    }
    if _matches(request.headers.get("if-none-match", ""), etag):
        return Reply(304, {key: headers[key] for key in ("Etag", "Cache-Control", "X-Content-Type-Options")})
    if length is not None:
        headers["Content-Length"] = str(length)
    return Reply(200, headers, () if request.method == "HEAD" else body)


def _matches(if_none_match: str, etag: str) -> bool:
    candidates = (part.strip().removeprefix("W/") for part in if_none_match.split(","))
    return any(part in ("*", etag.removeprefix("W/")) for part in candidates)


class PinnedBlocks:
    """Allows the blocks of pinned DAGs and nothing else: a node is no open proxy."""

    def __init__(self, store: LocalStore) -> None:
        self._store = store
        self._pins: frozenset[Cid] = frozenset()
        self._blocks: dict[Cid, frozenset[Cid]] = {}

    def __call__(self, cid: Cid) -> bool:
        pins = frozenset(self._store.pins())
        if pins != self._pins:
            # A root that was pinned stays complete, so only what is new is walked.
            self._blocks = {root: self._blocks.get(root) or self._cids_of(root) for root in pins}
            self._pins = pins
        return any(cid in blocks for blocks in self._blocks.values())

    def _cids_of(self, root: Cid) -> frozenset[Cid]:
        try:
            return frozenset(self._store.cids_of(root))
        except (BlockMissing, BadBlock):
            return frozenset((root,))
