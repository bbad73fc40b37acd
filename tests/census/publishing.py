"""The way of a real checkpoint: saved by transformers, published into pieces, and served in spans from these."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from census.configs import Entry
from harness.checkpoints import Published, add_companions, published
from tallystick_model.canonical.kernels import flushing_denormals
from tallystick_model.loader import load_span
from tallystick_model.publishing.rehearsal import TOLERANCE
from tallystick_model.segments import Segment
from tallystick_model.skeleton import arguments_of
from tallystick_protocol.types import Span


def publishing_error(model: Any, entry: Entry) -> float:
    """How far spans of the published model are from it as transformers loads it, by its output's standard deviation.

    Raises what `publish` and `load_span` raise.
    """
    with tempfile.TemporaryDirectory(prefix="census-") as scratch:
        folder = Path(scratch) / "checkpoint"
        model.save_pretrained(folder)
        add_companions(folder)
        settings = json.loads((folder / "config.json").read_text())
        settings["architectures"] = [entry.architecture]
        (folder / "config.json").write_text(json.dumps(settings))
        served = published(folder, Path(scratch))
        ids = torch.arange(20, 32)
        with torch.inference_mode(), flushing_denormals():
            found = _through(served, ids)
            loaded = type(model).from_pretrained(folder, dtype=torch.float32).eval()  # computed tables are not saved
            expected = _whole(loaded, served, ids)
    return float((found - expected).abs().max()) / (float(expected.std()) or 1.0)


def agrees(error: float) -> bool:
    return error <= TOLERANCE


def _through(served: Published, ids: torch.Tensor) -> torch.Tensor:
    """Rows through two spans of every stack."""
    manifest, memory, rows = served.manifest, None, ids
    cut = manifest.encoder_layers
    for stack in [Span(0, cut), Span(cut, manifest.layers)] if cut else [Span(0, manifest.layers)]:
        rows = ids
        middle = max(stack.start + 1, (stack.start + stack.end) // 2)
        for span in [Span(stack.start, middle), *([Span(middle, stack.end)] if middle < stack.end else [])]:
            model = load_span(manifest, span, served.open_piece, execution="stock")
            cache = model.new_cache(len(ids), memory)
            rows = model.forward([Segment(cache, 0, rows)])[0]
        memory = rows
    return rows


def _whole(model: Any, served: Published, ids: torch.Tensor) -> torch.Tensor:
    first = "decoder_" if served.manifest.encoder_layers else ""
    inputs: dict[str, Any] = {"input_ids": ids[None], f"{first}input_ids": ids[None], "use_cache": False}
    known = arguments_of(model)
    output = model(**{name: value for name, value in inputs.items() if name in known})
    logits = getattr(output, "logits", None)
    rows: torch.Tensor = output.last_hidden_state if logits is None else logits
    return rows[0].float()
