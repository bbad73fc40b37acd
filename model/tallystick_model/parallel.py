"""Tensor parallelism inside one node: rank 0 serves, the other ranks are processes that follow it.

Rank 0 tells the others what to run by broadcasting a JSON head and the rows, over the same group that the model's sums
use; nothing is pickled. A follower ends with its parent: its standard input closes. All talk on loopback.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist

from tallystick_model.segments import Cache, Segment
from tallystick_model.shards import parallel_plan, shard_span
from tallystick_model.skeleton import build_skeleton
from tallystick_model.span import SpanModel, Spliced
from tallystick_protocol.errors import BadPosition, ConfigError, TallystickError
from tallystick_protocol.manifest import Manifest, Piece
from tallystick_protocol.types import Span

_PATIENCE = timedelta(days=30)
"""Followers wait for the next step as long as rank 0 lives; when it is gone, its connections are closed."""

_START_TIMEOUT = timedelta(minutes=10)
_DTYPES = {"int64": torch.int64, "float32": torch.float32}


class ParallelSpan(SpanModel):
    """A span whose weights are dealt out to ranks. The same face as SpanModel's; stock execution."""

    def __init__(self, manifest: Manifest, span: Span, spliced: Spliced, followers: Sequence[subprocess.Popen[bytes]]):
        super().__init__(manifest, span, spliced, "stock")
        self.followers = list(followers)
        self._numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._openings: dict[int, tuple[int, torch.Tensor | None]] = {}
        self._next = itertools.count()
        self._gone: list[int] = []

    def new_cache(self, max_length: int, memory: torch.Tensor | None = None) -> Cache | None:
        cache = super().new_cache(max_length, memory)
        if cache is not None:
            number = next(self._next)
            self._numbers[cache] = number
            self._openings[number] = (max_length, memory)
            setattr(cache, "take", _no_fork)  # noqa: B010 - the other ranks' caches would not follow
            weakref.finalize(cache, self._gone.append, number)
        return cache

    def forward(self, segments: Sequence[Segment]) -> list[torch.Tensor]:
        for segment in segments:
            self._check(segment)  # what is refused must not reach the other ranks
        self._tell("forward", segments)
        return super().forward(segments)

    def rows_between(self, segment: Segment) -> tuple[torch.Tensor, torch.Tensor]:
        self._check(segment)
        self._tell("rows_between", [segment])
        return super().rows_between(segment)

    @property
    def alive(self) -> bool:
        """Whether every follower still runs; without one of them no step ends."""
        return all(follower.poll() is None for follower in self.followers)

    def close(self) -> None:
        """End the followers. They need no farewell: their input closes, and nothing of theirs is worth keeping."""
        for follower in self.followers:
            assert follower.stdin is not None
            follower.stdin.close()
        for follower in self.followers:
            try:
                follower.wait(timeout=10)
            except subprocess.TimeoutExpired:
                follower.kill()
                follower.wait()
        self.followers.clear()
        if dist.is_initialized():
            dist.destroy_process_group()

    def _tell(self, what: str, segments: Sequence[Segment]) -> None:
        gone, self._gone[:] = list(self._gone), []
        told: list[dict[str, Any]] = []
        tensors: list[torch.Tensor] = []
        for segment in segments:
            number = None if segment.cache is None else self._numbers[segment.cache]
            opening = None if number is None else self._openings.pop(number, None)
            memory = None if opening is None else opening[1]
            one: dict[str, Any] = {
                "cache": number,
                "opens": None if opening is None else opening[0],
                "first": segment.first,
                "wanted": None if segment.wanted is None else list(segment.wanted),
            }
            for name, tensor in (("rows", segment.rows), ("types", segment.token_types), ("memory", memory)):
                one[name] = None if tensor is None else _form(tensor)
                tensors += [] if tensor is None else [tensor]
            told.append(one)
        _send({"do": what, "segments": told, "gone": gone}, tensors)


def close_model(model: SpanModel) -> None:
    """End what a model has running beside this process."""
    if isinstance(model, ParallelSpan):
        model.close()


def load_parallel(
    manifest: Manifest, span: Span, open_piece: Callable[[Piece], Path], ranks: int, threads: int = 1
) -> ParallelSpan:
    """Load a span over `ranks` processes, this one included. Raises as `shard_span` does, and ConfigError."""
    skeleton = build_skeleton(manifest.config, manifest.architecture, manifest.labels)
    parallel_plan(skeleton, ranks)  # refuses before anything is started
    pieces = {piece.name: str(open_piece(piece)) for piece in manifest.span_pieces(span)}
    with tempfile.TemporaryDirectory(prefix="tallystick-") as folder:
        meeting = str(Path(folder) / "ranks")
        job = {
            "manifest": manifest.to_bytes().decode(), "span": [span.start, span.end], "pieces": pieces,
            "meeting": meeting, "ranks": ranks, "threads": threads,
        }  # fmt: skip
        followers = [_start(job, rank) for rank in range(1, ranks)]
        try:
            mesh = _meet(meeting, 0, ranks)
            spliced = shard_span(manifest, span, open_piece, mesh)
            dist.barrier()
        except BaseException as error:
            for follower in followers:
                follower.kill()
                follower.wait()
            if dist.is_initialized():
                dist.destroy_process_group()
            if isinstance(error, RuntimeError):
                raise ConfigError(f"the ranks of this node did not meet: {str(error)[:200]}; see its log") from None
            raise
    return ParallelSpan(manifest, span, spliced, followers)


def follow(input_stream: IO[bytes]) -> None:
    """A follower's whole life: read the job, load this rank's slices, run what rank 0 runs until it is gone."""
    job = json.loads(input_stream.readline())
    threading.Thread(target=_end_with_parent, args=(input_stream,), daemon=True).start()
    torch.set_num_threads(job["threads"])
    manifest = Manifest.from_bytes(job["manifest"].encode())
    span = Span(*job["span"])
    paths = job["pieces"]
    mesh = _meet(job["meeting"], job["rank"], job["ranks"])
    spliced = shard_span(manifest, span, lambda piece: Path(paths[piece.name]), mesh)
    model = SpanModel(manifest, span, spliced, "stock")
    dist.barrier()
    caches: dict[int, Cache | None] = {}
    while True:
        _obey(model, caches)


def _obey(model: SpanModel, caches: dict[int, Cache | None]) -> None:
    head, tensors = _receive()
    for number in head["gone"]:
        caches.pop(number, None)
    segments = [_segment(model, caches, one, tensors) for one in head["segments"]]
    try:
        if head["do"] == "forward":
            model.forward(segments)
        else:
            model.rows_between(segments[0])
    except TallystickError:
        return  # rank 0 met the same error, and told whoever asked


def _segment(model: SpanModel, caches: dict[int, Cache | None], one: Any, tensors: list[torch.Tensor]) -> Segment:
    """A segment as rank 0 sent it. Its cache is cut to where the segment begins: rank 0 may have cropped its own."""
    rows = tensors.pop(0)
    types = tensors.pop(0) if one["types"] else None
    memory = tensors.pop(0) if one["memory"] else None
    if one["opens"] is not None:
        caches[one["cache"]] = model.new_cache(one["opens"], memory)
    cache = None if one["cache"] is None else caches[one["cache"]]
    if cache is not None and cache.length > one["first"]:
        cache.crop(one["first"])
    return Segment(cache, one["first"], rows, wanted=one["wanted"], token_types=types)


def _no_fork(*_: Any) -> None:
    raise BadPosition("a span that is dealt out to ranks does not fork sessions: open another one")


def _start(job: dict[str, Any], rank: int) -> subprocess.Popen[bytes]:
    script = "import sys; from tallystick_model.parallel import follow; follow(sys.stdin.buffer)"
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
        start_new_session=True,  # a signal to the node's group stops the node, which then ends its followers
    )  # fmt: skip
    assert process.stdin is not None
    process.stdin.write(json.dumps({**job, "rank": rank}).encode() + b"\n")
    process.stdin.flush()
    return process


def _meet(meeting: str, rank: int, ranks: int) -> Any:
    """Join the group of all ranks; a mesh of one dimension over it."""
    if dist.is_initialized():
        raise ConfigError("this process belongs to a group of ranks already: one parallel span per process")
    os.putenv("GLOO_SOCKET_IFNAME", "lo")  # read by gloo itself: no stranger may reach these connections
    store = dist.FileStore(meeting, ranks)
    store.set_timeout(_START_TIMEOUT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=_PATIENCE)
    return dist.device_mesh.init_device_mesh("cpu", (ranks,))


def _end_with_parent(input_stream: IO[bytes]) -> None:
    input_stream.read()
    os._exit(0)  # the other threads may wait in the library for a rank that is gone


def _form(tensor: torch.Tensor) -> list[Any]:
    return [str(tensor.dtype).removeprefix("torch."), *tensor.shape]


def _send(head: dict[str, Any], tensors: Sequence[torch.Tensor]) -> None:
    body = torch.frombuffer(bytearray(json.dumps(head).encode()), dtype=torch.uint8)
    dist.broadcast(torch.tensor([len(body)]), 0)
    dist.broadcast(body, 0)
    for tensor in tensors:
        dist.broadcast(tensor.contiguous(), 0)


def _receive() -> tuple[dict[str, Any], list[torch.Tensor]]:
    length = torch.zeros(1, dtype=torch.int64)
    dist.broadcast(length, 0)
    body = torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(body, 0)
    head = json.loads(bytes(body.tolist()))
    tensors = []
    for one in head["segments"]:
        for name in ("rows", "types", "memory"):
            if one[name] is not None:
                dtype, *shape = one[name]
                tensors.append(torch.empty(shape, dtype=_DTYPES[dtype]))
                dist.broadcast(tensors[-1], 0)
    return head, tensors
