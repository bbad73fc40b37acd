"""The client as the third node: one window of a span computed again on this machine, from evidence.

It is what a juror runs, `tallystick_node.jury.recompute`, in a process of its own that checks the evidence before it
computes. Its word counts by equality alone, and only where this machine is of the class in question.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from tallystick.network import Network
from tallystick_protocol.chain.reads import ModelRecord
from tallystick_protocol.errors import NoAuditor, TallystickError
from tallystick_protocol.evidence.recomputing import Job, recompute
from tallystick_protocol.receipts import Receipt
from tallystick_protocol.signing import Domain, digest
from tallystick_protocol.types import Digest

RECOMPUTE_S = 300.0
"""For fetching pieces, and again for computing."""

_NEEDED = ("torch", "transformers", "safetensors", "pydantic_settings")


@cache
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
                job = Job(
                    str(folder / "evidence"), digest(self.domain, claim).hex(), str(folder / "manifest"), pieces,
                    self.domain.chain_id, self.domain.contract, "" if self.classes is None else str(self.classes), 1, 0,
                )  # fmt: skip
                told, status = await recompute(job, folder, RECOMPUTE_S)
        except TimeoutError:
            raise _unable(claim, "it took too long") from None
        except (TallystickError, OSError) as error:
            raise _unable(claim, str(error)) from None
        try:
            found = json.loads(told)
            if found["problem"] or found["same_class"] is not True:
                raise _unable(claim, str(found["why"] or "this machine is of another class"))
            return Digest(bytes.fromhex(found["root"]))
        except (KeyError, TypeError, ValueError):
            raise _unable(claim, f"the process ended with status {status}") from None

    async def _fetch(self, claim: Receipt) -> tuple[bytes, dict[str, str]]:
        """The manifest, and the file of each piece of the span by its CID."""
        manifest = await self.network.manifest(self.record)
        pieces = manifest.span_pieces(claim.span)
        if (size := sum(piece.bytes for piece in pieces)) > self.max_bytes:
            raise NoAuditor(f"its pieces are {size} bytes, {self.max_bytes} may be fetched")
        paths = {str(piece.cid): str(await self.network.piece(self.record, piece.name)) for piece in pieces}
        return manifest.to_bytes(), paths


def _unable(claim: Receipt, why: str) -> NoAuditor:
    return NoAuditor(f"the client cannot itself recompute layers {claim.span}: {why}")
