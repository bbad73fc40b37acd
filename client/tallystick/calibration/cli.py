"""`tallystick calibrate`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tallystick.calibration.calibrating import Calibration, Wanted, calibrate
from tallystick.publishing import register
from tallystick_protocol.chain.reads import Chain
from tallystick_protocol.content.store import LocalStore
from tallystick_protocol.signing import Key

LENGTHS = (1, 2, 4)


def add(
    commands: Any,
    registrar: Callable[[argparse.Namespace], tuple[Chain, Key]],
    sources: Callable[[argparse.Namespace], list[str]],
) -> None:
    """registrar: who records a model; sources: where content is fetched."""
    parser = commands.add_parser(
        "calibrate", help="measure how far apart honest nodes of other numeric classes are on a model, and cheaters"
    )
    parser.add_argument("cid", help="the CID of its manifest")
    parser.add_argument("--store", type=Path, default=os.environ.get("TALLYSTICK_STORE", "content"))
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=list(LENGTHS), help="layers of the spans (default 1 2 4)"
    )
    parser.add_argument("--texts", type=int, default=12, help="default 12")
    parser.add_argument("--positions", type=int, default=256, help="tokens of each text (default 256)")
    parser.add_argument("--text", type=Path, help="a text file; by default what the model itself writes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--device", action="append", default=[], help="a torch device that shows a further class; may be repeated"
    )
    parser.add_argument("--plot", type=Path, default="calibration.svg", help="where the plot goes")
    parser.add_argument("--no-register", action="store_true", help="do not record it on chain")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.set_defaults(command=partial(_calibrate, registrar, sources))


async def _calibrate(
    registrar: Callable[[argparse.Namespace], tuple[Chain, Key]],
    sources: Callable[[argparse.Namespace], list[str]],
    options: argparse.Namespace,
) -> int:
    recorder = None if options.no_register else registrar(options)
    lengths = sorted({length for length in options.lengths if length > 0})
    wanted = Wanted(lengths, options.texts, options.positions, options.text, options.seed, options.device)
    store = LocalStore(options.store)
    found = await calibrate(options.cid, store, sources(options), wanted, dict(os.environ), _say)
    options.plot.write_text(found.plot)
    Console(file=sys.stderr if options.json else sys.stdout, width=150).print(table(found))
    manifest = found.manifest
    print(f"manifest {manifest.cid}", flush=True)
    if recorder is not None:
        register(*recorder, manifest)
    print(f"model 0x{manifest.model_id.hex()}", flush=True)
    if options.json:
        print(json.dumps({
            "manifest": str(manifest.cid), "model": "0x" + manifest.model_id.hex(), "clear": manifest.clear,
            "classes": found.classes, "plot": str(options.plot), "spans": found.values,
        }))  # fmt: skip
    return 0


def table(found: Calibration) -> Table:
    """The calibration for people."""
    clear = "the protocol's" if found.manifest.clear is None else f"{found.manifest.clear:.1e}"
    made = Table(title=escape(f"{found.manifest.name}: {', '.join(found.classes)}; clear: {clear}"))
    for column in found.head:
        made.add_column(column, no_wrap=True)
    for row in found.table:
        made.add_row(*map(escape, row))
    return made


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
