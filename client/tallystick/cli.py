"""`tallystick`: ask, embed, look at the network, publish a model, move money in channels."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import sys
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tallystick.calibration import cli as calibration
from tallystick.channels import cli as channels
from tallystick.client import AsyncClient
from tallystick.court import cli as court
from tallystick.generation import Answer, Retracted, Token
from tallystick.inspection import list_models, verify_model
from tallystick.progress import ProgressBar
from tallystick.publishing import check_can_register, cut, register, serve_content
from tallystick.routing import cli as routing
from tallystick.session.setting import SKETCHES
from tallystick.settings import Settings
from tallystick.speculation.steps import named
from tallystick.tasks import cli as tasks
from tallystick.verdict import POLICIES
from tallystick_protocol.chain.book import load_book
from tallystick_protocol.chain.reads import Chain
from tallystick_protocol.content.ipfs import DaemonStore
from tallystick_protocol.content.store import LocalStore
from tallystick_protocol.errors import ConfigError, TallystickError
from tallystick_protocol.keystore import open_keystore, read_password
from tallystick_protocol.manifest import Manifest
from tallystick_protocol.sampling import Sampling
from tallystick_protocol.signing import Key
from tallystick_protocol.transport import loops
from tallystick_protocol.wire import WIRES

ENVIRONMENT = {
    "TALLYSTICK_RPC": "JSON-RPC of the chain",
    "TALLYSTICK_BOOK": "address book that scripts/deploy.js wrote",
    "TALLYSTICK_KEY": "keystore V3 file of the key that pays",
    "TALLYSTICK_PASSWORD_FILE": "file whose first line opens the keystore",
    "TALLYSTICK_SOURCES": "gateways to fetch manifests and tokenizers from, separated by commas",
    "TALLYSTICK_STORE": "folder of the content store that `publish` fills",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 0, 1 for an error that is told in one sentence, 2 for wrong usage."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level="INFO" if options.verbose else "WARNING", format="%(message)s", stream=sys.stderr)
    try:
        status = options.command(options)
        return int(loops.run(status) if isinstance(status, Coroutine) else status)
    except TallystickError as error:
        print(f"tallystick: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tallystick",
        description="Language models served by strangers, verified and paid for.",
        epilog="environment: " + "; ".join(f"{name}: {text}" for name, text in ENVIRONMENT.items()),
    )
    parser.add_argument("--verbose", action="store_true", help="tell what happens")
    parser.add_argument("--rpc", default=os.environ.get("TALLYSTICK_RPC", "http://127.0.0.1:8545"))
    parser.add_argument("--book", type=Path, default=os.environ.get("TALLYSTICK_BOOK", "deployments/31337.json"))
    parser.add_argument("--key", type=Path, default=os.environ.get("TALLYSTICK_KEY"))
    parser.add_argument("--password-file", type=Path, default=os.environ.get("TALLYSTICK_PASSWORD_FILE"))
    parser.add_argument("--source", action="append", default=[], help="a gateway to fetch content from")
    parser.add_argument(
        "--sketches",
        choices=SKETCHES,
        default="auto",
        help="have hops answer challenges by which other numeric classes can check them; auto: where no other can",
    )
    parser.add_argument(
        "--wire", choices=WIRES, default="f32",
        help="how hidden rows travel between nodes; bf16 and int8 save bytes and change answers a little",
    )  # fmt: skip
    parser.add_argument(
        "--admit-stock", action="store_true",
        help='with --verify off, use nodes of no numeric class for layers that nobody else serves; nothing is checked',
    )  # fmt: skip
    parser.add_argument(
        "--recompute-bytes", type=int, default=1 << 30, metavar="BYTES",
        help="pieces that may be fetched to judge here what no third node can, with the extra [node]; 0: never",
    )  # fmt: skip
    parser.add_argument(
        "--evidence", type=Path, metavar="FOLDER",
        help="keep evidence against nodes that are found wrong; it holds the text, or what it can be told from",
    )  # fmt: skip
    parser.add_argument("--accuse", action="store_true", help="with --evidence: accuse them in Court, for a bond")
    parser.add_argument(
        "--evidence-source", action="append", default=[], metavar="URL", help="where jurors find it, http://NUMBER:PORT"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="continue a prompt")
    generate.add_argument("prompt")
    generate.add_argument("--model", default="", help="id, part of an id or name; default: the only one")
    generate.add_argument("--tokens", type=int, default=64, help="new tokens at most")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    generate.add_argument("--top-k", type=int, default=0)
    generate.add_argument("--top-p", type=float, default=1.0)
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--verify", choices=POLICIES, default="audit", help="agree=2: two routes, and so on")
    generate.add_argument(
        "--speculate", default="off", metavar="off|auto|lookup|FOLDER", help="draft ahead, with the model in FOLDER"
    )
    generate.add_argument("--mode", choices=["pipeline", "ring", "auto"], default="pipeline", help="who chooses tokens")
    generate.add_argument("--json", action="store_true", help="end with one JSON object")
    generate.set_defaults(command=_generate)

    embed = commands.add_parser("embed", help="a sentence's vector")
    embed.add_argument("text", nargs="+")
    embed.add_argument("--model", default="")
    embed.add_argument("--verify", choices=POLICIES, default="audit")
    embed.set_defaults(command=_embed)

    tasks.add(commands, _client)

    routing.add(commands, _client)

    court.add(commands, _chain, _key)

    network = commands.add_parser("network", help="which nodes serve which layers")
    network.add_argument("--model", default="")
    network.add_argument("--json", action="store_true")
    network.set_defaults(command=_network)

    models = commands.add_parser("models", help="models on chain")
    models.add_argument("--store", type=Path, default=os.environ.get("TALLYSTICK_STORE", "content"))
    models.add_argument("--json", action="store_true", help="one JSON list")
    models.set_defaults(command=_models)

    verify = commands.add_parser("verify-model", help="fetch a model and check every byte of it")
    verify.add_argument("cid", help="the CID of its manifest")
    verify.add_argument("--store", type=Path, default=os.environ.get("TALLYSTICK_STORE", "content"))
    verify.add_argument(
        "--deep", action="store_true",
        help="also run its canary, layer by layer (takes torch): hashes say that the bytes are the publisher's, this"
        " says that the layers compute what the publisher's did, and in their order",
    )  # fmt: skip
    verify.add_argument("--json", action="store_true", help="one JSON object")
    verify.set_defaults(command=_verify_model)

    publish = commands.add_parser(
        "publish", help="cut a local Hugging Face checkpoint into pieces and record it on chain"
    )
    publish.add_argument("path", type=Path, help="a folder with config.json and safetensors, or a .gguf file")
    publish.add_argument(
        "--numerics", choices=["fp32", "bf16w"], default="fp32", help="bf16w: products of bf16 weights and inputs"
    )
    publish.add_argument("--quantize", choices=["int8", "int4"], help="store the layers' matrices as integers")
    publish.add_argument("--name", help="for people; by default the folder's or the file's")
    publish.add_argument("--architecture", help="the transformers class that runs it; by default config.json's")
    publish.add_argument("--licence", help="SPDX id or a sentence, where the checkpoint does not say it")
    publish.add_argument("--store", type=Path, default=os.environ.get("TALLYSTICK_STORE", "content"))
    publish.add_argument(
        "--ipfs", help="put the pieces into an IPFS daemon instead, for example /ip4/127.0.0.1/tcp/5001"
    )
    publish.add_argument("--no-register", action="store_true", help="do not record it on chain")
    publish.set_defaults(command=_publish)

    calibration.add(commands, _registrar, _sources)

    content = commands.add_parser("content", help="serve what `publish` put into a store, so that nodes can fetch it")
    content.add_argument("--store", type=Path, default=os.environ.get("TALLYSTICK_STORE", "content"))
    content.add_argument("--host", default="127.0.0.1")
    content.add_argument("--port", type=int, default=8180)
    content.set_defaults(command=_content)

    channels.add(commands, _chain, _key)
    return parser


def _chain(options: argparse.Namespace) -> Chain:
    return Chain(options.rpc, load_book(Path(options.book)))


def _key(options: argparse.Namespace) -> Key:
    if options.key is None or options.password_file is None:
        raise ConfigError("which key pays? set --key and --password-file (or TALLYSTICK_KEY, TALLYSTICK_PASSWORD_FILE)")
    return open_keystore(Path(options.key), read_password(Path(options.password_file)))


def _client(options: argparse.Namespace) -> AsyncClient:
    settings = Settings(
        rpc=options.rpc, book=Path(options.book), sources=_sources(options), admit_stock=options.admit_stock,
        wire=options.wire, sketches=options.sketches,
        recompute_bytes=options.recompute_bytes,
        evidence=options.evidence, accuse=options.accuse, evidence_sources=options.evidence_source,
        notify=lambda text: print(f"[{text}]", file=sys.stderr, flush=True),
    )  # fmt: skip
    return AsyncClient(_key(options), settings)


async def _generate(options: argparse.Namespace) -> int:
    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
    async with _client(options) as client:
        stream = client.stream(
            options.prompt,
            model=options.model,
            max_tokens=options.tokens,
            sampling=sampling,
            verify=options.verify,
            speculate=named(options.speculate),
            mode=options.mode,
        )
        prompt = options.prompt
        async for event in stream:
            print(prompt, end="", flush=True)  # not before: an error that comes first would stand behind it
            prompt = ""
            show(event)
        print(prompt)
        answer = stream.answer
    summary = summarise(answer)
    print(json.dumps(summary) if options.json else _told(summary), file=sys.stdout if options.json else sys.stderr)
    return 0


def show(event: Token | Retracted) -> None:
    """Print a stream event as it comes."""
    if isinstance(event, Token):
        print(event.text, end="", flush=True)
    else:
        print(
            f"\n[the last {event.num_tokens} tokens are taken back: their node was caught, or left and has no class]",
            flush=True,
        )


def summarise(answer: Answer) -> dict[str, Any]:
    """What a person wants to know of an answer, as plain values."""
    verdict = answer.verdict
    said = tasks.told(answer.route, verdict)
    return {
        "tokens": len(answer.ids),
        "tokens_per_s": round(answer.tokens_per_s, 1),
        "routes": [[hop.node for hop in route] for route in answer.routes],
        "drafted": answer.drafted,
        "accepted": answer.accepted,
        **{name: said["verdict"][name] for name in ("replaced", "unverifiable", "unaudited", "exact")},
        **said,
    }


def _told(summary: dict[str, Any]) -> str:
    checks = summary["checks"]
    hops = " -> ".join(f"{hop['node'][:8]}{hop['layers']}" for hop in summary["route"])
    verdict = summary["verdict"]
    stock, alone = (", ".join(str(one["layers"]) for one in verdict[key]) for key in ("unverifiable", "unaudited"))
    return (
        f"{summary['tokens']} tokens, {summary['tokens_per_s']} per second, over {hops};"
        f" {summary['receipts']} receipts,"
        f" {checks['passed']} checks passed, {checks['failed']} failed; paid {summary['paid_wei']} wei of tokens,"
        f" withheld {verdict['withheld']}"
        + ("" if not stock else f"; layers {stock} come from nodes of no numeric class: nothing of theirs was checked")
        + ("" if not alone else f"; layers {alone} were drawn for an audit and nobody could recompute them")
        + ("" if summary["exact"] else ", and one of them took another's place, so what follows may differ")
    )


async def _embed(options: argparse.Namespace) -> int:
    async with _client(options) as client:
        for text in options.text:
            embedding = await client.embed(text, model=options.model, verify=options.verify)
            print(json.dumps([float(value) for value in embedding.vector]))
    return 0


async def _network(options: argparse.Namespace) -> int:
    async with _client(options) as client:
        record, manifest = await client.model(options.model)
        survey = await client.network.survey(record)
    rows = [
        {
            "node": c.node,
            "operator": c.operator,
            "layers": [c.span.start, c.span.end],
            "price_wei": c.offer.price,
            "stake_wei": c.stake,
            "class": c.offer.numeric_class.hex()[:12] if any(c.offer.numeric_class) else "stock",
            "rtt_ms": round(c.rtt_s * 1e3, 1),
            "url": c.url,
        }
        for c in sorted(survey.candidates, key=lambda c: (c.span, c.node))
    ]
    if options.json:
        silent = [{"node": node, "why": why} for node, why in survey.silent]
        print(
            json.dumps({"model": "0x" + record.id.hex(), "nodes": rows, "silent": silent, "complete": survey.complete})
        )
        return 0
    Console().print(nodes_table(f"{manifest.name}: {manifest.layers} layers, 0x{record.id.hex()[:12]}", rows))
    for node, why in survey.silent:
        print(f"{node} does not answer: {why}")
    return 0


def nodes_table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Nodes as `--json` tells them, for people. Names and addresses are strangers' text: no markup."""
    table = Table(title=escape(title))
    for column in ("layers", "node", "price", "stake", "class", "ms", "url"):
        table.add_column(column, overflow="fold", no_wrap=column in ("layers", "price", "stake", "ms"))
    for row in rows:
        stake = f"{row['stake_wei'] / 1e18:g}"
        told = (row["layers"], row["node"], row["price_wei"], stake, row["class"], row["rtt_ms"], row["url"])
        table.add_row(*(escape(str(value)) for value in told))
    return table


async def _models(options: argparse.Namespace) -> int:
    chain = _chain(options)
    entries = await list_models(chain, Path(options.store), _sources(options))
    if options.json:
        print(json.dumps([entry.to_json() for entry in entries]))
        return 0
    for line in [line for entry in entries for line in entry.lines()] or ["no model on this chain yet"]:
        print(line)
    return 0


def _publish(options: argparse.Namespace) -> int:
    """Not a coroutine: it works in the main thread, where Ctrl-C stops it."""
    registrar = None if options.no_register else _registrar(options)
    store = DaemonStore(options.ipfs) if options.ipfs else LocalStore(Path(options.store))

    def finish(manifest: Manifest) -> None:
        bar.close()
        print(f"manifest {manifest.cid}", flush=True)
        if registrar is not None:
            register(*registrar, manifest)
        print(f"model 0x{manifest.model_id.hex()}", flush=True)

    try:
        with ProgressBar() as bar:
            cut(
                options.path, store, options.name, options.licence, bar.show, numerics=options.numerics,
                quantize=options.quantize, architecture=options.architecture,
                work=Path(options.store) / "publishing", finish=finish,
            )  # fmt: skip
    except KeyboardInterrupt:
        print("tallystick: stopped; the same command, run again, goes on from here", file=sys.stderr, flush=True)
        os._exit(130)  # all is unwound: what is left is the taking down of torch, which takes a second or two
    return 0


def _registrar(options: argparse.Namespace) -> tuple[Chain, Key]:
    """The chain and the key that will record the model, found good before anything else is done."""
    key = _key(options)
    chain = _chain(options)
    check_can_register(chain, key)
    return chain, key


async def _verify_model(options: argparse.Namespace) -> int:
    report = await verify_model(options.cid, Path(options.store), _sources(options), deep=options.deep)
    if options.json:
        print(json.dumps(report.to_json()))
    else:
        for line in report.lines():
            print(line)
    return 0 if report.sound else 1


def _sources(options: argparse.Namespace) -> list[str]:
    return [*options.source, *filter(None, os.environ.get("TALLYSTICK_SOURCES", "").split(","))]


async def _content(options: argparse.Namespace) -> int:
    runner, url = await serve_content(LocalStore(Path(options.store)), options.host, options.port)
    print(f"serving at {url}", flush=True)
    try:
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()
    return 0


if __name__ == "__main__":
    sys.exit(main())
