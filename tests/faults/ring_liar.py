"""A last hop that sends the first one another token than it should, once in each session.

First argument `tells` (it also says so to the client) or `hides`; the others as `tallystick-node`.
"""

from __future__ import annotations

import sys

from tallystick_node.cli import main
from tallystick_node.session import hop
from tallystick_node.session.ring import Sender
from tallystick_protocol.sampling import pick

LIES_FROM = 20
HIDES = sys.argv.pop(1) == "hides"


class Liar(Sender):
    """Chooses the second token instead of the first."""

    _lied = False

    async def turn(self, position: int, row: bytes) -> int | None:
        order = self._order
        if order is None or self._link is None or position < LIES_FROM or self._lied:
            return await super().turn(position, row)
        self._lied = True
        swapped = row[8:12] + row[4:8] + row[:4] + row[12:]
        told = await super().turn(position, swapped)
        print("fault: a false token was sent", flush=True)
        return pick(row, order.sampling, position + 1) if HIDES else told


if __name__ == "__main__":
    vars(hop)["Sender"] = Liar
    sys.exit(main())
