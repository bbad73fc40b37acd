"""The client as the third node: one window of a span computed again on this machine, from evidence.

It is what a juror runs, `tallystick_node.jury.recompute`, in a process of its own that checks the evidence before it
computes. Its word counts by equality alone, and only where this machine is of the class in question.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tallystick.network import Network
from tallystick_protocol.chain.reads import ModelRecord
from tallystick_protocol.errors import NoAuditor, TallystickError
from tallystick_protocol.receipts import Receipt
from tallystick_protocol.signing import Domain, digest
from tallystick_protocol.types import Digest

RECOMPUTE_S = 300.0
"""For fetching pieces, and again for computing."""

_NEEDED = ("torch", "transformers", "safetensors", "pydantic_settings")


def can_recompute() -> bool:
    """Whether the extra `[node]` is installed."""
    return all(find_spec(name) is not None for name in _NEEDED)


@dataclass(frozen=True, slots=True)
class Recomputer:
    """One model, computed again here. max_bytes: of a span's pieces, which are fetched where they are not in the cache.

    domain: Staking's. classes: folder of measured numeric classes; None: where nodes of this user keep theirs.
    """

    network: Network
    record: ModelRecord
    domain: Domain
    max_bytes: int
    classes: Path | None = None

    async def root(self, evidence: bytes, claim: Receipt) -> Digest:
        """The Merkle root over what leaves the claim's span in its window, as this machine computes it.

        evidence: a bundle about the claim. Raises NoAuditor where this machine cannot say, or is of another class.
        """
        try:
            async with asyncio.timeout(RECOMPUTE_S):
                manifest, pieces = await self._fetch(claim)
            with tempfile.TemporaryDirectory(prefix="tallystick-") as name:
                folder = Path(name)
                (folder / "evidence").write_bytes(evidence)
                (folder / "manifest").write_bytes(manifest)
                job = {
                    "evidence": str(folder / "evidence"), "receipt": digest(self.domain, claim).hex(),
                    "manifest": str(folder / "manifest"), "pieces": pieces,
                    "chain_id": self.domain.chain_id, "staking": self.domain.contract,
                    "class_cache": "" if self.classes is None else str(self.classes), "threads": 1, "memory": 0,
                }  # fmt: skip
                (folder / "job").write_text(json.dumps(job))
                found = await _in_a_process(folder / "job")
        except TimeoutError:
            raise _unable(claim, "it took too long") from None
        except (TallystickError, OSError) as error:
            raise _unable(claim, str(error)) from None
        if found.get("problem") or found.get("same_class") is not True:
            raise _unable(claim, str(found.get("why") or "this machine is of another class"))
        try:
            return Digest(bytes.fromhex(found["root"]))
        except (KeyError, TypeError, ValueError):
            raise _unable(claim, "nothing was found") from None

    async def _fetch(self, claim: Receipt) -> tuple[bytes, dict[str, str]]:
        """The manifest, and the file of each piece of the span by its CID."""
        manifest = await self.network.manifest(self.record)
        pieces = manifest.span_pieces(claim.span)
        if (size := sum(piece.bytes for piece in pieces)) > self.max_bytes:
            raise NoAuditor(f"its pieces are {size} bytes, {self.max_bytes} may be fetched")
        paths = {str(piece.cid): str(await self.network.piece(self.record, piece.name)) for piece in pieces}
        return manifest.to_bytes(), paths


async def _in_a_process(job: Path) -> dict[str, Any]:
    """What the process says in its last line; nothing where it said nothing. Raises TimeoutError."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tallystick_node.jury.recompute", str(job),
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        async with asyncio.timeout(RECOMPUTE_S):
            told, _ = await process.communicate()
        found = json.loads(told.decode().splitlines()[-1])
        return found if isinstance(found, dict) else {}
    except (IndexError, ValueError):
        return {"problem": "unable", "why": f"it ended with status {process.returncode}"}
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()


def _unable(claim: Receipt, why: str) -> NoAuditor:
    return NoAuditor(f"the client cannot itself recompute layers {claim.span}: {why}")
