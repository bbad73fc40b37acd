"""llama.cpp's RPC backend on the same weights, where its programs are on the PATH."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import gguf

from tallystick_devnet.bench.gguf_file import llama_gguf

SERVERS = 4
READY_S = 30.0
RUN_TIMEOUT_S = 300.0
_FAILURES = (OSError, subprocess.SubprocessError, ValueError, LookupError, TypeError)
"""What programs that end badly or print something else raise, and checkpoints that are no Llama."""


class LlamaCpp:
    """Four rpc-servers on loopback, one thread each. What fails is said, and gives None; the rest is measured."""

    def __init__(self, model: Path, ports: list[int], say: Callable[[str], None]) -> None:
        """model: a GGUF file. ports: of the servers."""
        self._model = model
        self._servers = ",".join(f"127.0.0.1:{port}" for port in ports)
        self._say = say

    def decode(self, tokens: int) -> float | None:
        """Tokens per second of one sequence (`llama-bench`)."""
        return self._run("llama-bench", ["-p", "0", "-n", str(tokens), "-r", "1", "-o", "json"], decode_rate)

    def together(self, count: int, prompt: int, tokens: int) -> float | None:
        """Tokens per second of so many sequences in one batch, prompts left out (`llama-batched-bench`)."""
        room = count * (prompt + tokens)
        options = [
            "-npp", str(prompt), "-ntg", str(tokens), "-npl", str(count), "-c", str(room), "--output-format", "jsonl",
        ]  # fmt: skip
        return self._run("llama-batched-bench", options, lambda output: together_rate(output, count))

    def _run(self, name: str, options: list[str], read: Callable[[str], float]) -> float | None:
        program = shutil.which(name)
        if program is None:
            return None
        command = [program, "-m", str(self._model), "-t", "1", "-ngl", "99", "--rpc", self._servers, *options]
        try:
            done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=RUN_TIMEOUT_S)
            return read(done.stdout)
        except _FAILURES as error:
            self._say(f"  {name} failed: {_why(error)}")
            return None


def decode_rate(output: str) -> float:
    """Out of what `llama-bench -o json` prints: a list of tests. Raises ValueError, LookupError, TypeError."""
    tests: Any = json.loads(output)
    return float([test["avg_ts"] for test in tests if test["n_gen"]][-1])


def together_rate(output: str, count: int) -> float:
    """Out of what `llama-batched-bench --output-format jsonl` prints. Raises ValueError, LookupError, TypeError."""
    for line in output.splitlines():
        if line.startswith("{") and (test := json.loads(line))["pl"] == count:
            return float(test["speed_tg"])
    raise ValueError(f"no line about {count} sequences")


def start_llamacpp(checkpoint: Path, folder: Path, stack: ExitStack, say: Callable[[str], None]) -> LlamaCpp | None:
    """The servers, until the stack is closed; None where llama.cpp is not, or cannot be used, which is said."""
    server = shutil.which("rpc-server") or shutil.which("ggml-rpc-server")
    if server is None or shutil.which("llama-bench") is None:
        say("llama.cpp is not measured: rpc-server and llama-bench are not on the PATH")
        return None
    try:
        model = llama_gguf(checkpoint, folder / "model.gguf", gguf.GGMLQuantizationType.F32, fill=True)
        return LlamaCpp(model, [_start_server(server, stack) for _ in range(SERVERS)], say)
    except _FAILURES as error:
        say(f"llama.cpp is not measured: {_why(error)}")
        return None


def _start_server(server: str, stack: ExitStack) -> int:
    """The port of one. Raises OSError when it does not listen in time."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    process = subprocess.Popen(
        [server, "-H", "127.0.0.1", "-p", str(port), "-t", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    stack.callback(process.wait)
    stack.callback(process.terminate)
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return port
        time.sleep(0.05)
    raise OSError(f"{server} does not listen at port {port}")


def _why(error: BaseException) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return f"it ended with status {error.returncode}: {' '.join(error.stderr.strip().splitlines()[-1:])}"[:300]
    return f"{type(error).__name__}: {error}"[:300]
