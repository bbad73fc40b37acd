"""What one hop knows of a session's rows: pure bookkeeping, from which receipts are claimed and lost hops refilled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tallystick_protocol.errors import BadPosition
from tallystick_protocol.receipts import leaf, merkle_root
from tallystick_protocol.types import WINDOW, Digest, Positions


@dataclass(frozen=True, slots=True)
class Claim:
    """What a receipt will say about a window: roots over its rows and which positions' results were wanted."""

    positions: Positions
    input: Digest
    output: Digest
    want: tuple[bool, ...]


class Record:
    """Rows in order of position: hashes of what came in, the bytes of what left, and what was wanted of each.

    one_shot: the session is a single window, whatever its length (bidirectional models).
    keeps_inputs: the bytes of what came in, too, and the scales of results: for sketches.
    """

    def __init__(self, one_shot: bool, keeps_inputs: bool = False) -> None:
        self._one_shot = one_shot
        self._kept: tuple[list[bytes], list[float]] | None = ([], []) if keeps_inputs else None
        self._inputs: list[Digest] = []
        self._outputs: list[bytes] = []
        self._leaves: list[Digest] = []
        self._want: list[bool] = []
        self.size_bytes = 0
        """Of the kept output rows."""

    def __len__(self) -> int:
        return len(self._inputs)

    def bytes_of(self, first: int, last: int) -> int:
        """The bytes of the kept output rows [first, last)."""
        return sum(map(len, self._outputs[first:last]))

    def new_rows(self, position: int, rows: Sequence[bytes]) -> int:
        """How many of these rows were seen before, with the same bytes: they are answered from memory.

        Raises BadPosition when they skip ahead, or repeat a position with other bytes.
        """
        if position > len(self):
            raise BadPosition(
                f"rows start at position {position}, the next one here is {len(self)}", expected=len(self)
            )
        known = min(len(self) - position, len(rows))
        for offset in range(known):
            if leaf(rows[offset]) != self._inputs[position + offset]:
                raise BadPosition(f"position {position + offset} was computed on other bytes", expected=len(self))
        return known

    def input_leaf(self, position: int) -> Digest:
        """The hash of the row that came in at a position."""
        return self._inputs[position]

    def append(
        self, inputs: Sequence[bytes], outputs: Sequence[bytes], want: Sequence[bool], scales: Sequence[float] = ()
    ) -> None:
        """Rows that were computed; an output nobody wanted is empty. scales: of results (`logits`), if any."""
        if self._kept is not None:
            self._kept[0].extend(inputs)
            self._kept[1].extend(scales or [0.0] * len(inputs))
        self._inputs += [leaf(row) for row in inputs]
        self._outputs += outputs
        self._leaves += [leaf(row) for row in outputs]
        self._want += want
        self.size_bytes += sum(map(len, outputs))

    def shares(self, other: Record, length: int) -> bool:
        """Whether both begin with the same `length` rows."""
        return self._inputs[:length] == other._inputs[:length]

    def take(self, other: Record, first: int, last: int) -> None:
        """Append rows [first, last) of another session, which they would have been here, too."""
        for rows, theirs in zip(self._parts(), other._parts(), strict=False):  # who keeps inputs takes no rows
            rows.extend(theirs[first:last])
        self.size_bytes += other.bytes_of(first, last)

    def crop(self, length: int) -> None:
        """Forget every position from `length` on.

        Raises BadPosition for a part of a one-shot session: the rows that stay were computed on those that would go, so
        that a receipt for them alone would be false.
        """
        if self._one_shot and 0 < length < len(self):
            raise BadPosition("this model is bidirectional: a session is rolled back to 0 or not at all", expected=0)
        self.size_bytes -= self.bytes_of(length, len(self))
        for rows in self._parts():
            del rows[length:]

    def outputs(self, positions: Positions) -> tuple[list[bytes], list[bool]]:
        """The kept output rows and what was wanted of them. Raises BadPosition beyond what was computed."""
        if positions.last > len(self):
            raise BadPosition(f"positions {positions} are not computed yet; {len(self)} are", expected=len(self))
        return self._outputs[positions.first : positions.last], self._want[positions.first : positions.last]

    def inputs(self, positions: Positions) -> tuple[list[bytes], list[float]]:
        """The kept input rows, and the scales of the results.

        Raises BadPosition beyond what was computed, or where none are kept.
        """
        if self._kept is None or positions.last > len(self):
            raise BadPosition(f"what entered at positions {positions} is not kept", expected=len(self))
        rows, scales = self._kept
        return rows[positions.first : positions.last], scales[positions.first : positions.last]

    def window(self, index: int) -> Positions:
        """The positions of a window as far as they are computed."""
        if self._one_shot:
            return Positions(0, len(self))
        return Positions(min(index * WINDOW, len(self)), min((index + 1) * WINDOW, len(self)))

    @property
    def num_complete(self) -> int:
        """Windows that no further row can change."""
        return 0 if self._one_shot else len(self) // WINDOW

    @property
    def num_windows(self) -> int:
        """Windows with at least one row."""
        return min(len(self), 1) if self._one_shot else (len(self) + WINDOW - 1) // WINDOW

    def claim(self, index: int) -> Claim:
        """The claim for window `index` as it stands. Raises ValueError when it has no rows."""
        at = self.window(index)
        return Claim(
            at,
            merkle_root(self._inputs[at.first : at.last]),
            merkle_root(self._leaves[at.first : at.last]),
            tuple(self._want[at.first : at.last]),
        )

    def _parts(self) -> tuple[list[Any], ...]:
        return self._inputs, self._outputs, self._leaves, self._want, *(self._kept or ())
