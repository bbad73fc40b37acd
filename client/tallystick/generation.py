"""One answer, token by token."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from tallystick.agreement.agreement import Agreement
from tallystick.routing.candidates import Candidate
from tallystick.session.repair import RolledBack
from tallystick.session.ring import Ring
from tallystick.session.session import Session
from tallystick.speculation.drafters import Drafter
from tallystick.speculation.steps import Speculation, Steps
from tallystick.tokens import TextStream
from tallystick.verdict import Policy, Verdict, num_routes
from tallystick_protocol.errors import ConfigError, TallystickError
from tallystick_protocol.manifest import Manifest
from tallystick_protocol.sampling import Sampling

if TYPE_CHECKING:
    from tallystick.client import AsyncClient

Mode = Literal["pipeline", "ring", "auto"]


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token; `text` is what it made certain, possibly empty."""

    id: int
    text: str
    position: int


@dataclass(frozen=True, slots=True)
class Retracted:
    """The last tokens were computed by a node that was caught: take them, and so many characters, back."""

    num_tokens: int
    num_characters: int


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished generation. route: the nodes that carried it to the end, first hop first. routes: all routes that did;
    one but with `agree=k`, of which `route` is then the first.

    drafted, accepted: tokens that were drafted ahead, and those of them that the model confirmed.
    """

    text: str
    ids: list[int]
    prompt_ids: list[int]
    finish_reason: str
    route: list[Candidate]
    verdict: Verdict
    seconds: float
    model: str
    drafted: int = 0
    accepted: int = 0
    routes: list[list[Candidate]] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        return len(self.ids) / self.seconds if self.seconds else 0.0


class Stream:
    """One generation in progress: iterate it, then read `.answer`."""

    def __init__(
        self,
        client: AsyncClient,
        prompt: str | list[int],
        model: str,
        max_tokens: int,
        sampling: Sampling,
        verify: Policy,
        ignore_eos: bool,
        speculate: str | Drafter,
        mode: Mode,
    ) -> None:
        self._client = client
        self._prompt = prompt
        self._model = model
        self._max_tokens = max_tokens
        self._sampling = sampling
        self._verify: Policy = verify
        self._ignore_eos = ignore_eos
        self._speculation = Speculation.of(speculate, sampling)
        self._mode = mode
        if mode not in ("pipeline", "ring", "auto"):
            raise ConfigError(f"mode={mode!r} is not pipeline, ring or auto")
        if mode == "ring" and self._speculation.drafter is not None:
            raise ConfigError("in a ring the last hop chooses the tokens, one by one: take speculate='off'")
        if mode == "ring" and num_routes(verify) > 1:
            raise ConfigError(
                f"in a ring the last hop chooses the tokens, with verify={verify!r} the client does, from rows that all"
                " routes agree on: take mode='pipeline'"
            )
        self._answer: Answer | None = None
        self._session: Session | Agreement | None = None
        self._events: AsyncGenerator[Token | Retracted, None] = self._run()

    @property
    def answer(self) -> Answer:
        """Raises TallystickError before the stream has ended."""
        if self._answer is None:
            raise TallystickError("the answer is not complete yet: iterate the stream to its end")
        return self._answer

    @property
    def session_route(self) -> list[Candidate]:
        """The nodes that carry the session now (of several routes, the first one's); empty before it is open."""
        return [] if self._session is None else list(self._session.route)

    def __aiter__(self) -> AsyncIterator[Token | Retracted]:
        return self._events

    async def aclose(self) -> None:
        """Stop; what was computed and checked has been paid."""
        await self._events.aclose()

    async def _run(self) -> AsyncGenerator[Token | Retracted, None]:
        client = self._client
        record, manifest = await client.model(self._model)
        if manifest.output != "logits" or not manifest.causal or manifest.encoder_layers:
            raise ConfigError(f"{manifest.name} is for {manifest.task}: it does not generate text from a prompt")
        tokens = await client.network.tokens(record)
        prompt = tokens.encode(self._prompt) if isinstance(self._prompt, str) else list(self._prompt)
        if not prompt or any(type(i) is not int or not 0 <= i < manifest.vocab for i in prompt):
            raise ConfigError("the prompt is empty or holds ids beyond the vocabulary")
        client._check_length(manifest, len(prompt), self._max_tokens)
        verdict = Verdict(self._verify)
        length = len(prompt) + self._max_tokens
        session: Session | Agreement
        if num_routes(self._verify) > 1:
            session = await client.open_agreement(record, manifest, length, verdict, len(prompt))
        else:
            session = await client.open_session(record, manifest, length, verdict, prompt)
        self._session = session
        began = time.monotonic()
        state = _Generation(prompt, TextStream(tokens, prompt), manifest, self._max_tokens, self._ignore_eos)
        steps = self._steps(session, len(prompt) + self._max_tokens, state.ends)
        try:
            await steps.start(prompt)
            while True:
                try:
                    while not state.done:
                        events = state.accept(await steps.decide(state.known))
                        if not state.done:
                            await steps.go_on(state.known)
                        for event in events:
                            yield event
                    await steps.stop(state.known)
                    await client.finish(session, self._verify)
                    break
                except RolledBack as back:
                    retracted = state.roll_back(back.position)
                    if retracted.num_tokens:
                        yield retracted
                    await steps.start(state.known)
            seconds = time.monotonic() - began
            finished = True
        except BaseException:
            finished = False
            raise
        finally:
            await steps.close()
            await session.close()
            client.ban(verdict)
        await client.go_to_court(verdict)
        if finished:
            self._answer = Answer(
                text=state.stream.text,
                ids=state.ids,
                prompt_ids=prompt,
                finish_reason=state.finish_reason,
                route=list(session.route),
                routes=session.routes,
                verdict=verdict,
                seconds=seconds,
                model="0x" + record.id.hex(),
                drafted=steps.drafted,
                accepted=steps.accepted,
            )

    def _steps(self, session: Session | Agreement, last: int, ends: set[int]) -> Steps | Ring:
        """Who decides the tokens. last: how many positions there may be."""
        speculation = self._speculation if session.rewinds else Speculation()
        ring = self._mode == "ring" or (self._mode == "auto" and speculation.drafter is None)
        if ring and isinstance(session, Session):
            return Ring(session, self._sampling, ends, last)
        return Steps(session, self._sampling, speculation, last, session.setting.manifest.vocab)


class _Generation:
    """The tokens decided so far."""

    def __init__(self, prompt: list[int], stream: TextStream, manifest: Manifest, limit: int, ignore_eos: bool) -> None:
        self.prompt = prompt
        self.stream = stream
        self.ids: list[int] = []
        self._limit = limit
        eos = manifest.generation.get("eos", [])
        self.ends: set[int] = set() if ignore_eos or not isinstance(eos, list) else set(eos)

    @property
    def done(self) -> bool:
        return len(self.ids) >= self._limit or bool(self.ids and self.ids[-1] in self.ends)

    @property
    def finish_reason(self) -> str:
        return "stop" if self.ids and self.ids[-1] in self.ends else "length"

    @property
    def known(self) -> list[int]:
        """Prompt and answer."""
        return self.prompt + self.ids

    def accept(self, tokens: list[int]) -> list[Token]:
        """Take decided tokens, as far as the answer goes."""
        taken = []
        for token in tokens:
            if self.done:
                break
            self.ids.append(token)
            taken.append(Token(token, self.stream.push(token), len(self.prompt) + len(self.ids) - 1))
        return taken

    def roll_back(self, position: int) -> Retracted:
        """Rows from `position` on were wrong: the tokens after `position` were chosen from them."""
        keep = max(position + 1 - len(self.prompt), 0)
        dropped = len(self.ids) - keep
        if dropped <= 0:
            return Retracted(0, 0)
        del self.ids[keep:]
        return Retracted(dropped, self.stream.retract(dropped))
