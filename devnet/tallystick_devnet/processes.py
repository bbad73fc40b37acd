"""Child processes that are waited for by readiness, logged to files, and always stopped."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tallystick_protocol.errors import TallystickError

STOP_TIMEOUT_S = 15.0


class ProcessFailed(TallystickError):
    """A child process ended, or did not become ready."""

    code = "process_failed"


class Process:
    """A running child. Its output goes to a log file; a line that matches `ready` says that it is up."""

    def __init__(
        self,
        name: str,
        pid: int,
        log: Path,
        status: Callable[[], int | None],
        wait: Callable[[float], bool],
    ) -> None:
        """status(): the exit status, None while it runs. wait(timeout_s): did it end in time?"""
        self.name = name
        self.pid = pid
        self.log = log
        self._status = status
        self._wait = wait
        self._asked = False

    @property
    def alive(self) -> bool:
        return self._status() is None

    def wait_for(self, ready: str, timeout_s: float) -> str:
        """The first group of the first line that matches. Raises ProcessFailed with the log's last lines."""
        pattern = re.compile(ready)
        deadline = time.monotonic() + timeout_s
        while True:
            alive = self.alive
            found = pattern.search(self.log.read_text("utf-8", "replace"))
            if found:
                return found.group(1) if found.groups() else found.group()
            if not alive:
                raise ProcessFailed(f"{self.name} ended with status {self._status()}: {self.tail()}")
            if time.monotonic() > deadline:
                raise ProcessFailed(f"{self.name} was not ready within {timeout_s:g} s: {self.tail()}")
            time.sleep(0.02)

    def tail(self, lines: int = 8) -> str:
        return "\n".join(self.log.read_text("utf-8", "replace").splitlines()[-lines:])

    def kill(self) -> None:
        """SIGKILL, as a power cut would."""
        self._signal(signal.SIGKILL)
        self._wait(STOP_TIMEOUT_S)

    def hang(self) -> None:
        """SIGSTOP: it does nothing, and its connections stay."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """SIGCONT, after `hang`."""
        self._signal(signal.SIGCONT)

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """SIGTERM, then SIGKILL. Does nothing when it has ended."""
        self.ask_to_stop()
        if self.alive and not self._wait(timeout_s):
            self.kill()

    def ask_to_stop(self) -> None:
        """SIGTERM, once: a second one would tell a node to drop everything."""
        if self.alive and not self._asked:
            self._asked = True
            self._signal(signal.SIGTERM)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)


def start(name: str, command: Sequence[str], log: Path) -> Process:
    """Run a program in a session of its own."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        popen = subprocess.Popen(
            list(command), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )

    def wait(timeout_s: float) -> bool:
        try:
            popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    return Process(name, popen.pid, log, popen.poll, wait)


def stop_all(processes: Sequence[Process]) -> None:
    """Stop children in parallel: all are asked, then each is waited for."""
    for process in processes:
        process.ask_to_stop()
    threads = [threading.Thread(target=process.stop) for process in processes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
