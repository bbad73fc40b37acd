"""The demo: one answer from seven nodes, checked and paid; then the same with a node that cheats.

Every figure of the result is computed from what happened: the contract's balances, the receipts, the verdicts, and
transformers' own `generate` on the unsharded checkpoint.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tallystick.cli import show
from tallystick.client import AsyncClient
from tallystick.generation import Answer
from tallystick_devnet.localchain import repository
from tallystick_devnet.localnet import READY_TIMEOUT_S, LocalNet, LocalNode, thirds
from tallystick_devnet.processes import stop_all
from tallystick_protocol.errors import ConfigError
from tallystick_protocol.manifest import Manifest
from tallystick_protocol.signing import Key
from tallystick_protocol.types import Address, ModelId, Wei

PROMPT = "The function returns a list of"


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """nodes: seven at least, because the span that is cheated on needs three."""

    prompt: str = PROMPT
    model: Path | None = None
    nodes: int = 7
    tokens: int = 48


def default_model() -> Path:
    return repository() / "models" / "tallystick-demo"


def cheating_command() -> tuple[str, ...]:
    """A node process with a faulty engine; it lives among the tests, for `tallystick-node` has no such flag."""
    return (sys.executable, str(repository() / "tests" / "faults" / "noisy_node.py"))


def run_demo(options: DemoOptions, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Run it all in `folder`; returns the JSON object. Everything it starts is stopped when it returns or raises."""
    if options.nodes < 7:
        raise ConfigError("the demo takes at least 7 nodes: three spans, and the one that is cheated on has three")
    began = time.monotonic()
    with LocalNet(folder, say) as net:
        model, manifest = net.publish(options.model or default_model())
        if manifest.output != "logits" or not manifest.causal or manifest.encoder_layers:
            raise ConfigError(f"{manifest.name} is for {manifest.task}, the demo continues a text: use scripts/devnet")
        nodes = _start_nodes(net, model, manifest, options.nodes, say)
        key, _ = net.client_key()
        return asyncio.run(_converse(net, nodes, key, model, manifest, options, began, say))


def _start_nodes(
    net: LocalNet, model: ModelId, manifest: Manifest, count: int, say: Callable[[str], None]
) -> list[LocalNode]:
    """Two nodes for the first and the last span, the others for the middle one."""
    first, middle, last = thirds(manifest.layers)
    spans = [first, middle, last, first, middle, last] + [middle] * (count - 6)
    say(f"starting {count} nodes: {count - 4} for layers {middle}, two for {first} and two for {last}")
    net.prepare(count)
    nodes = [net.add_node(model, span) for span in spans]
    for node in nodes:
        node.wait()
        say(f"  {node.name} {node.address} serves layers {node.span} at {node.url}")
    return nodes


async def _converse(
    net: LocalNet,
    nodes: list[LocalNode],
    key: Key,
    model: ModelId,
    manifest: Manifest,
    options: DemoOptions,
    began: float,
    say: Callable[[str], None],
) -> dict[str, Any]:
    chain = net.chain.chain()
    at_start = {node.address: chain.balance(node.address) for node in nodes}
    async with AsyncClient(key, net.settings()) as client:
        say("\n1. an answer, every span of it recomputed by another node\n")
        honest = await _ask(client, options)
    say("\n2. the same, with one node of the middle span cheating\n")
    cheater = next(node for node in nodes if node.address == honest.route[1].node)
    await asyncio.to_thread(_corrupt, net, cheater, model, honest.route[1].offer.price // 2)
    before_cheating = chain.balance(cheater.address)
    async with AsyncClient(key, net.settings()) as client:  # one that has not asked before, and sees the new price
        caught = await _ask(client, options)
    await asyncio.to_thread(stop_all, [node.process for node in nodes])  # a node that stops redeems its vouchers
    earned = {node.address: Wei(chain.balance(node.address) - at_start[node.address]) for node in nodes}
    reference = await asyncio.to_thread(
        _unsharded, options.model or default_model(), honest.prompt_ids, len(honest.ids)
    )
    result = {
        "manifest": str(manifest.cid),
        "text": honest.text,
        "tokens": len(honest.ids),
        "hops": [
            {"node": hop.node, "layers": [hop.span.start, hop.span.end], "paid_wei": honest.verdict.paid[hop.node]}
            for hop in honest.route
        ],
        "matches_unsharded": honest.ids == reference and caught.ids == reference,
        "checks": {
            "passed": honest.verdict.passed + caught.verdict.passed,
            "failed": honest.verdict.failed + caught.verdict.failed,
        },
        "earned_wei": {node: int(wei) for node, wei in earned.items()},
        "escrow_conserved": _conserved(net, key, nodes),
        "cheater": {
            "node": cheater.address,
            "caught": cheater.address in [a.node for a in caught.verdict.accusations],
            "accused": [a.node for a in honest.verdict.accusations + caught.verdict.accusations],
            "witnesses": [w for a in caught.verdict.accusations for w in a.witnesses],
            "paid_wei": int(chain.balance(cheater.address) - before_cheating),
        },
        "tokens_per_s": round(honest.tokens_per_s, 1),
        "seconds": round(time.monotonic() - began, 1),
    }
    _print_tables(result, nodes, honest, caught)
    return result


async def _ask(client: AsyncClient, options: DemoOptions) -> Answer:
    stream = client.stream(options.prompt, max_tokens=options.tokens, verify="full", ignore_eos=True)
    print(options.prompt, end="", flush=True)
    async for event in stream:
        show(event)
    print(flush=True)
    return stream.answer


def _corrupt(net: LocalNet, node: LocalNode, model: ModelId, price: int) -> None:
    """Restart a node with an engine that computes wrongly, and at a lower price: the planner will choose it."""
    node.process.stop()
    net.restart(node, model, cheating_command(), ["--price", str(price)])
    node.process.wait_for("fault: row", READY_TIMEOUT_S)
    node.wait()


def _unsharded(checkpoint: Path, prompt_ids: list[int], tokens: int) -> list[int]:
    """The same prompt through transformers' own `generate` on the whole model in fp32, greedy."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()

    whole = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False, local_files_only=True
    ).eval()
    with torch.inference_mode():
        ids = torch.tensor([prompt_ids])
        out = whole.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )
    generated: list[int] = out[0, len(prompt_ids) :].tolist()
    return generated


def _conserved(net: LocalNet, key: Key, nodes: list[LocalNode]) -> bool:
    """What the escrow holds is what was funded and not paid, over every channel there is."""
    chain = net.chain.chain()
    left = 0
    for node in nodes:
        channel = chain.escrow.functions.channels(key.address, node.address).call()
        left += channel[0] - channel[1]
    return bool(chain.balance(chain.book.contracts["Escrow"].address) == left)


def _print_tables(result: dict[str, Any], nodes: list[LocalNode], honest: Answer, caught: Answer) -> None:
    console = Console()
    table = Table(title="who did what, and what the contract paid for it")
    for column in ("node", "layers", "first answer", "second answer", "earned, 1e12 wei"):
        table.add_column(column)
    for node in sorted(nodes, key=lambda n: (n.span, n.name)):
        table.add_row(
            f"{node.name} {node.address[:10]}",
            str(node.span),
            _role(node.address, honest),
            _role(node.address, caught),
            f"{result['earned_wei'][node.address] / 1e12:,.1f}",
        )
    console.print(table)
    checks = result["checks"]
    console.print(
        f"{result['tokens']} tokens at {result['tokens_per_s']} per second, verified and paid;"
        f" {checks['passed']} windows agreed bit for bit, {checks['failed']} did not.\n"
        f"The text equals transformers' own generate: {result['matches_unsharded']}."
        f" The escrow adds up: {result['escrow_conserved']}.\n"
        f"The cheater {result['cheater']['node'][:10]} was caught: {result['cheater']['caught']}"
        f" and earned {result['cheater']['paid_wei']} wei by it. {result['seconds']} s in all."
    )


def _role(node: Address, answer: Answer) -> str:
    if node in [accusation.node for accusation in answer.verdict.accusations]:
        return "caught cheating"
    if node in [hop.node for hop in answer.route]:
        return "hop"
    if node in [check.auditor for check in answer.verdict.checks]:
        return "auditor"
    if node in [witness for accusation in answer.verdict.accusations for witness in accusation.witnesses]:
        return "witness"
    return "-"
