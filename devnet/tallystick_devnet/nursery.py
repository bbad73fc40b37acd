"""A warm parent for node processes: importing torch and transformers costs seconds of CPU, a fork costs none.

Each child is a process of its own, with its own session, log and signals, that runs the very `main` of the command it
was asked for. The nursery speaks JSON lines: {"command", "log", "environment"} in, {"pid"} and {"pid", "status"} out.
When its input ends, because whoever started it is gone, it stops its children and itself.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tallystick_devnet.processes import Process, ProcessFailed
from tallystick_node.cli import TORCH_ENVIRONMENT


class Nursery:
    """The side that asks. Thread-safe."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._popen: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        self._born: list[int] = []
        self._ended: dict[int, int] = {}
        self._news = threading.Condition()

    def start(self, name: str, command: Sequence[str], log: Path, environment: dict[str, str]) -> Process:
        """A child that runs `python -m MODULE …` or `python SCRIPT …`, as `command` says. Raises ProcessFailed."""
        log.parent.mkdir(parents=True, exist_ok=True)
        log.touch()
        with self._lock:
            popen = self._running()
            request = {"command": list(command[1:]), "log": str(log), "environment": environment}
            assert popen.stdin is not None
            popen.stdin.write(json.dumps(request) + "\n")
            popen.stdin.flush()
            with self._news:
                if not self._news.wait_for(lambda: self._born, timeout=120):
                    raise ProcessFailed(f"the nursery gave no process; see {self._log}")
                pid = self._born.pop(0)
        return Process(name, pid, log, lambda: self._ended.get(pid), self._wait_for_end(pid))

    def close(self) -> None:
        """Stop the nursery; its children have been stopped before."""
        if self._popen is not None:
            assert self._popen.stdin is not None
            with contextlib.suppress(OSError):
                self._popen.stdin.close()
            self._popen.wait(30)

    def _wait_for_end(self, pid: int) -> Any:
        def wait(timeout_s: float) -> bool:
            with self._news:
                return self._news.wait_for(lambda: pid in self._ended, timeout_s)

        return wait

    def _running(self) -> subprocess.Popen[str]:
        if self._popen is None:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            self._popen = subprocess.Popen(
                [sys.executable, "-m", "tallystick_devnet.nursery"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log.open("wb"),
                text=True,
                start_new_session=True,
                env={**os.environ, **TORCH_ENVIRONMENT, "OMP_NUM_THREADS": "1"},
            )
            threading.Thread(target=self._listen, args=(self._popen,), daemon=True).start()
        return self._popen

    def _listen(self, popen: subprocess.Popen[str]) -> None:
        assert popen.stdout is not None
        for line in popen.stdout:
            told = json.loads(line)
            with self._news:
                if "status" in told:
                    self._ended[told["pid"]] = told["status"]
                else:
                    self._born.append(told["pid"])
                self._news.notify_all()


def main() -> int:
    """The side that forks."""
    importlib.import_module("tallystick_node.node")
    waker, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    children: set[int] = set()
    line = b""
    while True:
        ready, _, _ = select.select([0, waker], [], [])
        if waker in ready:
            os.read(waker, 4096)
            _reap(children)
        if 0 in ready:
            chunk = os.read(0, 65536)
            if not chunk:
                break
            *requests, line = (line + chunk).split(b"\n")
            for request in requests:
                pid = _fork(json.loads(request), (waker, wake))
                children.add(pid)
                _tell({"pid": pid})
    for pid in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return 0


def _reap(children: set[int]) -> None:
    for pid in list(children):
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            children.discard(pid)
            _tell({"pid": pid, "status": os.waitstatus_to_exitcode(status)})


def _tell(news: dict[str, int]) -> None:
    os.write(1, (json.dumps(news) + "\n").encode())


def _fork(request: dict[str, Any], pipes: tuple[int, int]) -> int:
    """Fork a child that becomes the process that was asked for."""
    if (pid := os.fork()) != 0:
        return pid
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        for pipe in pipes:
            os.close(pipe)
        output = os.open(request["log"], os.O_WRONLY | os.O_APPEND)
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        os.environ.update(request["environment"])
        status = _become(request["command"])
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:  # noqa: BLE001 - the child's own crash, told as Python would
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _become(command: list[str]) -> int:
    if command[0] == "-m":
        sys.argv = command[1:]
        status: int = importlib.import_module(command[1]).main(command[2:])
        return status
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
