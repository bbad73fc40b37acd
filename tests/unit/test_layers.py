"""Who may import whom, what the SDK exports, and that nothing on the serving path can run code out of data."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import tallystick

ROOT = Path(__file__).parents[2]
PROTOCOL = ROOT / "protocol" / "tallystick_protocol"
SERVING = [
    path
    for folder in (PROTOCOL, ROOT / "node" / "tallystick_node", ROOT / "client" / "tallystick", ROOT / "model")
    for path in sorted(folder.rglob("*.py"))
]
HEAVY = ("torch", "transformers", "safetensors", "fastapi", "starlette", "uvicorn", "pydantic_settings")
RUNS_CODE = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle"}


def protocol_modules() -> list[str]:
    names = [".".join(path.relative_to(PROTOCOL.parent).with_suffix("").parts) for path in PROTOCOL.rglob("*.py")]
    return sorted(name.removesuffix(".__init__") for name in names)


@cache
def loaded_after(*imports: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after these imports."""
    code = f"import sys\nfor name in {imports!r}:\n    __import__(name)\nprint(*sys.modules, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "imports",
    [["tallystick", "tallystick.cli"], protocol_modules()],
    ids=["the client and its command line", "the protocol"],
)
def test_neither_torch_nor_a_web_framework_is_loaded(imports: list[str]) -> None:
    loaded = loaded_after(*imports)
    assert set(imports) <= loaded
    assert not {name for name in loaded if name.split(".")[0] in HEAVY}
    assert not {name for name in loaded if name.split(".")[0] in ("tallystick_node", "tallystick_model")}


def test_a_served_model_without_torch_is_refused_with_the_command_that_helps() -> None:
    code = "import sys; sys.modules['torch'] = None; import tallystick; tallystick.AutoModelForCausalLM"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    told = "ImportError: AutoModelForCausalLM takes torch: pip install 'tallystick[torch]'"
    assert done.stderr.splitlines()[-1] == told


def test_the_protocol_knows_nothing_above_it() -> None:
    ours = {name.split(".")[0] for name in loaded_after(*protocol_modules()) if name.startswith("tallystick")}
    assert ours == {"tallystick_protocol"}


def test_the_sdk_exports_exactly_this() -> None:
    assert sorted(tallystick.__all__) == [
        "Answer",
        "AsyncClient",
        "Client",
        "Embedding",
        "Retracted",
        "Sampling",
        "Settings",
        "Stream",
        "Token",
        "Verdict",
    ]
    assert tallystick.__all__ == sorted(tallystick.__all__)
    for name in tallystick.__all__:
        assert getattr(tallystick, name).__doc__, f"{name} has no docstring"


def test_only_the_sdk_exports_names() -> None:
    exporting = [path for path in SERVING if "__all__" in path.read_text() and path.name == "__init__.py"]
    assert exporting == [ROOT / "client" / "tallystick" / "__init__.py"]


def imported(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def called(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", SERVING, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled_and_no_code_runs_out_of_data(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert not {name for name in imported(tree) if name.split(".")[0] in RUNS_CODE}
    assert "torch.load" not in imported(tree)
    for name, call in called(tree):
        assert name not in ("torch.load", "torch.jit.load", "eval", "exec", "compile", "os.system", "yaml.load"), name
        flags = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert flags.get("allow_pickle", "False") == "False"
        assert flags.get("trust_remote_code", "False") == "False"
        assert flags.get("shell", "False") == "False"


def test_the_walk_finds_what_it_looks_for() -> None:
    assert len(SERVING) > 50
    tree = ast.parse("import pickle\nfrom torch import load\ntorch.load('x')\nnumpy.load('x', allow_pickle=True)")
    assert {"pickle", "torch.load"} <= imported(tree)
    assert [name for name, _ in called(tree)] == ["torch.load", "numpy.load"]


FORESEEABLE = {"network.py", "directory.py"}
"""They shuffle whom they ask first, which nobody gains by knowing."""


@pytest.mark.parametrize("path", [path for path in SERVING if path.is_relative_to(ROOT / "client")],
                         ids=lambda path: str(path.relative_to(ROOT)))  # fmt: skip
def test_no_coin_challenge_nonce_or_draw_of_a_client_can_be_foreseen(path: Path) -> None:
    """A generator whose outputs are seen can be wound forward; a client's audits and challenges must not be."""
    names = imported(ast.parse(path.read_text()))
    assert path.name in FORESEEABLE or not {name for name in names if name.split(".")[0] == "random"}
    assert not {name for name in names if name.startswith("numpy.random")}


def test_the_walk_over_coins_sees_who_draws_them() -> None:
    drawing = {path.name for path in SERVING if "secrets" in imported(ast.parse(path.read_text()))}
    assert {"coins.py", "openings.py", "sketching.py", "remote.py", "route.py", "ledger.py"} <= drawing
