"""Classes that a machine measured before: what they are found by, and when they are measured anew."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import checkpoints
from harness.checkpoints import Published, published
from tallystick_model import fingerprint, kept_classes
from tallystick_model.devices import CPU
from tallystick_model.fingerprint import class_key
from tallystick_model.kept_classes import KeptClasses
from tallystick_model.numeric_class import STOCK, numeric_class
from tallystick_node.moving import Relocation, watch_class
from tallystick_protocol.manifest import Manifest
from tallystick_protocol.types import Digest, Span


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Published:
    root = tmp_path_factory.mktemp("kept")
    torch.set_num_threads(1)
    return published(checkpoints.llama(root / "checkpoint", num_hidden_layers=2), root)


class Counted:
    """A class test that counts its runs, and gives what it is told."""

    def __init__(self, value: bytes = b"\1" * 32) -> None:
        self.runs = 0
        self.value = Digest(value)

    def __call__(self, manifest: Manifest, devices: Sequence[torch.device]) -> Digest:
        self.runs += 1
        return self.value


def test_the_real_class_is_kept_and_found_by_the_next_start(served: Published, tmp_path: Path) -> None:
    first = KeptClasses(tmp_path, {}).find(served.manifest)
    assert first.age_s == 0.0 and first.numeric_class == numeric_class(served.manifest)
    never = Counted()
    again = KeptClasses(tmp_path, {}, never).find(replace(served.manifest, name="another"))
    assert again.numeric_class == first.numeric_class and 0 < again.age_s < 3600 and never.runs == 0


def test_whatever_can_change_bits_is_in_the_key(served: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = served.manifest
    keys = [class_key(manifest, (CPU,), {})]

    def differs(*arguments: Any) -> None:
        keys.append(class_key(*arguments))

    differs(replace(manifest, numerics="bf16w"), (CPU,), {})
    differs(replace(manifest, max_length=64), (CPU,), {})
    differs(replace(manifest, config={**manifest.config, "rms_norm_eps": 1e-4}), (CPU,), {})
    differs(manifest, (torch.device("meta"),), {})
    differs(manifest, (CPU,), {"ONEDNN_MAX_CPU_ISA": "AVX2"})
    torch.set_num_threads(2)
    differs(manifest, (CPU,), {})
    torch.set_num_threads(1)
    for name in ("_machine", "_libraries", "_own_code"):
        with monkeypatch.context() as patch:
            patch.setattr(fingerprint, name, lambda: {"another": "one"})
            differs(manifest, (CPU,), {})
    assert len(set(keys)) == len(keys)
    assert class_key(replace(manifest, name="x", licence="y", pieces=()), (CPU,), {}) == keys[0]
    assert fingerprint.numeric_variables({"HOME": "/", "MKL_CBWR": "AVX2"}) == {"MKL_CBWR": "AVX2"}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"class": "00"}', b"null", b"\xff" * 5000])
def test_a_file_that_is_no_kept_class_is_measured_anew(served: Published, tmp_path: Path, content: bytes) -> None:
    test = Counted()
    (tmp_path / class_key(served.manifest, (CPU,), {})).write_bytes(content)
    kept = KeptClasses(tmp_path, {}, test)
    assert kept.find(served.manifest).numeric_class == test.value and test.runs == 1
    assert kept.find(served.manifest).numeric_class == test.value and test.runs == 1


def test_one_changed_digit_or_another_keys_file_counts_for_nothing(served: Published, tmp_path: Path) -> None:
    test = Counted()
    kept = KeptClasses(tmp_path, {}, test)
    kept.find(served.manifest)
    path = tmp_path / class_key(served.manifest, (CPU,), {})
    other = replace(served.manifest, max_length=64)
    path.with_name(class_key(other, (CPU,), {})).write_bytes(path.read_bytes())
    kept.find(other)
    assert test.runs == 2
    path.write_bytes(path.read_bytes().replace(b"0101", b"0102", 1))
    kept.find(served.manifest)
    assert test.runs == 3


def test_a_class_from_before_the_last_boot_is_due_at_once_and_stock_is_never_kept(
    served: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    test = Counted()
    kept = KeptClasses(tmp_path, {}, test)
    kept.find(served.manifest)
    with monkeypatch.context() as patch:
        patch.setattr(kept_classes, "_boot", lambda: "another boot")
        assert kept.find(served.manifest).age_s == float("inf") and test.runs == 1
    test.value = STOCK
    assert kept.measure(served.manifest) == STOCK
    assert kept.find(served.manifest).numeric_class == STOCK and test.runs == 3


def test_of_many_that_start_at_once_one_measures(served: Published, tmp_path: Path) -> None:
    test = Counted()
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(KeptClasses(tmp_path, {}, test).find(served.manifest)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert test.runs == 1 and {one.numeric_class for one in found} == {test.value}


def test_a_folder_that_cannot_be_written_only_costs_the_time(served: Published, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    test = Counted()
    assert KeptClasses(tmp_path / "file", {}, test).find(served.manifest).numeric_class == test.value


async def test_an_old_class_is_checked_as_soon_as_the_node_is_idle(tmp_path: Path) -> None:
    class Idle:
        draining = False

        def __len__(self) -> int:
            return 0

    class Here:
        async def run(self, work: Any) -> Any:
            return work()

    other = Digest(b"\2" * 32)
    engine: Any = Here()
    with pytest.raises(Relocation):
        sessions: Any = Idle()
        async with asyncio.timeout(30):
            await watch_class(engine, sessions, lambda: other, Digest(b"\1" * 32), Span(0, 1), 3600.0, float("inf"))
