"""Drafts without a model: what followed the last time that the text ended like this."""

from __future__ import annotations

from collections.abc import Sequence

SHORTEST, LONGEST = 2, 8


class PromptLookup:
    """Looks the text's longest suffix up in the text itself, prompt and answer alike.

    For every length from SHORTEST to LONGEST it remembers where each run of ids ended last; a new id costs one entry
    for each length. Drafts for text that quotes or repeats itself: code, tables, summaries.
    """

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}  # a run of ids -> the position behind its last occurrence

    def propose(self, ids: Sequence[int], k: int) -> list[int]:
        """As `Drafter.propose`. A draft that reaches the end of the text goes on in itself: periods are continued."""
        self._index(list(ids))
        text = self._ids
        start = self._find()
        if start is None or k <= 0:
            return []
        draft: list[int] = []
        for at in range(start, start + k):
            draft.append(text[at] if at < len(text) else draft[at - len(text)])
        return draft

    def _find(self) -> int | None:
        """Where the text went on after an earlier occurrence of its longest suffix; None for no such suffix."""
        text = self._ids
        for length in range(min(LONGEST, len(text)), SHORTEST - 1, -1):
            end = self._ends.get(tuple(text[-length:]))
            if end is not None:
                return end
        return None

    def _index(self, ids: list[int]) -> None:
        """Take the new ids. A run is entered when the id behind it is known: the text's own end is not found."""
        if ids[: len(self._ids)] != self._ids:  # tokens were taken back
            self._ids, self._ends = [], {}
        for end in range(max(len(self._ids), 1), len(ids)):
            for length in range(SHORTEST, min(LONGEST, end) + 1):
                self._ends[tuple(ids[end - length : end])] = end
        self._ids = ids
