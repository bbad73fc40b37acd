"""Where a process's time goes: the CPU time of its threads by what they are at work on, and cryptography counted.

What a thread has used is exact, by its CPU clock. It is divided by what the thread was seen at, two hundred times a
second: the innermost known Python frame says it. A thread that waits, in a queue or for its sockets, is not at work.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from Crypto.Hash import keccak

from tallystick_protocol import signing

EVERY_S = 0.005
SWITCH_S = 1e-4
"""How long a thread may keep the interpreter from the sampler: as long as usual, it would only be seen when it ends."""

KINDS = ("model", "hashing", "signing", "framing", "other")
CRYPTOGRAPHY = ("signatures", "checks", "sha256", "keccak")
"""Signatures made, signatures checked, and calls of the hash functions."""

_PLACES = (
    ("hashing", ("receipts.py", "record.py", "hashlib.py")),
    ("signing", ("/signing.py", "journal.py", "coincurve", "till.py", "vouchers.py", "payments.py", "database.py")),
    ("framing", ("frames.py", "peer.py", "channel.py", "listener.py", "uvicorn", "websockets", "aiohttp", "starlette",
                 "msgpack", "asyncio/", "selectors.py", "/ssl.py", "line.py")),
    ("model", ("tallystick_model", "torch", "transformers")),
)  # fmt: skip
_IDLE_FILES = ("threading.py", "queue.py", "futures/thread.py")
_IDLE_CALLS = ("_take_in",)
"""Innermost frames of threads that wait; the device thread does so in C, called from `Engine._take_in`."""


@dataclass(slots=True)
class Account:
    """What was done in `wall_s` seconds. cpu_s: by kind of work; counts: of cryptography."""

    wall_s: float = 0.0
    cpu_s: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def busy_s(self) -> float:
        return sum(self.cpu_s.values())

    @property
    def waiting(self) -> float:
        """The share of the wall clock in which no CPU was used; 0 where several threads used more than one."""
        return max(0.0, 1.0 - self.busy_s / self.wall_s)

    def share(self, kind: str) -> float:
        """Of the CPU time."""
        return self.cpu_s.get(kind, 0.0) / self.busy_s if self.busy_s else 0.0

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Account:
        return cls(**json.loads(text))


def kind_of(frame: FrameType | None) -> str:
    """What a stack is at work on: the innermost frame that is known says it. None: a thread of native code, torch's."""
    if frame is None:
        return "model"
    code = frame.f_code
    if code.co_name in _IDLE_CALLS or any(part in code.co_filename for part in _IDLE_FILES):
        return "waiting"
    at: FrameType | None = frame
    while at is not None:
        for kind, parts in _PLACES:
            if any(part in at.f_code.co_filename for part in parts):
                return kind
        at = at.f_back
    return "other"


def divided(used_s: float, seen: Mapping[str, int]) -> dict[str, float]:
    """A thread's CPU time by how often it was seen at what; what was never seen at work is `other`."""
    total = sum(seen.values())
    return {kind: used_s * count / total for kind, count in seen.items()} if total else {"other": used_s}


class Sampler(threading.Thread):
    """Looks at all other threads of this process until `end`."""

    def __init__(self, every_s: float = EVERY_S) -> None:
        super().__init__(name="sampler", daemon=True)
        self._every_s = every_s
        self._over = threading.Event()
        self._seen: dict[int, Counter[str]] = {}
        self._first = {tid: _cpu_s(tid) for tid in _threads()}
        self._last: dict[int, float] = {}
        self._began = time.monotonic()
        self._usual_s = sys.getswitchinterval()

    def run(self) -> None:
        sys.setswitchinterval(SWITCH_S)
        while not self._over.wait(self._every_s):
            self._look()
        sys.setswitchinterval(self._usual_s)

    def end(self) -> Account:
        """The account, without counts."""
        self._over.set()
        self.join()
        self._look()
        cpu_s: Counter[str] = Counter()
        for tid, now in self._last.items():
            cpu_s.update(divided(now - self._first.get(tid, 0.0), self._seen.get(tid, {})))
        return Account(time.monotonic() - self._began, dict(cpu_s))

    def _look(self) -> None:
        idents = {thread.native_id: thread.ident for thread in threading.enumerate()}
        idents[os.getpid()] = threading.main_thread().ident  # a fork leaves the parent's native id behind
        frames = sys._current_frames()
        for tid in _threads():
            if tid != self.native_id:
                self._last[tid] = _cpu_s(tid)
                kind = kind_of(frames.get(idents.get(tid) or 0))
                if kind != "waiting" and not _polls(tid):
                    self._seen.setdefault(tid, Counter())[kind] += 1


def _threads() -> list[int]:
    return [int(name) for name in os.listdir("/proc/self/task")]


def _cpu_s(tid: int) -> float:
    """A thread's CPU time, 0 when it has ended. The clock's number is the kernel's: CPUCLOCK_SCHED, of one thread."""
    try:
        return time.clock_gettime((~tid << 3) | 6)
    except OSError:
        return 0.0


def _polls(tid: int) -> bool:
    """Whether a thread waits for its sockets."""
    try:
        where = Path(f"/proc/self/task/{tid}/wchan").read_bytes()
    except OSError:
        return True
    return b"epoll" in where or b"ep_poll" in where


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Counts what this process signs, checks and hashes meanwhile."""
    counts = dict.fromkeys(CRYPTOGRAPHY, 0)

    def counting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def one_more(*arguments: Any, **options: Any) -> Any:
            counts[name] += 1
            return call(*arguments, **options)

        return one_more

    places: list[tuple[Any, str, str]] = [
        (signing.Key, "sign", "signatures"), (signing, "recover", "checks"),
        (hashlib, "sha256", "sha256"), (keccak, "new", "keccak"),
    ]  # fmt: skip
    before = [getattr(owner, attribute) for owner, attribute, _ in places]
    for owner, attribute, name in places:
        setattr(owner, attribute, counting(name, getattr(owner, attribute)))
    try:
        yield counts
    finally:
        for (owner, attribute, _), call in zip(places, before, strict=True):
            setattr(owner, attribute, call)
