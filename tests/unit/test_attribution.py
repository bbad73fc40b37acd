"""What failures and disagreements are put down to, and what a verdict says in plain values."""

from __future__ import annotations

import json

import pytest

from harness import samples
from tallystick.attribution import CAUSES, Attribution, cause_of, cause_of_difference, failed
from tallystick.verdict import POLICIES, Accusation, Check, Verdict, num_routes
from tallystick_protocol.errors import (
    BadSignature,
    CorruptResult,
    Departed,
    LinkMismatch,
    Overloaded,
    TallystickError,
    Unreachable,
    error_codes,
)
from tallystick_protocol.types import Positions, Span, Wei

A, B, C = (samples.address(name) for name in "abc")


@pytest.mark.parametrize(
    ("failure", "cause"),
    [(Overloaded("busy"), "overload"), (Unreachable("late"), "overload"), (Departed("gone"), "overload"),
     (LinkMismatch("other rows"), "link"), (CorruptResult("unsigned"), "protocol"), (BadSignature("no"), "protocol")],
    ids=lambda value: value if isinstance(value, str) else value.code,
)  # fmt: skip
def test_a_failure_has_its_cause_and_accuses_nobody(failure: TallystickError, cause: str) -> None:
    assert cause_of(failure) == cause
    found = failed(failure, A, Span(0, 1))
    assert (found.cause, found.avoided, found.accused) == (cause, (A,), None)


def test_no_failure_by_itself_is_a_fraud() -> None:
    for kind in error_codes().values():
        error = kind.__new__(kind)
        TallystickError.__init__(error, "")
        assert cause_of(error) in CAUSES[:3]


def test_causes_are_asked_for_in_their_order() -> None:
    late = Unreachable("late")
    assert CAUSES == ("overload", "link", "protocol", "numerics", "fraud")
    assert cause_of_difference(late, same_input=False, overruled=False) == "overload"
    assert cause_of_difference(None, same_input=False, overruled=False) == "link"
    assert cause_of_difference(None, same_input=False, overruled=True) == "link", "nobody lied about the same rows"
    assert cause_of_difference(CorruptResult("x"), same_input=True, overruled=False) == "protocol"
    assert cause_of_difference(None, same_input=True, overruled=False) == "numerics"
    assert cause_of_difference(None, same_input=True, overruled=True) == "fraud"
    assert cause_of_difference(late, same_input=True, overruled=True) == "fraud", "leaving does not excuse a lie"


def test_a_verdict_says_what_the_issue_names() -> None:
    verdict = Verdict("full", receipts=4, paid={A: Wei(3), B: Wei(4)}, withheld={C: Wei(5)})
    positions = Positions(0, 32)
    verdict.checks += [Check(Span(0, 1), positions, A, B, True), Check(Span(1, 2), positions, C, B, False)]
    verdict.accusations.append(Accusation(C, Span(1, 2), positions, (A, B)))
    verdict.attributions.append(Attribution("fraud", Span(1, 2), "disagreement", (C,), C, (A, B), positions))
    said = json.loads(json.dumps(verdict.to_json()))
    assert (said["checked"], said["passed"], said["failed"]) == (2, 1, 1)
    assert said["spans"] == [[0, 1], [1, 2]] and said["nodes"] == sorted([A, B, C])
    assert (said["worst_error"], said["tolerance"], said["paid"], said["withheld"]) == (0.0, 0.0, 7, 5)
    assert said["paid_by_node"] == {A: 3, B: 4} and said["withheld_by_node"] == {C: 5}
    assert said["attributions"][0]["accused"] == C and said["attributions"][0]["cause"] == "fraud"
    accused = {"node": C, "layers": [1, 2], "positions": [0, 32], "witnesses": [A, B], "evidence": ""}
    assert said["accusations"] == [accused]


def test_policies_name_their_routes() -> None:
    assert [num_routes(policy) for policy in POLICIES] == [1, 1, 1, 2, 3, 4]
