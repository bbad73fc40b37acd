"""What an interrupted publication leaves behind, so that the next run of the same one goes on from there.

    work/<job>/pieces.jsonl       a line for each piece that is in the store, written after it was
    work/<job>/walk.json          the canary's walk: blocks and norms so far, and which file holds its rows
    work/<job>/rows.<n>.safetensors
    work/<job>/lock               held while somebody works on it

The job's name is a digest of all that decides the result: class, config, numerics, quantisation, and name, size and
time of change of the checkpoint's files. A line that was cut short by a kill is ignored. The folder goes when the work
is done, which for the command line is when the model is registered.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tallystick_protocol.content.cid import Cid
from tallystick_protocol.content.files import locked, replacing
from tallystick_protocol.content.store import Store
from tallystick_protocol.errors import BadCid, ConfigError, ContentError, ManifestError
from tallystick_protocol.manifest import Piece, PieceKind, TensorSpec

FORMAT = 2
"""Counts up when pieces are written differently."""


class Job:
    """The notes of one publication."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lines = folder / "pieces.jsonl"

    @property
    def is_begun(self) -> bool:
        return self._lines.exists()

    def pieces(self, store: Store) -> dict[str, Piece]:
        """Pieces that are written and still in the store."""
        found = {}
        with suppress(FileNotFoundError):
            for line in self._lines.read_text().splitlines():
                with suppress(ValueError, KeyError, TypeError, BadCid):
                    piece = _piece_of(json.loads(line))
                    if store.has(piece.cid):
                        found[piece.name] = piece
        return found

    def note(self, piece: Piece) -> None:
        """Remember a piece that is in the store; on disk when this returns."""
        with self._lines.open("ab") as file:
            file.write(b"\n" + json.dumps(_piece_as(piece)).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def walk(self, store: Store) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
        """The canary's walk as it was noted last; None without one, or when the store has lost a block of it."""
        try:
            state = json.loads((self.folder / "walk.json").read_text())
            if not all(store.has(Cid.parse(block)) for block in filter(None, (*state["blocks"], state["output"]))):
                return None
            return state, load_file(self.folder / str(state["rows"]))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError, BadCid):
            return None

    def note_walk(self, state: dict[str, Any], rows: dict[str, torch.Tensor]) -> None:
        """Remember where the walk is. The rows go into a new file before the state names it."""
        name = f"rows.{state['layer']}.safetensors"
        save_file({key: tensor.clone() for key, tensor in rows.items()}, self.folder / name)
        with replacing(self.folder / "walk.json") as file:
            file.write(json.dumps({**state, "rows": name}).encode())
        for path in self.folder.glob("rows.*.safetensors"):
            if path.name != name:
                path.unlink()


@contextmanager
def open_job(work: Path, identity: dict[str, Any]) -> Iterator[Job]:
    """The job with that identity, for nobody else meanwhile.

    Its folder goes when the block ends well and when the checkpoint is refused; else it stays for the next run, if
    anything is noted there. Raises ConfigError while another process publishes the same.
    """
    text = json.dumps({"format": FORMAT, **identity}, sort_keys=True)
    folder = work / hashlib.sha256(text.encode()).hexdigest()[:32]
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder / "lock", shared=False, timeout_s=1.0))
        except ContentError:
            raise ConfigError(f"another process publishes this checkpoint ({folder}): wait for it") from None
        job = Job(folder)
        keep = False
        try:
            yield job
        except ManifestError:
            raise
        except BaseException:
            keep = job.is_begun
            raise
        finally:
            if not keep:
                shutil.rmtree(folder, ignore_errors=True)


def _piece_as(piece: Piece) -> dict[str, Any]:
    tensors = {name: [spec.dtype, list(spec.shape)] for name, spec in piece.tensors.items()}
    return {"kind": piece.kind, "index": piece.index, "cid": str(piece.cid), "bytes": piece.bytes, "tensors": tensors}


def _piece_of(value: dict[str, Any]) -> Piece:
    kinds: dict[str, PieceKind] = {"embed": "embed", "layer": "layer", "shared": "shared", "head": "head"}
    tensors = {str(name): TensorSpec(dtype, tuple(shape)) for name, (dtype, shape) in value["tensors"].items()}
    return Piece(kinds[value["kind"]], int(value["index"]), Cid.parse(value["cid"]), int(value["bytes"]), tensors)
