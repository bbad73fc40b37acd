"""What a node says of itself beside its signed offer, for clients that plan routes. Nobody signs it."""

from __future__ import annotations

from typing import Any

from tallystick_node.session.shop import Shop


def pace(shop: Shop, rows_per_s: float | None) -> dict[str, Any]:
    """How fast it is, and how far from the nodes that it has dialled (docs/routing.md).

    rows_per_s: through the span, measured before serving. step_ms: a forward with one row of each session at present;
    row_ms: a row of other forwards; backlog_ms: how long what waits will take; batch: sessions in a forward;
    waiting_rows: not computed yet. parts: whether sessions over some of its layers are served. links_ms: by node.
    """
    load = shop.engine.load
    return {
        "rows_per_s": rows_per_s and round(rows_per_s, 2),
        "step_ms": _ms(load.single_s),
        "row_ms": _ms(load.bulk_row_s),
        "backlog_ms": round(load.backlog_s * 1e3, 3),
        "batch": round(load.batch, 2),
        "waiting_rows": load.waiting_rows,
        "parts": shop.engine.serves_parts,
        "links_ms": shop.dialler.distances.told(),
    }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 3)
