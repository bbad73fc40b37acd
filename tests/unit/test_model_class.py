"""The class id: the same on every run and thread count, another on another instruction set, `stock` when unsure."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from harness import checkpoints
from harness.checkpoints import Published, published
from tallystick_model.canonical import kernels, products
from tallystick_model.numeric_class import STOCK, numeric_class

_SCRIPT = """
import sys, torch
from tallystick_model.numeric_class import numeric_class
from tallystick_protocol.manifest import Manifest
manifest = Manifest.from_bytes(open(sys.argv[1], "rb").read())
for threads in (1, 2):
    torch.set_num_threads(threads)
    print(numeric_class(manifest).hex())
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Published:
    root = tmp_path_factory.mktemp("class")
    torch.set_num_threads(1)
    return published(checkpoints.llama(root / "checkpoint"), root)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


def test_the_class_is_the_same_again(served: Published) -> None:
    found = numeric_class(served.manifest)
    assert found != STOCK
    assert len(found) == 32
    assert numeric_class(replace(served.manifest, name="another", licence="another")) == found


def test_other_processes_and_threads_share_the_class_and_another_instruction_set_may_not(
    served: Published, tmp_path: Path
) -> None:
    path = tmp_path / "manifest"
    path.write_bytes(served.manifest.to_bytes())

    def classes(**environment: str) -> set[str]:
        given = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", **environment}
        command = [sys.executable, "-c", _SCRIPT, str(path)]
        done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=240, check=True)
        return set(done.stdout.split())

    here = numeric_class(served.manifest).hex()
    assert classes() == {here}
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        other = classes(TALLYSTICK_KERNELS="libraries", ATEN_CPU_CAPABILITY="avx2", ONEDNN_MAX_CPU_ISA="AVX2")
        assert len(other) == 1
        assert not other & {here, STOCK.hex()}


def test_a_machine_whose_chunkings_disagree_is_stock(served: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    def by_rows(self: kernels.CanonicalLinear, rows: torch.Tensor) -> torch.Tensor:
        out = self._plain(rows)  # type: ignore[attr-defined]
        return out * (1 + 1e-6) if len(rows) > 64 else out

    monkeypatch.setattr(kernels.CanonicalLinear, "_plain", kernels.CanonicalLinear._product, raising=False)
    monkeypatch.setattr(kernels.CanonicalLinear, "_product", by_rows)
    assert numeric_class(served.manifest) == STOCK


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_fewest_rows_of_a_call_leave_the_class_alone(
    served: Published, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    found = products.packing("fp32")
    if found is None or (count < 4 and not products.bits_hold(count, found)):
        pytest.skip("not with this machine's kernels")
    before = numeric_class(served.manifest)
    monkeypatch.setattr(kernels, "fewest_rows", lambda packing: count)
    assert numeric_class(served.manifest) == before


def test_another_activation_kernel_is_another_class(served: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    before = numeric_class(served.manifest)
    monkeypatch.setattr(F, "silu", lambda x, inplace=False: x * (1 / (1 + torch.exp(-x))))
    assert numeric_class(served.manifest) != before


def test_a_bidirectional_model_has_a_class_too(tmp_path: Path) -> None:
    manifest = published(checkpoints.bert(tmp_path / "checkpoint", num_hidden_layers=2), tmp_path).manifest
    assert numeric_class(manifest) not in (STOCK, b"")
