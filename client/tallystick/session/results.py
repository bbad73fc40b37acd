"""The rows that leave a model's end, as they arrive: checked for form, kept by position."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np

from tallystick.session.setting import Setting
from tallystick_protocol.errors import CorruptResult
from tallystick_protocol.frames import DType, Frame, take
from tallystick_protocol.sampling import parse_top_k
from tallystick_protocol.types import Address

log = logging.getLogger(__name__)


class Results:
    """Results of one session."""

    def __init__(self, setting: Setting) -> None:
        manifest = setting.manifest
        output = manifest.output_of(setting.stack)
        widths = {"hidden": manifest.width, "logits": manifest.vocab}
        self._vocab = manifest.vocab
        self._ranked = output == "logits" and setting.top_k > 0
        self._form = (
            (DType.TOP_K, setting.top_k) if self._ranked else (DType.F32, widths.get(output, len(manifest.labels)))
        )
        self.rows: dict[int, bytes] = {}

    def take(self, node: Address, frame: Frame, is_wanted: Callable[[int], bool]) -> None:
        """Keep a RESULT's rows. Raises CorruptResult for rows of another form than was asked for."""
        positions = [frame.position + bit for bit in _set_bits(take(frame.body, "want", bytes))]
        if (frame.dtype, frame.shape[2]) != self._form:
            raise CorruptResult(f"{node} returned rows of another form than was asked for", hop=node)
        rows = frame.rows()
        if len(positions) != len(rows):
            raise CorruptResult(f"{node} returned {len(rows)} rows for {len(positions)} positions", hop=node)
        if self._ranked and any(int(parse_top_k(row)[0].max()) >= self._vocab for row in rows):
            raise CorruptResult(f"{node} returned ids beyond the vocabulary", hop=node)
        if not self._ranked and not bool(np.isfinite(np.frombuffer(frame.tensor, dtype="<f4")).all()):
            raise CorruptResult(f"{node} returned values that are not finite", hop=node)
        for position, row in zip(positions, rows, strict=True):
            if not is_wanted(position):
                continue  # cropped meanwhile
            before = self.rows.setdefault(position, row)
            if before != row:
                log.warning("%s gives another result for position %d than its predecessor", node, position)

    def forget(self, position: int) -> None:
        """Forget results from `position` on."""
        self.rows = {at: row for at, row in self.rows.items() if at < position}


def _set_bits(packed: bytes) -> list[int]:
    """The indices of set bits, least significant first."""
    return [8 * i + bit for i, byte in enumerate(packed) for bit in range(8) if byte >> bit & 1]
