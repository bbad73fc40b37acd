"""Machine code for this processor, with LLVM, when it is first needed."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")

FOLDER = Path("~/.cache/tallystick/code")
"""Where machine code is kept: to make it takes some 0.3 s a process."""

_THREADS = ("GOMP_parallel", "omp_get_max_threads")
"""Of libgomp, whose threads are torch's."""


VARIABLE = "TALLYSTICK_KERNELS"
"""Environment variable: `libraries` for what torch's libraries compute, as on machines that there is no code for."""


@cache
def lanes() -> int | None:
    """float32 in a vector of this processor: 16 with AVX-512, else 8; None where there is no fused multiply-add, on
    other makes than x86-64, without llvmlite, and where the environment says so."""
    if os.environ.get(VARIABLE) == "libraries":
        return None
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return None
    try:
        if not has("fma"):
            return None
    except (ImportError, OSError) as error:
        log.info("there is no machine code to be had (%s)", error)
        return None
    return 16 if has("avx512f") else 8


def has(feature: str) -> bool:
    """Whether the processor has it, by LLVM's name. Raises ImportError or OSError where there is no LLVM."""
    from llvmlite import binding

    return bool(binding.get_host_cpu_features().get(feature))


def if_possible(make: Callable[[int], T]) -> T | None:
    """What `make` makes for this processor's `lanes`; None where there are none, or nothing can be made."""
    width = lanes()
    try:
        return None if width is None else make(width)
    except (OSError, RuntimeError) as error:  # e.g. a system that lets nobody make code
        log.info("machine code is not to be had (%s)", error)
        return None


@cache
def _threads() -> dict[str, int | None]:
    """Where the functions are by which threads of this process share a job; empty where they are missing."""
    try:
        library = ctypes.CDLL(None)
        return {name: ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in _THREADS}
    except (OSError, TypeError, AttributeError):  # TypeError: a system whose processes are no library
        return {}


def shared_from(work: int) -> int | None:
    """From so much work on threads share a job; None where this process has none that can."""
    return work if _threads() else None


class Compiled:
    """A module's functions. Raises RuntimeError where LLVM or the system does not make them."""

    def __init__(self, name: str, make: Callable[[], Any], width: int) -> None:
        """name: what the module is, its parameters included; make(): writes it; width: float32 in the vectors that it
        uses: below 16 nothing of AVX-512 is used."""
        from llvmlite import binding

        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
        for function, address in _threads().items():
            binding.add_symbol(function, address)
        features = binding.get_host_cpu_features()
        if width < 16:
            features = type(features)({one: on and "avx512" not in one for one, on in features.items()})
        said, processor = features.flatten(), binding.get_host_cpu_name()
        target = binding.Target.from_default_triple().create_target_machine(cpu=processor, features=said, opt=3)
        kept = _Kept(name, processor, said, llvmlite_version(), str(bool(_threads())))
        made = kept.read()
        if made is None:
            parsed = binding.parse_assembly(str(make()))
            parsed.verify()
            made = target.emit_object(parsed)
            kept.write(made)
        self._engine = binding.create_mcjit_compiler(binding.parse_assembly(""), target)
        self._engine.add_object_file(binding.ObjectFileRef.from_data(made))
        self._engine.finalize_object()

    def function(self, name: str, pointers: int, numbers: int) -> Callable[..., None]:
        """One that takes so many addresses, then so many 64-bit numbers. It lets go of the interpreter's lock."""
        kind = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * pointers, *[ctypes.c_int64] * numbers)
        found: Any = kind(self._engine.get_function_address(name))
        found.code = self._engine  # it lives as long as its functions
        return found  # type: ignore[no-any-return]


def address_of(function: Callable[..., None]) -> int:
    """Where one of `Compiled`'s functions is in memory."""
    address: int | None = ctypes.cast(function, ctypes.c_void_p).value  # type: ignore[arg-type]
    assert address is not None
    return address


class _Kept:
    """Machine code that an earlier process has made of the same source for the same processor: a file that begins with
    the SHA-256 of the rest, in a folder that nobody else may write to."""

    def __init__(self, *key: str) -> None:
        digest = hashlib.sha256(json.dumps([*key, _source()]).encode()).hexdigest()
        self._path = FOLDER.expanduser() / digest

    def read(self) -> bytes | None:
        try:
            folder = self._path.parent.stat()
            held = self._path.read_bytes()
        except (OSError, RuntimeError):  # RuntimeError: there is no home
            return None
        is_own = not hasattr(os, "getuid") or (folder.st_uid == os.getuid() and not folder.st_mode & 0o022)
        return held[32:] if is_own and hashlib.sha256(held[32:]).digest() == held[:32] else None

    def write(self, made: bytes) -> None:
        """Keep it, where that can be done."""
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._path.parent, delete=False) as file:
                file.write(hashlib.sha256(made).digest() + made)
            os.replace(file.name, self._path)
        except (OSError, RuntimeError) as error:
            log.info("machine code is not kept (%s)", error)


@cache
def _source() -> str:
    """SHA-256, in hex, over the files that write the code."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def llvmlite_version() -> str:
    """Empty where it is not installed."""
    try:
        return importlib.metadata.version("llvmlite")
    except importlib.metadata.PackageNotFoundError:
        return ""
