"""Sketches: linear, as precise as was measured, and worth nothing when the challenge is known beforehand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from harness import samples
from tallystick_protocol.errors import ManifestError
from tallystick_protocol.manifest import Manifest
from tallystick_protocol.sketching import statistic
from tallystick_protocol.sketching.logits import compare, scales_of
from tallystick_protocol.sketching.matrix import M, matrix, project
from tallystick_protocol.sketching.rows import ROW_BYTES, Sketches, sketch
from tallystick_protocol.sketching.thresholds import Zone, logits_thresholds, thresholds
from tallystick_protocol.types import Positions, Span

WIDTH, ROWS = 256, 32
AT = Positions(32, 64)


def challenge(number: int) -> bytes:
    return samples.digest(f"challenge {number}")


def drawn(seed: int = 0, count: int = ROWS) -> np.random.Generator:
    return np.random.default_rng(seed)


def window(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows that enter, large beside what is added to them, and those that leave."""
    numbers = drawn(seed)
    x = (15 * numbers.standard_normal((ROWS, WIDTH))).astype(np.float32)
    return x, (x + numbers.standard_normal((ROWS, WIDTH))).astype(np.float32)


def test_the_matrix_is_a_function_of_the_challenge_and_of_nothing_else() -> None:
    s = matrix(bytes(range(32)), 24)
    assert s.shape == (M, 24) and set(np.unique(s)) == {-0.25, 0.25}
    assert "".join("01"[int(value > 0)] for value in s[0]) == "011000000101011001101100"
    assert not np.array_equal(s, matrix(challenge(1), 24))
    assert np.array_equal(matrix(challenge(1), 4096)[0, :24], matrix(challenge(1), 24)[0])
    with pytest.raises(ValueError, match="32 bytes"):
        matrix(b"short", 24)


def test_a_sketch_is_linear_so_that_differences_need_no_rows() -> None:
    x, y = window()
    s = matrix(challenge(0), WIDTH)
    apart = project(y.astype(np.float64) - x, s) - (project(y, s) - project(x, s))
    assert np.abs(apart).max() <= 1e-14 * np.linalg.norm(y, axis=1).max()


def test_holders_of_the_same_bytes_agree_to_1e_14_however_they_sum() -> None:
    x, _ = window()
    s, order = matrix(challenge(0), WIDTH), drawn(3).permutation(WIDTH)
    apart = project(x, s) - project(x[:, order], s[:, order])
    assert np.abs(apart).max() <= 1e-14 * np.linalg.norm(x, axis=1).max()
    one = sketch(challenge(0), AT, x[:1], x[:1])
    assert np.allclose(one.entered, sketch(challenge(0), AT, x, x).entered[:1], rtol=1e-6)


def test_sixteen_values_measure_an_error_to_a_few_percent_over_a_window() -> None:
    x, y = window()
    noise = drawn(1).standard_normal((ROWS, WIDTH))
    for size in (1e-6, 1e-3):
        other = y.astype(np.float64) + size * noise
        true = np.sqrt(np.mean(np.square(size * noise).sum(1) / np.square(other - x).sum(1)))
        found = []
        for number in range(200):
            s = matrix(challenge(number), WIDTH)
            claim, answer = (sketch(challenge(number), AT, x, left) for left in (y, other))
            assert answer.rows.shape == (ROWS, 33) and s.shape[0] == 16
            found.append(statistic.error(claim, answer) / true - 1)
        low, high = np.quantile(found, [0.05, 0.95])
        assert -0.10 < low < -0.03 and 0.03 < high < 0.10, (low, high)
        assert abs(np.mean(found)) < 0.02


def test_an_error_hidden_in_the_null_space_of_a_known_matrix_passes_and_fails_under_a_later_one() -> None:
    x, y = window()
    known, later = challenge(1), challenge(2)
    s = matrix(known, WIDTH)
    bad = drawn(5).standard_normal((ROWS, WIDTH))
    bad -= bad @ np.linalg.pinv(s) @ s  # nothing is left of it under S
    bad *= 0.5 * np.linalg.norm(y - x, axis=1, keepdims=True) / np.linalg.norm(bad, axis=1, keepdims=True)
    lie = (y + bad).astype(np.float32)  # half of what the span adds is wrong
    limits = thresholds(samples.manifest(), Span(0, 2))
    passed = statistic.squares(sketch(known, AT, x, lie), sketch(known, AT, x, y))
    caught = statistic.squares(sketch(later, AT, x, lie), sketch(later, AT, x, y))
    assert limits.zone([passed]) is Zone.CLEAR and statistic.rms(passed) < 1e-6
    assert limits.zone([caught]) is Zone.GUILTY and 0.4 < statistic.rms(caught) < 0.6


def test_the_added_part_is_sketched_because_float32_of_the_whole_spoils_an_fp32_comparison() -> None:
    x, y = window()
    y_else = (y.astype(np.float64) * (1 + 2e-8 * drawn(2).standard_normal((ROWS, WIDTH)))).astype(np.float32)
    s = matrix(challenge(0), WIDTH)
    scale = np.linalg.norm(y_else.astype(np.float64) - x, axis=1)
    whole = np.linalg.norm(project(y, s).astype(np.float32) - project(y, s), axis=1) / scale
    added = np.linalg.norm(project(y - x, s).astype(np.float32) - project(y - x, s), axis=1) / scale
    assert np.sqrt(np.mean(np.square(added))) < 5e-8 < 3e-7 < np.sqrt(np.mean(np.square(whole)))


def test_rows_to_which_nothing_is_added_are_left_out_unless_only_one_says_so() -> None:
    x, y = window()
    y[3] = x[3]
    honest = sketch(challenge(0), AT, x, y)
    assert len(statistic.squares(honest, honest)) == ROWS - 1 and statistic.error(honest, honest) == 0.0
    lie = y.copy()
    lie[3] += 1
    assert statistic.error(sketch(challenge(0), AT, x, lie), honest) == np.inf


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_fail_and_do_not_slip_through_a_comparison(value: float) -> None:
    x, y = window()
    honest = sketch(challenge(0), AT, x, y)
    for column in (0, 20, 32):
        rows = honest.rows.copy()
        rows[5, column] = value
        bad = replace(honest, rows=rows)
        if column == 0:
            assert statistic.input_error(bad, honest) == np.inf or statistic.input_error(honest, bad) == np.inf
            assert not statistic.is_linked(bad, honest)
        else:
            assert statistic.error(honest, bad) == np.inf
            assert thresholds(samples.manifest(), Span(0, 2)).zone([statistic.squares(honest, bad)]) is Zone.GUILTY
        with pytest.raises(ValueError, match="NaN, infinity"):
            Sketches.from_bytes(challenge(0), AT, bad.to_bytes())


def test_neighbours_tell_one_story_and_one_changed_row_breaks_it() -> None:
    x, y = window()
    for scale in (1.0, 1e-3, 1e4):
        into, out = (scale * x).astype(np.float32), (scale * y).astype(np.float32)
        before, after = sketch(challenge(0), AT, into, out), sketch(challenge(0), AT, out, out)
        assert statistic.is_linked(before, after)
        out[7, 3] *= 1 + 1e-5
        assert not statistic.is_linked(before, sketch(challenge(0), AT, out, out))


def test_a_scale_that_is_understated_is_noticed() -> None:
    x, y = window()
    honest = sketch(challenge(0), AT, x, y)
    assert statistic.states_its_scale(honest)
    rows = honest.rows.copy()
    rows[2, 32] /= 100
    assert not statistic.states_its_scale(replace(honest, rows=rows))


def test_bytes_and_root_bind_challenge_positions_and_every_value() -> None:
    x, y = window()
    made = sketch(challenge(0), AT, x, y)
    again = Sketches.from_bytes(challenge(0), AT, made.to_bytes())
    assert len(made.to_bytes()) == ROWS * ROW_BYTES == ROWS * 132 and again.root == made.root
    changed = made.rows.copy()
    changed[31, 32] += 1
    others = (
        replace(made, challenge=challenge(1)), replace(made, positions=Positions(0, 32)), replace(made, rows=changed)
    )  # fmt: skip
    assert len({made.root, *(other.root for other in others)}) == 4
    with pytest.raises(ValueError, match="32 positions"):
        Sketches.from_bytes(challenge(0), AT, made.to_bytes()[4:])


# -- zones


def errors(size: float, rows: int = ROWS) -> np.ndarray:
    return np.full(rows, size**2)


def test_each_numerics_has_its_own_zones() -> None:
    fp32 = thresholds(samples.manifest(), Span(0, 2))
    assert [fp32.zone([errors(e, 3)]) for e in (8e-7, 2e-5, 1.4e-3)] == [Zone.CLEAR, Zone.BETWEEN, Zone.GUILTY]
    bf16w = thresholds(samples.manifest(numerics="bf16w"), Span(0, 2))
    honest, int8, int4 = errors(9e-4), errors(4e-3), errors(4e-2)
    assert bf16w.zone([honest]) is Zone.CLEAR and bf16w.zone([int8]) is Zone.BETWEEN
    assert bf16w.zone([int4]) is Zone.BETWEEN, "32 rows are too few for it"
    assert bf16w.zone([int4] * 4) is Zone.GUILTY
    assert bf16w.zone([errors(0.1)]) is Zone.GUILTY, "so much is never noise"
    assert bf16w.zone([int8] * 7) is Zone.BETWEEN and bf16w.zone([int8] * 8) is Zone.GUILTY
    assert bf16w.zone([honest] * 8) is Zone.CLEAR
    assert thresholds(samples.manifest(numerics="bf16w"), Span(0, 5)).median is None


def test_a_manifest_tightens_clear_and_cannot_loosen_it() -> None:
    tight, loose = samples.manifest(clear=1e-6), samples.manifest(clear=0.5)
    assert thresholds(tight, Span(0, 1)).clear == 1e-6
    assert thresholds(loose, Span(0, 1)) == thresholds(samples.manifest(), Span(0, 1))
    assert Manifest.from_bytes(tight.to_bytes()) == tight
    assert b'"clear"' not in samples.manifest().to_bytes()
    with pytest.raises(ManifestError, match="clear"):
        Manifest.from_bytes(samples.manifest(clear=2.0).to_bytes())
    with pytest.raises(ManifestError):
        Manifest.from_bytes(samples.manifest().to_bytes().replace(b'"config"', b'"clear":null,"config"'))


# -- logits


def top(values: dict[int, float]) -> bytes:
    pairs = np.array(
        sorted(values.items(), key=lambda pair: (-pair[1], pair[0])), dtype=[("id", "<u4"), ("value", "<f4")]
    )
    return pairs.tobytes()


def test_results_are_compared_by_id_and_an_id_that_only_the_auditor_has_must_be_at_the_edge() -> None:
    claimed, recomputed = top({7: 4.0, 2: 3.0, 9: 1.0}), top({7: 4.0, 2: 3.0, 5: 1.00001})
    apart = compare([claimed, b""], [recomputed, b""], [2.0, 0.0], ranked=True)
    assert apart.num_rows == 1 and apart.row == 0.0 and apart.edge == pytest.approx(5e-6, rel=0.01)
    assert logits_thresholds(samples.manifest()).zone(apart) is Zone.CLEAR
    hidden = compare([claimed], [top({7: 4.0, 2: 3.0, 5: 3.5})], [2.0], ranked=True)
    assert hidden.edge == pytest.approx(1.25)
    assert logits_thresholds(samples.manifest()).zone(hidden) is Zone.GUILTY
    swapped = compare([claimed], [top({7: 3.0, 2: 4.0, 9: 1.0})], [2.0], ranked=True)
    assert swapped.row == pytest.approx(np.sqrt(0.5 / 3), rel=1e-6)


def test_results_of_another_form_or_without_a_scale_are_infinitely_far_apart() -> None:
    row = top({7: 4.0, 2: 3.0})
    assert compare([row], [b""], [1.0], ranked=True).row == np.inf
    assert compare([row], [top({7: 4.5, 2: 3.0})], [0.0], ranked=True).row == np.inf
    assert compare([row], [row], [0.0], ranked=True).row == 0.0
    nan = np.array([np.nan, 1.0], dtype="<f4").tobytes()
    apart = compare([nan], [np.array([0.0, 1.0], dtype="<f4").tobytes()], [1.0], ranked=False)
    assert logits_thresholds(samples.manifest()).zone(apart) is Zone.GUILTY


def test_the_window_counts_when_half_of_it_is_there() -> None:
    one, other = top({7: 4.0, 2: 3.0}), top({7: 4.000001, 2: 3.000001})
    limits = logits_thresholds(samples.manifest())
    few, many = (compare([one] * n, [other] * n, [1.0] * n, ranked=True) for n in (2, 16))
    assert 5e-7 < few.row < 2e-6
    assert limits.zone(few) is Zone.CLEAR and limits.zone(many) is Zone.BETWEEN


def test_a_constant_means_nothing_to_logits_and_something_to_scores() -> None:
    values = np.array([[1.0, 3.0], [11.0, 13.0]], dtype=np.float32)
    assert scales_of(values, True).tolist() == [1.0, 1.0]
    assert scales_of(values, False).tolist() == pytest.approx([np.sqrt(5), np.sqrt(145)])
