"""No plot in a document but of the figures that the ledger has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import plots
import tables


@pytest.mark.parametrize("name", plots.PLOTS)
def test_plots_are_of_the_ledger_and_shown(name: str) -> None:
    assert plots.is_current(name), f"python benchmarks/plots.py draws {name} anew"
    assert f"(images/{plots.path_of(name).name})" in (tables.ROOT / "docs" / "performance.md").read_text("utf-8")


def test_a_plot_of_other_figures_is_noticed_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    results = shutil.copytree(tables.RESULTS, tmp_path / "results")
    ledger = results / "serving.jsonl"
    rows = [json.loads(line) for line in ledger.read_text().splitlines()]
    row = next(row for row in reversed(rows) if row["name"] == "serving: batcher")
    row["latency_seconds"]["p99"] = 99.0
    ledger.write_text(ledger.read_text() + json.dumps(row) + "\n")
    monkeypatch.setattr(tables, "RESULTS", results)
    monkeypatch.setattr(plots, "IMAGES", tmp_path)
    tables._ledger.cache_clear()
    try:
        shutil.copy(tables.ROOT / "docs" / "images" / "performance-serving.png", tmp_path)
        assert not plots.is_current("serving")
        plots.write("serving")
        assert plots.is_current("serving")
    finally:
        tables._ledger.cache_clear()
