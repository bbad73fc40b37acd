"""The connection to a session at a node: numbered commands, signs of life, and coming back when it is cut."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace

from tallystick.session.ending import end
from tallystick.session.patience import Patience
from tallystick_protocol.errors import Departed, InternalError, TallystickError, Unreachable
from tallystick_protocol.frames import Frame, Kind, take
from tallystick_protocol.peer import Channel, expect
from tallystick_protocol.types import Digest

log = logging.getLogger(__name__)

COMMAND_TIMEOUT_S = 30.0
RESUME_TIMEOUT_S = 5.0
LOOK_EVERY_S = 0.25
QUIET_S = 0.5
AWAY_RETRY_S = (0.0, 0.05, 0.1, 0.2, 0.4)
PONG_FLOOR_S, PONG_PRIOR_S = 1.5, 10.0


@dataclass(slots=True)
class _Pending:
    frame: Frame
    answer: asyncio.Future[None]
    on_done: Callable[[], None]


@dataclass(frozen=True, slots=True)
class Pong:
    """What a node last said of its session: the positions it has computed, and whether it waits for a voucher."""

    position: int = 0
    unpaid: bool = False
    at: float = 0.0


@dataclass(frozen=True, slots=True)
class Comeback:
    """How a cut connection is replaced. dial: a new connection. claim(spki): the RESUME frame, bound to the
    key of that connection.

    rejoin: sends again what the node lacks; gets the RESUMED frame. insist_s: for how long to try, at present.
    """

    dial: Callable[[], Awaitable[Channel]]
    claim: Callable[[Digest], Frame]
    rejoin: Callable[[Frame], Awaitable[None]]
    insist_s: Callable[[], float]


class Line:
    """One session at one node.

    While there is no connection, frames are dropped: `rejoin` sends again what the node lacks. While it does so, other
    frames wait, so that nothing is sent in between and nothing is forgotten.
    """

    def __init__(self, node: str, channel: Channel) -> None:
        self.node = node
        self.pong = Pong()
        self.num_resumed = 0
        self._channel = channel
        self._pending: dict[int, _Pending] = {}
        self._last_number = 0
        self._reader: asyncio.Task[None] | None = None
        self._away = False
        self._rejoined: asyncio.Event | None = None
        self._failure: TallystickError | None = None
        self._on_frame: Callable[[Frame], None] = lambda _: None
        self._on_change: Callable[[], None] = lambda: None
        self._fail: Callable[[TallystickError], None] = lambda _: None
        self._comeback: Comeback | None = None
        self._patience = Patience(PONG_FLOOR_S, PONG_PRIOR_S)
        self._heard_at = time.monotonic()
        self._asked_at: float | None = None

    def listen(
        self,
        on_frame: Callable[[Frame], None],
        on_change: Callable[[], None],
        fail: Callable[[TallystickError], None],
        comeback: Comeback | None = None,
    ) -> None:
        """Begin to read, or be heard by somebody else. on_change: called after every frame and after `fail`, which is
        called once, at the end."""
        self._on_frame, self._on_change = on_frame, on_change
        self._fail = fail
        self._comeback = comeback

        async def read() -> None:
            while True:
                try:
                    frame = await self._channel.receive()
                    self._heard_at = time.monotonic()
                    if frame.kind is Kind.PONG:
                        self._take_pong(frame)
                    elif frame.kind is Kind.DONE:
                        self._settle(frame.body.get("of"), None)
                    else:
                        self._on_frame(frame)
                    self._on_change()
                except Exception as error:
                    if isinstance(error, Unreachable) and not isinstance(error, Departed) and await self._come_back():
                        self._on_change()
                        continue
                    if not isinstance(error, TallystickError):
                        log.exception("reading from %s failed", self.node)
                    known = error if isinstance(error, TallystickError) else InternalError(f"reading failed: {error}")
                    self._give_up(known)
                    self._on_change()
                    return

        if self._reader is None:
            self._reader = asyncio.create_task(read())

    @property
    def is_away(self) -> bool:
        """Whether the connection was cut, and there is no other one yet."""
        return self._away

    @property
    def is_informed(self) -> bool:
        """Whether it has answered often enough to tell how long its answers take."""
        return self._patience.is_informed

    # -- sending

    async def send(self, frame: Frame) -> None:
        """Raises Unreachable, and remembers it."""
        if self._away and asyncio.current_task() is not self._reader:
            if self._rejoined is not None:
                await self._rejoined.wait()
            if self._away:
                return  # what the node lacks is sent again when it is back
        try:
            await self._channel.send(frame)
        except Unreachable as error:
            if self._away:
                raise
            if self._comeback is None or self._reader is None:
                self._give_up(error)
                raise
            if self._failure is not None:
                raise self._failure from None  # else the reader finds out, too, and comes back

    async def post(self, frame: Frame, on_done: Callable[[], None] = lambda: None) -> asyncio.Future[None]:
        """Send a command without waiting for its end; over another connection again, if this one is cut.

        on_done: called when the node has done it, before anything that the node sent afterwards is looked at.
        """
        self._last_number += 1
        numbered = replace(frame, body={**frame.body, "id": self._last_number})
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        answer.add_done_callback(_look)
        self._pending[self._last_number] = _Pending(numbered, answer, on_done)
        if self._failure is not None:
            self._settle(self._last_number, self._failure)
        else:
            await self.send(numbered)
        return answer

    async def command(
        self, frame: Frame, timeout_s: float = COMMAND_TIMEOUT_S, on_done: Callable[[], None] = lambda: None
    ) -> None:
        """Send a command and wait until the node has done it. Raises Unreachable, or what the node answers."""
        answer = await self.post(frame, on_done)
        deadline = time.monotonic() + timeout_s
        while not answer.done():
            await self.look()
            await asyncio.wait([answer], timeout=LOOK_EVERY_S)
            if not answer.done() and time.monotonic() > deadline:
                self._give_up(Unreachable(f"{self.node} did not acknowledge {frame.kind.name}", hop=self.node))
        answer.result()

    def settle_error(self, number: object, error: TallystickError) -> bool:
        """A command failed, perhaps one that nobody waits for; False when there is none of that number."""
        return self._settle(number, error)

    # -- signs of life

    async def look(self) -> None:
        """Ask for a sign of life when there was none for a while; give up when it does not come."""
        now = time.monotonic()
        if self._away or self._failure is not None:
            return
        if self._asked_at is not None:
            waited = now - max(self._asked_at, self._heard_at)
            if waited > self._patience.limit_s:
                self._give_up(Unreachable(f"{self.node} gave no sign of life for {waited:.1f} s", hop=self.node))
        elif now - self._heard_at > QUIET_S or not self._patience.is_informed:
            await self.ping()

    async def ping(self) -> None:
        """Ask where the node stands, unless it has been asked and has not answered yet."""
        if self._asked_at is None and self._failure is None:
            self._asked_at = time.monotonic()
            with suppress(Unreachable):  # the reader finds out
                await self.send(Frame(Kind.PING, {"n": self._last_number}))

    def _take_pong(self, frame: Frame) -> None:
        now = time.monotonic()
        if self._asked_at is not None:
            self._patience.note(now - self._asked_at)
            self._asked_at = None
        self.pong = Pong(take(frame.body, "at", int), take(frame.body, "unpaid", bool, False), now)

    # -- coming back

    async def _come_back(self) -> bool:
        """Replace a connection that was cut. False when the session is lost, or nobody is there."""
        comeback = self._comeback
        if comeback is None or self._failure is not None:
            return False
        self._away = True
        began = time.monotonic()
        for attempt in range(1 << 30):
            await asyncio.sleep(AWAY_RETRY_S[min(attempt, len(AWAY_RETRY_S) - 1)])
            if self._failure is not None:
                return False
            try:
                await self._resume(comeback)
                self.num_resumed += 1
                log.info("back at %s over another connection", self.node)
                return True
            except TallystickError as error:
                log.debug("coming back to %s failed (%s)", self.node, error)
                if not isinstance(error, Unreachable) or time.monotonic() > began + comeback.insist_s():
                    return False
        return False

    async def _resume(self, comeback: Comeback) -> None:
        try:
            async with asyncio.timeout(RESUME_TIMEOUT_S):
                channel = await comeback.dial()
        except TimeoutError:
            raise Unreachable(f"{self.node} does not answer", hop=self.node) from None
        try:
            await channel.send(comeback.claim(channel.spki))
            resumed = await expect(channel, Kind.RESUMED, RESUME_TIMEOUT_S)
            old, self._channel = self._channel, channel
            self._heard_at, self._asked_at = time.monotonic(), None
            self._rejoined = asyncio.Event()
            for pending in [self._pending[number] for number in sorted(self._pending)]:
                await channel.send(pending.frame)
            await comeback.rejoin(resumed)
            self._away = False
        except BaseException:
            await channel.close()
            raise
        finally:
            if self._rejoined is not None:
                self._rejoined.set()
                self._rejoined = None
        await old.close()

    # -- the end

    def _settle(self, number: object, error: TallystickError | None) -> bool:
        pending = self._pending.pop(number, None) if isinstance(number, int) else None
        if pending is None or pending.answer.done():
            return False
        if error is None:
            pending.on_done()
            pending.answer.set_result(None)
        else:
            pending.answer.set_exception(error)
        return True

    def _give_up(self, error: TallystickError) -> None:
        if self._failure is None:
            self._failure = error
            self._fail(error)
        for number in list(self._pending):
            self._settle(number, self._failure)

    async def close(self) -> None:
        """Leave in order."""
        await end(self._reader)
        self._fail = lambda _: None
        self._give_up(Unreachable(f"the session at {self.node} was left"))
        await self._channel.close()


def _look(answer: asyncio.Future[None]) -> None:
    """A command that nobody waits for may fail without a complaint from asyncio."""
    if not answer.cancelled():
        answer.exception()
