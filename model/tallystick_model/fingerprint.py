"""All that can change what a machine computes for a model, as one key: hardware, libraries, our code, settings."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from tallystick_model.canonical.native.compiling import llvmlite_version
from tallystick_model.devices import CPU
from tallystick_protocol import canonical_json
from tallystick_protocol.manifest import Manifest

_CPUINFO = Path("/proc/cpuinfo")
_CPU_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_GPU_DRIVER = Path("/proc/driver/nvidia/version")
_CPU_FIELDS = (
    "vendor_id", "cpu family", "model", "model name", "stepping", "microcode", "flags", "cache size",
    "CPU implementer", "CPU architecture", "CPU variant", "CPU part", "CPU revision", "Features",
)  # fmt: skip
_OTHERS = frozenset({"name", "licence", "task", "pieces", "tokenizer", "generation", "pooling", "norms", "canary"})
"""Fields of a manifest that the class test does not look at."""

_NUMERIC_PREFIXES = (
    "ONEDNN_", "DNNL_", "ATEN_", "MKL_", "OMP_", "KMP_", "GOMP_", "OPENBLAS_", "TORCH_", "PYTORCH_", "CUBLAS_",
    "CUDA_", "CUDNN_", "NVIDIA_", "GLIBC_", "LD_", "TALLYSTICK_KERNELS",
)  # fmt: skip


def numeric_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment variables that libraries choose their kernels by, or that load other libraries."""
    return {name: value for name, value in environment.items() if name.startswith(_NUMERIC_PREFIXES)}


def class_key(manifest: Manifest, devices: Sequence[torch.device], environment: Mapping[str, str]) -> str:
    """SHA-256, in hex, over what the class of a model on these devices depends on.

    environment: `numeric_variables` of the process's own. The manifest counts without its name, pieces and files.
    """
    parts = {
        "model": _shape_of(manifest),
        "machine": _machine(),
        "libraries": _libraries(),
        "code": _own_code(),
        "settings": _settings(),
        "environment": dict(environment),
        "devices": [_device(device) for device in devices],
    }
    return hashlib.sha256(canonical_json.encode(parts)).hexdigest()


def _shape_of(manifest: Manifest) -> dict[str, str]:
    """Config, shapes and numerics; not which weights they are, nor what they are called."""
    return {field.name: repr(getattr(manifest, field.name)) for field in fields(manifest) if field.name not in _OTHERS}


@cache
def _machine() -> dict[str, Any]:
    """Processors as /proc/cpuinfo has them, each kind once, with their number, and the caches that kernels size by."""
    kinds: dict[str, int] = {}
    for block in _text(_CPUINFO).split("\n\n"):
        fields = dict(line.split(":", 1) for line in block.splitlines() if ":" in line)
        said = {key.strip(): value.strip() for key, value in fields.items()}
        kind = "\n".join(f"{field}: {said[field]}" for field in _CPU_FIELDS if field in said)
        if kind:
            kinds[kind] = kinds.get(kind, 0) + 1
    caches = [_text(path) for path in sorted(_CPU_CACHES.glob("index*/size"))]
    libc = " ".join(platform.libc_ver())
    return {"machine": platform.machine(), "processors": kinds, "caches": caches, "libc": libc}


@cache
def _libraries() -> dict[str, str]:
    """Versions; torch's own report has those of oneDNN and MKL, and the instruction set that ATen chose."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "built": torch.__config__.show(),
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "llvmlite": llvmlite_version(),
    }


@cache
def _own_code() -> str:
    """SHA-256 over the source of this package."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        source = path.read_bytes()
        digest.update(f"{path.relative_to(root)} {len(source)}\n".encode() + source)
    return digest.hexdigest()


def _settings() -> dict[str, Any]:
    """What a process may have set in torch."""
    return {
        "threads": torch.get_num_threads(),
        "between": torch.get_num_interop_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "onednn": bool(torch.backends.mkldnn.enabled),
        "products": torch.get_float32_matmul_precision(),
        "tf32": [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32],
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def _device(device: torch.device) -> dict[str, Any]:
    if device == CPU:
        return {"device": "cpu"}
    if device.type != "cuda":
        return {"device": str(device)}
    return {
        "device": str(device),
        "properties": repr(torch.cuda.get_device_properties(device)),
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "driver": _text(_GPU_DRIVER),
    }


def _text(path: Path) -> str:
    """A file of the system's; empty where there is none."""
    try:
        return path.read_text()
    except OSError:
        return ""
