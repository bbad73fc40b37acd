"""Fetching a file into the local store: many blocks at a time, each verified, none of them twice."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tallystick_protocol.content import gateway
from tallystick_protocol.content.cid import Cid
from tallystick_protocol.content.dag import Branch, Budget, Progress, Visit, open_block
from tallystick_protocol.content.sources import Patience, Sources
from tallystick_protocol.content.store import LocalStore
from tallystick_protocol.errors import BlockMissing


async def fetch_file(
    cid: Cid,
    dest_path: Path,
    sources: Sequence[str],
    *,
    store: LocalStore,
    max_bytes: int,
    progress: Progress | None = None,
    patience: Patience | None = None,
    num_parallel: int = 8,
) -> int:
    """Fetch the file under `cid` from gateways, keep it in `store`, pin it, put it at `dest_path`; returns its size.

    sources: base URLs, best first. What the store holds already is not fetched again, so calling this anew resumes.
    progress: called on the event loop with file bytes done and file bytes in all.
    Raises BlockMissing (naming each source and why), BadBlock, ContentTooLarge, ContentError, ConfigError.
    """
    bases = [gateway.check_base_url(source) for source in sources]
    async with gateway.open_session(num_parallel * 2) as session:

        async def ask(base_url: str, block_cid: Cid) -> bytes:
            return await gateway.get_block(session, base_url, block_cid)

        await fetch_dag(cid, store, Sources(bases, ask, patience or Patience()), max_bytes, progress, num_parallel)
    return await asyncio.to_thread(store.read_file, cid, dest_path, max_bytes)


async def fetch_dag(
    cid: Cid,
    store: LocalStore,
    sources: Sources,
    max_bytes: int,
    progress: Progress | None = None,
    num_parallel: int = 8,
) -> None:
    """Bring every block of a file into `store`, gather them into a whole file, pin it. Raises as `fetch_file` does."""
    async with _kept(store):
        job = _Job(store, sources, Budget(max_bytes), progress)
        await job.run(cid, num_parallel)
        await asyncio.to_thread(store.gather, cid, max_bytes)
        await asyncio.to_thread(store.pin, cid)


@contextlib.asynccontextmanager
async def _kept(store: LocalStore) -> AsyncIterator[None]:
    # Cancelled while it waits, the lock goes when its last reference does.
    holding = store.in_use()
    await asyncio.to_thread(holding.__enter__)
    try:
        yield
    finally:
        holding.__exit__(None, None, None)


@dataclass(slots=True)
class _Job:
    store: LocalStore
    sources: Sources
    budget: Budget
    progress: Progress | None
    todo: list[Branch] = field(default_factory=list)
    done_bytes: int = 0
    total_bytes: int = 0
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    num_running: int = 0

    async def run(self, root: Cid, num_parallel: int) -> None:
        self.todo = [Branch(root)]
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(num_parallel):
                    group.create_task(self._work())
        except BaseExceptionGroup as errors:
            # The first failure ends the others; it is the one that tells what happened.
            raise errors.exceptions[0] from None

    async def _work(self) -> None:
        while (branch := await self._next()) is not None:
            visit = await self._bring(branch)
            self.budget.spend(visit)
            async with self.changed:
                # The newest branches go first, so that what waits stays within the links beside one path.
                self.todo.extend(reversed(visit.children))
                self.num_running -= 1
                self.changed.notify_all()
            self._tell(visit)

    async def _next(self) -> Branch | None:
        async with self.changed:
            while not self.todo and self.num_running:
                await self.changed.wait()
            if not self.todo:
                return None
            self.num_running += 1
            return self.todo.pop()

    async def _bring(self, branch: Branch) -> Visit:
        try:
            return open_block(branch, await asyncio.to_thread(self.store.get_block, branch.cid))
        except BlockMissing:
            visit = open_block(branch, await self.sources.get_block(branch.cid))
        await asyncio.to_thread(self.store.put_block, visit.block, branch.cid.codec)
        return visit

    def _tell(self, visit: Visit) -> None:
        self.total_bytes = max(self.total_bytes, visit.size_bytes)
        self.done_bytes += len(visit.content)
        if self.progress is not None and visit.content:
            self.progress(self.done_bytes, self.total_bytes)
