"""Audits without a network: the node's own rows, records and receipts around spans in memory, and the client's own
comparison of two nodes' receipts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harness import samples
from tallystick.checks import agree, same_work
from tallystick_model.segments import Cache, Segment
from tallystick_model.span import SpanModel
from tallystick_node.session.record import Record
from tallystick_node.session.rows import RowFormat
from tallystick_node.session.steps import PIECE_ROWS
from tallystick_node.session.windows import Terms, Windows
from tallystick_protocol.receipts import Receipt
from tallystick_protocol.signing import digest
from tallystick_protocol.types import ZERO_ADDRESS, SessionId, window_of

TOP_K = 16
NOW = 1_700_000_000


@dataclass(frozen=True, slots=True)
class Task:
    """What enters a span in one session: a row for each position, and which results are wanted.

    prompt: how many of them are there from the beginning; the others come one by one.
    """

    rows: list[bytes]
    want: list[bool]
    prompt: int

    def __len__(self) -> int:
        return len(self.rows)


class AtNode:
    """One session at one node."""

    def __init__(self, model: SpanModel, node: str, length: int) -> None:
        self.model = model
        self.record = Record(one_shot=False)
        terms = Terms(
            samples.address(node), model.manifest.model_id, samples.digest("class"),
            SessionId(samples.digest("session of " + node)), 0, model.span, ZERO_ADDRESS, TOP_K,
            model.manifest.numerics, "f32",
        )  # fmt: skip
        self.windows = Windows(terms, self.record)
        self.format = RowFormat(model.manifest, model.span, TOP_K)
        self.cache: Cache | None = model.new_cache(length)

    @property
    def position(self) -> int:
        return len(self.record)

    def segment(self, rows: Sequence[bytes], want: Sequence[bool]) -> Segment:
        return self.format.segment(self.cache, self.position, rows, want)

    def crop(self, length: int) -> None:
        assert self.cache is not None
        self.cache.crop(length)
        self.record.crop(length)
        self.windows.crop(length)

    def receipts(self) -> list[Receipt]:
        """Those over all that was computed, in order of windows."""
        self.windows.flush(len(self.record))
        while (receipt := self.windows.next_unsigned(NOW)) is not None:
            self.windows.signed(receipt, window_of(receipt.first), digest(samples.STAKING, receipt))
        return list(self.windows._standing)


def step(work: Sequence[tuple[AtNode, Sequence[bytes], Sequence[bool]]]) -> None:
    """One forward over the new rows of several sessions at one node."""
    segments = [session.segment(rows, want) for session, rows, want in work]
    results = work[0][0].model.forward(segments)
    for (session, rows, want), result in zip(work, results, strict=True):
        session.record.append(rows, session.format.outputs(result, want), want)


def go_on(sessions: Sequence[AtNode], tasks: Sequence[Task], chunk: int) -> None:
    """Everything that is missing, in steps of `chunk` rows, those of all sessions together."""
    while waiting := [pair for pair in zip(sessions, tasks, strict=True) if pair[0].position < len(pair[1])]:
        parts = [(session, task, slice(session.position, session.position + chunk)) for session, task in waiting]
        step([(session, task.rows[part], task.want[part]) for session, task, part in parts])


def fill(sessions: Sequence[AtNode], tasks: Sequence[Task], length: int | None = None) -> None:
    """As a replay or an audit does: the rows [0, length) in frames of PIECE_ROWS. length: None for all."""
    cut = [Task(task.rows[:length], task.want[:length], task.prompt) for task in tasks]
    go_on(sessions, cut, PIECE_ROWS)


def serve(model: SpanModel, tasks: Sequence[Task], node: str = "hop") -> list[AtNode]:
    """As a hop does: each prompt in frames of PIECE_ROWS, then a row at a time."""
    sessions = [AtNode(model, f"{node} {number}", len(task)) for number, task in enumerate(tasks)]
    for session, task in zip(sessions, tasks, strict=True):
        fill([session], [task], task.prompt)
    go_on(sessions, tasks, 1)
    return sessions


def audit(model: SpanModel, tasks: Sequence[Task]) -> list[list[Receipt]]:
    """The receipts of an auditor, which gets everything at once."""
    sessions = [AtNode(model, f"auditor {number}", len(task)) for number, task in enumerate(tasks)]
    for session, task in zip(sessions, tasks, strict=True):
        fill([session], [task])
    return [session.receipts() for session in sessions]


def differs(claims: Sequence[Receipt], answers: Sequence[Receipt]) -> int | None:
    """The first window about which hop and auditor do not agree; None where they agree about all."""
    for window, (claim, answer) in enumerate(zip(claims, answers, strict=True)):
        assert same_work(claim, answer), "they worked on other rows"
        if not agree(claim, answer):
            return window
    return None


def outputs(session: AtNode, task: Task) -> Task:
    """What enters the next span."""
    return Task(session.record._outputs, task.want, task.prompt)
