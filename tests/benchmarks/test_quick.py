"""The guard against lost speed: what it takes from the ledger, and where it fails."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import quick


def test_rows_are_those_of_like_processors(tmp_path: Path) -> None:
    path = tmp_path / "quick.jsonl"
    assert quick.recorded(path, "avx2") == {}
    rows = [("quick: a", "avx2", 1.5), ("quick: a", "amx", 9.0), ("quick: a", "avx2", 1.6), ("quick: b", "avx2", 2.0)]
    lines = [json.dumps({"name": name, "instructions": level, "times_faster": ratio}) for name, level, ratio in rows]
    path.write_text("\n".join(lines) + "\n")
    assert quick.recorded(path, "avx2") == {"a": [1.5, 1.6], "b": [2.0]}


def test_it_fails_far_outside_the_spread_alone() -> None:
    assert quick.least([]) is None
    assert quick.least([3.0]) == pytest.approx(2.0)
    assert quick.least([3.0], 4.0) == pytest.approx(0.75)
    assert quick.least([3.0, 3.0, 3.0, 3.03]) == pytest.approx(3.0 / 1.5)
    # The logarithms are 0, 1 and 2: their deviation is 1.
    assert quick.least([1.0, math.e, math.e**2]) == pytest.approx(math.exp(1 - 4))


def test_a_ratio_is_how_many_times_faster_ours_is() -> None:
    pair = quick.Pair("a", lambda: torch.ones(8), lambda: torch.stack([torch.ones(8)] * 200)[0], 1e-6)
    assert quick.measure(pair, 0.01).value > 2


def test_what_computes_something_else_has_no_ratio() -> None:
    with pytest.raises(AssertionError, match="results differ"):
        quick.measure(quick.Pair("a", lambda: torch.ones(8), lambda: torch.zeros(8) + 0.5, 1e-3), 0.01)


def test_the_batcher_s_own_share_is_small() -> None:
    """What is a tenth of the model's time at most here is far less where a step takes longer."""
    ratio = quick.batcher(0.0)
    assert ratio.low <= ratio.value <= ratio.high
    assert ratio.value > 10  # of a tiny model on a busy machine
