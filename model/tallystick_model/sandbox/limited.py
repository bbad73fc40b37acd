"""Runs a task of `worker` in a process of its own, with limits on time, memory and output."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict, dataclass
from typing import Any

from tallystick_protocol.errors import ManifestError


@dataclass(frozen=True, slots=True)
class Limits:
    """cpu_s: processor time. wall_s: time altogether. memory_bytes: address space. output_bytes: of the answer."""

    cpu_s: int
    wall_s: float
    memory_bytes: int
    output_bytes: int


def ask(task: str, request: dict[str, Any], limits: Limits) -> Any:
    """The answer of a task of `worker.TASKS`, a JSON value.

    Raises ManifestError with the task's own words where it refuses, and when it goes over a limit.
    """
    question = json.dumps({"task": task, "limits": asdict(limits), "request": request})
    with tempfile.TemporaryFile() as given:
        given.write(question.encode())
        given.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-I", "-m", "tallystick_model.sandbox.worker"],
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
        )
    late = threading.Event()

    def stop() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(limits.wall_s, stop)
    timer.start()
    try:
        assert process.stdout is not None
        answer = process.stdout.read(limits.output_bytes + 1)
    finally:
        timer.cancel()
        process.kill()
        status = process.wait()
        if process.stdout is not None:
            process.stdout.close()
    if len(answer) > limits.output_bytes:
        raise ManifestError(f"{task}: more than {limits.output_bytes} bytes came out")
    return _result(task, answer, status, limits, late=late.is_set())


def _result(task: str, answer: bytes, status: int, limits: Limits, *, late: bool) -> Any:
    try:
        found = json.loads(answer)
    except (ValueError, RecursionError):
        spent = f"{limits.wall_s:g} s" if late else f"{limits.cpu_s} s of processor time or its memory"
        raise ManifestError(f"{task}: stopped, it took more than {spent} (exit status {status})") from None
    if "error" in found:
        raise ManifestError(f"{task}: {str(found['error'])[:200]}")
    return found["answer"]
