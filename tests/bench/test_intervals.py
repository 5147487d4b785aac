"""Intervals on series whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from ldmrt.bench.intervals import Ratio, median_of_ratios, ratio_of_medians, verdict


def test_of_constant_series_there_is_no_doubt() -> None:
    found = ratio_of_medians([3.0] * 9, [2.0] * 9)
    assert (found.low, found.value, found.high) == (1.5, 1.5, 1.5)
    assert str(found) == "1.500 (1.500 to 1.500)"


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    """The true ratio of medians is 1.2. The percentile bootstrap of a median is a little narrow at 15 runs: 88 % are asked for, of 95."""
    random = np.random.default_rng(5)
    held = 0
    for _ in range(200):
        found = ratio_of_medians(
            list(1.2 * random.lognormal(sigma=0.1, size=15)), list(random.lognormal(sigma=0.1, size=15))
        )
        assert found.low <= found.value <= found.high
        held += found.low <= 1.2 <= found.high
    assert 0.88 <= held / 200 <= 0.995


def test_the_same_series_give_the_same_interval() -> None:
    random = np.random.default_rng(6)
    a, b = list(random.lognormal(size=9)), list(random.lognormal(size=9))
    assert ratio_of_medians(a, b) == ratio_of_medians(a, b)


def test_what_hits_a_whole_round_leaves_the_ratio_of_rounds_alone() -> None:
    """The machine halves its speed in every other round: times scatter by two, their ratio does not."""
    base = [1.0, 2.0] * 5
    found = median_of_ratios([1.5 * seconds for seconds in base], base)
    assert (found.low, found.value, found.high) == (1.5, 1.5, 1.5)
    apart = ratio_of_medians([1.5 * seconds for seconds in base], base)
    assert apart.high - apart.low > 1


@pytest.mark.parametrize(
    ("low", "high", "runs", "drift", "expected"),
    [
        (0.8, 0.9, 5, 1.0, "faster"),
        (1.1, 1.2, 5, 1.0, "slower"),
        (0.9, 1.1, 99, 1.0, "noise"),
        (0.8, 0.9, 4, 1.0, "noise"),  # too few runs
        (0.8, 0.9, 5, 1.2, "noise"),  # the machine itself was faster by as much
        (0.8, 0.9, 5, 0.5, "faster"),  # in spite of a slower machine
        (1.1, 1.2, 5, 0.8, "noise"),
        (0.9, 0.95, 5, 1.02, "faster"),
    ],
)
def test_verdicts(low: float, high: float, runs: int, drift: float, expected: str) -> None:
    assert verdict(Ratio(value=(low + high) / 2, low=low, high=high), runs, drift=drift) == expected
