"""Having an accused window computed again: the job, and the process of the node software that does it.

Jurors and clients run it by its name; whoever runs it needs the node software installed, and imports nothing of it.
"""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from tallystick_protocol.signing import Domain, staking_domain
from tallystick_protocol.types import Address

PROGRAM = "tallystick_node.jury.recompute"


@dataclass(frozen=True, slots=True)
class Job:
    """What to judge. evidence, manifest: files. receipt: the digest of the accused one, in hex.

    pieces: the file of each piece of the span, by its CID. class_cache: "" for the nodes' usual one. memory: bytes for
    weights; 0: what is free.
    """

    evidence: str
    receipt: str
    manifest: str
    pieces: dict[str, str]
    chain_id: int
    staking: str
    class_cache: str
    threads: int
    memory: int

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @property
    def domain(self) -> Domain:
        return staking_domain(self.chain_id, Address(self.staking))


async def recompute(job: Job, folder: Path, timeout_s: float) -> tuple[str, int | None]:
    """The process's last line, "" where it said nothing, and its exit status. folder: for the job's own file.

    Raises TimeoutError. It is gone when this returns.
    """
    path = folder / "job.json"
    job.write(path)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", PROGRAM, str(path),
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        async with asyncio.timeout(timeout_s):
            told, _ = await process.communicate()
        return (told.decode(errors="replace").splitlines() or [""])[-1], process.returncode
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
