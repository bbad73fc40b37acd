"""`scripts/demo` and `scripts/devnet`: the local network for a person."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from tallystick_devnet.demo import DemoOptions, default_model, run_demo
from tallystick_devnet.localnet import LocalNet, spread
from tallystick_devnet.trial.trial import run_trial
from tallystick_protocol.errors import ConfigError, TallystickError
from tallystick_protocol.manifest import Manifest

TASKS_TO_TRY = {
    "feature-extraction": 'tallystick embed "a sentence"',
    "fill-mask": 'tallystick run fill-mask "a text with one [MASK] or what the model calls it"',
    "text-classification": 'tallystick run text-classification "a text"',
    "token-classification": 'tallystick run token-classification "a text with names"',
    "question-answering": 'tallystick run question-answering "a question" "a text that answers it"',
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; SIGTERM counts as Ctrl-C. Whatever was started is stopped."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level="ERROR", format="%(message)s")
    signal.signal(signal.SIGTERM, lambda *_: _interrupt())
    try:
        status: int = options.command(options)
        return status
    except TallystickError as error:
        print(f"tallystick: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130


def _say(text: str) -> None:
    Console(highlight=False, soft_wrap=True).print(text)


def _interrupt() -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tallystick-devnet", description="The whole network on this machine.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="an honest answer, then a cheater is caught; stops by itself")
    demo.add_argument("--prompt", default=DemoOptions().prompt)
    demo.add_argument("--model", type=Path, help="a local Hugging Face checkpoint folder; default: the demo model")
    demo.add_argument("--nodes", type=int, default=DemoOptions().nodes, help="7 or more")
    demo.add_argument("--tokens", type=int, default=DemoOptions().tokens)
    demo.add_argument("--json", action="store_true", help="end with one JSON object on the last line")
    demo.set_defaults(command=_demo)
    trial = commands.add_parser("trial", help="a cheater, a false accuser, a lazy juror; the Court, with time moved")
    trial.add_argument("--json", action="store_true", help="end with one JSON object on the last line")
    trial.set_defaults(command=_trial)
    up = commands.add_parser("up", help="stay up until Ctrl-C and print what to try")
    up.add_argument("--model", type=Path, help="a checkpoint folder or a .gguf file; default: the demo model")
    up.add_argument("--numerics", choices=["fp32", "bf16w"], default="fp32")
    up.add_argument("--quantize", choices=["int8", "int4"], help="store the layers' matrices as integers")
    up.add_argument("--nodes", type=int, help="spread over the spans; default: two for each")
    up.add_argument("--folder", type=Path, default=Path(".devnet"), help="keys, logs and state; must not exist yet")
    up.add_argument("--rpc-port", type=int, default=8545)
    up.add_argument("--tls", action="store_true", help="nodes speak TLS, as they would beyond this machine")
    up.set_defaults(command=_up)
    return parser


def _demo(options: argparse.Namespace) -> int:
    demo = DemoOptions(options.prompt, options.model, options.nodes, options.tokens)
    with tempfile.TemporaryDirectory(prefix="tallystick-demo-") as folder:
        result = run_demo(demo, Path(folder), _say)
    if options.json:
        print(json.dumps(result))
    return 0 if result["matches_unsharded"] and result["cheater"]["caught"] else 1


def _trial(options: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="tallystick-trial-") as folder:
        result = run_trial(Path(folder), _say)
    if options.json:
        print(json.dumps(result))
    return 0 if result["conserved"] and not result["honest_slashed"] else 1


def _up(options: argparse.Namespace) -> int:
    say = _say
    folder = options.folder.resolve()
    if folder.exists():
        raise TallystickError(f"{folder} exists: a devnet starts from nothing; remove it, or choose another --folder")
    folder.mkdir(parents=True)
    with LocalNet(folder, say, options.rpc_port, options.tls) as net:
        model, manifest = net.publish(
            options.model or default_model(), numerics=options.numerics, quantize=options.quantize
        )
        spans = spread(manifest)
        count = 2 * len(spans) if options.nodes is None else options.nodes
        if count < len(spans):
            raise ConfigError(f"--nodes {count} leave layers unserved: {manifest.name} is cut into {len(spans)} spans")
        net.prepare(count)
        nodes = [net.add_node(model, spans[i % len(spans)]) for i in range(count)]
        for node in nodes:
            node.wait()
            say(f"  {node.name} {node.address} serves layers {node.span} at {node.url}")
        _, key = net.client_key()
        environment = {
            "TALLYSTICK_RPC": net.chain.rpc,
            "TALLYSTICK_BOOK": str(net.chain.book),
            "TALLYSTICK_KEY": str(key),
            "TALLYSTICK_PASSWORD_FILE": str(key.parent / "password"),
            "TALLYSTICK_SOURCES": net.source,
            "TALLYSTICK_STORE": str(folder / "content"),
        }
        lines = [f"export {name}={value}" for name, value in environment.items()]
        (folder / "env").write_text("\n".join([*lines, f'export PATH="{Path(sys.executable).parent}:$PATH"', ""]))
        say(f"\nthe network is up. In another terminal:\n\n  source {os.path.relpath(folder / 'env')}")
        say(f"  tallystick network\n  {_to_try(manifest)}")
        say("\nCtrl-C stops it all.")
        threading.Event().wait()
    return 0


def _to_try(manifest: Manifest) -> str:
    """A command for what the model does."""
    if manifest.task in TASKS_TO_TRY:
        return TASKS_TO_TRY[manifest.task]
    if manifest.encoder_layers:
        return 'tallystick run summarization "a text"  # or translation'
    return 'tallystick generate "The function returns"'


if __name__ == "__main__":
    sys.exit(main())
