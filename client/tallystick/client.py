"""The SDK, async: models, routes and sessions; answers, embeddings, single passes and decoders. Runs without torch."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from tallystick.admission import note_stock
from tallystick.agreement.agreement import Agreement
from tallystick.court.accusing import Accused, accuse, load_evidence
from tallystick.court.keeping import keep_evidence, prune
from tallystick.decoding import Decoder
from tallystick.generation import Answer, Mode, Stream
from tallystick.lanes import Workshop
from tallystick.network import Network, Survey
from tallystick.passes import Passes
from tallystick.payments import Need, Purse
from tallystick.planning import Planning
from tallystick.prefixes import Prefix, Prefixes
from tallystick.recomputing import Recomputer, can_recompute
from tallystick.routing.candidates import Candidate
from tallystick.routing.choice import checkable, price_of
from tallystick.routing.route import Route, route_over
from tallystick.session.coins import to_audit
from tallystick.session.proving import note_unproven
from tallystick.session.repair import RolledBack
from tallystick.session.session import Session
from tallystick.session.setting import Setting, Sides
from tallystick.settings import Settings
from tallystick.speculation.drafters import Drafter
from tallystick.tasks.api import Tasks
from tallystick.tasks.features import pool, to_unit_length
from tallystick.verdict import POLICIES, Policy, Verdict, num_routes
from tallystick_protocol.chain.book import load_book
from tallystick_protocol.chain.reads import Chain, ModelRecord
from tallystick_protocol.chain.writes import Wallet
from tallystick_protocol.content.store import LocalStore
from tallystick_protocol.errors import ConfigError, ContextLengthExceeded, TallystickError
from tallystick_protocol.manifest import Manifest
from tallystick_protocol.passes import MAX_ROWS
from tallystick_protocol.peer import Peers
from tallystick_protocol.receipts import Receipt
from tallystick_protocol.sampling import Sampling
from tallystick_protocol.signing import Key
from tallystick_protocol.types import Address, Digest, Span

log = logging.getLogger(__name__)

MAX_DEARER = 1.5
"""Times the planned route's price, for nodes that hold the beginning of a prompt."""

TOP_K = 64


@dataclass(frozen=True, slots=True)
class Embedding:
    """A sentence's vector (width,) float32, normalised if the model says so, and the verdict on it."""

    vector: np.ndarray
    num_tokens: int
    route: list[Candidate]
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Encoded:
    """What left a model for the wanted positions: rows (positions, values) fp32, the nodes, and the verdict on them.

    values: the width for hidden states, the vocabulary for logits, the number of labels for classifiers.
    """

    rows: np.ndarray
    route: list[Candidate]
    verdict: Verdict


class AsyncClient(Tasks):
    """A client of the network. Use as an async context manager."""

    def __init__(self, key: Key, settings: Settings | None = None) -> None:
        """key: pays for what is asked; its address must hold tokens, or channels that hold some."""
        self.settings = settings or Settings()
        self.chain = Chain(self.settings.rpc, load_book(self.settings.book.expanduser()))
        self._key = key
        self._peers = Peers()
        self.network = Network(self.chain, self._peers, self.settings.cache.expanduser(), self.settings.sources)
        self.prefixes = Prefixes()
        self._purse = Purse(self.chain, key, self.settings.max_cost)
        self.planning = Planning(self.network, self.settings)
        self._checked = False

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def banned(self) -> set[Address]:
        """Nodes that are never used again; add to it."""
        return self.planning.banned

    async def close(self) -> None:
        await self.network.close()
        await asyncio.to_thread(self.planning.save)
        if self.settings.evidence is not None:
            await asyncio.to_thread(prune, LocalStore(self.settings.evidence.expanduser()))
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
        speculate: str | Drafter = "off",
        mode: Mode = "pipeline",
    ) -> Stream:
        """Generate as an async iterator of `Token` and `Retracted`; afterwards `.answer` holds the Answer.

        prompt: text, or token ids. model: id, part of an id or name; empty takes the only one on chain.
        verify: "off", "audit" (a random span of some sessions), "full" (every span, on other nodes), or "agree=2" to
        "agree=4" (so many routes of different owners side by side; a token is released when all of them agree).
        speculate: "off"; "lookup" drafts what followed earlier in the text; "auto" likewise, where it saves much time
        and costs few rows; or a `Drafter`, for example a `DraftModel`. The tokens are the same, wrong drafts are paid.
        mode: "pipeline"; "ring" lets the last hop choose the tokens, too, which saves a transit; "auto" is "ring" where
        nothing is drafted.
        Raises NoRoute, NoAuditor, UnknownModel, ConfigError, ChainError, InsufficientFunds, Unreachable.
        """
        _check_policy(verify)
        if type(max_tokens) is not int or not 0 < max_tokens <= 1 << 20:
            raise ConfigError(f"max_tokens={max_tokens!r} is not a positive number")
        return Stream(self, prompt, model, max_tokens, sampling or Sampling(), verify, ignore_eos, speculate, mode)

    async def embed(self, text: str, *, model: str = "", verify: Policy = "audit") -> Embedding:
        """A sentence's embedding, pooled as the model's own files say. Raises as `stream`."""
        _check_policy(verify)
        record, manifest = await self.model(model)
        pooling = manifest.pooling
        if manifest.output != "hidden" or pooling is None:
            raise ConfigError(f"{manifest.name} gives no embeddings; use an encoder model")
        ids = (await self.network.tokens(record)).encode(text)
        done = await self._pass(record, manifest, ids, None, None, verify)
        vector = pool(done.rows, pooling.mode)
        if pooling.normalize:
            vector = to_unit_length(vector)
        return Embedding(vector.astype(np.float32), len(ids), done.route, done.verdict)

    async def run(
        self,
        model: str,
        ids: list[int],
        *,
        token_types: list[int] | None = None,
        want: list[int] | None = None,
        verify: Policy = "audit",
    ) -> Encoded:
        """One pass over a model, or over the encoder of an encoder-decoder: what leaves it for the wanted positions.

        token_types: one per id, for models that have them. want: ascending positions; None for all, or for the one
        row of a sequence classifier. Raises as `stream`.
        """
        _check_policy(verify)
        record, manifest = await self.model(model)
        return await self._pass(record, manifest, ids, token_types, want, verify)

    async def _pass(
        self,
        record: ModelRecord,
        manifest: Manifest,
        ids: list[int],
        token_types: list[int] | None,
        want: list[int] | None,
        verify: Policy,
    ) -> Encoded:
        stack = manifest.stack_of(Span(0, 1))
        _check_ids(manifest, ids, token_types)
        self._check_length(manifest, len(ids), 0)
        last_only = manifest.output_of(stack) == "label"
        wanted = want if want is not None else [len(ids) - 1] if last_only else list(range(len(ids)))
        chosen = set(wanted)
        flags = [position in chosen for position in range(len(ids))]
        verdict = Verdict(verify)
        sides = Sides(token_types=bytes(token_types or ()))
        session: Session | Agreement
        if num_routes(verify) > 1:
            session = await self.open_agreement(record, manifest, len(ids), verdict, len(ids), dense=True, sides=sides)
        else:
            survey, route = await self.planning.route(record, manifest, stack, verify, prompt=len(ids), new=1)
            setting = self._setting(record, manifest, stack, survey, len(ids), dense=True, sides=sides)
            session = await self._open(setting, route, verdict)
        try:
            while True:
                try:
                    await session.feed(ids[len(session.ids) :], flags[len(session.ids) :])
                    rows = [await session.result(position) for position in wanted]
                    await self.finish(session, verify)
                    break
                except RolledBack:
                    continue
        finally:
            await session.close()
            self.ban(verdict)
        values = np.frombuffer(b"".join(rows), dtype="<f4").reshape(len(wanted), -1)
        return Encoded(values, list(session.route), verdict)

    def decoder(
        self,
        model: str,
        *,
        max_length: int,
        beams: int = 1,
        dense: bool = False,
        memory: np.ndarray | None = None,
        verify: Policy = "audit",
    ) -> Decoder:
        """Continuations of a causal model, or of an encoder-decoder's decoder, under one's own control.

        max_length: positions of each beam. dense: rows hold the logits of the whole vocabulary, not the largest 64.
        memory: (source positions, width) fp32, what `run` gave for the source. The sessions open when the decoder is
        entered (`async with`); raises as `stream` then.
        """
        _check_policy(verify, one_route=True)
        verdict = Verdict(verify)

        async def open_sessions(count: int) -> tuple[Manifest, list[Session]]:
            record, manifest = await self.model(model)
            stack = Span(manifest.encoder_layers, manifest.layers)
            if not manifest.is_causal(stack):
                raise ConfigError(f"{manifest.name} is bidirectional: it takes a text whole; use `run`")
            self._check_length(manifest, max_length, 0)
            sides = Sides(memory=_memory_rows(manifest, memory))
            survey, route = await self.planning.route(record, manifest, stack, verify, new=max_length)
            setting = self._setting(record, manifest, stack, survey, max_length, dense, sides)
            await self._prepay([setting.need(candidate, count) for candidate in route])
            opened: list[Session] = []
            try:
                for _ in range(count):
                    opened.append(await self._open(setting, list(route), verdict))
                    route = opened[-1].route
            except BaseException:
                for session in opened:
                    await session.close()
                raise
            return manifest, opened

        finish = partial(self.finish, verify=verify)
        return Decoder(verdict, beams, dense, open_sessions, finish, partial(self.ban, verdict))

    async def passes(self, model: str, *, max_length: int = MAX_ROWS, verify: Policy = "audit") -> Passes:
        """Forward and backward passes for tuning (`async with await client.passes(...)`). max_length: rows of a pass.

        Raises as `stream`.
        """
        _check_policy(verify, one_route=True)
        record, manifest = await self.model(model)
        stack = Span(manifest.encoder_layers, manifest.layers)
        survey, route = await self.planning.route(record, manifest, stack, verify, prompt=max_length, new=1, whole=True)
        verdict = Verdict(verify)
        note_stock(verdict, route)
        workshop = Workshop(
            peers=self._peers,
            key=self._key,
            domain=self.chain.book.staking_domain,
            purse=self._purse,
            manifest=manifest,
            candidates=survey.candidates,
            max_length=min(max_length, manifest.max_length, MAX_ROWS),
            verdict=verdict,
            audit_probability=self.settings.audit_probability,
            avoid=self.planning.shunned(record.id),
            model=self.planning.which(manifest),
            ban=self.ban,
        )
        return Passes(workshop, route)

    async def model(self, text: str) -> tuple[ModelRecord, Manifest]:
        """Find a model and its manifest; checks once that chain and contracts are the ones of the address book."""
        if not self._checked:
            await asyncio.to_thread(self.chain.check)
            self._checked = True
        record = await self.network.find(text)
        return record, await self.network.manifest(record)

    async def open_session(
        self, record: ModelRecord, manifest: Manifest, max_length: int, verdict: Verdict, prompt: Sequence[int] = ()
    ) -> Session:
        """Plan a route and open it for rows of top-k logits, with an auditor per hop if the policy is `full`.

        prompt: the ids that are known from the beginning. What nodes still hold of them, the session holds when this
        returns; the caller feeds the rest.
        """
        stack, new = manifest.stack_of(Span(0, 1)), max(max_length - len(prompt), 1)
        survey, route = await self.planning.route(record, manifest, stack, verdict.policy, len(prompt), new)
        setting = self._setting(record, manifest, stack, survey, max_length)
        held, shared, route = self._held(setting, route, prompt, verdict.policy)
        session = await self._open(setting, route, verdict)
        if held is not None and session.holds.hops == held.hops and not session.sketching.is_on:
            try:
                taken = await session.rewinding.take_over(held, 0, shared)
            except BaseException:
                await session.close()
                raise
            (self.prefixes.used if taken else self.prefixes.forget)(held.session)
        return session

    async def open_agreement(
        self,
        record: ModelRecord,
        manifest: Manifest,
        max_length: int,
        verdict: Verdict,
        prompt: int,
        dense: bool = False,
        sides: Sides | None = None,
    ) -> Agreement:
        """Plan the routes of a policy `agree=k` and open them. prompt: positions that are given. Raises NoRoute."""
        stack, count = manifest.stack_of(Span(0, 1)), num_routes(verdict.policy)
        new = max(max_length - prompt, 1)
        survey, routes = await self.planning.routes_apart(record, manifest, stack, count, prompt, new)
        settings = (self._setting(record, manifest, stack, survey, max_length, dense, sides) for _ in routes)
        agreed = Agreement([self._session(*one, verdict) for one in zip(settings, routes, strict=True)], verdict)
        try:
            await agreed.open()
        except BaseException:
            await agreed.close()
            raise
        return agreed

    def _held(
        self, setting: Setting, planned: list[Candidate], ids: Sequence[int], verify: Policy
    ) -> tuple[Prefix | None, int, list[Candidate]]:
        """An earlier session that began with the same ids, how many, and its nodes, if they are still good enough."""
        shunned = self.planning.shunned(setting.manifest.model_id)
        usable = [c for c in setting.candidates if c.node not in shunned]
        if verify == "full":
            usable = checkable(usable, shunned, self.planning.compares)
        if (wanted := self.settings.numeric_class) is not None:
            usable = [c for c in usable if c.offer.numeric_class == wanted]
        for held, shared in self.prefixes.find(setting.form, ids):
            route = held.route(usable)
            if route is not None and price_of(route) <= MAX_DEARER * price_of(planned):
                return held, shared, route
        return None, 0, planned

    async def route(
        self, model: str = "", *, prompt: int = 0, new: int = 64, verify: Policy = "audit"
    ) -> tuple[Manifest, Route]:
        """The route that a session over a model's first stack would take at present, with standbys. Raises NoRoute."""
        record, manifest = await self.model(model)
        survey, hops = await self.planning.route(record, manifest, manifest.stack_of(Span(0, 1)), verify, prompt, new)
        work = self.planning.workload(manifest, prompt, new)
        return manifest, route_over(survey.candidates, hops, work, self.planning.shunned(record.id))

    def ban(self, verdict: Verdict) -> None:
        """Never again use the nodes that a verdict accuses."""
        self.planning.banned |= {accusation.node for accusation in verdict.accusations}

    def _setting(
        self,
        record: ModelRecord,
        manifest: Manifest,
        stack: Span,
        survey: Survey,
        max_length: int,
        dense: bool = False,
        sides: Sides | None = None,
    ) -> Setting:
        return Setting(
            peers=self._peers,
            key=self._key,
            domain=self.chain.book.staking_domain,
            purse=self._purse,
            manifest=manifest,
            stack=stack,
            candidates=list(survey.candidates),
            max_length=max_length,
            top_k=0 if dense else min(TOP_K, manifest.vocab),
            on_replaced=lambda: self.network.forget(record),
            sides=sides or Sides(),
            wire=self.settings.wire,
            wait_s=self.settings.wait_s,
            look_again=partial(self.planning.look_again, record),
            unstaked=partial(self.network.unstaked, record),
            on_waiting=lambda error: self.settings.notify(
                f"waiting up to {self.settings.wait_s:g} s for a node: {error.message}"
            ),
            work=self.planning.workload(manifest, 0, max_length),
            reputation=self.planning.reputation,
            suspicions=self.planning.suspicions,
            proven=self.planning.proven,
            sketches=self.settings.sketches,
            numeric_class=self.settings.numeric_class,
            keep_evidence=None if self.settings.evidence is None else self._keep_evidence,
            recompute=self._recompute(record),
        )

    def _recompute(self, record: ModelRecord) -> Callable[[bytes, Receipt], Awaitable[Digest]] | None:
        most = self.settings.recompute_bytes
        if most <= 0 or not can_recompute():
            return None
        return Recomputer(self.network, record, self.chain.book.staking_domain, most).root

    def _keep_evidence(self, data: bytes) -> str:
        assert self.settings.evidence is not None
        store = LocalStore(self.settings.evidence.expanduser())
        return str(keep_evidence(store, data, self.settings.evidence_bytes))

    async def go_to_court(self, verdict: Verdict) -> None:
        """Accuse as the settings say; an answer does not fail by what fails here."""
        if self.settings.accuse and verdict.accusations:
            try:
                for opened in await self.accuse(verdict):
                    self.settings.notify(f"case 0x{opened.id.hex()} is opened with a bond of {opened.bond}")
            except TallystickError as error:
                self.settings.notify(f"nobody is accused: {error.message}")

    async def accuse(self, verdict: Verdict) -> list[Accused]:
        """Put what a verdict has evidence for up in Court. Raises ChainError, ConfigError."""
        if self.settings.evidence is None:
            raise ConfigError("there is no evidence: set `evidence` to a folder before the session")
        store = LocalStore(self.settings.evidence.expanduser())
        wallet, opened = Wallet(self.chain, self._key), []
        for accusation in verdict.accusations:
            if accusation.evidence:
                evidence, cid = load_evidence(accusation.evidence, store, self.chain.book.staking_domain)
                sources = self.settings.evidence_sources
                opened.append(await asyncio.to_thread(accuse, wallet, evidence, cid, sources))
        return opened

    async def _prepay(self, needs: list[Need]) -> None:
        """Fill the channels for several sessions in one transaction; what each of them sets aside is then there."""
        await asyncio.to_thread(self._purse.reserve, needs)
        self._purse.release(needs)

    def _session(self, setting: Setting, route: list[Candidate], verdict: Verdict) -> Session:
        session = Session(setting, route, verdict)
        session.avoid |= self.planning.shunned(setting.manifest.model_id)
        return session

    async def _open(self, setting: Setting, route: list[Candidate], verdict: Verdict) -> Session:
        note_stock(verdict, route)
        session = self._session(setting, route, verdict)
        try:
            await session.open(list(range(len(route))) if verdict.policy == "full" else [])
        except BaseException:
            await session.close()
            raise
        return session

    async def finish(self, session: Session | Agreement, verify: Policy) -> None:
        """Sign, check and pay what is left; under `audit`, secret coins decide which spans are recomputed."""
        await session.finish()
        if isinstance(session, Agreement):
            note_unproven(session.verdict, [hop for route in session.routes for hop in route], self.planning.proven)
            await session.take_leave()
            return
        if verify == "audit":
            if session.to_audit is None and not session.has_audits:
                session.to_audit = to_audit(session, self.settings.audit_probability)
            while session.to_audit:  # one that takes everybody back leaves the others for the next time
                await session.audit_at_end(session.to_audit.pop())
        note_unproven(session.verdict, session.route, self.planning.proven)
        await session.take_leave()
        setting = session.setting
        is_plain = setting.top_k and setting.sides.memory is None and not session.sketching.is_on
        if not session.one_shot and is_plain:
            self.prefixes.remember(session.holds)

    def _check_length(self, manifest: Manifest, prompt: int, new: int) -> None:
        if prompt + new > manifest.max_length:
            raise ContextLengthExceeded(
                f"{manifest.name} takes {manifest.max_length} positions; {prompt} of the prompt and {new} new ones"
                " are more",
                limit=manifest.max_length,
            )


def _check_policy(verify: str, one_route: bool = False) -> None:
    if verify not in POLICIES:
        raise ConfigError(f"verify={verify!r} is not off, audit, full or agree=2 to agree=4")
    if one_route and num_routes(verify) > 1:
        raise ConfigError(
            f"verify={verify!r} is for generate, stream, embed and run; a decoder's beams and passes for tuning take"
            " one route: use full"
        )


def _check_ids(manifest: Manifest, ids: list[int], token_types: list[int] | None) -> None:
    if not ids or any(type(i) is not int or not 0 <= i < manifest.vocab for i in ids):
        raise ConfigError("there are no ids, or some beyond the vocabulary")
    types = manifest.config.get("type_vocab_size") or 1
    if token_types is not None and (
        len(token_types) != len(ids) or not all(0 <= kind < min(types, 256) for kind in token_types)
    ):
        raise ConfigError(f"token types: one for each id, from 0 to {types - 1}")


def _memory_rows(manifest: Manifest, memory: np.ndarray | None) -> tuple[bytes, ...] | None:
    """An encoder's states as rows. Raises ConfigError unless the model has an encoder and the states are its."""
    if (memory is None) != (manifest.encoder_layers == 0):
        raise ConfigError("an encoder-decoder's decoder takes `memory`, and nothing else does")
    if memory is None:
        return None
    if memory.ndim != 2 or memory.shape[1] != manifest.width or not 0 < len(memory) <= manifest.max_length:
        raise ConfigError(f"memory is (source positions, {manifest.width}) fp32")
    return tuple(row.tobytes() for row in memory.astype("<f4"))
