"""The tokens of an answer, a pass at a time: the client samples, and sends the token with drafts of what follows it.

A pass over the last token and k drafts gives the rows from which the next k + 1 tokens are chosen. The first token that
is not its draft is the next token all the same; what was drafted behind it is dropped. Every choice is a function of
its row and its position, and rows do not depend on how many come at once: the tokens are those of plain decoding.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Protocol

from tallystick.speculation.drafters import Coupling, Drafter
from tallystick.speculation.local import DraftModel
from tallystick.speculation.lookup import PromptLookup
from tallystick.speculation.pace import Limits, Pace
from tallystick_protocol.errors import ConfigError
from tallystick_protocol.sampling import Sampling, pick
from tallystick_protocol.types import WINDOW

_WORDS = ("auto", "lookup", "off")
EAGER = Limits(chance=0.2, gain=1.0)
"""For who has asked for speculation: more drafts, of which more are paid for in vain."""


class Log(Protocol):
    """What a session is to whoever decides its tokens: rows that are appended, and perhaps taken back."""

    @property
    def ids(self) -> list[int]: ...

    async def feed(self, ids: list[int], want: Sequence[bool] | None = None) -> None: ...

    async def result(self, position: int) -> bytes: ...

    async def drop(self, length: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Speculation:
    """Who drafts for an answer, and how boldly. drafter None: nobody."""

    drafter: Drafter | None = None
    limits: Limits = field(default_factory=Limits)

    @staticmethod
    def of(speculate: str | Drafter, sampling: Sampling) -> Speculation:
        """What `speculate` means for an answer. Raises ConfigError for what it does not know."""
        if speculate == "off":
            return Speculation()
        if speculate in ("auto", "lookup"):
            return Speculation(PromptLookup(), Limits() if speculate == "auto" else EAGER)
        if isinstance(speculate, str) or not callable(getattr(speculate, "propose", None)):
            raise ConfigError(f"speculate={speculate!r} is not auto, lookup, off or a drafter")
        return Speculation(speculate.coupled(sampling) if isinstance(speculate, Coupling) else speculate, EAGER)


def named(text: str) -> str | Drafter:
    """What a person means by a word, or by the folder of a draft model. Raises ConfigError."""
    return text if text in _WORDS else DraftModel(Path(text))


class Steps:
    """Decides the tokens of one answer over an open session. `drafted` and `accepted` count drafts.

    `start`, then `decide` and `go_on` in turns, then `stop`. `ids` are always the prompt's and the answer's so far.
    Each may raise RolledBack, NoRoute, Unreachable; after RolledBack, `start` again with the ids that are left.
    """

    def __init__(
        self,
        session: Log,
        sampling: Sampling,
        speculation: Speculation,
        last: int,
        vocab: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """last: how many positions prompt and answer may take. vocab: ids that the model knows. clock: seconds."""
        self.drafted = self.accepted = 0
        self._session = session
        self._sampling = sampling
        self._drafter = speculation.drafter
        self._pace = Pace(speculation.limits)
        self._last, self._vocab = last, vocab
        self._clock = clock
        self._drafts: list[int] = []
        self._look: tuple[int, float] | None = None
        self._look_s = 0.0
        self._sent_at: float | None = None

    async def start(self, ids: list[int]) -> None:
        """Feed what the session does not hold."""
        self._drafts, self._look, self._sent_at = [], None, None
        if missing := ids[len(self._session.ids) :]:
            await self._session.feed(missing)

    async def decide(self, ids: list[int]) -> list[int]:
        """The next tokens, at least one."""
        session, drafts, first = self._session, self._drafts, len(ids)
        began = self._clock()
        tokens: list[int] = []
        for draft in (*drafts, None):
            position = first + len(tokens)
            tokens.append(pick(await session.result(position - 1), self._sampling, position))
            if tokens[-1] != draft:
                break
        accepted = len(tokens) - 1
        waited = self._clock() - began
        if accepted < len(drafts):
            await session.drop(first + accepted)
        self._account(accepted, tokens[0], waited)
        self._drafts = []
        return tokens

    async def go_on(self, ids: list[int]) -> None:
        """Send the last token, and drafts behind it."""
        self._sent_at = self._clock()
        room = min(room_behind(len(ids) - 1), self._last - len(ids) - 1)
        wanted = self._pace.drafts(room) if self._drafter is not None else 0
        self._drafts = await self._propose(ids, wanted) if wanted else []
        fed = [ids[-1], *self._drafts]
        await self._session.feed(fed, [True] * len(fed))
        if not wanted and self._drafter is not None and self._pace.may_look(self._look_s):
            began = self._clock()
            draft = await self._propose(ids, 1)
            self._look_s = self._clock() - began
            self._look = (draft[0], self._look_s) if draft else None

    async def stop(self, ids: list[int]) -> None:
        """The answer is complete: forget rows behind it."""
        if len(self._session.ids) > len(ids):
            await self._session.drop(len(ids))

    async def close(self) -> None:
        """Nothing goes on beside."""

    async def _propose(self, ids: list[int], k: int) -> list[int]:
        """What the drafter proposes, as far as the model knows it."""
        assert self._drafter is not None
        if isinstance(self._drafter, PromptLookup):  # takes microseconds
            draft: Sequence[int] = self._drafter.propose(ids, k)
        else:
            draft = await asyncio.to_thread(self._drafter.propose, list(ids), k)
        return list(takewhile(lambda token: type(token) is int and 0 <= token < self._vocab, draft[:k]))

    def _account(self, accepted: int, token: int, waited_s: float) -> None:
        """Tell the pace how the pass went. A pass whose rows were there before anybody waited tells no time."""
        self.drafted += len(self._drafts)
        self.accepted += accepted
        if self._look is not None:
            draft, seconds = self._look
            self._pace.looked(draft == token, seconds)
            self._look = None
        if self._sent_at is not None:
            took_s = self._clock() - self._sent_at
            self._pace.passed(len(self._drafts), accepted, took_s if waited_s > took_s / 2 else None)


def room_behind(position: int) -> int:
    """How many drafts may follow the token at `position`: none ends a window, for a window that is whole is signed
    for, and what is signed for is not taken back."""
    return (WINDOW - 2 - position) % WINDOW
