"""`tallystick plan`: the route that a session would take at present, and why."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from tallystick.client import AsyncClient
from tallystick.routing.report import route_to_json, route_to_lines


def add(commands: Any, make_client: Callable[[argparse.Namespace], AsyncClient]) -> None:
    """Add the command to a parser's."""
    plan = commands.add_parser("plan", help="the route that a session would take, what it would cost, who stands by")
    plan.add_argument("--model", default="", help="id, part of an id or name; default: the only one")
    plan.add_argument("--prompt", type=int, default=0, help="positions of the prompt")
    plan.add_argument("--tokens", type=int, default=64, help="tokens that are expected")
    plan.add_argument("--verify", choices=["off", "audit", "full"], default="audit")
    plan.add_argument("--json", action="store_true", help="one JSON object")

    async def show(options: argparse.Namespace) -> int:
        async with make_client(options) as client:
            manifest, route = await client.route(
                options.model, prompt=max(options.prompt, 0), new=max(options.tokens, 1), verify=options.verify
            )
        if options.json:
            print(json.dumps({"model": "0x" + manifest.model_id.hex(), **route_to_json(route, manifest.layers)}))
        else:
            print("\n".join([manifest.name, *route_to_lines(route, manifest.layers)]))
        return 0

    plan.set_defaults(command=show)
