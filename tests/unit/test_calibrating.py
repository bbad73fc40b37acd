"""From measured errors to thresholds: tighter than the protocol's or refused, and true for texts that were left out."""

from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest

from harness import samples
from tallystick_model.calibrating.cheaters import CHEATERS, fitting
from tallystick_model.calibrating.judging import Judged, calibrated, judge
from tallystick_model.calibrating.measuring import Measured, spans_of
from tallystick_model.calibrating.report import HEAD, plot, rows, values
from tallystick_protocol.errors import ConfigError
from tallystick_protocol.manifest import Manifest, Margin
from tallystick_protocol.sketching.accumulating import MEANS, level, scores
from tallystick_protocol.types import Span

SPAN, END = Span(0, 1), Span(1, 2)
TEXTS, WINDOWS = 10, 16


def around(size: float, spread: float = 0.1, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return size * np.exp(draw.normal(0.0, spread, (TEXTS, WINDOWS)))


def measured(honest: np.ndarray, span: Span = SPAN, quiet: float = 0.85, **cheaters: np.ndarray) -> Measured:
    """quiet: what three quarters of an honest window's rows exceed, relative to the window's error."""

    def both(errors: np.ndarray, part: float = 0.85) -> np.ndarray:
        return np.stack([errors, part * errors], axis=-1)

    shown = {name: both(errors) for name, errors in cheaters.items()}
    return Measured(span, 1, {"a / b": both(honest, quiet)}, {"a": both(1.1 * honest)}, shown)


def rounding() -> np.ndarray:
    """As in `bf16w`: half of the windows agree exactly, the others differ by a few roundings."""
    draw = np.random.default_rng(3)
    return np.where(draw.random((TEXTS, WINDOWS)) < 0.5, 0.0, around(4e-4, 0.35, 4))


@pytest.mark.parametrize("honest", [around(3e-7), rounding()], ids=["fp32", "bf16w"])
def test_levels_hold_for_honest_windows_that_were_not_looked_at(honest: np.ndarray) -> None:
    found = judge(measured(honest))
    assert honest.max() < found.level.rare < 3 * honest.max() and found.level.usual <= found.level.rare
    again = rounding() if (honest == 0).any() else around(3e-7, seed=9)
    means = np.mean([scores(float(error), 0.85 * float(error), found.level) for error in again.ravel()], axis=0)
    assert all(means <= MEANS) and all(np.array(found.held_out) <= MEANS)
    assert found.windows == TEXTS * WINDOWS and found.exact == pytest.approx((honest == 0).mean())
    assert found.stock == pytest.approx(1.1 * honest.max())


def test_what_is_far_above_takes_four_windows_and_what_is_among_the_noise_takes_more() -> None:
    honest = rounding()
    worst = float(honest.max())
    found = judge(measured(honest, gross=around(10 * worst), near=around(0.9 * worst, 0.05), none=honest)).cheaters
    assert found["gross"].windows == 4
    assert found["near"].windows is not None and 4 < found["near"].windows <= 40
    assert found["none"].windows is None, "an honest node is not found"


def test_an_error_in_every_row_is_found_among_windows_that_err_as_much_in_a_few() -> None:
    """An error just under the tolerance: half of the honest rows have none at all, its rows all have one."""
    honest, near = rounding(), around(4e-4, 0.05)
    spread, quiet = judge(measured(honest, near=near)), judge(measured(honest, quiet=0.0, near=near))
    assert spread.cheaters["near"].windows is None or spread.cheaters["near"].windows > 40
    assert quiet.cheaters["near"].windows is not None and quiet.cheaters["near"].windows <= 11
    assert quiet.level.quiet == pytest.approx(quiet.level.rare / 8, rel=0.02), "no less: other devices may err in all"


def test_one_text_that_is_unlike_the_others_widens_the_level() -> None:
    odd = around(3e-7)
    odd[4, :8] *= 1.6
    plain, wide = judge(measured(around(3e-7))), judge(measured(odd))
    assert wide.level.rare > 1.2 * plain.level.rare and wide.held_out[0] <= MEANS[0]
    odd[4] *= 1e4
    with pytest.raises(ConfigError, match="more of them"):
        judge(measured(odd))
    for few in (odd[:1], odd[:6]):
        with pytest.raises(ConfigError, match="two texts and 100 windows"):
            judge(measured(few))


def judged(rare: float, span: Span = SPAN) -> Judged:
    return judge(measured(around(rare / 2), span, int8=around(4e-3), noise=around(1.0)))


def test_a_manifest_gets_margins_and_a_tighter_clear() -> None:
    before = samples.manifest()
    made = calibrated(before, [judged(6e-7), judged(4e-7, END)])
    assert [(one.start, one.end) for one in made.margins] == [(0, 1), (1, 2)]
    assert made.clear is not None and made.clear < 5e-6, "less than the protocol's"
    assert Manifest.from_bytes(made.to_bytes()) == made and made.model_id != before.model_id
    assert level(made, SPAN).rare < level(before, SPAN).rare
    assert made.weights == before.weights, "the same pieces"


def test_thresholds_are_never_loosened() -> None:
    with pytest.raises(ConfigError, match="protocol's levels"):
        calibrated(samples.manifest(), [judged(2e-4)])
    tight = calibrated(samples.manifest(), [judged(6e-7)])
    with pytest.raises(ConfigError, match="never loosened"):
        calibrated(tight, [judged(2e-6)])
    with pytest.raises(ConfigError, match="less than honest nodes err"):
        calibrated(replace(samples.manifest(), clear=1e-7), [judged(6e-7)])
    again = calibrated(tight, [judged(4e-7, END)])
    assert set(tight.margins) < set(again.margins), "what was measured before stays"
    assert again.clear == pytest.approx(tight.clear or 0, rel=0.5)


def test_the_usual_level_is_not_loosened_either() -> None:
    tight = replace(samples.manifest(), margins=(Margin(0, 1, 4e-6, 1e-8),))
    assert calibrated(tight, [judged(6e-7)]).margins[0].usual == 1e-8
    quiet = replace(samples.manifest(), margins=(Margin(0, 1, 4e-6, 1e-6, 1e-8),))
    assert calibrated(quiet, [judged(6e-7)]).margins[0].quiet == 1e-8


def test_a_noise_above_clear_leaves_clear_to_the_protocol() -> None:
    manifest = samples.manifest(numerics="bf16w")
    made = calibrated(manifest, [judged(2.4e-3)])
    assert made.clear is None and made.margins


def test_spans_of_these_lengths() -> None:
    manifest = samples.manifest()
    assert spans_of(manifest, [1, 2]) == [Span(0, 1), Span(0, 2), Span(1, 2)]
    with pytest.raises(ConfigError, match="no spans"):
        spans_of(manifest, [3])
    with pytest.raises(ConfigError, match="encoder"):
        spans_of(replace(manifest, encoder_layers=1), [1])
    assert set(fitting(1)) < set(fitting(2)) == set(CHEATERS)


def test_the_plot_is_xml_with_named_axes_powers_of_ten_and_every_cheater() -> None:
    manifest, found = samples.manifest(name="a < b & c"), [judged(6e-7), judged(4e-7, END)]
    tree = ElementTree.fromstring(plot(manifest, found))
    texts = [node.text or "" for node in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert any("a < b & c" in text for text in texts)
    assert {"layers of the span", "error of a window, relative to what the span adds"} <= set(texts)
    assert {"int8", "noise", "[0, 1)", "[1, 2)", "1e-7", "1e-2", "protocol: guilty"} <= set(texts)
    heights = {float(node.get("cy") or 0) for node in tree.iter("{http://www.w3.org/2000/svg}circle")}
    assert len(heights) == 2 and max(heights) - min(heights) > 100, "errors of 4e-3 and 1 are far apart"
    assert all(0 <= height <= 520 for height in heights)


def test_the_table_names_the_weakest_cheater_and_the_values_hold_everything() -> None:
    found = [judged(6e-7)]
    row = dict(zip(HEAD, rows(found)[0], strict=True))
    assert row["weakest cheater"].startswith("int8") and row["found in"] == "4" and row["layers"] == "[0, 1)"
    (told,) = values(found)
    assert told["layers"] == [0, 1] and told["cheaters"]["int8"]["windows_to_99"] == 4
