"""Evidence against a hop that an arbitration found wrong: gathered while the session still has it."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from tallystick.session.auditing import Disagreement
from tallystick_protocol.errors import TallystickError
from tallystick_protocol.evidence.bundle import Bundle
from tallystick_protocol.evidence.checking import check_model, output_leaves, read_evidence
from tallystick_protocol.receipts import Receipt, merkle_root

if TYPE_CHECKING:
    from tallystick.session.session import Session

log = logging.getLogger(__name__)


async def gather(session: Session, index: int, disagreement: Disagreement) -> bytes:
    """The bundle about the disputed receipt of hop `index`, which may be a closing one: as a juror would read it, else
    nothing.

    The rows that entered come from the hop before, those that left from the client itself or, between hops, from the
    accused: without them a juror can find wrong bits, and no more than a fault. Raises BadEvidence, Unreachable, and
    what the hop before answers.
    """
    hop, accused, setting = session.hops[index], disagreement.hop, session.setting
    window, standing = disagreement.window, hop.standing
    closes = accused.previous in standing.digests[window : window + 1]
    receipts = [*standing.receipts[: window + closes], accused]
    if index == 0:
        inputs = session.input_rows(0, accused.last)
    else:
        inputs = await session.hops[index - 1].fetch_kept(0, accused.last)
    bundle = Bundle(
        setting.manifest.numerics,
        setting.wire,
        setting.top_k,
        tuple(hop.sealed[receipt] for receipt in receipts),
        tuple(session.want[: accused.last]),
        tuple(inputs),
        setting.sides.token_types if hop.candidate.span.start == setting.stack.start else b"",
        setting.sides.memory or (),
    )
    bundle = await _with_outputs(session, index, bundle, accused)
    data = bundle.encode()
    check_model(read_evidence(setting.domain, data), setting.manifest)
    return data


async def _with_outputs(session: Session, index: int, bundle: Bundle, accused: Receipt) -> Bundle:
    """With the accused window's output rows, if there are some that hash to what it signed."""
    between = index < len(session.hops) - 1
    if between:
        try:
            outputs = tuple(await session.hops[index].fetch_kept(accused.first, accused.last))
        except TallystickError as error:
            log.info("the accused %s does not give its rows (%s)", accused.node, error)
            return bundle
    else:
        rows = session.results.rows
        outputs = tuple(rows[at] for at in accused.positions if session.want[at] and at in rows)
    full = replace(bundle, outputs=outputs, all_outputs=between)
    expected = len(accused.positions) if between else sum(bundle.want[accused.first : accused.last])
    if len(outputs) != expected or merkle_root(output_leaves(full, accused)) != accused.output:
        log.info("the rows that %s returned are not those that it signed", accused.node)
        return bundle
    return full


async def keep(session: Session, index: int, disagreement: Disagreement) -> str:
    """Gather, and keep as the setting says; the CID, or "" where there is none."""
    store = session.setting.keep_evidence
    if store is None:
        return ""
    try:
        return store(await gather(session, index, disagreement))
    except (TallystickError, KeyError) as error:
        why = error.message if isinstance(error, TallystickError) else "a receipt of it is gone"
        log.warning("no evidence against %s: %s", disagreement.hop.node, why)
        return ""
