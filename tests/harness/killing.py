"""A process that is killed before its n-th system call that writes, syncs or sends (ptrace; Linux on x86-64)."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import sys
from collections.abc import Callable

IS_POSSIBLE = sys.platform == "linux" and platform.machine() == "x86_64"

CALLS = {
    1: "write", 18: "pwrite64", 20: "writev", 26: "msync", 40: "sendfile", 44: "sendto", 46: "sendmsg", 74: "fsync",
    75: "fdatasync", 76: "truncate", 77: "ftruncate", 82: "rename", 87: "unlink", 263: "unlinkat", 264: "renameat",
    277: "sync_file_range", 285: "fallocate", 296: "pwritev", 316: "renameat2", 328: "pwritev2",
}  # fmt: skip
"""By its number what changes a file, makes it durable, or says something to another process."""

_TRACEME, _PEEKUSER, _SYSCALL, _SETOPTIONS = 0, 3, 24, 0x4200
_TRACESYSGOOD, _EXITKILL = 1, 0x100000
_CALL_STOP = signal.SIGTRAP | 0x80
_ORIG_RAX = 8 * 15
"""Where `struct user` has the number of the system call."""


def kill_before(nth: int, start: Callable[[], None]) -> tuple[int, str]:
    """Fork, run `start` in the child, and kill it by SIGKILL before its n-th call of CALLS: its wait status, and which
    call it was; "" if it ended by itself. Raises OSError where processes may not be traced."""
    child = os.fork()
    if child == 0:
        try:
            _ptrace(_TRACEME, 0)
            os.kill(os.getpid(), signal.SIGSTOP)
            start()
        finally:
            os._exit(1)
    status, seen, enters, deliver = os.waitpid(child, 0)[1], 0, True, 0
    if not os.WIFSTOPPED(status):
        raise OSError("processes cannot be traced here")
    _ptrace(_SETOPTIONS, child, _TRACESYSGOOD | _EXITKILL)
    while True:
        _ptrace(_SYSCALL, child, deliver)
        status, deliver = os.waitpid(child, 0)[1], 0
        if not os.WIFSTOPPED(status):
            return status, ""
        if os.WSTOPSIG(status) != _CALL_STOP:
            deliver = os.WSTOPSIG(status)
            continue
        call = CALLS.get(_ptrace(_PEEKUSER, child, address=_ORIG_RAX)) if enters else None
        enters = not enters
        seen += call is not None
        if call is not None and seen == nth:
            os.kill(child, signal.SIGKILL)
            return os.waitpid(child, 0)[1], call


def _ptrace(request: int, process: int, data: int = 0, address: int = 0) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    libc.ptrace.restype = ctypes.c_long
    ctypes.set_errno(0)
    found = int(libc.ptrace(request, process, address, data))
    if found == -1 and ctypes.get_errno():
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return found
