"""Rows of one session taken back, or replaced by those of another one, in a new epoch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tallystick_model.canonical.cache import KvCache
from tallystick_model.stock import CannotForget
from tallystick_node.alone import alone
from tallystick_node.session.kept import FORKS_PER_ROW, FREE_FORKS, Source
from tallystick_protocol.errors import BadPosition, Rejected, SessionUnknown
from tallystick_protocol.frames import Frame, take
from tallystick_protocol.types import SessionId

if TYPE_CHECKING:
    from tallystick_node.session.hop import Hop


class Rewinding:
    """CROP and FORK."""

    def __init__(self, hop: Hop) -> None:
        self._forks = 0
        self._hop = hop

    async def crop(self, frame: Frame) -> None:
        """Forget positions from frame.position on; whoever gets rows from here hears of it in the order of the rows."""
        hop = self._hop
        async with hop.moving:
            await self._rewind(frame, min(frame.position, len(hop.record)))

    async def _rewind(self, frame: Frame, length: int, source: Source | None = None, last: int = 0) -> None:
        """Keep `length` rows, then take [length, last) of `source`; the next hop hears of a crop. Holds `moving`.

        Nothing is signed until the client has heard that it is done: it drops every receipt that came before.
        """
        hop = self._hop
        hop.has_parted = False
        if length < hop.reused:
            hop.continues = None
        async with hop.signer.lock:
            try:
                if source is None:
                    self._rewind_cache(length)
                else:  # copying takes its time
                    await alone(self._rewind_cache, length, source, last)
            except CannotForget as error:
                raise BadPosition(str(error)) from None
            hop.record.crop(length)
            hop.windows.crop(frame.position)
            hop.signer.sealed = {k: v for k, v in hop.signer.sealed.items() if k < hop.record.num_complete}
            hop.signer.closing = None
            hop.sketcher.crop()
            hop.steps.drop_held()
            hop.ring.disarm()
            hop.fed_by.crop(length)
            if source is not None:
                hop.record.take(source.record, length, last)
            epoch = take(frame.body, "epoch", int)
            await hop.downstream.enter(epoch, frame.position)
            hop.inbox.enter(epoch, frame.position)
            hop.billing.wake()  # a step that waited for a voucher is void now
            await hop.commands.done(frame)

    def _rewind_cache(self, length: int, source: Source | None = None, last: int = 0) -> None:
        """Raises CannotForget, and then has changed nothing."""
        hop = self._hop
        if hop.cache is None:
            return
        if source is None or isinstance(hop.cache, KvCache):
            hop.cache.crop(length)
        if source is not None:
            hop.cache.take(source.cache, length, last)  # of the same span, so of the same class

    async def fork(self, frame: Frame) -> None:
        """Go on from another session of this client, open or kept: its rows [frame.position, to) replace ours.

        Nothing is computed, so nothing is charged; the receipts that follow say what is true of these rows here, too.
        """
        hop = self._hop
        source = hop.find(SessionId(take(frame.body, "from", bytes)))
        first, last = frame.position, take(frame.body, "to", int)
        if source is None or source.id == hop.id or source.client != hop.client:
            raise SessionUnknown("no other session of yours with that id is open or kept here")
        if source.is_spent or self._forks >= FREE_FORKS + FORKS_PER_ROW * hop.steps.computed:
            raise Rejected("more forks than this session has computed rows for: each is signed, none is paid")
        same = source.side == hop.windows.side and source.form == hop.rows.form
        same = same and source.span == hop.model.span and not hop.sketcher.is_on  # their inputs are not kept there
        if hop.one_shot or hop.cache is None or source.cache is None or not same:
            raise BadPosition("these sessions do not hold rows that one could go on from in the other")
        early, late = sorted((hop.source, source), key=lambda one: one.id)
        async with early.moving, late.moving:
            if not 0 <= first <= last <= len(source.record) or first > len(hop.record):
                raise BadPosition(f"rows [{first}, {last}) are not there to be taken", expected=len(source.record))
            hop.steps.check_length(last)
            if not hop.record.shares(source.record, first):
                raise BadPosition(f"the two sessions differ before position {first}")
            hop.steps.make_room(hop.record.bytes_of(0, first) + source.record.bytes_of(first, last))
            await self._rewind(frame, first, source, last)
            self._forks += 1
            source.forks += 1
            hop.reused += last - first
            hop.continues = source.id if last == len(source.record) else None
