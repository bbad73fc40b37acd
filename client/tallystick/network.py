"""What there is: models on chain, nodes that serve them, their signed offers; remembered for a moment."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from tallystick.routing.candidates import Candidate
from tallystick.routing.claims import read_claims
from tallystick.routing.survey import PER_LAYER, Round, well_served
from tallystick.tokens import Tokens
from tallystick_protocol.chain.reads import Chain, ModelRecord, Serving
from tallystick_protocol.content.cid import Cid, Codec
from tallystick_protocol.content.fetch import fetch_file
from tallystick_protocol.content.store import LocalStore
from tallystick_protocol.errors import (
    BadMessage,
    ConfigError,
    ManifestError,
    TallystickError,
    UnknownModel,
)
from tallystick_protocol.manifest import MAX_BYTES, Manifest
from tallystick_protocol.messages import Offer
from tallystick_protocol.peer import Peers
from tallystick_protocol.signing import digest, unseal
from tallystick_protocol.transport.contact import Contact
from tallystick_protocol.transport.directory import Directory
from tallystick_protocol.types import Address, ModelId

log = logging.getLogger(__name__)

OFFERS_AGE_S = 5.0
INFO_TIMEOUT_S = 2.0

Asked = Round[Serving, Candidate | tuple[Address, str]]


@dataclass(frozen=True, slots=True)
class Survey:
    """A model's nodes as they answer now, and those that do not. complete: their stake adds up to the chain's."""

    candidates: list[Candidate]
    silent: list[tuple[Address, str]]
    complete: bool
    at: float


class Network:
    """Reads of chain, content and nodes for a client. num_models: on chain, when one was last looked for."""

    def __init__(self, chain: Chain, peers: Peers, cache: Path, sources: list[str]) -> None:
        """cache: folder for manifests and tokenizers. sources: gateways to ask besides the model's own nodes."""
        self.chain = chain
        self._peers = peers
        self.directory = Directory(peers, chain.book.staking_domain, chain.node_of, chain.locate)
        self._cache = cache
        self._sources = sources
        self._store = LocalStore(cache / "store")
        self._surveys: dict[ModelId, Survey] = {}
        self._manifests: dict[ModelId, Manifest] = {}
        self._tokens: dict[ModelId, Tokens] = {}
        self._rounds: dict[ModelId, Asked] = {}
        self._surveying = asyncio.Lock()
        self.num_models = 0
        self._rtts: dict[Address, float] = {}
        self._signers: dict[Address, Address] = {}

    async def find(self, text: str) -> ModelRecord:
        """A model by id, by a part of its id, or (empty) the only one. Raises UnknownModel listing what there is."""
        models = await asyncio.to_thread(self.chain.all_models)
        self.num_models = len(models)
        wanted = text.lower().removeprefix("0x")
        found = [record for record in models if record.id.hex().startswith(wanted)] if wanted or models else []
        unread: list[TallystickError] = []
        if not found and text:
            found, unread = await self._named(text, models)
        if len(found) == 1:
            return found[0]
        known = ", ".join("0x" + record.id.hex()[:12] for record in models[:5]) or "none"
        known += f"; of {len(unread)} the manifest cannot be read ({unread[0].message})" if unread else ""
        which = "" if text or not found else ": say which one (--model)"
        raise UnknownModel(f"{len(found)} models match {text!r}{which}; on chain: {known}; all: tallystick models")

    async def _named(self, name: str, models: Iterable[ModelRecord]) -> tuple[list[ModelRecord], list[TallystickError]]:
        """Models of that name, and why manifests of others cannot be read: anybody may register what nobody holds."""
        found: list[ModelRecord] = []
        unread: list[TallystickError] = []
        for record in models:
            try:
                if (await self.manifest(record)).name == name:
                    found.append(record)
            except TallystickError as error:
                log.info("model 0x%s: %s", record.id.hex(), error)
                unread.append(error)
        return found, unread

    async def manifest(self, record: ModelRecord) -> Manifest:
        """A model's manifest, verified against the chain. Raises BlockMissing, ManifestError."""
        if record.id not in self._manifests:
            path = await self._file(record, Cid(Codec.RAW, record.manifest), MAX_BYTES)
            manifest = Manifest.from_bytes(path.read_bytes())
            if manifest.model_id != record.id:
                raise ManifestError("the manifest's pieces are not the ones that the chain records")
            self._manifests[record.id] = manifest
        return self._manifests[record.id]

    async def tokens(self, record: ModelRecord) -> Tokens:
        """The model's tokenizer. Raises ManifestError when it has none."""
        if record.id not in self._tokens:
            manifest = await self.manifest(record)
            if "tokenizer.json" not in manifest.tokenizer:
                raise ManifestError(f"{manifest.name} was published without a tokenizer.json: give token ids instead")
            paths = {
                name: await self._file(record, manifest.tokenizer[name].cid, manifest.tokenizer[name].bytes)
                for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
                if name in manifest.tokenizer
            }
            from tallystick_model.sandbox.tokenizers import examine_tokenizer  # a client without text never needs it

            await asyncio.to_thread(examine_tokenizer, paths["tokenizer.json"])  # in a limited process first
            self._tokens[record.id] = Tokens(
                paths["tokenizer.json"], paths.get("tokenizer_config.json"), paths.get("chat_template.jinja")
            )
        return self._tokens[record.id]

    async def piece(self, record: ModelRecord, name: str) -> Path:
        """One of the model's pieces as a file, checked against its CID. Raises ManifestError, BlockMissing."""
        manifest = await self.manifest(record)
        piece = next((piece for piece in manifest.pieces if piece.name == name), None)
        if piece is None:
            raise ManifestError(f"{manifest.name} has no piece {name}")
        return await self._file(record, piece.cid, piece.bytes)

    async def survey(
        self, record: ModelRecord, avoid: Collection[Address] = (), fresh: bool = False, per_layer: int = PER_LAYER
    ) -> Survey:
        """The nodes' offers, asked in parallel: of all, or of enough of them where others keep one waiting.

        avoid: nodes that are not enough of anything. per_layer: operators of each layer that are enough.
        Those that answer later are in what is remembered for OFFERS_AGE_S, and are asked first the next time.
        """
        async with self._surveying:
            known = self._surveys.get(record.id)
            if known is None or fresh or time.monotonic() - known.at > OFFERS_AGE_S:
                serving, complete = await asyncio.to_thread(self._serving, record)
                await self._end_round(record.id)
                asked: Asked = Round(serving, partial(self._ask, record))
                self._rounds[record.id] = asked

                def enough(so_far: list[Candidate | tuple[Address, str]]) -> bool:
                    found = [c for c in _candidates(so_far) if c.node not in avoid]
                    return well_served(found, record.layers, per_layer)

                await asked.settle(enough)
                self._surveys[record.id] = Survey([], [], complete, time.monotonic())
            asked, known = self._rounds[record.id], self._surveys[record.id]
        answers = asked.answers.values()
        silent = [answer for answer in answers if not isinstance(answer, Candidate)]
        silent += [(entry.record.node, "it has not answered yet") for entry in asked.unanswered()]
        return replace(known, candidates=_candidates(answers), silent=silent)

    async def unstaked(self, record: ModelRecord, nodes: Collection[Address]) -> dict[Address, str]:
        """Those of these nodes that do not stake for a model any more, and what the chain says. Raises ChainError."""
        found = await asyncio.to_thread(self.chain.nodes, sorted(nodes))
        return {one.node: why for one in found if (why := one.why_gone(record.id))}

    def _serving(self, record: ModelRecord) -> tuple[list[Serving], bool]:
        """Who serves a model, those that have ever answered first, and whether their stake adds up. Blocking."""
        serving = self.chain.serving(record.id)
        complete = sum(entry.record.active for entry in serving) == self.chain.weight(record.id)
        if not complete:
            log.warning("the nodes found do not add up to the model's stake on chain: this RPC hides some")
        random.shuffle(serving)
        return sorted(serving, key=lambda entry: entry.record.node not in self._rtts), complete

    async def close(self) -> None:
        """Ask nobody any more."""
        for model in list(self._rounds):
            await self._end_round(model)

    async def _end_round(self, model: ModelId) -> None:
        before = self._rounds.pop(model, None)
        if before is not None:
            await before.close()

    def forget(self, record: ModelRecord) -> None:
        """Ask the nodes anew the next time: one of them is gone."""
        self._surveys.pop(record.id, None)

    async def _ask(self, record: ModelRecord, entry: Serving) -> Candidate | tuple[Address, str]:
        """One node's offer, or why it cannot be used."""
        node = entry.record.node
        try:
            contact = await self.directory.contact(entry.contact)
            began = time.monotonic()
            info = await self._peers.info(contact, INFO_TIMEOUT_S)
            took_s = time.monotonic() - began
            if node not in self._rtts:  # that included a connect: once more over the same connection
                began = time.monotonic()
                await self._peers.info(contact, INFO_TIMEOUT_S)
                took_s = min(took_s, time.monotonic() - began)
            candidate = await self._candidate(record, entry, contact, str(info.get("offer", "")))
            status = info.get("status")
            if isinstance(status, dict) and status.get("draining") is True:
                return node, "it is about to stop"
            claims = read_claims(status, len(candidate.offer.span))
            return replace(
                candidate,
                rtt_s=self._nearest(node, took_s),
                claimed=claims.delivers,
                expected=claims.delivers,
                serves_parts=claims.serves_parts,
                links=claims.links,
            )
        except TallystickError as error:
            return node, error.message

    def _nearest(self, node: Address, took_s: float) -> float:
        """The round trip to a node: the shortest that was seen, forgotten slowly."""
        before = self._rtts.get(node, took_s)
        self._rtts[node] = min(took_s, before + (took_s - before) / 8)
        return self._rtts[node]

    async def _node_of(self, signer: Address) -> Address | None:
        """The node that a hot key signs for; a binding is for ever."""
        if signer not in self._signers:
            node = await asyncio.to_thread(self.chain.node_of, signer)
            if node is None:
                return None
            self._signers[signer] = node
        return self._signers[signer]

    async def _candidate(self, record: ModelRecord, entry: Serving, contact: Contact, text: str) -> Candidate:
        url = contact.url
        domain = self.chain.book.staking_domain
        try:
            offer, signer = unseal(domain, Offer, bytes.fromhex(text[:4096]))
        except ValueError:
            raise BadMessage(f"{url} gives no offer") from None
        node = entry.record.node
        if await self._node_of(signer) != node or offer.node != node:
            raise BadMessage(f"{url} gives an offer that {node} did not sign")
        if offer.model != record.id or offer.span != entry.span or offer.expires < time.time():
            raise BadMessage(f"{node} offers something else than it has on chain, or its offer has expired")
        return Candidate(
            offer=offer,
            offer_digest=digest(domain, offer),
            operator=entry.operator,
            payee=entry.record.payee,
            signer=signer,
            stake=entry.record.active,
            url=url,
            contact=contact,
            rtt_s=0.0,
        )

    async def _file(self, record: ModelRecord, cid: Cid, max_bytes: int) -> Path:
        path = self._cache / "files" / str(cid)
        if path.exists():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        serving = await asyncio.to_thread(self.chain.serving, record.id)
        sources = [*self._sources, *(source for entry in serving for source in entry.contact.sources)]
        if not sources:
            raise ConfigError("nobody serves this model and no source is set: where should its manifest come from?")
        await fetch_file(cid, path, sources, store=self._store, max_bytes=max_bytes)
        return path


def _candidates(answers: Iterable[Candidate | tuple[Address, str]]) -> list[Candidate]:
    return [answer for answer in answers if isinstance(answer, Candidate)]
