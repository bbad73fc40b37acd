"""The ring: the last hop chooses the token by the client's sampler and sends it straight to the first hop.

The client sends every token to the first hop as well, a transit later: it confirms what the ring has brought, or takes
its place where the ring is broken. So nothing depends on the ring but time. The first hop signs for no id that its
client has not sent, and tells it of one that the last hop made up.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from tallystick_node.session.links import Dialler, Link
from tallystick_node.session.record import Record
from tallystick_protocol.errors import BadFrame, ConfigError, LinkMismatch, TallystickError, Unreachable
from tallystick_protocol.frames import DType, Frame, Kind, rows_frame, take
from tallystick_protocol.receipts import leaf, pack_flags
from tallystick_protocol.sampling import Sampling, pick
from tallystick_protocol.signing import address_bytes, checksum_address
from tallystick_protocol.types import Address, SessionId

log = logging.getLogger(__name__)

MAX_ENDS = 256


@dataclass(frozen=True, slots=True)
class Order:
    """What a client asks of the last hop. first: the node of the first hop. Tokens are sent to it for positions below
    `until`, but for those that end the answer."""

    first: Address
    until: int
    sampling: Sampling
    ends: frozenset[int]

    @staticmethod
    def parse(frame: Frame) -> Order:
        """Raises BadFrame."""
        body = take(frame.body, "sampling", dict)
        ends = take(frame.body, "ends", list, [])
        if len(ends) > MAX_ENDS or any(type(end) is not int for end in ends):
            raise BadFrame(f"ends: at most {MAX_ENDS} token ids")
        try:
            sampling = Sampling(
                temperature=take(body, "temperature", float),
                top_k=take(body, "top_k", int),
                top_p=take(body, "top_p", float),
                seed=take(body, "seed", int),
                min_p=take(body, "min_p", float),
            )
        except ConfigError as error:
            raise BadFrame(error.message) from None
        return Order(_address(frame, "first"), take(frame.body, "until", int), sampling, frozenset(ends))


class Sender:
    """At the last hop: chooses tokens and sends them to the first one."""

    def __init__(self, dialler: Dialler, session: SessionId, attempt: int) -> None:
        self._dialler = dialler
        self._session = session
        self._attempt = attempt
        self._order: Order | None = None
        self._epoch = 0
        self._link: Link | None = None
        self._attending: asyncio.Task[None] | None = None

    def arm(self, order: Order, epoch: int) -> None:
        """Choose tokens from now on. The first hop is dialled beside; until it answers, the client's steps do alone."""
        is_attended = self._attending is not None and not self._attending.done()
        before = None if self._order is None else self._order.first
        stays = is_attended and before == order.first and self._epoch == epoch
        self._order, self._epoch = order, epoch
        if not stays:
            self._drop_link()
            self._attending = asyncio.create_task(self._attend(order.first, epoch))

    def disarm(self) -> None:
        """Rows are taken back: the client says when to go on."""
        self._order = None
        self._drop_link()

    async def turn(self, position: int, row: bytes) -> int | None:
        """The token behind the row at `position`, sent to the first hop if it goes on there.

        None when not armed, or when nobody wanted the row.

        Raises CorruptResult for a row that is no top-k row.
        """
        order = self._order
        if order is None or not row:
            return None
        token = pick(row, order.sampling, position + 1)
        if token not in order.ends and position + 1 < order.until and self._link is not None:
            step = rows_frame(
                Kind.STEP, DType.IDS, [token.to_bytes(4, "little")], position + 1, {"want": pack_flags([True])}
            )
            try:
                await self._link.send(step)
            except Unreachable:
                self._link = None
        return token

    def _drop_link(self) -> None:
        self._link = None
        if self._attending is not None:
            self._attending.cancel()
            self._attending = None

    async def _attend(self, first: Address, epoch: int) -> None:
        """Dial the first hop, and read the connection as long as it lasts."""
        try:
            link = await self._dialler.dial(first, self._session, self._attempt, epoch)
        except TallystickError as error:
            log.info("no ring to %s (%s)", first, error)
            return
        try:
            self._link = link
            await link.ended()
        finally:
            self._link = None if self._link is link else self._link
            await link.channel.close()


class Receiver:
    """At the first hop: which ids came by the ring, and which of them the client has confirmed."""

    def __init__(self) -> None:
        self.node: Address | None = None
        self._until = 0
        self._unconfirmed: int | None = None

    def open(self, frame: Frame) -> None:
        """Take ids from the node that the client names, below the position `until`. Raises BadFrame."""
        self.node, self._until = _address(frame, "from"), take(frame.body, "until", int)

    def admits(self, frame: Frame, length: int) -> bool:
        """Whether a step of the ring is the next token; `length`: rows that the session has. What is late is known."""
        return frame.num_rows == 1 and frame.position == length < self._until

    def fed(self, position: int) -> None:
        """The ring brought the id at `position`."""
        if self._unconfirmed is None:
            self._unconfirmed = position

    def confirm(self, record: Record, first: int, rows: Sequence[bytes]) -> bool:
        """The client has sent the ids from position `first` on; whether the ring had brought some of them before.

        Raises LinkMismatch where the ring brought others.
        """
        start = self._unconfirmed
        if start is None or not first <= start < first + len(rows):
            return False
        for position in range(start, min(first + len(rows), len(record))):
            if leaf(rows[position - first]) != record.input_leaf(position):
                raise LinkMismatch(
                    f"{self.node} sent another token for position {position} than the client",
                    hop=self.node or "", wrong_from=position,
                )  # fmt: skip
        self._unconfirmed = first + len(rows) if first + len(rows) < len(record) else None
        return True

    def crop(self, length: int) -> None:
        if self._unconfirmed is not None and self._unconfirmed >= length:
            self._unconfirmed = None

    def confirmed(self, length: int) -> int:
        """How many of `length` rows the client has sent the ids of."""
        return length if self._unconfirmed is None else min(length, self._unconfirmed)

    def may_sign(self, last: int) -> bool:
        """Whether the client has sent every id before `last`."""
        return self.confirmed(last) == last


def _address(frame: Frame, key: str) -> Address:
    return checksum_address(address_bytes(Address(take(frame.body, key, str))))
