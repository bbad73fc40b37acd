"""The encoder's states as a decoder's session receives them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from tallystick_node.session.rows import check_rows
from tallystick_protocol.errors import BadPosition, BadTensor, ContextLengthExceeded
from tallystick_protocol.frames import DType, Frame
from tallystick_protocol.manifest import Manifest
from tallystick_protocol.receipts import leaf, merkle_root
from tallystick_protocol.types import Digest


class Memory:
    """Collects the states, frame by frame."""

    def __init__(self, manifest: Manifest, row_bytes: int, reserve: Callable[[int], None]) -> None:
        """row_bytes: of the keys and values that the span makes of one row. reserve: takes bytes, or Overloaded."""
        self._manifest = manifest
        self._row_bytes = row_bytes + 4 * manifest.width
        self._reserve = reserve
        self._rows: list[bytes] = []

    def take(self, frame: Frame) -> None:
        """Keep a frame's rows. Raises BadTensor, BadPosition, ContextLengthExceeded, Overloaded; keeps none then."""
        manifest = self._manifest
        if frame.dtype is not DType.F32 or frame.shape[2] != manifest.width or frame.num_rows < 1:
            raise BadTensor(f"states of the encoder are F32 rows of {manifest.width} values", width=manifest.width)
        if frame.position != len(self._rows):
            raise BadPosition(f"the next state is that of position {len(self._rows)}", expected=len(self._rows))
        if len(self._rows) + frame.num_rows > manifest.max_length:
            raise ContextLengthExceeded(
                f"the source has more than {manifest.max_length} positions", limit=manifest.max_length
            )
        rows = np.frombuffer(frame.tensor, dtype="<f4").reshape(-1, manifest.width)
        check_rows(rows, manifest, manifest.encoder_layers, BadTensor)
        self._reserve(frame.num_rows * self._row_bytes)
        self._rows += frame.rows()

    def whole(self) -> tuple[torch.Tensor, Digest]:
        """All states, (positions, width) float32, and the Merkle root over their rows."""
        states = torch.frombuffer(bytearray(b"".join(self._rows)), dtype=torch.float32)
        root = merkle_root([leaf(row) for row in self._rows])
        count, self._rows = len(self._rows), []
        return states.view(count, self._manifest.width), root
