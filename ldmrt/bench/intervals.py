"""Whether two series of times differ: the ratio of them, and how far it can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

# Fewer runs than this say nothing about their own spread.
FEWEST = 5
_RESAMPLES = 4000

Verdict = Literal["faster", "slower", "noise"]


class Ratio(BaseModel):
    """One series over another, and the 95 % confidence interval."""

    model_config = ConfigDict(frozen=True)

    value: float
    low: float
    high: float

    def scaled(self, factor: float) -> Ratio:
        """All of it times a factor."""
        return Ratio(value=self.value * factor, low=self.low * factor, high=self.high * factor)

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def ratio_of_medians(times: Sequence[float], base: Sequence[float]) -> Ratio:
    """median(times) / median(base), of series that were taken apart.

    The interval is the percentile bootstrap's (Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapter 13): both series are
    drawn anew with replacement, always with the same random numbers.

    Args:
        times: seconds, one or more.
        base: seconds, one or more, greater than 0.
    """
    random = np.random.default_rng(0)
    drawn = _medians(times, random) / _medians(base, random)
    return _ratio(float(np.median(times) / np.median(base)), drawn)


def median_of_ratios(times: Sequence[float], base: Sequence[float]) -> Ratio:
    """The median of times[i] / base[i], of series that were taken in turn: what the machine did in a round has hit both alike.

    The interval is the same bootstrap's over rounds.

    Args:
        times: seconds of each round.
        base: seconds of the same rounds, greater than 0.
    """
    rounds = np.asarray(times) / np.asarray(base)
    return _ratio(float(np.median(rounds)), _medians(rounds, np.random.default_rng(0)))


def _medians(series: Sequence[float] | NDArray[np.float64], random: np.random.Generator) -> NDArray[np.float64]:
    drawn = random.choice(np.asarray(series), (_RESAMPLES, len(series)))
    return np.asarray(np.median(drawn, axis=1))


def _ratio(value: float, drawn: NDArray[np.float64]) -> Ratio:
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Ratio(value=value, low=float(low), high=float(high))


def verdict(ratio: Ratio, runs: int, *, drift: float = 1.0) -> Verdict:
    """What a ratio of times says.

    Args:
        ratio: see `ratio_of_medians`.
        runs: of the shorter series; below `FEWEST` nothing is said.
        drift: how much faster the machine itself was in the first series than in the second. A difference counts only if the interval
            excludes 1 both as it is and for a machine that had kept its rate.
    """
    both = (ratio, ratio.scaled(drift))
    if runs >= FEWEST and all(each.high < 1 for each in both):
        return "faster"
    if runs >= FEWEST and all(each.low > 1 for each in both):
        return "slower"
    return "noise"
