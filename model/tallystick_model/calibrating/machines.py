"""Nodes of several classes on one machine: processes whose libraries are told to use other instructions."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tallystick_model.span import Execution
from tallystick_protocol.errors import ConfigError
from tallystick_protocol.types import Span


@dataclass(frozen=True, slots=True)
class Kind:
    """One way to compute. environment: what the libraries are told before they are loaded (docs/numerics.md)."""

    name: str
    environment: Mapping[str, str] = field(default_factory=dict, hash=False)
    execution: Execution = "canonical"
    device: str = "cpu"


_LIBRARIES = {"TALLYSTICK_KERNELS": "libraries"}
"""As on machines for which there is no machine code of our own: oneDNN's products, MKL's attention."""

HERE = Kind("as it is")
AVX2 = Kind(
    "libraries, AVX2",
    {**_LIBRARIES, "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "COMPATIBLE"},
)
CLASSES = (
    HERE,
    Kind("libraries, plain AVX-512", {**_LIBRARIES, "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}),
    AVX2,
    Kind("libraries, MKL of any CPU", {**_LIBRARIES, "MKL_CBWR": "COMPATIBLE"}),
)
STOCK = Kind("stock kernels", execution="stock")


class Machine:
    """A process that computes spans in one way; a context manager. See `worker` for what it does."""

    def __init__(
        self, kind: Kind, manifest: Path, pieces: Path, folder: Path, environment: Mapping[str, str], top_k: int
    ) -> None:
        """folder: where it puts arrays. environment: this process's own. Raises ConfigError where it cannot run."""
        self._folder, self._top_k, self._count = folder, top_k, 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tallystick_model.calibrating.worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**environment, **kind.environment, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self.kind = kind
        how = {"execution": kind.execution, "device": kind.device}
        self._ask({"manifest": str(manifest), "pieces": str(pieces), **how})

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def run(self, span: Span, rows: Path, cheat: str | None = None) -> tuple[Path, Path]:
        """What leaves a span, and the scales of results, as files (`worker`)."""
        out, scales = self._fresh(), self._fresh()
        self._ask({
            "do": "pass", "span": [span.start, span.end], "cheat": cheat, "rows": str(rows), "out": str(out),
            "scales": str(scales), "top_k": self._top_k,
        })  # fmt: skip
        return out, scales

    def enter(self, ids: Path) -> Path:
        """What enters the first layer."""
        out = self._fresh()
        self._ask({"do": "enter", "rows": str(ids), "out": str(out)})
        return out

    def generate(self, texts: int, positions: int, seed: int) -> Any:
        """Ids that the model draws, (texts, positions) int64."""
        out = self._fresh()
        self._ask({"do": "generate", "texts": texts, "positions": positions, "seed": seed, "out": str(out)})
        return np.load(out, allow_pickle=False)

    def _fresh(self) -> Path:
        self._count += 1
        return self._folder / f"{self.kind.name.replace(' ', '-')}.{self._count}.npy"

    def _ask(self, order: dict[str, Any]) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the line that it left says why, or that there is none
        answer = self._process.stdout.readline()
        if not answer:
            raise ConfigError(f"the process that computes as {self.kind.name!r} ended with {self._process.wait(30)}")
        if "error" in (told := json.loads(answer)):
            raise ConfigError(f"{self.kind.name}: {told['error']}")
