"""Between bytes on the wire and tensors in the span: every bound is checked here, before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tallystick_model.ranking import as_pairs, top_k
from tallystick_model.segments import Segment
from tallystick_model.span import SpanModel
from tallystick_protocol.errors import BadTensor, CorruptResult
from tallystick_protocol.frames import DType, Frame, take
from tallystick_protocol.manifest import Manifest
from tallystick_protocol.sketching.logits import scales_of
from tallystick_protocol.types import Positions, Span
from tallystick_protocol.wire import DTYPES, Wire, decode, encode, values_per_row


class RowFormat:
    """What rows of one session look like at one span: token ids or hidden states in, hidden states or results out."""

    def __init__(self, manifest: Manifest, span: Span, k: int, wire: Wire = "f32") -> None:
        """k: the largest logits of a position that the client wants; 0 for all of them, in the order of their ids.

        wire: how hidden rows travel between hops; what leaves the model's end is f32.
        """
        self.wire: Wire = wire
        self._manifest = manifest
        self._span = span
        self._k = min(k, manifest.vocab)
        self.is_first = manifest.takes_ids(span)
        self.is_last = manifest.is_result(span)
        self._output = manifest.output_of(span)
        self._one_shot = not manifest.is_causal(span)

    @property
    def form(self) -> tuple[int, Wire]:
        """What rows of two sessions must have in common to stand for each other."""
        return self._k, self.wire

    @property
    def result_dtype(self) -> DType:
        return DType.TOP_K if self._output == "logits" and self._k else DType.F32

    @property
    def result_bytes(self) -> int:
        """The bytes of one wanted result at the model's end."""
        if self._output == "hidden":
            return 4 * self._manifest.width
        if self._output == "logits":
            return 8 * self._k or 4 * self._manifest.vocab
        return 4 * len(self._manifest.labels)

    def parse(self, frame: Frame) -> list[bytes]:
        """The rows of a STEP. Raises BadTensor: wrong dtype or width, ids beyond the vocabulary, rows out of range."""
        expected = DType.IDS if self.is_first else DTYPES[self.wire]
        width = 1 if self.is_first else values_per_row(self.wire, self._manifest.width)
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
            rows = decode(frame.tensor, self.wire, self._manifest.width)
            check_rows(rows, self._manifest, self._span.start, BadTensor)
        return frame.rows()

    def token_types(self, frame: Frame) -> list[int]:
        """The token type of each row of a STEP, where the session gives them; one byte each in the body's `types`."""
        types = list(take(frame.body, "types", bytes, b""))
        if types and (not self.is_first or not self._one_shot or len(types) != frame.num_rows):
            raise BadTensor("token types: one for each token id of a one-shot session")
        if types and max(types) >= (self._manifest.config.get("type_vocab_size") or 1):
            raise BadTensor(f"this model has no token type {max(types)}")
        return types

    def segment(
        self, cache: Any, start: int, rows: Sequence[bytes], want: Sequence[bool], token_types: Sequence[int] = ()
    ) -> Segment:
        """Rows as the span takes them: ids (n,) int64 or hidden states (n, width) float32."""
        data = b"".join(rows)
        if self.is_first:
            payload = torch.from_numpy(np.frombuffer(data, dtype="<u4").astype(np.int64))
        else:
            payload = torch.from_numpy(decode(bytearray(data), self.wire, self._manifest.width))
        wanted = [index for index, asked in enumerate(want) if asked] if self._output != "hidden" else []
        types = torch.tensor(token_types, dtype=torch.int64) if token_types else None
        return Segment(cache, start, payload, wanted, types)

    def outputs(self, result: Any, want: Sequence[bool]) -> list[bytes]:
        """The bytes of each output row; empty where a result was not wanted.

        Raises CorruptResult for rows that must never be signed: our own machine is broken.
        """
        if self._output == "hidden":
            rows = result.numpy()
            check_rows(rows, self._manifest, self._span.end, CorruptResult)
            if not self.is_last:
                return encode(rows, self.wire)
            return [row.tobytes() if asked else b"" for row, asked in zip(rows, want, strict=True)]
        if not any(want):
            return [b""] * len(want)
        lines = iter(self._results(result))
        return [next(lines) if asked else b"" for asked in want]

    def scales(self, result: Any, want: Sequence[bool]) -> list[float]:
        """By what differences of results are measured across classes; none for hidden rows, 0 where none was wanted."""
        if self._output == "hidden":
            return []
        lines = iter(scales_of(result.numpy(), self._output == "logits").tolist() if any(want) else ())
        return [next(lines) if asked else 0.0 for asked in want]

    def hidden(self, outputs: Sequence[bytes]) -> Any:
        """Output rows as they left, (n, width) float32, NaN where nobody wanted them; None where results leave."""
        if self._output != "hidden":
            return None
        unwanted = np.full(self._manifest.width, np.nan, dtype="<f4").tobytes()
        data = b"".join(row or unwanted for row in outputs)
        return decode(data, "f32" if self.is_last else self.wire, self._manifest.width)

    def _results(self, result: Any) -> list[bytes]:
        """The rows of the model's end: (wanted rows, values) float32 as they are, or their k largest."""
        if self.result_dtype is DType.F32:
            values = result.numpy()
            if not bool(np.isfinite(values).all()):
                raise CorruptResult("this node computed results that are not finite; nothing is signed")
            return [row.tobytes() for row in values]
        ids, values = top_k(result, self._k)
        if not bool(np.isfinite(values).all()):
            raise CorruptResult("this node computed logits that are not finite; nothing is signed")
        return [pair.tobytes() for pair in as_pairs(ids, values)]


def needed_ids(model: SpanModel, positions: Positions) -> Positions:
    """Whose ids it takes to compute what enters the first layer: all before, where sessions do not share calls."""
    return Positions(positions.first if model.packs else 0, positions.last)


def embedded(model: SpanModel, ids: Sequence[bytes], at: Positions, types: Sequence[int]) -> torch.Tensor:
    """The embedding's output, (n, width) float32, for the ids at `needed_ids`, each as a row.

    types: a token type for each position of the session, or none.
    """
    numbers = torch.from_numpy(np.frombuffer(b"".join(ids), dtype="<u4").astype(np.int64))
    kinds = torch.tensor(types[at.first : at.last], dtype=torch.int64) if types else None
    return model.entering(numbers, at.first, kinds)


def check_rows(rows: Any, manifest: Manifest, boundary: int, error: type[BadTensor] | type[CorruptResult]) -> None:
    """Rows (n, width) float32: finite, no denormals, norms within the manifest's range for this layer boundary."""
    low, high = manifest.norms[boundary]
    squares = np.square(rows, dtype=np.float64).sum(axis=-1)  # no square of an fp32 is beyond fp64
    norms = np.sqrt(squares)
    if not bool(((norms >= low) & (norms <= high)).all()):
        if not bool(np.isfinite(squares).all()):
            raise error(f"rows at layer boundary {boundary} hold NaN or infinity")
        raise error(f"a row's norm at layer boundary {boundary} is outside [{low:.3g}, {high:.3g}]")
    magnitude = rows.view(np.uint32) & np.uint32(0x7FFFFFFF)
    if bool((magnitude - np.uint32(1) < np.uint32(0x7FFFFF)).any()):  # zero wraps round
        raise error(f"rows at layer boundary {boundary} hold denormal values")
