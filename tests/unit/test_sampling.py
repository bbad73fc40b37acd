"""Choosing tokens: against a plain reference, deterministic per position, hostile rows refused."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from tallystick_protocol.errors import ConfigError, CorruptResult
from tallystick_protocol.sampling import Sampling, distribution, parse_top_k, pick

LOGITS = [4.0, 3.5, 3.5, 2.0, 1.0, 0.0, -1.0, -30.0]
IDS = [7, 3, 9, 0, 2, 1, 5, 8]


def row(ids: Sequence[int], values: Sequence[float]) -> bytes:
    pairs = np.array(list(zip(ids, values, strict=True)), dtype=[("id", "<u4"), ("value", "<f4")])
    return pairs.tobytes()


ROW = row(IDS, LOGITS)


def reference(logits: Sequence[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """Plain floats: soften, cut to k, cut to the fewest that reach p, scale to one."""
    kept = list(logits)[: top_k or len(logits)]
    weights = [math.exp((value - kept[0]) / temperature) for value in kept]
    shares = [weight / sum(weights) for weight in weights]
    nucleus: list[float] = []
    for share in shares:
        if sum(nucleus) >= top_p and top_p < 1.0:
            break
        nucleus.append(share)
    return [share / sum(nucleus) for share in nucleus]


def test_temperature_zero_takes_the_largest_logit_whatever_the_seed() -> None:
    assert {pick(ROW, Sampling(seed=seed, top_k=5, top_p=0.5), seed) for seed in range(20)} == {7}


@pytest.mark.parametrize("temperature", [0.1, 0.7, 1.0, 2.5, 100.0])
@pytest.mark.parametrize("top_k", [0, 1, 3, 8, 100])
@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.5, 0.9, 0.999, 1.0])
def test_the_distribution_is_that_of_a_plain_reference(temperature: float, top_k: int, top_p: float) -> None:
    found = distribution(np.array(LOGITS, dtype=np.float32), Sampling(temperature, top_k, top_p))
    assert found.tolist() == pytest.approx(reference(LOGITS, temperature, top_k, top_p), abs=1e-12)


def test_top_p_keeps_the_token_that_reaches_p_and_none_after_it() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.125], dtype=np.float64)).astype(np.float32)
    sizes = {p: len(distribution(logits, Sampling(1.0, 0, p))) for p in (0.49, 0.51, 0.74, 0.76, 0.99)}
    assert sizes == {0.49: 1, 0.51: 2, 0.74: 2, 0.76: 3, 0.99: 4}


def test_top_p_that_is_reached_exactly_is_enough() -> None:
    assert len(distribution(np.zeros(4, dtype=np.float32), Sampling(1.0, 0, 0.5))) == 2


def test_draws_follow_the_distribution() -> None:
    sampling = Sampling(temperature=1.0, seed=1)
    draws = np.array([IDS.index(pick(ROW, sampling, position)) for position in range(6000)])
    counts = np.bincount(draws, minlength=len(IDS))
    expected = np.array(reference(LOGITS, 1.0, 0, 1.0)) * len(draws)
    likely = expected > 5
    chi_square = float((((counts - expected) ** 2) / expected)[likely].sum())
    assert chi_square < 24.3  # 7 degrees of freedom: one in a thousand
    assert counts[~likely].sum() < 5


def test_a_position_is_drawn_alike_whatever_was_drawn_before() -> None:
    sampling = Sampling(temperature=1.0, seed=5)
    forward = [pick(ROW, sampling, position) for position in range(50)]
    backward = [pick(ROW, sampling, position) for position in reversed(range(50))]
    assert forward == backward[::-1]
    assert len(set(forward)) > 2


def test_the_draws_of_a_seed_are_pinned() -> None:
    sampling = Sampling(temperature=1.0, seed=42)
    assert [pick(ROW, sampling, position) for position in range(12)] == PINNED


PINNED = [9, 3, 3, 9, 9, 7, 7, 3, 7, 0, 7, 0]


def test_seeds_and_positions_draw_independently() -> None:
    a = [pick(ROW, Sampling(temperature=1.0, seed=1), position) for position in range(64)]
    b = [pick(ROW, Sampling(temperature=1.0, seed=2), position) for position in range(64)]
    shifted = [pick(ROW, Sampling(temperature=1.0, seed=1), position + 1) for position in range(63)]
    assert a != b
    assert a[:63] != shifted[:63]


def test_the_largest_seed_and_position_are_taken() -> None:
    assert pick(ROW, Sampling(temperature=1.0, seed=(1 << 64) - 1), (1 << 22) - 1) in IDS


@pytest.mark.parametrize("temperature", [5e-324, 1e-308, 1e-30])
def test_a_tiny_temperature_is_greedy_and_not_nan(temperature: float) -> None:
    sampling = Sampling(temperature=temperature)
    assert distribution(np.array(LOGITS, dtype=np.float32), sampling)[0] == 1.0
    assert pick(ROW, sampling, 3) == 7


def test_equal_logits_share_a_tiny_temperature() -> None:
    tied = row([3, 9], [3.5, 3.5])
    assert {pick(tied, Sampling(temperature=1e-308), position) for position in range(40)} == {3, 9}


def test_one_logit_is_certain() -> None:
    for sampling in (Sampling(), Sampling(1.0), Sampling(1.0, 1, 1e-9)):
        assert pick(row([5], [-3.0]), sampling, 0) == 5


def test_logits_at_the_ends_of_float32_give_finite_probabilities() -> None:
    largest = float(np.finfo(np.float32).max)
    found = distribution(np.array([largest, 0.0, -largest], dtype=np.float32), Sampling(temperature=0.5))
    assert found.tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "bad",
    {
        "empty": b"",
        "half a pair": ROW[:-4],
        "a byte too many": ROW + b"\0",
        "NaN first": row([1, 2], [float("nan"), 1.0]),
        "NaN later": row([1, 2], [1.0, float("nan")]),
        "infinity": row([1, 2], [float("inf"), 1.0]),
        "minus infinity": row([1, 2], [1.0, float("-inf")]),
        "ascending": row([1, 2], [1.0, 2.0]),
        "equal values out of order": row([2, 1], [1.0, 1.0]),
        "an id twice": row([1, 1], [2.0, 1.0]),
        "an id twice with equal values": row([1, 1], [1.0, 1.0]),
    }.items(),
    ids=lambda pair: pair[0],
)
def test_a_row_that_is_no_top_k_row_is_a_corrupt_result(bad: tuple[str, bytes]) -> None:
    for sampling in (Sampling(), Sampling(1.0)):
        with pytest.raises(CorruptResult):
            pick(bad[1], sampling, 0)


def test_a_row_is_parsed_as_it_was_written() -> None:
    ids, values = parse_top_k(ROW)
    assert ids.tolist() == IDS
    assert values.tolist() == LOGITS


@pytest.mark.parametrize(
    "values",
    [{"temperature": -0.1}, {"temperature": 100.1}, {"temperature": float("nan")}, {"temperature": float("inf")},
     {"top_p": 0.0}, {"top_p": 1.01}, {"top_p": -1.0}, {"top_p": float("nan")}, {"top_k": -1}, {"top_k": (1 << 20) + 1},
     {"seed": -1}, {"seed": 1 << 64}],
    ids=str,
)  # fmt: skip
def test_settings_out_of_range_are_a_config_error(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Sampling(**values)  # type: ignore[arg-type]
