"""The ledger: rows are appended, with what it takes to repeat them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ldmrt.bench.ledger import append, summary


def test_rows_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "results" / "x.jsonl"
    first = append(path, "one", {"seconds": 1.5})
    append(path, "two", {"seconds": 2.5})
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows[0] == first
    assert [row["name"] for row in rows] == ["one", "two"]
    for key in ("date", "command", "commit", "machine", "python", "versions"):
        assert rows[0][key]
    assert rows[0]["machine"]["cores"] >= 1
    assert rows[0]["versions"]["torch"]


def test_summary_is_of_all_runs() -> None:
    seconds = np.random.default_rng(0).exponential(size=1000)
    found = summary(list(seconds))
    assert found["n"] == 1000
    for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        assert (seconds <= found[name]).mean() == pytest.approx(share, abs=0.002)
    assert found["min"] == pytest.approx(seconds.min(), rel=1e-3)
