"""The docs stay true: whatever exists is documented in its place, and the README's commands are run."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from urllib.request import urlopen

import pytest

import tallystick.cli
import tallystick_devnet.cli
import tallystick_node.cli
from harness import samples
from tallystick.verdict import Verdict
from tallystick_devnet.processes import Process, start
from tallystick_node.config import ENV_PREFIX, NodeConfig
from tallystick_node.relay.config import RELAY_PREFIX, RelayConfig
from tallystick_node.scheduling.load import Meter
from tallystick_node.server import _metrics, create_app
from tallystick_protocol import errors
from tallystick_protocol.frames import MAX_BODY, MAX_TENSOR, DType, Kind, rows_frame
from tallystick_protocol.manifest import Manifest
from tallystick_protocol.messages import session_id
from tallystick_protocol.receipts import Context, leaf, merkle_root
from tallystick_protocol.signing import digest, keccak
from tallystick_protocol.types import ModelId
from tallystick_protocol.vouchers import Voucher

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SERVING = r"serving at (http://\S+)"
DEMO_TIMEOUT_S = 240
DEVNET_TIMEOUT_S = 180.0
COMMAND_TIMEOUT_S = 120


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def section(text: str, heading: str) -> str:
    """What stands under a heading, up to the next one of its level or above."""
    level = heading.split(" ")[0]
    begin = text.index(f"\n{heading}\n") + len(heading) + 2
    end = re.search(rf"^#{{1,{len(level)}}} ", text[begin:], re.MULTILINE)
    return text[begin : begin + end.start()] if end else text[begin:]


# -- docs/protocol.md


@pytest.mark.parametrize("kind", Kind)
def test_every_frame_kind_has_a_section_that_says_who_sends_it(kind: Kind) -> None:
    assert "->" in section(page("protocol.md"), f"### {kind.name} ({kind.value})")


def test_every_error_code_is_in_the_table_with_its_status() -> None:
    table = section(page("protocol.md"), "## 12. Errors")
    ours = {code: cls for code, cls in errors.error_codes().items() if cls.__module__ == errors.__name__}
    missing = [code for code, cls in ours.items() if f"| `{code}` | {cls.status} |" not in table]
    assert not missing
    documented = set(re.findall(r"^\| `(\w+)` \| \d+ \|", table, re.MULTILINE))
    assert documented == set(ours), "documented codes that do not exist"


def test_every_struct_stands_there_with_its_type_string_and_size() -> None:
    text = page("protocol.md")
    for struct in samples.structs():
        assert f"`{struct.TYPE}`" in text
        if not struct.TYPE.startswith("Bind("):
            size = 32 * (struct.TYPE.count(",") + 1) + 65
            assert re.search(rf"`{re.escape(struct.TYPE)}` \|[^|]*\| {size} \|", text), struct.TYPE


def test_the_vectors_of_the_page_are_right() -> None:
    client, node = samples.key("client").address, samples.key("node").address
    vectors: list[bytes] = [
        digest(samples.ESCROW, Voucher(client, node, 1234567890123456789)),
        session_id(31337, client, keccak(b"nonce"), ModelId(keccak(b"model"))),
        merkle_root([leaf(b"a"), leaf(b"b"), leaf(b"c")]),
        Context("fp32", "f32", 64, (False, True, True)).digest(),
        rows_frame(Kind.STEP, DType.IDS, [b"\5\0\0\0", b"\7\0\0\0"], 32, {"want": b"\2"}).encode(),
    ]
    assert not [vector.hex() for vector in vectors if vector.hex() not in page("protocol.md")]
    assert f"{MAX_BODY:,}" in page("protocol.md") and f"{MAX_TENSOR:,}" in page("protocol.md")


def test_every_route_of_a_node_is_documented() -> None:
    app = create_app(_nobody(), dict, bool, lambda _: None, _nobody())  # type: ignore[arg-type, return-value]
    table = section(page("protocol.md"), "## 10. HTTP")
    assert not [route.path for route in app.routes if f" {route.path}`" not in table]  # type: ignore[attr-defined]


def test_every_manifest_field_is_documented() -> None:
    rows = re.findall(r"^\| (`[^|]*`) \|", section(page("protocol.md"), "## 11. Models and content"), re.MULTILINE)
    documented = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(documented) == sorted({*Manifest.__slots__, "format"})


def test_every_field_of_a_verdict_is_documented() -> None:
    text = section(page("verification.md"), "## The verdict")
    assert not [member.name for member in fields(Verdict) if f"`{member.name}`" not in text]


# -- docs/operating.md


@pytest.mark.parametrize(
    ("settings", "prefix", "where", "name"),
    [
        *((NodeConfig, ENV_PREFIX, "operating.md", name) for name in NodeConfig.model_fields),
        *((RelayConfig, RELAY_PREFIX, "reachability.md", name) for name in RelayConfig.model_fields),
    ],
)
def test_every_setting_is_documented_with_default_and_environment_name(
    settings: type[NodeConfig] | type[RelayConfig], prefix: str, where: str, name: str
) -> None:
    field = settings.model_fields[name]
    default = str(field.get_default(call_default_factory=True, validated_data={}))
    shown = "required" if field.is_required() else "empty" if default in ("", "None") else default
    assert f"| `{name}` | {shown} | `{prefix}{name.upper()}` |" in page(where)


@pytest.mark.parametrize(
    ("program", "parser", "known"),
    [
        ("tallystick", tallystick.cli._parser, set()),
        ("tallystick-node", tallystick_node.cli._parser, {*NodeConfig.model_fields, *RelayConfig.model_fields}),
        ("tallystick-devnet", tallystick_devnet.cli._parser, set()),
    ],
)
def test_every_command_and_option_is_documented(
    program: str, parser: Callable[[], argparse.ArgumentParser], known: set[str]
) -> None:
    text = section(page("operating.md"), f"### {program}")
    documented = set(re.findall(r"--[a-z][a-z-]*", text))
    existing = set(_options(parser(), known))
    assert existing == documented
    for command in _commands(parser()):
        assert re.search(rf"^\| `{command}[ `]", text, re.MULTILINE), command


def test_every_environment_name_of_the_client_is_documented() -> None:
    text = section(page("operating.md"), "### tallystick")
    assert set(tallystick.cli.ENVIRONMENT) == set(re.findall(r"^\| `(TALLYSTICK_\w+)` \|", text, re.MULTILINE))


def test_every_metric_is_documented() -> None:
    names = [metric.name for metric in _metrics(_nobody()).collect()]  # type: ignore[arg-type]
    assert names and not [name for name in names if f"`{name}`" not in page("operating.md")]


def _subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    found: dict[str, argparse.ArgumentParser] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= action.choices
    return found


def _commands(parser: argparse.ArgumentParser) -> list[str]:
    return list(_subparsers(parser))


def _options(parser: argparse.ArgumentParser, known: set[str]) -> Iterator[str]:
    for one in (parser, *_subparsers(parser).values()):
        for action in one._actions:
            if action.dest not in {"help", *known} or (action.dest == "password_file" and one.prog.endswith("keys")):
                yield from (option for option in action.option_strings if option.startswith("--"))


class _Nobody:
    """What an app asks of the sessions before it serves any."""

    counters = SimpleNamespace(opened=0, refused=0, rows=0, reused=0)
    reserved_bytes = 0
    cache_usage = 0.0
    meter = Meter()
    load = meter.load(0, 0)
    draining = False

    def __len__(self) -> int:
        return 0


def _nobody() -> _Nobody:
    return _Nobody()


# -- docs/attacks.md


def _shown() -> list[tuple[str, str]]:
    """The tests that the page names: file and function."""
    return re.findall(r"`([\w/.]+\.(?:py|sol))::(\w+)`", page("attacks.md"))


@pytest.mark.parametrize(("file", "name"), sorted(set(_shown())), ids=lambda part: part.rsplit("/", 1)[-1])
def test_the_test_that_shows_an_attack_fail_exists(file: str, name: str) -> None:
    path = ROOT / file if file.endswith(".sol") else ROOT / "tests" / file
    pattern = rf"^ *function {name}\(" if file.endswith(".sol") else rf"^(?:async )?def {name}\("
    assert re.search(pattern, path.read_text(), re.MULTILINE)


def test_every_attack_has_a_test_or_a_line_of_what_is_not_covered() -> None:
    threats = page("threats.md")
    rows = [row for row in page("attacks.md").splitlines() if row.startswith("| ") and not row.startswith("| attack")]
    assert len(rows) > 50
    for row in rows:
        open_lines = [line for cell in re.findall(r"threats: (.+?) \|$", row) for line in re.findall(r'"(.+?)"', cell)]
        assert "::" in row or open_lines, row
        assert not [line for line in open_lines if line not in threats], row


# -- all pages


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_resolve(path: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text())
    assert not [t for t in targets if "://" not in t and not (path.parent / t).exists()]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_files_that_are_named_exist(path: Path) -> None:
    rooms = [ROOT / room for room in ("protocol", "model", "node", "client", "devnet", "tests", "models", "examples")]
    existing = {file.name for room in rooms for file in room.rglob("*.py")}
    assert not set(re.findall(r"\b\w+\.py\b", path.read_text())) - existing


def test_the_readme_fits_on_a_few_screens() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


# -- the README's commands


@dataclass(frozen=True, slots=True)
class Block:
    language: str
    text: str

    @property
    def lines(self) -> list[str]:
        return [line for line in self.text.splitlines() if line.strip()]


def blocks() -> list[Block]:
    """The fenced blocks of the README that can be run, in order."""
    found = re.findall(r"^```(sh|python)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    return [Block(language, text) for language, text in found]


class Terminal:
    """A folder to type in: the environment lasts from one line to the next, as in a person's shell."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._state = folder / "environment"
        self._state.write_text(f"export PATH='{_environment()['PATH']}'\n")
        for name in ("scripts", "models", "node_modules"):
            (folder / name).symlink_to(ROOT / name)

    def run(self, line: str) -> str:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", f". '{self._state}'\n{line}\nexport -p > '{self._state}'"],
            cwd=self.folder,
            env=_environment(),
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def start(self, line: str) -> Process:
        """A command that serves until it is stopped."""
        shell = f"cd '{self.folder}' && . '{self._state}' && exec {line}"
        return start(line.split()[0], ["bash", "-c", shell], self.folder / f"{line.split()[0]}.log")


def _environment() -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith("TALLYSTICK_")}
    return {**ours, "PATH": f"{Path(sys.executable).parent}:{ours['PATH']}", "OMP_WAIT_POLICY": "PASSIVE"}


def test_the_readmes_first_command_ends_with_a_cheater_that_was_caught_and_earned_nothing() -> None:
    assert blocks()[0].lines == ["scripts/demo"]
    done = subprocess.run(
        [ROOT / "scripts" / "demo", "--json"],
        env=_environment(), capture_output=True, text=True, timeout=DEMO_TIMEOUT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["matches_unsharded"] is True and result["escrow_conserved"] is True
    assert result["tokens"] > 0 and result["text"].strip() and len(result["hops"]) == 3
    assert result["checks"]["passed"] > 0 and result["seconds"] > 0
    cheater = result["cheater"]
    assert cheater["caught"] is True and cheater["paid_wei"] == 0 and cheater["accused"] == [cheater["node"]]
    assert all(hop["paid_wei"] > 0 and result["earned_wei"][hop["node"]] > 0 for hop in result["hops"])


def test_the_readmes_other_commands_work_on_a_devnet(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path)
    rest = [block for block in blocks() if block.lines not in (["scripts/demo"], ["scripts/test"])]
    assert rest.pop(0).lines == ["scripts/devnet"]
    devnet = terminal.start("tallystick-devnet up --folder .devnet --rpc-port 0")
    ran = 0
    try:
        devnet.wait_for("the network is up", DEVNET_TIMEOUT_S)
        for block in rest:
            for line in [block.text] if block.language == "python" else block.lines:
                if line.startswith("tallystick-node run"):
                    _serve_for_a_moment(terminal, line)
                elif block.language == "python":
                    assert "receipts checked" in terminal.run(f"python - <<'END'\n{line}\nEND")
                else:
                    terminal.run(line)
                ran += 1
    finally:
        devnet.stop()
    assert ran > 8, "the README has lost its commands"


def _serve_for_a_moment(terminal: Terminal, line: str) -> None:
    node = terminal.start(line)
    try:
        url = node.wait_for(SERVING, DEVNET_TIMEOUT_S)
        with urlopen(f"{url}/ready", timeout=10) as answer:
            assert json.load(answer) == {"ready": True}
    finally:
        node.stop()
