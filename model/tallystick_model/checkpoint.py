"""A Hugging Face checkpoint folder, read tensor by tensor: safetensors only, every name accounted for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from tallystick_model.anatomy import Anatomy
from tallystick_model.skeleton import Skeleton
from tallystick_protocol.errors import ManifestError

MAX_JSON_BYTES = 16 << 20
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.gguf", "*.h5", "*.msgpack")


class Checkpoint:
    """The tensors of a folder, by the names that its files use."""

    def __init__(self, folder: Path) -> None:
        """Raises ManifestError for a folder without config.json or without safetensors."""
        self.folder = folder
        self.config = self.read_json("config.json")
        if self.config is None:
            raise ManifestError(f"{folder} has no config.json: publish a Hugging Face checkpoint folder")
        self._file_of = self._index()

    def read_json(self, name: str) -> Any:
        """A JSON file of the folder; None when it is not there. Raises ManifestError when it is not JSON."""
        path = self.folder / name
        if not path.is_file():
            return None
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ManifestError(f"{name} has {path.stat().st_size} bytes; {MAX_JSON_BYTES} is the limit")
        try:
            return json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ManifestError(f"{name} is not JSON: {str(error)[:80]}") from None

    def names(self) -> frozenset[str]:
        return frozenset(self._file_of)

    def spec(self, name: str) -> tuple[str, tuple[int, ...]]:
        """dtype as safetensors writes it, and shape."""
        with self._open(self._file_of[name]) as file:
            found = file.get_slice(name)
            return found.get_dtype(), tuple(found.get_shape())

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor as it is stored. Raises ManifestError when it holds NaN or infinity."""
        with self._open(self._file_of[name]) as file:
            tensor: torch.Tensor = file.get_tensor(name)
        if not bool(torch.isfinite(tensor).all()):
            raise ManifestError(f"{name} holds NaN or infinity: the checkpoint is damaged or overflowed in training")
        return tensor

    def _index(self) -> dict[str, Path]:
        index = self.read_json("model.safetensors.index.json")
        files = set(index["weight_map"].values()) if index else {"model.safetensors"}
        for name in files:
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise ManifestError(f"the index names a file {str(name)[:60]!r}")
            if not (self.folder / name).is_file():
                self._refuse_pickles()
                raise ManifestError(f"{self.folder} lacks {name}: download the whole checkpoint")
        found: dict[str, Path] = {}
        for name in sorted(files):
            with self._open(self.folder / name) as file:
                for tensor in file.keys():  # noqa: SIM118 - not a dict
                    if tensor in found:
                        raise ManifestError(f"{tensor} is in {name} and in {found[tensor].name}")
                    found[tensor] = self.folder / name
        return found

    def _refuse_pickles(self) -> None:
        others = sorted(path.name for pattern in _PICKLES for path in self.folder.glob(pattern))
        if others:
            raise ManifestError(
                f"{self.folder} holds weights only as {', '.join(others[:3])}, which can run code when they are read; "
                "convert them to safetensors: model.save_pretrained(folder, safe_serialization=True)"
            )

    def _open(self, path: Path) -> Any:
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ManifestError(f"{path.name} is not a safetensors file: {str(error)[:120]}") from None


def match_names(checkpoint: Checkpoint, skeleton: Skeleton, anatomy: Anatomy) -> dict[str, str]:
    """{weight of the model: tensor of the checkpoint} for every weight that is stored.

    Raises ManifestError naming what is missing, doubled, unknown or of another shape, and a tied weight stored twice
    with two values.
    """
    weights = skeleton.weights()
    prefix = skeleton.model.base_model_prefix
    found: dict[str, str] = {}
    for stored in sorted(checkpoint.names()):
        name = next((spelling for spelling in _spellings(stored, prefix) if spelling in weights), None)
        if name is None:
            _expect_droppable(stored, skeleton, prefix)
        elif name in found:
            raise ManifestError(f"the checkpoint holds {name} twice, as {found[name]} and {stored}")
        else:
            found[name] = stored
    for late, early in (anatomy.tied | anatomy.aliases).items():
        _settle_tie(checkpoint, found, late, early)
    needed = {name for name in anatomy.roles if name not in anatomy.tied and name not in anatomy.aliases}
    missing = sorted(needed - found.keys())
    if missing:
        raise ManifestError(f"the checkpoint lacks {', '.join(missing[:3])} ({len(missing)} in all)")
    matched = {name: found[name] for name in sorted(needed)}
    for name, stored in matched.items():
        dtype, shape = checkpoint.spec(stored)
        if shape != tuple(weights[name].shape):
            raise ManifestError(f"{stored} has shape {shape}; its config makes it {tuple(weights[name].shape)}")
        if dtype not in ("F32", "F16", "BF16"):
            raise ManifestError(f"{stored} is {dtype}; F32, F16 and BF16 are served")
    return matched


def _spellings(stored: str, prefix: str) -> Iterable[str]:
    """A tensor's name with and without the base model's prefix, and in the spelling of older checkpoints."""
    modern = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", stored))
    for name in dict.fromkeys((stored, modern)):
        yield name
        yield f"{prefix}.{name}"
        yield name.removeprefix(f"{prefix}.")


def _expect_droppable(stored: str, skeleton: Skeleton, prefix: str) -> None:
    """Tables that the model computes itself may be left out; anything else is refused."""
    buffers = {name for name, _ in skeleton.model.named_buffers()}
    patterns = skeleton.model._keys_to_ignore_on_load_unexpected or ()
    if any(name in buffers for name in _spellings(stored, prefix)) or any(re.search(p, stored) for p in patterns):
        return
    if stored.endswith(("rotary_emb.inv_freq", "embeddings.position_ids")):
        return
    raise ManifestError(
        f"the checkpoint holds {stored}, which {type(skeleton.model).__name__} does not have: "
        "is `architectures` in config.json right?"
    )


def _settle_tie(checkpoint: Checkpoint, found: dict[str, str], late: str, early: str) -> None:
    if early not in found and late in found:
        found[early] = found.pop(late)
    elif late in found and early in found:
        one, other = checkpoint.tensor(found[late]), checkpoint.tensor(found[early])
        if one.dtype != other.dtype or not torch.equal(one, other):
            raise ManifestError(f"{late} and {early} are tied by the config but stored with two values")
        del found[late]
