"""A node of one numeric class, as far as its numbers go: a process that computes spans of one model over given rows.

The first line on standard input is a JSON object {manifest, pieces, execution, device}: the manifest's file, the folder
in which pieces lie under their CIDs, "canonical" or "stock", a torch device. Each further line is one order, answered
by one line {"ok": true} or {"error": text}. Arrays are .npy files.

    {"do": "pass", "span": [a, b], "cheat": name or null, "rows": file, "out": file, "scales": file, "top_k": k}
        rows: ids (texts, positions) int64, or hidden (texts, positions, width) float32, each text one session
        out: hidden (texts, positions, width) float32; logits' k largest (texts, positions, k, 2) uint32, as they travel
        scales: of results (texts, positions) float64
    {"do": "enter", "rows": file, "out": file}   the embedding's output for ids, (texts, positions, width) float32
    {"do": "generate", "texts": n, "positions": p, "seed": s, "out": file}   ids that the model itself draws
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tallystick_model.calibrating.cheaters import CHEATERS
from tallystick_model.devices import Placement
from tallystick_model.loader import checked_anatomy, fill_span
from tallystick_model.ranking import as_pairs, top_k
from tallystick_model.segments import Segment
from tallystick_model.skeleton import build_skeleton
from tallystick_model.span import Execution, SpanModel
from tallystick_protocol.errors import TallystickError
from tallystick_protocol.manifest import Manifest, Piece
from tallystick_protocol.sketching.logits import scales_of
from tallystick_protocol.types import Span


class Worker:
    """Loads spans as they are asked for, one at a time."""

    def __init__(self, manifest: Manifest, pieces: Path, execution: Execution, device: str) -> None:
        self._manifest, self._pieces, self._execution = manifest, pieces, execution
        self._device = torch.device(device)
        _, self._anatomy = checked_anatomy(manifest)

    def load(self, span: Span, cheat: str | None = None) -> SpanModel:
        """A span, as it should be or altered."""
        manifest = self._manifest
        skeleton = build_skeleton(manifest.config, manifest.architecture, manifest.labels)
        where = Placement.on(self._device, span)
        model = fill_span(manifest, span, self._piece, skeleton, self._anatomy, self._execution, where)
        if cheat is not None:
            CHEATERS[cheat](model)
        return model

    def _piece(self, piece: Piece) -> Path:
        return self._pieces / str(piece.cid)

    def do(self, order: dict[str, Any]) -> None:
        """Carry out one order."""
        if order["do"] == "generate":
            np.save(order["out"], self._generate(order["texts"], order["positions"], order["seed"]))
            return
        rows = np.load(order["rows"], allow_pickle=False)
        if order["do"] == "enter":
            first = self.load(Span(0, 1))
            np.save(order["out"], np.stack([first.entering(torch.from_numpy(text)).numpy(force=True) for text in rows]))
            return
        model = self.load(Span(*order["span"]), order["cheat"])
        left = [model.forward([self._segment(model, text)])[0] for text in rows]
        if self._manifest.output_of(model.span) == "hidden":
            np.save(order["out"], np.stack([one.numpy(force=True) for one in left]))
            return
        ranked, values = self._manifest.output == "logits", [one.numpy(force=True) for one in left]
        np.save(order["out"], np.stack([as_pairs(*top_k(one, order["top_k"])) for one in left] if ranked else values))
        np.save(order["scales"], np.stack([scales_of(one, ranked) for one in values]))

    def _segment(self, model: SpanModel, text: Any) -> Segment:
        return Segment(model.new_cache(len(text)), 0, torch.from_numpy(text))

    def _generate(self, texts: int, positions: int, seed: int) -> Any:
        """(texts, positions) int64: each begins with a random id and goes on at temperature 1."""
        manifest, draw = self._manifest, torch.Generator().manual_seed(seed)
        ids = torch.randint(manifest.vocab, (texts, positions), generator=draw)
        if not manifest.causal or manifest.output != "logits":
            return ids.numpy()
        model = self.load(manifest.whole)
        caches = [model.new_cache(positions) for _ in range(texts)]
        for at in range(positions - 1):
            rows = model.forward([Segment(cache, at, ids[row, at : at + 1]) for row, cache in enumerate(caches)])
            chances = torch.softmax(torch.cat(rows).cpu().double(), dim=-1)
            ids[:, at + 1] = torch.multinomial(chances, 1, generator=draw)[:, 0]
        return ids.numpy()


def main() -> None:
    asked = json.loads(sys.stdin.readline())
    torch.set_num_threads(1)
    try:
        manifest = Manifest.from_bytes(Path(asked["manifest"]).read_bytes())
        worker = Worker(manifest, Path(asked["pieces"]), asked["execution"], asked["device"])
    except (TallystickError, RuntimeError) as error:
        _say({"error": str(error)[:300]})
        return
    _say({"ok": True})
    for line in sys.stdin:
        try:
            worker.do(json.loads(line))
        except (TallystickError, RuntimeError) as error:
            _say({"error": str(error)[:300]})
        else:
            _say({"ok": True})


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
