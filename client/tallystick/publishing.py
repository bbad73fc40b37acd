"""For who brings a model: cut it into pieces, put them where nodes can fetch them, record it on chain."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from aiohttp import web

from tallystick_protocol.chain.reads import Chain
from tallystick_protocol.chain.writes import Wallet
from tallystick_protocol.content.cid import Cid
from tallystick_protocol.content.serving import BlockRequest, PinnedBlocks, answer
from tallystick_protocol.content.store import LocalStore, Store
from tallystick_protocol.errors import ChainError, ConfigError, UnknownModel
from tallystick_protocol.manifest import Manifest, Numerics
from tallystick_protocol.signing import Key
from tallystick_protocol.types import ModelId

if TYPE_CHECKING:  # the client and its command line load without tallystick_model
    from tallystick_model.publishing.progress import Report


def cut(
    checkpoint: Path,
    store: Store,
    name: str | None = None,
    licence: str | None = None,
    progress: Report | None = None,
    *,
    numerics: Numerics = "fp32",
    quantize: Literal["int8", "int4"] | None = None,
    architecture: str | None = None,
    work: Path | None = None,
    finish: Callable[[Manifest], object] = lambda manifest: None,
) -> Manifest:
    """Publish a Hugging Face checkpoint folder or a GGUF file into a store, pinned. Needs the extra `[torch]`.

    work: where an interrupted run leaves notes for the next one; they stay until `finish` has come back. Raises
    ConfigError without the extra or without room, ManifestError for a checkpoint that cannot be served.
    """
    try:
        from tallystick_model.publish import publish
        from tallystick_model.publishing.progress import quiet
    except ImportError:
        raise ConfigError("publishing takes torch: pip install 'tallystick[torch]'") from None

    def pin_and_finish(manifest: Manifest) -> None:
        for cid in contents(manifest):
            store.pin(cid)
        finish(manifest)

    return publish(
        checkpoint,
        store,
        name=name,
        licence=licence,
        numerics=numerics,
        quantize=quantize,
        architecture=architecture,
        progress=progress or quiet,
        work=work,
        finish=pin_and_finish,
    )


def contents(manifest: Manifest) -> list[Cid]:
    """Every CID that a model needs: manifest, pieces, tokenizer, canary."""
    return [
        manifest.cid,
        *(piece.cid for piece in manifest.pieces),
        *(file.cid for file in manifest.tokenizer.values()),
        *manifest.canary.rows,
        manifest.canary.output,
    ]


def register(chain: Chain, key: Key, manifest: Manifest) -> ModelId:
    """Record a model on chain, unless it is there. Raises ChainError."""
    try:
        chain.model(manifest.model_id)
    except UnknownModel:
        Wallet(chain, key).add_model(manifest.digest, manifest.weights, manifest.layers)
    return manifest.model_id


def check_can_register(chain: Chain, key: Key) -> None:
    """Looked at before hours of work. Raises ChainError for another chain or a key without means, ConfigError for a
    key that is public knowledge."""
    chain.check()
    address = Wallet(chain, key).address
    if not chain.guard("reading the key's balance", lambda: chain.web3.eth.get_balance(address)):
        raise ChainError(f"{address} has nothing on chain {chain.book.chain_id} to pay gas with: send it some first")


def content_app(store: LocalStore) -> web.Application:
    """A trustless gateway over what a store has pinned, and nothing else."""
    pinned = PinnedBlocks(store)

    async def block(request: web.Request) -> web.StreamResponse:
        asked = BlockRequest(
            request.match_info["cid"],
            dict(request.query),
            {name.lower(): value for name, value in request.headers.items()},
            request.method,
        )
        reply = await asyncio.to_thread(answer, store, asked, pinned)
        response = web.StreamResponse(status=reply.status, headers=reply.headers)
        await response.prepare(request)
        for chunk in reply.body:
            await response.write(chunk)
        await response.write_eof()
        return response

    app = web.Application()
    app.router.add_get("/ipfs/{cid}", block)
    return app


async def serve_content(store: LocalStore, host: str, port: int) -> tuple[web.AppRunner, str]:
    """Serve a store's pins; returns the runner (clean it up) and the base URL."""
    runner = web.AppRunner(content_app(store), access_log=None, handle_signals=False)
    await runner.setup()
    site = web.TCPSite(runner, host, port)
    try:
        await site.start()
    except OSError as error:
        await runner.cleanup()
        raise ConfigError(f"port {port} on {host} cannot be used ({error.strerror}); choose another") from None
    bound = runner.addresses[0]
    return runner, f"http://{bound[0]}:{bound[1]}"
