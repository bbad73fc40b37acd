"""`tallystick-node`: keys, settings, joining and serving, for the person who runs a node."""

from __future__ import annotations

import argparse
import asyncio
import getpass
import json
import logging
import os
import signal
import sys
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic_settings import BaseSettings

from tallystick_node.config import NodeConfig, load_config
from tallystick_node.relay.config import RelayConfig, load_relay_config
from tallystick_protocol.errors import ConfigError, TallystickError
from tallystick_protocol.keystore import create_keystore, open_keystore, read_password
from tallystick_protocol.transport import loops
from tallystick_protocol.types import Address

if TYPE_CHECKING:  # torch takes seconds to import, and only `run` needs it
    from tallystick_node.node import Keys, MakeEngine

TORCH_ENVIRONMENT = {"GOMP_SPINCOUNT": "20000", "THP_MEM_ALLOC_ENABLE": "1"}
"""Read when torch is loaded. Its threads wait for the next product for some 0.2 ms before they sleep: products of one
forward follow each other sooner, to be woken takes as long, and another process soon has the core. Large tensors lie
in huge pages."""

_LIST_SETTINGS = {"sources", "announce", "relays"}


def main(arguments: Sequence[str] | None = None, make_engine: MakeEngine | None = None) -> int:
    """Run a command, with another engine if one is given.

    The exit status is 0, 1 for an error that is told in one sentence, 2 for wrong usage.
    """
    options = _parser().parse_args(arguments)
    try:
        status: int = options.command(options, make_engine)
        return status
    except TallystickError as error:
        print(f"tallystick-node: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tallystick-node", description="Serve layers of a model and earn tokens.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="fetch the pieces of a span and serve it")
    run.add_argument("--join", action="store_true", help="stake, bind the hot key and register first (cold key)")
    run.set_defaults(command=_run)
    _add_settings(run)
    plan = commands.add_parser("plan", help="show which span this machine should serve, and why; changes nothing")
    plan.add_argument("--dry-run", action="store_true", help="what plan does anyway: register and fetch nothing")
    plan.add_argument("--json", action="store_true", help="one line of JSON")
    plan.set_defaults(command=_plan)
    _add_settings(plan)
    relay = commands.add_parser("relay", help="let nodes be reached that have no open port, for money; needs no stake")
    relay.add_argument("--show", action="store_true", help="show every setting, its value and what it means; then end")
    relay.set_defaults(command=_relay)
    _add_settings(relay, RelayConfig)
    jail = commands.add_parser("jail", help="jail a node that has not beaten on chain for two days; costs gas")
    jail.add_argument("dead", metavar="NODE", help="its address")
    jail.set_defaults(command=_jail)
    _add_settings(jail)
    show = commands.add_parser("config", help="show every setting, its value and what it means")
    show.add_argument("what", choices=["show"])
    show.set_defaults(command=_show)
    _add_settings(show)
    keys = commands.add_parser("keys", help="make a keystore for a new key")
    keys.add_argument("what", choices=["new"])
    keys.add_argument("path", type=Path)
    keys.add_argument("--password-file", type=Path, help="file whose first line is the password; else it is asked for")
    keys.set_defaults(command=_new_key)
    return parser


def _add_settings(parser: argparse.ArgumentParser, settings: type[BaseSettings] = NodeConfig) -> None:
    parser.add_argument("--config", type=Path, help="TOML file with settings")
    for name, field in settings.model_fields.items():
        flag = "--" + name.replace("_", "-")
        if name in _LIST_SETTINGS:
            parser.add_argument(flag, action="append", dest=name, help=field.description)
        else:
            parser.add_argument(flag, dest=name, help=field.description)


def _settings(options: argparse.Namespace) -> NodeConfig:
    return load_config(options.config, _flags(options, NodeConfig))


def _flags(options: argparse.Namespace, settings: type[BaseSettings]) -> dict[str, Any]:
    return {name: value for name in settings.model_fields if (value := getattr(options, name)) is not None}


def _run(options: argparse.Namespace, make_engine: MakeEngine | None) -> int:
    for name, value in TORCH_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from tallystick_node.node import Node
    from tallystick_node.scheduling.engine import Engine

    config = _settings(options)
    _log_to_stderr(config.log_level)
    node = Node(config, _open_keys(config, options.join), make_engine or Engine, options.join)
    return loops.run(_until_stopped(node.run(lambda url: print(f"serving at {url}", flush=True))))


def _jail(options: argparse.Namespace, _: MakeEngine | None) -> int:
    from tallystick_node.heartbeat import jail

    config = _settings(options)
    print(jail(config, open_keystore(config.hot_key, _password(config.password_file)), options.dead))
    return 0


def _relay(options: argparse.Namespace, _: MakeEngine | None) -> int:
    from tallystick_node.relay.service import run_relay

    config = load_relay_config(options.config, _flags(options, RelayConfig))
    if options.show:
        return _print_settings(config)
    _log_to_stderr(config.log_level)
    key = open_keystore(config.key, _password(config.password_file))
    relaying = run_relay(config, key, lambda name: print(f"relaying as {name}", flush=True))
    return loops.run(_until_stopped(relaying))


def _log_to_stderr(level: str) -> None:
    logging.basicConfig(
        level=level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr
    )
    logging.getLogger("uvicorn.error").setLevel("WARNING")
    logging.getLogger("uvicorn.error").addFilter(_is_ours_to_read)


def _password(path: Path | None) -> str:
    return read_password(path) if path else getpass.getpass("keystore password: ")


def _plan(options: argparse.Namespace, _: MakeEngine | None) -> int:
    from tallystick_node.planning.command import make_plan

    plan = loops.run(make_plan(_settings(options)))
    if options.json:
        print(json.dumps(plan.to_json()))
    else:
        print("\n".join(plan.to_lines()))
    return 0


def _is_ours_to_read(record: logging.LogRecord) -> bool:
    """What any stranger can make uvicorn write, as often as it likes, is not worth a line."""
    return not record.getMessage().startswith(("Invalid ", "Unsupported upgrade", "No supported WebSocket"))


async def _until_stopped(serving: Coroutine[Any, Any, None]) -> int:
    """Serve until SIGTERM or SIGINT; a second one ends the process at once."""
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None

    def stop() -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
        task.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    try:
        await serving
    except asyncio.CancelledError:
        return 0
    except ExceptionGroup as group:
        expected, rest = group.split(TallystickError)
        if rest is not None or expected is None:
            raise
        raise expected.exceptions[0] from None
    return 0


def _open_keys(config: NodeConfig, join: bool) -> Keys:
    from tallystick_node.node import Keys

    password = _password(config.password_file)
    hot = open_keystore(config.hot_key, password)
    cold = open_keystore(config.cold_key, password) if config.cold_key and join else None
    if join and cold is None:
        raise ConfigError("--join takes the cold key: set cold_key")
    node = cold.address if cold else Address(config.node)
    if not node:
        raise ConfigError("node is not set: which node (cold address) does the hot key sign for?")
    return Keys(hot, cold, node)


def _show(options: argparse.Namespace, _: MakeEngine | None) -> int:
    return _print_settings(_settings(options))


def _print_settings(config: NodeConfig | RelayConfig) -> int:
    for name, field in (NodeConfig if isinstance(config, NodeConfig) else RelayConfig).model_fields.items():
        print(f"{name} = {getattr(config, name)!s:40}  # {field.description}")
    return 0


def _new_key(options: argparse.Namespace, _: MakeEngine | None) -> int:
    if options.password_file:
        password = read_password(options.password_file)
    else:
        password = getpass.getpass("new password: ")
        if getpass.getpass("again: ") != password:
            raise ConfigError("the passwords differ; nothing was written")
    print(create_keystore(options.path, password))
    return 0


if __name__ == "__main__":
    os.umask(0o077)
    sys.exit(main())
