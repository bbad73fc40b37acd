"""Slow evidence: an honest pair is never found to disagree, a cheater under the zones is, after so many windows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from harness import samples
from tallystick.routing.suspicions import FORGOTTEN_AFTER_S, MAX_SEEN, Pair, Side, Suspicions
from tallystick_protocol.errors import ManifestError
from tallystick_protocol.manifest import Manifest, Margin
from tallystick_protocol.sketching import statistic
from tallystick_protocol.sketching.accumulating import BETS, ERROR, MEANS, Capital, Level, Scores, level, scores
from tallystick_protocol.sketching.thresholds import thresholds
from tallystick_protocol.types import Digest, ModelId, Span

SPAN = Span(0, 2)


def alike(values: Iterable[float]) -> list[Scores]:
    """Windows that score the same by all levels."""
    return [(float(one), float(one), float(one)) for one in values]


def windows_needed(windows: Sequence[Scores], before: Capital | None = None) -> int | None:
    capital = before or Capital()
    for number, one in enumerate(windows, 1):
        capital = capital.after(one)
        if capital.is_conclusive:
            return number
    return None


def to_99(draw: np.random.Generator, shape: Callable[[np.random.Generator], Sequence[Scores]]) -> int:
    """Windows after which 99 of 100 pairs are found."""
    needed = [windows_needed(shape(draw)) for _ in range(200)]
    counts = sorted(400 if one is None else one for one in needed)
    return counts[math.ceil(0.99 * len(counts)) - 1]


def test_a_score_is_nothing_up_to_the_level_and_one_from_half_as_much_again() -> None:
    levels = Level(1e-6, 1e-7, 1e-8)
    found = [scores(error, 0.0, levels) for error in (0.0, 1e-7, 1.5e-7, 1e-6, 1.5e-6, 1.0, math.inf, math.nan)]
    assert [one[:2] for one in found] == [(0, 0), (0, 0), (0, 1), (0, 1), (1, 1), (1, 1), (1, 1), (1, 1)]
    assert {one[2] for one in found} == {0}
    assert [scores(0.0, quiet, levels) for quiet in (1e-8, 1.6e-8, math.nan)] == [(0, 0, 0), (0, 0, 1), (0, 0, 1)]
    half = math.sqrt(1.5) * 1e-6
    assert scores(half, half, Level(1e-6, 1e-6, 1e-6)) == pytest.approx((0.5, 0.5, 0.5))


def test_quiet_is_what_three_quarters_of_the_rows_exceed() -> None:
    """A few rows that err much make no quiet window loud; rows that all err a little do."""
    spikes, noise = np.zeros(32), np.full(32, 1e-6)
    spikes[:23] = 1.0
    assert statistic.quiet(spikes) == 0.0 and statistic.rms(spikes) > 0.8
    assert statistic.quiet(noise) == pytest.approx(1e-3) and statistic.rms(noise) == pytest.approx(1e-3)
    spikes[:25] = 1.0
    assert statistic.quiet(spikes) == 1.0
    assert statistic.quiet([]) == 0.0 and statistic.quiet(np.array([0.0, np.inf, np.inf])) == 0.0
    assert statistic.quiet(np.array([np.inf, np.inf])) == np.inf


def test_the_capital_of_an_honest_pair_does_not_grow_on_average_whatever_the_scores_look_like() -> None:
    """Ville's inequality needs no more; the bound is met with equality by the scores that are worst."""
    rare, usual, quiet = MEANS
    assert usual == quiet
    worst: list[list[tuple[Scores, float]]] = [
        [((1.0, 1.0, 1.0), rare), ((0.0, 1.0, 1.0), usual - rare), ((0.0, 0.0, 0.0), 1 - usual)],
        [((1.0, 1.0, 0.0), rare), ((0.0, 1.0, 0.0), usual - rare), ((0.0, 0.0, 1.0), quiet), ((0.0, 0.0, 0.0), 0.6)],
        [((0.5, 0.5, 0.5), 2 * rare), ((0.0, 0.5, 0.5), 2 * usual - 2 * rare), ((0.0, 0.0, 0.0), 1 - 2 * usual)],
        [(MEANS, 1.0)],
    ]
    for chances in worst:
        for length in (1, 2, 3):
            total = 0.0
            for path in itertools.product(chances, repeat=length):
                capital = Capital()
                for one, _ in path:
                    capital = capital.after(one)
                total += math.prod(chance for _, chance in path) * capital.total
            assert total == pytest.approx(1 - 1 / (length + 1), rel=1e-9), "what has entered by then"
    assert all(0 <= bet <= 1 / MEANS[which] for which, bet in BETS) and pytest.approx(1e-6) == ERROR


@pytest.mark.parametrize("kind", ["zeros and spikes", "normal", "the worst that is allowed", "in runs"])
def test_no_honest_pair_is_found_in_ten_thousand_windows(kind: str) -> None:
    draw = np.random.default_rng(7)
    level = Level(10.0, 1.0, 1.0)
    for _ in range(3):
        if kind == "zeros and spikes":  # bf16w: half of the windows agree exactly
            errors = np.where(draw.random(10_000) < 0.5, 0.0, np.exp(draw.normal(-0.5, 0.7, 10_000)))
        elif kind == "normal":
            errors = np.exp(draw.normal(-0.35, 0.15, 10_000))
        elif kind == "the worst that is allowed":
            coin = draw.random(10_000)
            errors = np.where(coin < MEANS[0], 20.0, np.where(coin < MEANS[1], 2.0, 0.0))
        else:  # windows that follow a bad one are bad more often, a hundredth of all at most
            state, runs = 0, []
            for coin in draw.random(10_000):
                state = int(coin < (0.02 if state else 0.0098))
                runs.append(20.0 if state else 0.1)
            errors = np.array(runs)
        assert windows_needed([scores(float(one), float(one), level) for one in errors]) is None


def test_how_many_windows_it_takes() -> None:
    """The figures of docs/verification.md."""
    draw = np.random.default_rng(1)
    full = to_99(draw, lambda _: alike([1.0] * 50))
    half = to_99(draw, lambda _: alike([0.5] * 50))
    usual = to_99(draw, lambda _: [(0.0, 1.0, 0.0)] * 50)
    quiet = to_99(draw, lambda _: [(0.0, 0.0, 1.0)] * 50)
    seldom = to_99(draw, lambda g: [(float(coin < 0.2), 0.0, 0.0) for coin in g.random(400)])
    assert (full, half, usual, quiet) == (4, 5, 11, 11)
    assert seldom == pytest.approx(83, abs=15)


def test_a_good_past_does_not_hide_a_node_that_begins_to_cheat() -> None:
    past = Capital()
    for _ in range(5_000):
        past = past.after((0.0, 0.0, 0.0))
    late = windows_needed(alike([1.0] * 50), past)
    assert late is not None and late <= 10


def test_levels_are_the_protocols_and_a_manifest_may_only_lower_them() -> None:
    plain = samples.manifest(numerics="bf16w")
    tight = replace(plain, margins=(Margin(0, 2, 1e-5, 1e-6), Margin(1, 2, 0.5, 0.5)))
    assert level(tight, SPAN) == Level(1e-5, 1e-6, 1e-5) and level(tight, Span(1, 2)) == level(plain, Span(1, 2))
    quiet = replace(plain, margins=(Margin(0, 2, 1e-5, 1e-6, 2e-6), Margin(1, 2, 0.5, 0.5, 0.5)))
    assert level(quiet, SPAN) == Level(1e-5, 1e-6, 2e-6) and level(quiet, Span(1, 2)) == level(plain, Span(1, 2))
    assert Manifest.from_bytes(quiet.to_bytes()) == quiet
    assert level(tight, Span(0, 1)) == level(plain, Span(0, 1)), "another span than those that were measured"
    assert Manifest.from_bytes(tight.to_bytes()) == tight and b"margins" not in plain.to_bytes()
    bad = [
        (Margin(1, 2, 0.1, 0.1), Margin(0, 2, 0.1, 0.1)), (Margin(0, 1, 2.0, 0.1),), (Margin(0, 9, 0.1, 0.1),),
        (Margin(1, 1, 0.1, 0.1),), (Margin(0, 1, 0.1, 0.2),), (Margin(0, 1, 0.1, 0.1, 0.2),),
        (Margin(0, 1, 0.1, 0.1, 0.0),),
    ]  # fmt: skip
    for margins in bad:
        with pytest.raises(ManifestError, match="margin"):
            Manifest.from_bytes(replace(plain, margins=margins).to_bytes())
    with pytest.raises(ManifestError):
        Manifest.from_bytes(plain.to_bytes().replace(b'"max_length"', b'"margins":[],"max_length"'))


@pytest.mark.parametrize("numerics", ["fp32", "bf16w"])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_an_uncalibrated_level_is_not_below_what_is_clear_and_its_full_score_not_above_what_convicts(
    numerics: str, layers: int
) -> None:
    manifest = samples.manifest(numerics=numerics, layers=8)
    limits, lowest = thresholds(manifest, Span(0, layers)), level(manifest, Span(0, layers)).usual
    assert limits.clear <= lowest and 1.5 * lowest <= limits.guilty


# -- what a client remembers


MODEL = ModelId(bytes([170]) * 32)
HOP, OTHER, FIRST, SECOND = (samples.address(name) for name in ("hop", "other hop", "one", "two"))


def pair(hop: str, auditor: str, span: Span = SPAN, operator: str | None = None) -> Pair:
    one, other = samples.address(hop), samples.address(auditor)
    owner = other if operator is None else samples.address(operator)
    return Pair(MODEL.hex(), span, Side(one, one), Side(other, owner))


def rows(number: int) -> Digest:
    return Digest(number.to_bytes(32, "big"))


def disagree(book: Suspicions, one: Pair, windows: int = 6) -> None:
    for _ in range(windows):
        book.note(one, rows(len(book._seen)), (1.0, 1.0, 1.0))


def test_who_disagrees_with_two_other_operators_is_avoided_and_they_are_not() -> None:
    book = Suspicions()
    disagree(book, pair("cheater", "one"))
    assert book.avoided(MODEL) == set(), "one of the two, but which?"
    disagree(book, pair("cheater", "two", operator="one"))
    assert book.avoided(MODEL) == set(), "one operator is one voice"
    disagree(book, pair("cheater", "three"))
    assert book.avoided(MODEL) == {samples.address("cheater")}
    assert book.avoided(ModelId(bytes(32))) == set(), "of another model, whose thresholds somebody else wrote"


def test_an_auditor_that_lies_is_the_one_that_is_avoided() -> None:
    book = Suspicions()
    for hop in ("one", "two", "three"):
        disagree(book, pair(hop, "liar"))
    assert book.avoided(MODEL) == {samples.address("liar")}


def test_two_cheaters_over_the_same_layers_do_not_make_their_auditors_suspect() -> None:
    book = Suspicions()
    for cheater in ("bad", "worse"):
        for auditor in ("one", "two", "three"):
            disagree(book, pair(cheater, auditor))
    assert book.avoided(MODEL) == {samples.address("bad"), samples.address("worse")}
    tied = Suspicions()
    for cheater in ("bad", "worse"):
        for auditor in ("one", "two"):
            disagree(tied, pair(cheater, auditor))
    assert tied.avoided(MODEL) == set(), "two against two: nobody can say"


def test_pairs_over_other_layers_do_not_add_up() -> None:
    book = Suspicions()
    disagree(book, pair("hop", "one", Span(0, 2)))
    disagree(book, pair("hop", "two", Span(2, 4)))
    assert book.avoided(MODEL) == set()


def test_the_same_rows_count_once() -> None:
    book, one = Suspicions(), pair("hop", "one")
    for _ in range(100):
        book.note(one, rows(1), (1.0, 1.0, 1.0))
    assert book.of(one).windows == 1 and not book.of(one).is_conclusive
    for number in range(2, MAX_SEEN + 100):
        book.note(one, rows(number), (0.0, 0.0, 0.0))
    assert len(book._seen) == MAX_SEEN


def test_a_suspect_is_one_before_it_is_avoided() -> None:
    book, one = Suspicions(), pair("hop", "one")
    disagree(book, one, 2)
    assert book.is_suspect(MODEL, one.hop.node, SPAN) and not book.of(one).is_conclusive
    assert not book.is_suspect(MODEL, one.auditor.node, SPAN) and not book.is_suspect(MODEL, one.hop.node, Span(2, 4))


def test_it_is_kept_merged_and_forgotten(tmp_path: Path) -> None:
    now, path = [1_000.0], tmp_path / "suspicions.json"
    first = Suspicions(path, lambda: now[0])
    disagree(first, pair("cheater", "one"))
    second = Suspicions(path, lambda: now[0])
    disagree(second, pair("cheater", "two"))
    first.save()
    second.save()
    third = Suspicions(path, lambda: now[0])
    assert third.avoided(MODEL) == {samples.address("cheater")} and len(third) == 2
    assert third.of(pair("cheater", "one")).windows == 6
    third.note(pair("cheater", "two"), rows(0), (1.0, 1.0, 1.0))
    assert third.of(pair("cheater", "two")).windows == 6, "its rows are known"
    now[0] += FORGOTTEN_AFTER_S + 1
    assert third.avoided(MODEL) == set() and third.of(pair("cheater", "one")) == Capital()
    third.save()
    assert len(Suspicions(path, lambda: now[0])) == 0


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"version": 1}', '{"version": 2, "pairs": [{}], "seen": []}', "NaN"])
def test_what_is_not_ours_is_started_anew(tmp_path: Path, text: str) -> None:
    path = tmp_path / "suspicions.json"
    path.write_text(text)
    assert len(Suspicions(path)) == 0
    path.write_text('{"version": 2, "seen": [], "pairs": [{"model": "a", "span": [0, 2], "at": 1, "windows": 3,'
                    ' "sides": [["a", "a"], ["b", "b"]], "bets": [NaN, 1, 1, 1, 1, 1, 1, 1]}]}')  # fmt: skip
    assert len(Suspicions(path)) == 0
