"""llama.cpp's RPC backend on the same weights, where its programs are on the PATH."""

from __future__ import annotations

import json
import shutil
import socket
import statistics
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import gguf

from tallystick_devnet.bench.gguf_file import llama_gguf
from tallystick_devnet.bench.reference import Reference
from tallystick_devnet.bench.sections import Figures, Plan

SERVERS = 4
READY_S = 30.0


def measure_llamacpp(
    checkpoint: Path, folder: Path, reference: Reference, plan: Plan, say: Callable[[str], None]
) -> Figures:
    """Decoding over four rpc-servers against `generate`, in interleaved pairs; None where llama.cpp is not there."""
    figures: Figures = {"llamacpp_rpc4_vs_generate": None}
    server = shutil.which("rpc-server") or shutil.which("ggml-rpc-server")
    bench = shutil.which("llama-bench")
    if server is None or bench is None:
        say("llama.cpp: rpc-server and llama-bench are not on the PATH")
        return figures
    model = llama_gguf(checkpoint, folder / "model.gguf", gguf.GGMLQuantizationType.F32, fill=True)
    with ExitStack() as stack:
        ports = [_start_server(server, stack) for _ in range(SERVERS)]
        rates, ratios = [], []
        for _ in range(plan.pairs):
            theirs = reference.generate(list(range(2, 2 + plan.prompt)), plan.tokens)
            base = (plan.tokens - 1) / theirs["rest_s"]
            command = [
                bench, "-m", str(model), "-t", "1", "-p", "0", "-n", str(plan.tokens), "-r", "1", "-o", "json",
                "-ngl", "99", "--rpc", ",".join(f"127.0.0.1:{port}" for port in ports),
            ]  # fmt: skip
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            rates.append(float(found[-1]["avg_ts"]))
            ratios.append(rates[-1] / base)
            say(f"  llama.cpp over {SERVERS} servers {rates[-1]:.1f}, generate {base:.1f}")
    return {
        "llamacpp_rpc4_tokens_per_s": statistics.median(rates),
        "llamacpp_rpc4_vs_generate": statistics.median(ratios),
    }


def _start_server(server: str, stack: ExitStack) -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    process = subprocess.Popen([server, "-H", "127.0.0.1", "-p", str(port), "-t", "1"], stdout=subprocess.DEVNULL)
    stack.callback(process.wait)
    stack.callback(process.terminate)
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    return port
