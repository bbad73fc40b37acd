"""Whether disk and memory suffice, before anything is written, and the checkpoint without its values for that."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from tallystick_model.publishing.checkpoint import TensorSource
from tallystick_protocol.errors import ConfigError

_RESERVE = 256 << 20
"""Bytes that stay free on the disk, and of memory for the program itself."""


class Outline:
    """A checkpoint's names, types and shapes: what its tensors hold is not read, so that sizes are known at once."""

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        self.folder, self.config = source.folder, source.config

    def read_json(self, name: str) -> Any:
        return self._source.read_json(name)

    def names(self) -> frozenset[str]:
        return self._source.names()

    def spec(self, name: str) -> tuple[str, tuple[int, ...]]:
        return self._source.spec(name)

    def chunks(self, name: str) -> Iterator[torch.Tensor]:
        """None: two tensors of one type and shape look equal."""
        return iter(())

    def fingerprint(self) -> list[list[Any]]:
        return self._source.fingerprint()


def check_disk(folder: Path, needed: int) -> None:
    """Raises ConfigError, saying how much is missing, unless `needed` bytes fit beside a reserve."""
    free = shutil.disk_usage(folder).free
    if needed + _RESERVE > free:
        raise ConfigError(
            f"publishing writes {_gib(needed)} and {_gib(free)} are free under {folder}: "
            f"{_gib(needed + _RESERVE - free)} are missing; free some, or name a store on another disk with --store"
        )


def check_memory(needed: int, meminfo: Path = Path("/proc/meminfo")) -> None:
    """Raises ConfigError, saying how much is missing, unless `needed` bytes of memory are available.

    Where the system does not tell (other than Linux), nothing is checked.
    """
    available = available_memory(meminfo)
    if available is not None and needed + _RESERVE > available:
        raise ConfigError(
            f"one layer with its neighbours takes {_gib(needed)} of memory and {_gib(available)} are available: "
            f"{_gib(needed + _RESERVE - available)} are missing; publish on a larger machine"
        )


def available_memory(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Bytes that a process can take without swapping, as Linux estimates it."""
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), None)


def peak_bytes(layers: Iterable[int], first: int, last: int, shared: int, largest: int) -> int:
    """Memory that the canary's walk takes, from numbers of weights: one layer with its neighbours in fp32, and the
    largest tensor once more while it is packed."""
    held = [*layers]
    if held:
        held[0] += first
        held[-1] += last
    return 4 * (max(held, default=0) + shared + largest)


def _gib(count: int) -> str:
    return f"{count / (1 << 30):.2f} GiB"
