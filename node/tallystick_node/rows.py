"""Between bytes on the wire and tensors in the span: every bound is checked here, before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tallystick_model.ranking import top_k
from tallystick_model.segments import Segment
from tallystick_protocol.errors import BadTensor, CorruptResult
from tallystick_protocol.frames import DType, Frame
from tallystick_protocol.manifest import Manifest
from tallystick_protocol.types import Span

SMALLEST_NORMAL = np.float32(1.1754944e-38)


class RowFormat:
    """What rows of one session look like at one span: token ids or hidden states in, hidden states or top-k out."""

    def __init__(self, manifest: Manifest, span: Span, k: int) -> None:
        self._manifest = manifest
        self._span = span
        self._k = min(k, manifest.vocab)
        self.is_first = span.start == 0
        self.is_last = span.end == manifest.layers
        self._logits = self.is_last and manifest.output == "logits"

    @property
    def result_dtype(self) -> DType:
        return DType.TOP_K if self._logits else DType.F32

    def parse(self, frame: Frame) -> list[bytes]:
        """The rows of a STEP. Raises BadTensor: wrong dtype or width, ids beyond the vocabulary, rows out of range."""
        expected = DType.IDS if self.is_first else DType.F32
        width = 1 if self.is_first else self._manifest.width
        if frame.dtype is not expected or frame.shape[2] != width or frame.num_rows < 1:
            raise BadTensor(
                f"span {self._span} takes {expected.name} rows of {width} values,"
                f" got {frame.dtype.name} of {frame.shape[2]}",
                width=width,
            )
        if self.is_first:
            ids = np.frombuffer(frame.tensor, dtype="<u4")
            if int(ids.max()) >= self._manifest.vocab:
                raise BadTensor(f"token id {int(ids.max())} is beyond the vocabulary of {self._manifest.vocab}")
        else:
            self._check(np.frombuffer(frame.tensor, dtype="<f4").reshape(-1, width), self._span.start, BadTensor)
        return frame.rows()

    def segment(self, cache: Any, start: int, rows: Sequence[bytes], want: Sequence[bool]) -> Segment:
        """Rows as the span takes them: ids (n,) int64 or hidden states (n, width) float32."""
        data = bytearray(b"".join(rows))
        if self.is_first:
            payload = torch.frombuffer(data, dtype=torch.int32).to(torch.int64)
        else:
            payload = torch.frombuffer(data, dtype=torch.float32).view(len(rows), self._manifest.width)
        wanted = [index for index, asked in enumerate(want) if asked] if self._logits else []
        return Segment(cache, start, payload, wanted)

    def outputs(self, result: Any, want: Sequence[bool]) -> list[bytes]:
        """The bytes of each output row; empty where logits were not wanted.

        Raises CorruptResult for rows that must never be signed: our own machine is broken.
        """
        if not self._logits:
            rows = result.numpy()
            self._check(rows, self._span.end, CorruptResult)
            return [row.tobytes() for row in rows]
        if not any(want):
            return [b""] * len(want)
        ids, values = top_k(result, self._k)
        if not bool(torch.isfinite(values).all()):
            raise CorruptResult("this node computed logits that are not finite; nothing is signed")
        pairs = np.empty((ids.shape[0], self._k), dtype=[("id", "<u4"), ("value", "<f4")])
        pairs["id"], pairs["value"] = ids.numpy(), values.numpy()
        lines = iter(pair.tobytes() for pair in pairs)
        return [next(lines) if asked else b"" for asked in want]

    def _check(self, rows: Any, boundary: int, error: type[BadTensor] | type[CorruptResult]) -> None:
        """Finite, no denormals, norms within the manifest's range for this boundary."""
        if not bool(np.isfinite(rows).all()):
            raise error(f"rows at layer boundary {boundary} hold NaN or infinity")
        magnitude = np.abs(rows)
        if bool(((magnitude > 0) & (magnitude < SMALLEST_NORMAL)).any()):
            raise error(f"rows at layer boundary {boundary} hold denormal values")
        low, high = self._manifest.norms[boundary]
        norms = np.sqrt(np.square(rows, dtype=np.float64).sum(axis=-1))
        if not bool(((norms >= low) & (norms <= high)).all()):
            raise error(f"a row's norm at layer boundary {boundary} is outside [{low:.3g}, {high:.3g}]")
