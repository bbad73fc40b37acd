"""Verdicts on answers that took several sessions."""

from __future__ import annotations

from harness import samples
from tallystick.tasks.backend import merge
from tallystick.verdict import Check, Verdict
from tallystick_protocol.types import Positions, Span

A, B = samples.address("a"), samples.address("b")


def noted(error: float, tolerance: float) -> Verdict:
    verdict = Verdict("full")
    verdict.note(Check(Span(0, 1), Positions(0, 32), A, B, True, "sketch", error, tolerance))
    return verdict


def test_what_one_session_cannot_vouch_for_the_whole_answer_cannot() -> None:
    moved, stock = Verdict("audit", moved=[A]), Verdict("audit", unverifiable=[(B, Span(0, 1))])
    stock.replaced.append((B, A, "unreachable"))
    assert merge([Verdict("audit"), moved]).moved == [A]
    assert merge([Verdict("audit"), stock]).unverifiable == [(B, Span(0, 1))]
    assert merge([Verdict("audit"), Verdict("audit", unaudited=[(B, Span(0, 1))])]).unaudited == [(B, Span(0, 1))]
    assert merge([Verdict("audit", not_slashable=3), Verdict("audit", not_slashable=4)]).not_slashable == 7
    assert merge([Verdict("audit")]).exact
    assert not merge([Verdict("audit"), moved]).exact and not merge([stock, Verdict("audit")]).exact


def test_the_worst_error_is_the_one_that_came_nearest_to_its_own_tolerance() -> None:
    near, far = noted(4e-6, 5e-6), noted(1e-3, 1e-2)
    for order in ([near, far], [far, near]):
        whole = merge(order)
        assert (whole.worst_error, whole.tolerance) == (4e-6, 5e-6)
    assert merge([noted(0.0, 5e-6)]).tolerance == 5e-6
