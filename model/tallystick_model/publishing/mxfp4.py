"""A folder whose experts are stored in MXFP4, as GPT-OSS is released: they are dequantised by transformers' own code.

An expert tensor `x` of shape (experts, in, out) is stored as `x_blocks`, U8 (experts, out, in / 32, 16): two values of
four bits in a byte; and `x_scales`, U8 (experts, out, in / 32): the exponent of a power of two, plus 127, of 32 values.
All products are exact in bf16. https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tallystick_model.publishing.checkpoint import Checkpoint
from tallystick_protocol.errors import ManifestError

_BLOCKS, _SCALES = "_blocks", "_scales"


class Mxfp4Checkpoint(Checkpoint):
    """The tensors of such a folder, experts in bf16."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.config = {key: value for key, value in self.config.items() if key != "quantization_config"}
        stored = super().names()
        self._packed = {name.removesuffix(_BLOCKS) for name in stored if name.endswith(_BLOCKS)}
        self._parts = frozenset(name + part for name in self._packed for part in (_BLOCKS, _SCALES))
        for name in self._packed:
            if name + _SCALES not in stored or not self._fits(name):
                raise ManifestError(f"{name}{_BLOCKS} and {name}{_SCALES} are not MXFP4: download the model again")

    def names(self) -> frozenset[str]:
        return super().names() - self._parts | self._packed

    def spec(self, name: str) -> tuple[str, tuple[int, ...]]:
        if name not in self._packed:
            return super().spec(name)
        experts, out, groups, half = super().spec(name + _BLOCKS)[1]
        return "BF16", (experts, groups * half * 2, out)

    def chunks(self, name: str) -> Iterator[torch.Tensor]:
        if name not in self._packed:
            yield from super().chunks(name)
            return
        for expert in range(self.spec(name)[1][0]):
            blocks, scales = (self.rows(name + part, expert, 1, torch.uint8) for part in (_BLOCKS, _SCALES))
            yield convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)

    def _fits(self, name: str) -> bool:
        (kind, blocks), (other, scales) = super().spec(name + _BLOCKS), super().spec(name + _SCALES)
        return kind == other == "U8" and len(blocks) == 4 and blocks == (*scales, 16)


def is_mxfp4(checkpoint: Checkpoint) -> bool:
    settings = checkpoint.config.get("quantization_config")
    return isinstance(settings, dict) and settings.get("quant_method") == "mxfp4"
