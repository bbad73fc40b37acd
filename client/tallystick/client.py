"""The SDK: `Client.generate`, `Client.stream`, `Client.embed`; `AsyncClient` underneath. Runs without torch."""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from tallystick.network import Network, Survey
from tallystick.payments import Purse
from tallystick.repair import RolledBack
from tallystick.route import Candidate, Weights, plan
from tallystick.sampling import Sampling, pick
from tallystick.session import Session, Setting
from tallystick.tokens import TextStream
from tallystick.verdict import Policy, Verdict
from tallystick_protocol.chain.book import load_book
from tallystick_protocol.chain.reads import Chain, ModelRecord
from tallystick_protocol.errors import ConfigError, ContextLengthExceeded, NoRoute, TallystickError
from tallystick_protocol.manifest import Manifest
from tallystick_protocol.peer import Peers
from tallystick_protocol.signing import Key
from tallystick_protocol.types import Address, Digest, Wei

log = logging.getLogger(__name__)

T = TypeVar("T")
AUDIT_PROBABILITY = 0.05
TOP_K = 64
DEFAULT_MAX_COST = Wei(10**19)


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
    """A finished generation. route: the nodes that carried it to the end, first hop first."""

    text: str
    ids: list[int]
    prompt_ids: list[int]
    finish_reason: str
    route: list[Candidate]
    verdict: Verdict
    seconds: float
    model: str

    @property
    def tokens_per_s(self) -> float:
        return len(self.ids) / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class Embedding:
    """A sentence's vector (width,) float32, normalised if the model says so, and the verdict on it."""

    vector: np.ndarray
    num_tokens: int
    route: list[Candidate]
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Settings:
    """Where a client finds its world. numeric_class: insist on one class. banned: nodes never to use."""

    rpc: str = "http://127.0.0.1:8545"
    book: Path = Path("deployments/31337.json")
    cache: Path = Path("~/.cache/tallystick")
    sources: list[str] = field(default_factory=list)
    max_cost: Wei = DEFAULT_MAX_COST
    numeric_class: Digest | None = None
    audit_probability: float = AUDIT_PROBABILITY
    weights: Weights = field(default_factory=Weights)


class AsyncClient:
    """A client of the network. Use as an async context manager."""

    def __init__(self, key: Key, settings: Settings | None = None) -> None:
        """key: pays for what is asked; its address must hold tokens, or channels that hold some."""
        self.settings = settings or Settings()
        self.chain = Chain(self.settings.rpc, load_book(self.settings.book.expanduser()))
        self.banned: set[Address] = set()
        self._key = key
        self._peers = Peers()
        self.network = Network(self.chain, self._peers, self.settings.cache.expanduser(), self.settings.sources)
        self._purse = Purse(self.chain, key, self.settings.max_cost)
        self._checked = False

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._peers.close()

    async def generate(self, prompt: str, **options: Any) -> Answer:
        """The whole answer; options as for `stream`."""
        stream = self.stream(prompt, **options)
        async for _ in stream:
            pass
        return stream.answer

    def stream(
        self,
        prompt: str | list[int],
        *,
        model: str = "",
        max_tokens: int = 64,
        sampling: Sampling | None = None,
        verify: Policy = "audit",
        ignore_eos: bool = False,
    ) -> Stream:
        """Generate as an async iterator of `Token` and `Retracted`; afterwards `.answer` holds the Answer.

        prompt: text, or token ids. model: id, part of an id or name; empty takes the only one on chain.
        verify: "off", "audit" (a random span of some sessions) or "full" (every span, on other nodes).
        Raises NoRoute, NoAuditor, UnknownModel, ConfigError, ChainError, InsufficientFunds, Unreachable.
        """
        _check_policy(verify)
        if type(max_tokens) is not int or not 0 < max_tokens <= 1 << 20:
            raise ConfigError(f"max_tokens={max_tokens!r} is not a positive number")
        return Stream(self, prompt, model, max_tokens, sampling or Sampling(), verify, ignore_eos)

    async def embed(self, text: str, *, model: str = "", verify: Policy = "audit") -> Embedding:
        """A sentence's embedding, pooled as the model's own files say. Raises as `stream`."""
        _check_policy(verify)
        record, manifest = await self.model(model)
        if manifest.output != "hidden" or manifest.pooling is None:
            raise ConfigError(f"{manifest.name} gives no embeddings; use an encoder model")
        tokens = await self.network.tokens(record)
        ids = tokens.encode(text)
        self._check_length(manifest, len(ids), 0)
        verdict = Verdict(verify)
        session = await self.open_session(record, manifest, len(ids), verdict)
        try:
            while True:
                try:
                    await session.feed(ids)
                    rows = [await session.result(position) for position in range(len(ids))]
                    await self.finish(session, verify)
                    break
                except RolledBack:
                    continue
        finally:
            await session.close()
            self.banned |= {accusation.node for accusation in verdict.accusations}
        hidden = np.frombuffer(b"".join(rows), dtype="<f4").reshape(len(ids), manifest.width)
        vector = hidden.mean(axis=0) if manifest.pooling.mode == "mean" else hidden[0]
        if manifest.pooling.normalize:
            vector = vector / max(float(np.linalg.norm(vector)), 1e-12)
        return Embedding(vector.astype(np.float32), len(ids), list(session.route), verdict)

    async def model(self, text: str) -> tuple[ModelRecord, Manifest]:
        """Find a model and its manifest; checks once that chain and contracts are the ones of the address book."""
        if not self._checked:
            await asyncio.to_thread(self.chain.check)
            self._checked = True
        record = await self.network.find(text)
        return record, await self.network.manifest(record)

    async def open_session(self, record: ModelRecord, manifest: Manifest, max_length: int, verdict: Verdict) -> Session:
        """Plan a route and open it, with an auditor per hop if the policy is `full`."""
        survey = await self.network.survey(record)
        try:
            route = self._plan(survey, manifest)
        except NoRoute:
            survey = await self.network.survey(record, fresh=True)
            route = self._plan(survey, manifest)
        setting = Setting(
            peers=self._peers,
            key=self._key,
            domain=self.chain.book.staking_domain,
            purse=self._purse,
            manifest=manifest,
            candidates=survey.candidates,
            max_length=max_length,
            top_k=min(TOP_K, manifest.vocab),
            on_replaced=lambda: self.network.forget(record),
        )
        session = Session(setting, route, verdict)
        session.avoid |= self.banned
        try:
            await session.open(list(range(len(route))) if verdict.policy == "full" else [])
        except BaseException:
            await session.close()
            raise
        return session

    def _plan(self, survey: Survey, manifest: Manifest) -> list[Candidate]:
        settings = self.settings
        return plan(survey.candidates, manifest.layers, self.banned, settings.numeric_class, settings.weights)

    async def finish(self, session: Session, verify: Policy) -> None:
        """Sign, check and pay what is left; under `audit`, a secret coin decides whether one span is recomputed."""
        await session.finish()
        if verify == "audit" and not session.has_audits:
            coin = secrets.SystemRandom()
            if coin.random() < self.settings.audit_probability:
                await session.audit_at_end(coin.randrange(len(session.route)))
        await session.take_leave()

    def _check_length(self, manifest: Manifest, prompt: int, new: int) -> None:
        if prompt + new > manifest.max_length:
            raise ContextLengthExceeded(
                f"{manifest.name} takes {manifest.max_length} positions; {prompt} of the prompt and {new} new ones"
                " are more",
                limit=manifest.max_length,
            )


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
    ) -> None:
        self._client = client
        self._prompt = prompt
        self._model = model
        self._max_tokens = max_tokens
        self._sampling = sampling
        self._verify: Policy = verify
        self._ignore_eos = ignore_eos
        self._answer: Answer | None = None
        self._session: Session | None = None
        self._events: AsyncGenerator[Token | Retracted, None] = self._run()

    @property
    def answer(self) -> Answer:
        """Raises TallystickError before the stream has ended."""
        if self._answer is None:
            raise TallystickError("the answer is not complete yet: iterate the stream to its end")
        return self._answer

    @property
    def session_route(self) -> list[Candidate]:
        """The nodes that carry the session now, first hop first; empty before it is open."""
        return [] if self._session is None else list(self._session.route)

    def __aiter__(self) -> AsyncIterator[Token | Retracted]:
        return self._events

    async def aclose(self) -> None:
        """Stop; what was computed and checked has been paid."""
        await self._events.aclose()

    async def _run(self) -> AsyncGenerator[Token | Retracted, None]:
        client = self._client
        record, manifest = await client.model(self._model)
        if manifest.output != "logits":
            raise ConfigError(f"{manifest.name} does not generate text; use `embed`")
        tokens = await client.network.tokens(record)
        prompt = tokens.encode(self._prompt) if isinstance(self._prompt, str) else list(self._prompt)
        if not prompt or any(type(i) is not int or not 0 <= i < manifest.vocab for i in prompt):
            raise ConfigError("the prompt is empty or holds ids beyond the vocabulary")
        client._check_length(manifest, len(prompt), self._max_tokens)
        verdict = Verdict(self._verify)
        session = await client.open_session(record, manifest, len(prompt) + self._max_tokens, verdict)
        self._session = session
        began = time.monotonic()
        state = _Generation(prompt, TextStream(tokens, prompt), manifest, self._max_tokens, self._ignore_eos)
        try:
            await session.feed(prompt)
            while True:
                try:
                    while not state.done:
                        row = await session.result(len(prompt) + len(state.ids) - 1)
                        token = pick(row, self._sampling, len(prompt) + len(state.ids))
                        yield state.accept(token)
                        if not state.done:
                            await session.feed([token])
                    await client.finish(session, self._verify)
                    break
                except RolledBack as back:
                    retracted = state.roll_back(back.position)
                    if retracted.num_tokens:
                        yield retracted
                    await session.feed((prompt + state.ids)[back.position :])
            seconds = time.monotonic() - began
            finished = True
        except BaseException:
            finished = False
            raise
        finally:
            await session.close()
            client.banned |= {accusation.node for accusation in verdict.accusations}
        if finished:
            self._answer = Answer(
                text=state.stream.text,
                ids=state.ids,
                prompt_ids=prompt,
                finish_reason=state.finish_reason,
                route=list(session.route),
                verdict=verdict,
                seconds=seconds,
                model="0x" + record.id.hex(),
            )


def _check_policy(verify: str) -> None:
    if verify not in ("off", "audit", "full"):
        raise ConfigError(f"verify={verify!r} is not off, audit or full")


class _Generation:
    """The tokens decided so far."""

    def __init__(self, prompt: list[int], stream: TextStream, manifest: Manifest, limit: int, ignore_eos: bool) -> None:
        self.prompt = prompt
        self.stream = stream
        self.ids: list[int] = []
        self._limit = limit
        eos = manifest.generation.get("eos", [])
        self._eos = set() if ignore_eos or not isinstance(eos, list) else set(eos)

    @property
    def done(self) -> bool:
        return len(self.ids) >= self._limit or bool(self.ids and self.ids[-1] in self._eos)

    @property
    def finish_reason(self) -> str:
        return "stop" if self.ids and self.ids[-1] in self._eos else "length"

    def accept(self, token: int) -> Token:
        self.ids.append(token)
        return Token(token, self.stream.push(token), len(self.prompt) + len(self.ids) - 1)

    def roll_back(self, position: int) -> Retracted:
        """Rows from `position` on were wrong: the tokens after `position` were chosen from them."""
        keep = max(position + 1 - len(self.prompt), 0)
        dropped = len(self.ids) - keep
        if dropped <= 0:
            return Retracted(0, 0)
        del self.ids[keep:]
        return Retracted(dropped, self.stream.retract(dropped))


class Client:
    """The same, for code that is not async: runs an event loop in a thread of its own. Use as a context manager."""

    def __init__(self, key: Key, settings: Settings | None = None) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tallystick", daemon=True)
        self._thread.start()
        self._async = AsyncClient(key, settings)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(self, prompt: str, **options: Any) -> Answer:
        """As AsyncClient.generate."""
        return self._wait(self._async.generate(prompt, **options))

    def stream(self, prompt: str | list[int], **options: Any) -> Generator[Token | Retracted, None, Answer]:
        """As AsyncClient.stream; the Answer is the generator's return value (`answer = yield from …`)."""
        stream = self._async.stream(prompt, **options)
        events = stream.__aiter__()
        try:
            while True:
                try:
                    yield self._wait(events.__anext__())  # type: ignore[arg-type]
                except StopAsyncIteration:
                    return stream.answer
        finally:
            self._wait(stream.aclose())

    def embed(self, text: str, **options: Any) -> Embedding:
        """As AsyncClient.embed."""
        return self._wait(self._async.embed(text, **options))

    def close(self) -> None:
        self._wait(self._async.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5)
        self._loop.close()

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise
