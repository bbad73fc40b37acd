"""Record and Windows against a plain model: which window may be signed, and what no history may ever lead to."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from harness import samples
from tallystick_node.session.record import Record
from tallystick_node.session.windows import Terms, Windows
from tallystick_protocol.errors import BadPosition, LinkMismatch
from tallystick_protocol.receipts import Context, Receipt, leaf, merkle_root
from tallystick_protocol.signing import digest
from tallystick_protocol.types import WINDOW, ZERO32, ZERO_ADDRESS, Address, Positions, SessionId, Span

NODE, FIRST_UPSTREAM, SECOND_UPSTREAM = (samples.address(name) for name in ("node", "upstream", "replacement"))
CHUNKS = st.one_of(st.integers(1, 5), st.sampled_from([1, 31, 32, 33, 64]))


def terms(previous: Address) -> Terms:
    session = SessionId(samples.digest("session"))
    return Terms(NODE, samples.MODEL, samples.digest("class"), session, 3, Span(2, 4), previous, 8, "fp32", "f32")


class Machine(RuleBasedStateMachine):
    """A hop's bookkeeping. `rows` is all that the model keeps of the record: (input, output, wanted) by position."""

    one_shot = False
    previous: Address = FIRST_UPSTREAM

    @initialize()
    def begin(self) -> None:
        self.record = Record(self.one_shot)
        self.windows = Windows(terms(self.previous), self.record)
        self.upstream = self.previous
        self.rows: list[tuple[bytes, bytes, bool]] = []
        self.computed = 0
        self.flush_to = 0
        self.standing: list[Receipt] = []
        self.heard: dict[int, Receipt] = {}
        self.signed: dict[tuple[int, int], Receipt] = {}
        self.newest_revision: dict[int, int] = {}
        self.last_revision = 0
        self.num_receipts = 0

    # -- the model

    def window(self, index: int) -> Positions:
        if self.one_shot:
            return Positions(0, len(self.rows))
        return Positions(min(index * WINDOW, len(self.rows)), min((index + 1) * WINDOW, len(self.rows)))

    def input_root(self, at: Positions) -> bytes:
        return merkle_root([leaf(self.rows[position][0]) for position in at])

    def expected(self) -> tuple[int, bool] | None:
        """(window that may be signed next, whether its link holds), or None."""
        index = 0
        while True:
            at = self.window(index)
            if len(at) == 0 or (self.one_shot and index > 0):
                return None
            if index < len(self.standing) and self.standing[index].positions == at:
                index += 1
                continue
            complete = not self.one_shot and len(at) == WINDOW
            if not complete and self.flush_to != len(self.rows):
                return None
            if self.upstream == ZERO_ADDRESS:
                return index, True
            heard = self.heard.get(index)
            if heard is None or heard.positions != at:
                return None
            return index, heard.output == self.input_root(at)

    # -- what happens to a hop

    @rule(count=CHUNKS, wanted=st.integers(0, 3))
    def compute(self, count: int, wanted: int) -> None:
        if self.one_shot and self.rows:
            return
        new = []
        for _ in range(count):
            self.computed += 1  # after a crop a position may be computed on other rows than before
            text = str(self.computed).encode()
            asked = self.computed % 4 < wanted
            new.append((b"in" + text, b"out" + text if asked else b"", asked))
        assert self.record.new_rows(len(self.rows), [row[0] for row in new]) == 0
        self.record.append([row[0] for row in new], [row[1] for row in new], [row[2] for row in new])
        self.rows += new

    @rule(where=st.floats(0, 1), count=st.integers(1, 70), extra=st.integers(0, 3))
    def replay(self, where: float, count: int, extra: int) -> None:
        first = int(where * len(self.rows))
        known = [row[0] for row in self.rows[first : first + count]]
        if first + len(known) < len(self.rows):
            extra = 0
        assert self.record.new_rows(first, [*known, *[b"new"] * extra]) == len(known)

    @precondition(lambda self: self.rows)
    @rule(where=st.floats(0, 1, exclude_max=True))
    def replay_other_bytes(self, where: float) -> None:
        with pytest.raises(BadPosition):
            self.record.new_rows(int(where * len(self.rows)), [b"forged"])
        with pytest.raises(BadPosition):
            self.record.new_rows(len(self.rows) + 1, [b"ahead"])

    @rule(ahead=st.sampled_from([0, 0, 0, 1, 2, 5]))
    def flush(self, ahead: int) -> None:
        """ahead: so many rows are still on their way."""
        self.flush_to = len(self.rows) + ahead
        self.windows.flush(self.flush_to)

    @rule(where=st.floats(0, 1))
    def crop(self, where: float) -> None:
        length = int(where * len(self.rows))
        if self.one_shot and 0 < length < len(self.rows):
            with pytest.raises(BadPosition):
                self.record.crop(length)
            return
        self.record.crop(length)
        self.windows.crop(length)
        del self.rows[length:]
        keep = 0 if self.one_shot else length // WINDOW
        del self.standing[keep:]
        self.heard = {index: receipt for index, receipt in self.heard.items() if index < length // WINDOW}
        self.flush_to = 0

    @precondition(lambda self: self.upstream != ZERO_ADDRESS)
    @rule(ahead=st.sampled_from([0, 0, 0, 1, 2]), short=st.sampled_from([0, 0, 0, 1, 3]), lies=st.booleans(),
          revision=st.sampled_from([0, 1, 1, 2]), attempt=st.integers(0, 1))  # fmt: skip
    def hear(self, ahead: int, short: int, lies: bool, revision: int, attempt: int) -> None:
        """The previous hop's receipt for the window that comes next, or for a later one."""
        full = self.standing and self.standing[-1].positions == self.window(len(self.standing) - 1)
        index = len(self.standing) - (not full and bool(self.standing)) + ahead
        at = self.window(0 if self.one_shot else index)
        if len(at) <= short:
            return
        at = Positions(at.first, at.last - short)
        output = samples.digest("a lie") if lies else self.input_root(at)
        receipt = samples.receipt(
            node=self.upstream, first=at.first, last=at.last, output=output, revision=revision, attempt=attempt
        )
        index = 0 if self.one_shot else index
        event(f"heard {'a lie' if lies else 'the truth'}")
        self.windows.hear(receipt, index)
        before = self.heard.get(index)
        if before is None or (attempt, revision) >= (before.attempt, before.revision):
            self.heard[index] = receipt

    @precondition(lambda self: self.upstream != ZERO_ADDRESS)
    @rule()
    def another_upstream(self) -> None:
        self.upstream = SECOND_UPSTREAM if self.upstream == FIRST_UPSTREAM else FIRST_UPSTREAM
        self.windows.replace_previous(self.upstream)
        self.heard = {}

    @rule(most=st.integers(1, 4))
    def sign(self, most: int) -> None:
        for _ in range(most):
            expected = self.expected()
            if expected is None:
                assert self.windows.next_unsigned(5) is None
                return
            index, linked = expected
            if not linked:
                with pytest.raises(LinkMismatch) as raised:
                    self.windows.next_unsigned(5)
                assert raised.value.fields["hop"] == self.upstream
                event("link mismatch")
                return
            receipt = self.windows.next_unsigned(5)
            assert receipt is not None
            assert receipt == self.windows.next_unsigned(5), "asking changes nothing"
            self.check_receipt(receipt, index)
            self.windows.signed(receipt, index, digest(samples.STAKING, receipt))
            del self.standing[index:]
            self.standing.append(receipt)
            self.num_receipts += 1

    def check_receipt(self, receipt: Receipt, index: int) -> None:
        at = self.window(index)
        want = tuple(self.rows[position][2] for position in at)
        assert receipt.positions == at
        assert receipt.input == self.input_root(at)
        assert receipt.output == merkle_root([leaf(self.rows[position][1]) for position in at])
        assert receipt.context == Context("fp32", "f32", 8, want).digest()
        assert receipt.previous == (digest(samples.STAKING, self.standing[index - 1]) if index else ZERO32)
        assert (receipt.attempt, receipt.start, receipt.end, receipt.at) == (3, 2, 4, 5)
        key = (index, receipt.revision)
        assert key not in self.signed, "never two receipts for one window and revision"
        assert receipt.revision > self.newest_revision.get(index, -1), "every re-signing raises the revision"
        assert receipt.revision >= self.last_revision, "one counter for the session"
        assert receipt.revision - self.last_revision == (index in self.newest_revision)
        self.signed[key] = receipt
        self.newest_revision[index] = self.last_revision = receipt.revision

    @invariant()
    def record_is_the_rows(self) -> None:
        if not hasattr(self, "rows"):
            return
        assert len(self.record) == len(self.rows)
        assert self.record.size_bytes == sum(len(row[1]) for row in self.rows)
        outputs, wanted = self.record.outputs(Positions(0, len(self.rows)))
        assert (outputs, wanted) == ([row[1] for row in self.rows], [row[2] for row in self.rows])
        if self.one_shot:
            assert len(self.standing) <= 1

    def teardown(self) -> None:
        """Whatever happened: once the link holds and everything is flushed, the session ends wholly signed."""
        if not hasattr(self, "rows") or not self.rows:
            return
        self.flush_to = len(self.rows)
        self.windows.flush(self.flush_to)
        for index in range(1 if self.one_shot else -(-len(self.rows) // WINDOW)):
            at = self.window(index)
            honest: dict[str, Any] = {"first": at.first, "last": at.last, "output": self.input_root(at)}
            receipt = samples.receipt(node=self.upstream, revision=9, attempt=9, **honest)
            self.windows.hear(receipt, index)
            self.heard[index] = receipt
        self.sign(10_000)
        assert [position for receipt in self.standing for position in receipt.positions] == list(range(len(self.rows)))


class FirstHop(Machine):
    previous = ZERO_ADDRESS


class OneShot(Machine):
    one_shot = True


class OneShotFirstHop(Machine):
    previous = ZERO_ADDRESS
    one_shot = True


def machine(cls: type[Machine], max_examples: int) -> Any:
    case = cls.TestCase
    case.settings = settings(max_examples=max_examples, stateful_step_count=30, deadline=None)
    return case


TestHopInTheMiddle = machine(Machine, 150)
TestFirstHop = machine(FirstHop, 60)
TestOneShotHop = machine(OneShot, 25)
TestOneShotFirstHop = machine(OneShotFirstHop, 25)
