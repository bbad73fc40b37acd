"""The tables of contracts.md: who captures a jury, whom slashing deters, that nobody gains by dealing with itself."""

from __future__ import annotations

import pytest

from tallystick_devnet import economics
from tallystick_node.config import NodeConfig

# contracts.md section 2.5: seats -> quorum missed, then convicts alone / blocks for shares 0.1, 0.2, 0.3
DESIGN = {
    15: (1.8e-2, (2e-5, 7e-3), (4e-4, 9e-2), (5e-3, 3e-1)),
    31: (1.1e-3, (9e-10, 3e-4), (5e-7, 4e-2), (6e-5, 3e-1)),
    61: (8e-6, (8e-18, 9e-7), (2e-12, 7e-3), (3e-8, 3e-1)),
}


@pytest.mark.parametrize("seats", economics.SEATS)
def test_committees_are_those_of_the_design(seats: int) -> None:
    missed, *by_share = DESIGN[seats]
    for share, (convicts, blocks) in zip(economics.SHARES, by_share, strict=True):
        found = economics.committee(seats, share)
        assert found.missed == pytest.approx(missed, rel=0.1)
        # The design's figures have one digit.
        assert f"{found.convicts:.0e}" == f"{convicts:.0e}"
        assert f"{found.blocks:.0e}" == f"{blocks:.0e}"
        # They leave the quorum out, which makes capture rarer still.
        assert found.captures < found.convicts


def test_juries_drawn_by_hash_are_poissons() -> None:
    counted, exact = economics.drawn_committees(15, 0.3, 1000), economics.committee(15, 0.3)
    assert counted.missed == pytest.approx(exact.missed, abs=0.015)
    assert counted.blocks == pytest.approx(exact.blocks, abs=0.05)
    assert counted.captures <= 0.02


def test_without_the_honest_an_adversary_needs_half_of_the_expected_seats() -> None:
    for seats in economics.SEATS:
        unopposed = [economics.committee(seats, share).unopposed for share in (*economics.SHARES, 0.5)]
        assert unopposed == sorted(unopposed)
        assert unopposed[-1] == pytest.approx(0.5, abs=0.1)
    counted = economics.drawn_committees(15, 0.3, 1000)
    assert counted.unopposed == pytest.approx(economics.committee(15, 0.3).unopposed, abs=0.03)


def test_a_case_about_nothing_costs_its_accuser_and_pays_nobody() -> None:
    assert economics.bogus_case(1000) == (2.5, 53.5)
    assert [economics.bogus_case(1000, before)[0] for before in range(5)] == [2.5, 5, 10, 20, 20]


@pytest.mark.parametrize("audit", [0.01, 0.05])
@pytest.mark.parametrize("detection", [0.5, 1.0])
def test_cheating_pays_above_the_break_even_and_not_below(audit: float, detection: float) -> None:
    stake, sessions, runs = 10_000.0, 40, 400
    worth = economics.break_even(audit, detection, economics.FIRST, stake)

    def mean(gain: float) -> float:
        return sum(economics.cheater(gain, audit, detection, stake, sessions, seed) for seed in range(runs)) / runs

    assert mean(worth / 2) < 0
    # Later convictions cost ten times as much: far above what even those cost, it pays.
    assert mean(economics.break_even(audit, detection, economics.REPEAT, stake) * 2) > 0


def test_what_a_node_earns_in_the_audited_windows_is_what_it_loses() -> None:
    """A node that cheats in every window, and is found after so many audited ones."""
    assert NodeConfig.model_fields["price"].default == economics.PRICE * 1e18
    for units, audit, stake in ((2, 0.01, 1000.0), (3, 0.05 / 3, 5000.0)):
        windows = economics.audited_windows(economics.PRICE, units, audit, stake)
        earned = 32 * units * economics.PRICE
        assert windows / audit * earned == pytest.approx(economics.FIRST * stake)
        assert earned == pytest.approx(economics.break_even(audit, 1 / windows, economics.FIRST, stake))
    assert int(economics.audited_windows(economics.PRICE, 2, 0.01, 1000)) == 1562
    assert int(economics.audited_windows(economics.PRICE, 3, 0.01, 1000)) == 1041


def test_accusing_pays_who_is_right_two_times_in_three() -> None:
    assert economics.accuser(2, 0.67, 0.33, 1000) > 0
    assert economics.accuser(2, 0.66, 0.34, 1000) < 0


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_nobody_gains_by_dealing_with_itself(share: float) -> None:
    for paid in (1.0, 1e3, 1e9):
        others = paid / share - paid if share else 1e12
        for budget in (0.0, 10.0, 342_465.0):
            assert economics.self_payment(paid, others, budget) < 0
    for slashed in (economics.FIRST, economics.REPEAT, economics.CAP):
        assert economics.self_accusation(1000, share, slashed) <= -economics.BURNED * slashed * 1000
        assert economics.self_acquittal(1000, share, slashed) <= 0


def test_the_tables_are_printed() -> None:
    lines = list(economics.tables(5))
    assert sum(line.startswith((" 15", "   15", "   31", "   61")) for line in lines) == 9
    assert lines[-1].startswith(" " * 21 + "1.0")
