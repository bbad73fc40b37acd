"""Rows of one session: checked, paid for in advance, computed, recorded, sent on."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from tallystick_model.stock import CannotForget
from tallystick_node.scheduling.engine import Withdrawn
from tallystick_node.scheduling.pieces import divides
from tallystick_node.session.downstream import result_frames
from tallystick_protocol.errors import (
    BadFrame,
    BadPosition,
    BadTensor,
    ContextLengthExceeded,
    LinkMismatch,
    TallystickError,
    Unauthorized,
)
from tallystick_protocol.frames import Frame, take
from tallystick_protocol.peer import Channel
from tallystick_protocol.receipts import rows_root, unpack_flags
from tallystick_protocol.types import ZERO_ADDRESS, Positions, Wei
from tallystick_protocol.vouchers import charge

if TYPE_CHECKING:
    from tallystick_node.session.hop import Hop

MEMORY_TIMEOUT_S = 30.0
PIECE_ROWS = 64


class Steps:
    """The rows of one session. computed: how many rows were, those taken back too."""

    def __init__(self, hop: Hop) -> None:
        self.computed = 0
        self._hop = hop
        self._result_room = 4 * hop.model.manifest.width * hop.opened.max_length  # the opening has reserved it
        self.drop_held()

    async def take(self, channel: Channel | None, frame: Frame, epoch: int) -> None:
        """A STEP from the client (None) or over a push connection: new rows are computed, known ones sent on again.

        epoch: in which it was sent. What was taken back since is void.
        """
        hop = self._hop
        is_first = hop.previous == ZERO_ADDRESS
        by_ring = is_first and channel is not None
        if channel is None and not is_first:
            raise Unauthorized("rows come from the hop that the session names as the previous one")
        if by_ring and not hop.fed_by.admits(frame, hop.position):
            return
        with self._of_whom(channel):
            rows = hop.rows.parse(frame)
        want = self._flags(frame)
        types = hop.rows.token_types(frame)
        if hop.one_shot:
            await self._take_at_once(frame, rows, want, types, channel)
            return
        await self._await_memory()
        async with hop.moving:
            kept = max(hop.inbox.kept_of(epoch) - frame.position, 0)
            rows, want = rows[:kept], want[:kept]
            if not rows:
                return  # taken back since then
            if is_first and not by_ring and hop.fed_by.confirm(hop.record, frame.position, rows):
                hop.signer.wake()
            with self._of_whom(channel):
                known = self._known(frame.position, rows, pushed=channel is not None and not by_ring)
            if known and not take(frame.body, "confirm", bool, False):
                repeated = Positions(frame.position, frame.position + known)
                _, before = hop.record.outputs(repeated)
                if any(asked and not had for asked, had in zip(want, before, strict=False)):
                    raise BadPosition("results are wanted of rows that were computed without: crop and send them again")
                await self._deliver(repeated)
        if by_ring:
            hop.fed_by.fed(frame.position)
        if known < len(rows):
            await self._compute(frame.position + known, rows[known:], want[known:], epoch)

    def _known(self, position: int, rows: list[bytes], pushed: bool) -> int:
        """How many of these rows are there already. Raises BadPosition; LinkMismatch where the previous hop now sends
        other bytes than those that a row was computed on: one of its two stories is false."""
        hop = self._hop
        try:
            return hop.record.new_rows(position, rows)
        except BadPosition as error:
            if not pushed or position > len(hop.record):
                raise
            raise LinkMismatch(error.message, hop=hop.previous) from None

    @contextmanager
    def _of_whom(self, channel: Channel | None) -> Iterator[None]:
        """Rows that must not be, or come in no order, are told of as the hop's before, where it has sent them."""
        hop = self._hop
        try:
            yield
        except (BadTensor, BadPosition) as error:
            if hop.inbox.is_push(channel) and hop.previous != ZERO_ADDRESS:
                error.fields.setdefault("hop", hop.previous)
            raise

    async def _take_at_once(
        self, frame: Frame, rows: list[bytes], want: list[bool], types: list[int], channel: Channel | None
    ) -> None:
        """A bidirectional span takes the whole sequence at once, however many frames it came in."""
        hop = self._hop
        if len(hop.record):
            raise BadPosition("this model is bidirectional: a session takes one step", expected=len(hop.record))
        with self._of_whom(channel):
            if frame.position != len(self._held):
                raise BadPosition(f"rows go on at position {len(self._held)}", expected=len(self._held))
        self.check_length(len(self._held) + len(rows))
        if self._held and bool(types) != bool(self._held_types):
            raise BadFrame("token types come with every row of a session or with none")
        more = take(frame.body, "more", bool, False)
        self._held += rows
        self._held_want += want
        self._held_types += types
        if not more:
            rows, want, types = self._held, self._held_want, self._held_types
            self.drop_held()
            hop.sketcher.types = types
            root = rows_root(bytes([kind]) for kind in types) if types else None
            hop.windows.side = replace(hop.windows.side, token_types=root)
            await self._compute(0, rows, want, hop.inbox.epoch, types)

    def drop_held(self) -> None:
        """Forget the frames of a step that is not whole yet."""
        self._held: list[bytes] = []
        self._held_want: list[bool] = []
        self._held_types: list[int] = []

    def _flags(self, frame: Frame) -> list[bool]:
        if "want" not in frame.body:
            return [False] * frame.num_rows
        try:
            return list(unpack_flags(take(frame.body, "want", bytes), frame.num_rows))
        except ValueError as error:
            raise BadFrame(str(error)) from None

    def check_length(self, length: int) -> None:
        """Raises ContextLengthExceeded."""
        hop = self._hop
        if length > hop.opened.max_length:
            raise ContextLengthExceeded(
                f"the session was opened for {hop.opened.max_length} positions, {length} were asked for",
                limit=hop.opened.max_length,
            )

    def make_room(self, num_bytes: int) -> None:
        """Reserve what kept rows will take beyond what the opening has reserved: dense logits may be large."""
        hop = self._hop
        missing = num_bytes - self._result_room
        if missing > 0:
            hop.reserve(missing)
            self._result_room += missing

    async def _compute(
        self, start: int, rows: list[bytes], want: list[bool], epoch: int, types: Sequence[int] = ()
    ) -> None:
        """New rows from position `start`, void where they are taken back meanwhile.

        They are charged, computed and sent on a piece at a time: PONG tells how far a replay has come, the next hop
        begins, and no more is computed ahead of vouchers than credit allows.
        """
        hop = self._hop
        self.check_length(start + len(rows))
        if hop.rows.is_last:
            self.make_room(hop.record.size_bytes + sum(want) * hop.rows.result_bytes)
        divisible = not hop.one_shot and divides(hop.model, hop.cache)
        size = PIECE_ROWS if divisible else len(rows)
        for begin in range(0, len(rows), size):
            piece = slice(begin, begin + size)
            if not await self._compute_piece(start + begin, rows[piece], want[piece], epoch, types):
                return

    async def _compute_piece(
        self, start: int, rows: list[bytes], want: list[bool], epoch: int, types: Sequence[int]
    ) -> bool:
        """False when the rows are void."""
        hop = self._hop
        if not await hop.billing.book(self._cost(rows), lambda: hop.inbox.kept_of(epoch) <= start):
            return False  # cropped while it waited for a voucher
        async with hop.moving:
            if (kept := max(hop.inbox.kept_of(epoch) - start, 0)) < len(rows):
                hop.billing.refund(self._cost(rows[kept:]))
                rows, want = rows[:kept], want[:kept]
            if not rows:
                return False
            hop.has_parted = False
            try:
                segment = hop.rows.segment(hop.cache, start, rows, want, types)
                result = await hop.shop.engine.forward(segment, hop.client, model=hop.model)
                outputs = hop.rows.outputs(result, want)
                scales = hop.rows.scales(result, want) if hop.sketcher.is_on else ()
            except (TallystickError, Withdrawn) as error:
                hop.billing.refund(self._cost(rows))
                if hop.cache is not None and hop.cache.length > start:
                    with suppress(CannotForget):  # then the model refuses what goes on from elsewhere than its state
                        hop.cache.crop(start)  # its rows were computed, but are not fit to be signed
                if isinstance(error, Withdrawn):
                    return False
                raise
            hop.record.append(rows, outputs, want, scales)
            self.computed += len(rows)
            chosen = await hop.ring.turn(len(hop.record) - 1, outputs[-1])
            await self._deliver(Positions(start, len(hop.record)), chosen)
        if hop.windows.may_be_due(start):
            hop.signer.wake()
        return True

    def _cost(self, rows: list[bytes]) -> Wei:
        model = self._hop.model
        return charge(model.span, model.manifest.layers, self._hop.shop.price, len(rows))

    async def _deliver(self, positions: Positions, chosen: int | None = None) -> None:
        """Send output rows on: to the next hop, or from the model's end to the client.

        chosen: the token that the ring has chosen from the last one.
        """
        hop = self._hop
        if not hop.downstream.is_end:
            await hop.downstream.pass_on(positions)
        elif hop.rows.is_last:
            for frame in self.results(positions):
                body = frame.body if chosen is None else {**frame.body, "chosen": chosen}
                await hop.control.send(replace(frame, body=body))

    def results(self, positions: Positions) -> Iterator[Frame]:
        """The wanted results of these positions, as RESULT frames."""
        hop = self._hop
        outputs, want = hop.record.outputs(positions)
        return result_frames(hop.rows.result_dtype, positions.first, outputs, want, hop.inbox.epoch)

    async def _await_memory(self) -> None:
        """The encoder's states come from the client, rows perhaps from the hop before: either may be first."""
        hop = self._hop
        if hop.memory is None or hop.remembers.is_set():
            return
        try:
            async with asyncio.timeout(MEMORY_TIMEOUT_S):
                await hop.remembers.wait()
        except TimeoutError:
            raise BadPosition("a decoder takes the encoder's states (MEMORY) before its first step") from None
