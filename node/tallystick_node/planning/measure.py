"""What this machine can hold and how fast it is: free memory, free disk, the time of one layer."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from tallystick_model.devices import CPU, Placement
from tallystick_model.memory import device_layer_bytes, largest_piece_bytes, layer_bytes, span_bytes
from tallystick_model.speed import layer_seconds
from tallystick_node.planning.choice import Machine
from tallystick_protocol.errors import ConfigError
from tallystick_protocol.manifest import Manifest
from tallystick_protocol.types import Span

KEPT_FREE = 0.1
"""The part of the free memory that is left to others."""

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def free_memory_bytes() -> int:
    """Memory that new allocations can have: the system's, or what is left of a container's limit."""
    free = math.inf
    if _MEMINFO.exists():
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    limit, used = _number(_CGROUP / "memory.max"), _number(_CGROUP / "memory.current")
    if limit is not None and used is not None:
        free = min(free, limit - used)
    if free == math.inf:
        raise ConfigError("this system does not say how much memory is free: set memory, in bytes")
    return max(0, int(free))


def machine_for(
    manifest: Manifest,
    memory_bytes: int,
    cache_bytes: int,
    room: Sequence[tuple[torch.device, int]] = (),
    *,
    mixed: bool = False,
) -> Machine:
    """Measure this machine for a model. memory_bytes: what the node may take; 0: what is free, less a tenth.

    Room for caches, and for the largest piece once more while it is loaded, is set aside. room: accelerators, and
    bytes for weights there; the first one's speed counts for all. mixed: whether the CPU takes what does not fit them.
    """
    memory = memory_bytes or int(free_memory_bytes() * (1 - KEPT_FREE))
    aside = cache_bytes + largest_piece_bytes(manifest, manifest.whole)
    here = max(0, memory - aside)
    if not room:
        return Machine(here, layer_bytes(manifest), layer_seconds(manifest))
    there = sum(free for _, free in room)
    return Machine(there + here * mixed, device_layer_bytes(manifest), layer_seconds(manifest, room[0][0]))


def check_memory(manifest: Manifest, span: Span, memory_bytes: int, placement: Placement | None = None) -> None:
    """Raises ConfigError saying how much is missing to load a span. memory_bytes: the limit; 0: what is free.

    placement: layers on accelerators do not count; None for all on the CPU.
    """
    free = memory_bytes or free_memory_bytes()
    places = placement.devices if placement is not None else ()
    sizes = layer_bytes(manifest)[span.start : span.end]
    elsewhere = sum(size for size, device in zip(sizes, places, strict=False) if device != CPU)
    needed = span_bytes(manifest, span) - elsewhere + largest_piece_bytes(manifest, span)
    if needed > free:
        raise ConfigError(
            f"layers {span} of {manifest.name} take {_mb(needed)} of memory while they are loaded, {_mb(free)} may be"
            f" used: {_mb(needed - free)} are missing; serve fewer layers, or span = \"auto\""
        )


def check_disk(folder: Path, needed_bytes: int, largest_bytes: int) -> None:
    """Raises ConfigError unless a folder has room for pieces that are to be fetched.

    A piece lies there in blocks and as a file for a moment, hence the largest one counts twice.
    """
    needed = needed_bytes + largest_bytes
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigError(
            f"the pieces to fetch take {_mb(needed)} of disk, {folder} has {_mb(free)} free:"
            f" {_mb(needed - free)} are missing; nothing was fetched"
        )


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such limit, or "max"
        return None


def _mb(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"
