"""What there is: models on chain, nodes that serve them, their signed offers; remembered for a moment."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from pathlib import Path

from tallystick.routing.candidates import Candidate
from tallystick.tokens import Tokens
from tallystick_protocol.chain.reads import Chain, ModelRecord, Serving
from tallystick_protocol.content.cid import Cid, Codec
from tallystick_protocol.content.fetch import fetch_file
from tallystick_protocol.content.store import LocalStore
from tallystick_protocol.errors import BadMessage, ConfigError, ManifestError, TallystickError, UnknownModel
from tallystick_protocol.manifest import MAX_BYTES, Manifest
from tallystick_protocol.messages import Offer
from tallystick_protocol.peer import Peers
from tallystick_protocol.signing import digest, unseal
from tallystick_protocol.types import Address, ModelId

log = logging.getLogger(__name__)

OFFERS_AGE_S = 5.0
INFO_TIMEOUT_S = 2.0
NODES_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Survey:
    """A model's nodes as they answer now, and those that do not. complete: their stake adds up to the chain's."""

    candidates: list[Candidate]
    silent: list[tuple[Address, str]]
    complete: bool
    at: float


class Network:
    """Reads of chain, content and nodes for a client."""

    def __init__(self, chain: Chain, peers: Peers, cache: Path, sources: list[str]) -> None:
        """cache: folder for manifests and tokenizers. sources: gateways to ask besides the model's own nodes."""
        self.chain = chain
        self._peers = peers
        self._cache = cache
        self._sources = sources
        self._store = LocalStore(cache / "store")
        self._surveys: dict[ModelId, Survey] = {}
        self._manifests: dict[ModelId, Manifest] = {}
        self._tokens: dict[ModelId, Tokens] = {}

    async def find(self, text: str) -> ModelRecord:
        """A model by id, by a part of its id, or (empty) the only one. Raises UnknownModel listing what there is."""
        models = await asyncio.to_thread(self.chain.all_models)
        wanted = text.lower().removeprefix("0x")
        found = [record for record in models if record.id.hex().startswith(wanted)] if wanted or models else []
        if not found and text:
            found = [record for record in models if (await self.manifest(record)).name == text]
        if len(found) == 1:
            return found[0]
        known = ", ".join("0x" + record.id.hex()[:12] for record in models[:5]) or "none"
        raise UnknownModel(f"{len(found)} models match {text!r}; on chain: {known}; list them: tallystick models")

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

    async def survey(self, record: ModelRecord, fresh: bool = False) -> Survey:
        """Every node's offer, asked in parallel."""
        known = self._surveys.get(record.id)
        if known is not None and not fresh and time.monotonic() - known.at < OFFERS_AGE_S:
            return known
        serving = await asyncio.to_thread(self.chain.serving, record.id)
        weight = await asyncio.to_thread(self.chain.weight, record.id)
        complete = sum(entry.record.active for entry in serving) == weight
        if not complete:
            log.warning("the nodes found do not add up to the model's stake on chain: this RPC hides some")
        gate = asyncio.Semaphore(NODES_AT_ONCE)
        answers = await asyncio.gather(*(self._ask(record, entry, gate) for entry in serving))
        candidates = [answer for answer in answers if isinstance(answer, Candidate)]
        silent = [answer for answer in answers if not isinstance(answer, Candidate)]
        survey = Survey(candidates, silent, complete, time.monotonic())
        self._surveys[record.id] = survey
        return survey

    def forget(self, record: ModelRecord) -> None:
        """Ask the nodes anew the next time: one of them is gone."""
        self._surveys.pop(record.id, None)

    async def _ask(
        self, record: ModelRecord, entry: Serving, gate: asyncio.Semaphore
    ) -> Candidate | tuple[Address, str]:
        """One node's offer, or why it cannot be used."""
        node = entry.record.node
        why = "it has no address on chain"
        for endpoint in entry.endpoints:
            try:
                async with gate:
                    began = time.monotonic()
                    info = await self._peers.info(endpoint.url, INFO_TIMEOUT_S)
                    rtt_s = time.monotonic() - began
                return await self._candidate(record, entry, endpoint.url, str(info.get("offer", "")), rtt_s)
            except TallystickError as error:
                why = error.message
        return node, why

    async def _candidate(self, record: ModelRecord, entry: Serving, url: str, text: str, rtt_s: float) -> Candidate:
        domain = self.chain.book.staking_domain
        try:
            offer, signer = unseal(domain, Offer, bytes.fromhex(text[:4096]))
        except ValueError:
            raise BadMessage(f"{url} gives no offer") from None
        node = entry.record.node
        if await asyncio.to_thread(self.chain.node_of, signer) != node or offer.node != node:
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
            rtt_s=rtt_s,
        )

    async def _file(self, record: ModelRecord, cid: Cid, max_bytes: int) -> Path:
        path = self._cache / "files" / str(cid)
        if path.exists():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        serving = await asyncio.to_thread(self.chain.serving, record.id)
        sources = [*self._sources, *(endpoint.url for entry in serving for endpoint in entry.endpoints)]
        if not sources:
            raise ConfigError("nobody serves this model and no source is set: where should its manifest come from?")
        await fetch_file(cid, path, sources, store=self._store, max_bytes=max_bytes)
        return path
