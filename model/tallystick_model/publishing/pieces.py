"""Writes a piece: a safetensors file that is made while it is read, so that neither memory nor disk holds it twice.

The layout is safetensors' own (https://huggingface.co/docs/safetensors): eight bytes of header length, a JSON header
padded with spaces to a multiple of eight, then the tensors without gaps, wider types first and names in order. The same
tensors give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from tallystick_model.publishing.checkpoint import TORCH_DTYPES
from tallystick_model.publishing.matching import Weights
from tallystick_model.publishing.quantize import SCALE, scales_of, stored_specs, values_of
from tallystick_protocol.manifest import Quantization, TensorSpec
from tallystick_protocol.manifest_checks import DTYPES


@dataclass(frozen=True, slots=True)
class Encoding:
    """How weights are stored. rounded: the ones in bf16 whatever the checkpoint has; integers: the quantised ones."""

    rounded: frozenset[str]
    integers: frozenset[str]
    quantization: Quantization | None

    def specs(self, weights: Weights, name: str) -> dict[str, TensorSpec]:
        """The tensors that stand for a weight in its piece."""
        dtype, shape = weights.spec(name)
        if self.quantization is not None and name in self.integers:
            return stored_specs(name, shape, self.quantization)
        return {name: TensorSpec("BF16" if name in self.rounded else dtype, shape)}

    def chunks(self, weights: Weights, stored: str, spec: TensorSpec) -> Iterator[torch.Tensor]:
        """One of those tensors, in runs of whole rows."""
        owner = stored.removesuffix(SCALE)
        if self.quantization is None or owner not in self.integers:
            for chunk in weights.chunks(stored):
                yield chunk.to(TORCH_DTYPES[spec.dtype])
        else:
            make = scales_of if stored != owner else values_of
            for chunk in weights.chunks(owner):
                yield make(chunk, self.quantization)


class PieceReader:
    """The bytes of a piece's file, for `Store.put_file`; memory holds one run of rows."""

    def __init__(
        self, piece: str, weights: Weights, names: tuple[str, ...], encoding: Encoding, said: Callable[[int], None]
    ) -> None:
        """names: the weights in the piece. said: called with the number of bytes whenever some are read."""
        self.piece = piece
        tensors = {part: spec for name in names for part, spec in encoding.specs(weights, name).items()}
        order = sorted(tensors, key=lambda name: (-DTYPES[tensors[name].dtype], name))
        self.tensors = {name: tensors[name] for name in sorted(tensors)}
        self._header = _header({name: tensors[name] for name in order})
        self._bytes = self._stream(weights, encoding, {name: tensors[name] for name in order})
        self._said = said
        self._rest = memoryview(b"")
        self.size = len(self._header) + sum(spec.bytes for spec in tensors.values())

    def read(self, size: int, /) -> bytes:
        """The next bytes, at most `size`; none at the end. Raises ManifestError for a damaged tensor."""
        while not self._rest:
            following = next(self._bytes, None)
            if following is None:
                return b""
            self._rest = following
        given, self._rest = bytes(self._rest[:size]), self._rest[size:]
        self._said(len(given))
        return given

    def _stream(self, weights: Weights, encoding: Encoding, order: dict[str, TensorSpec]) -> Iterator[memoryview]:
        yield memoryview(self._header)
        for name, spec in order.items():
            for chunk in encoding.chunks(weights, name, spec):
                if chunk.numel():
                    flat = chunk.contiguous().view(-1)
                    yield memoryview(flat.view(torch.uint8).numpy())


def _header(tensors: dict[str, TensorSpec]) -> bytes:
    entries, offset = {}, 0
    for name, spec in tensors.items():
        entries[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, offset + spec.bytes]}
        offset += spec.bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
