"""The small world's client as the third node: it computes again what evidence says."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from harness.small_world import STAKING, World
from tallystick_node.session.rows import RowFormat
from tallystick_protocol.evidence.checking import check_model, read_evidence
from tallystick_protocol.receipts import Receipt, leaf, merkle_root
from tallystick_protocol.signing import digest
from tallystick_protocol.types import Digest


def recomputing(world: World, asked: list[Receipt]) -> Callable[[bytes, Receipt], Awaitable[Digest]]:
    """What a `Setting` takes. asked: gets the receipts that it was asked about."""

    async def root(data: bytes, claim: Receipt) -> Digest:
        asked.append(claim)
        evidence = read_evidence(STAKING, data, digest(STAKING, claim))
        check_model(evidence, world.manifest)
        bundle = evidence.bundle
        model = next(node.engine.model for node in world.nodes.values() if node.engine.model.span == claim.span)
        rows = RowFormat(world.manifest, claim.span, bundle.top_k, bundle.wire)
        cache = model.new_cache(bundle.num_positions)
        result = model.forward([rows.segment(cache, 0, list(bundle.inputs), list(bundle.want))])[0]
        outputs = rows.outputs(result, list(bundle.want))
        return merkle_root([leaf(row) for row in outputs[claim.first : claim.last]])

    return root
