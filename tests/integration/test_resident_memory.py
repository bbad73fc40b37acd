"""What a loaded span takes of memory, measured in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness import checkpoints
from harness.checkpoints import Published, published
from tallystick_model.memory import largest_piece_bytes, span_bytes
from tallystick_protocol.types import Span

LOAD = """
import json, sys
from pathlib import Path
import torch
import tallystick_model.loader as loader
from tallystick_model.canonical.native.products import products
from tallystick_protocol.manifest import Manifest
from tallystick_protocol.types import Span

def kilobytes(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name + ":"))

folder, start, end = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
manifest = Manifest.from_bytes((folder / "manifest").read_bytes())
products(torch.float32)  # maps LLVM, whose pages are the library's file
before = kilobytes("VmRSS")
span = loader.load_span(manifest, Span(start, end), lambda piece: folder / "pieces" / str(piece.cid))
print(json.dumps({"loaded": kilobytes("VmRSS") - before, "peak": kilobytes("VmHWM") - before}))
"""
LIBRARIES = 40 << 20
"""Parts of the libraries that are first touched while loading."""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Published]:
    root = tmp_path_factory.mktemp("large")
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 8}
    served = published(checkpoints.llama(root / "checkpoint", **sizes, vocab_size=16000, num_hidden_layers=6), root)
    for piece in served.manifest.pieces:
        served.open_piece(piece)
    (root / "manifest").write_bytes(served.manifest.to_bytes())
    return root, served


@pytest.mark.nightly
@pytest.mark.parametrize("span", [Span(0, 2), Span(2, 5), Span(4, 6)], ids=str)
def test_a_span_takes_its_weights_once_and_one_piece_more_while_loading(
    large: tuple[Path, Published], span: Span
) -> None:
    folder, served = large
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder), str(span.start), str(span.end)],
        capture_output=True, text=True, check=True, timeout=200, env=os.environ,
    )  # fmt: skip
    took = {name: kilobytes * 1024 for name, kilobytes in json.loads(done.stdout).items()}
    weights, piece = span_bytes(served.manifest, span), largest_piece_bytes(served.manifest, span)
    assert weights <= took["loaded"] <= weights + LIBRARIES
    file = max(piece.bytes for piece in served.manifest.span_pieces(span))  # mapped while it is read
    assert took["peak"] <= weights + piece + file + LIBRARIES
