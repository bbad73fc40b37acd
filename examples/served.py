"""The demo model, served by six nodes of a network on this machine, or whole in this process: one interface to both."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

import tallystick
from tallystick.torch.lora import Lora
from tallystick.torch.parts import targeted
from tallystick_devnet.localnet import LocalNet, thirds
from tallystick_model.gradients import linear_shape

CHECKPOINT = Path(__file__).resolve().parents[1] / "models" / "tallystick-demo"


@contextmanager
def model(local: bool, verify: str) -> Iterator[Any]:
    """local: transformers' own model. Else a chain, a content store and six nodes run until the context ends."""
    if local:
        whole = transformers.AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
        yield whole.eval().requires_grad_(False)
        return
    with tempfile.TemporaryDirectory(prefix="tallystick-") as folder, LocalNet(Path(folder), print) as net:
        model_id, manifest = net.publish(CHECKPOINT)
        net.prepare(6)
        nodes = [net.add_node(model_id, span) for span in thirds(manifest.layers) * 2]
        key, _ = net.client_key()
        for node in nodes:
            node.wait()
        opened = tallystick.AutoModelForCausalLM.from_network(key=key, settings=net.settings(), verify=verify)
        with opened as served:
            yield served
        for verdict in served.verdicts:
            print(f"checks passed: {verdict.passed}, failed: {verdict.failed}, paid: {sum(verdict.paid.values())}")


def command(description: str, run: Callable[[Any, int, Callable[[str], None]], Any]) -> None:
    """An example as a command: `run(model, steps, say)` on the served model, or with --local on the whole one."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--local", action="store_true", help="the whole model in this process")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--verify", default="audit", choices=["off", "audit", "full"])
    options = parser.parse_args()
    with model(options.local, options.verify) as served:
        run(served, options.steps, print)


def attach_lora(model: Any, targets: tuple[str, ...], rank: int, alpha: float) -> Lora:
    """The same adapters on either model, drawn from torch's generator."""
    if hasattr(model, "attach_lora"):
        lora: Lora = model.attach_lora(targets, rank, alpha)
        return lora
    layers = {name: linear_shape(module) for name, module in model.named_modules() if ".layers." in name}
    lora = Lora(targeted({name: shape for name, shape in layers.items() if shape is not None}, targets), rank, alpha)
    for name, a, b in zip(lora.names, lora.a, lora.b, strict=True):
        model.get_submodule(name).register_forward_hook(
            lambda _, args, out, a=a, b=b: out + args[0] @ a.T @ b.T * lora.scale
        )
    return lora
