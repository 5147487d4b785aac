"""Measuring: what runs when, and that rates are of the work that was done."""

from __future__ import annotations

import time

import pytest
import torch

from ldmrt.bench import measure

CPU = torch.device("cpu")


def test_runs_alternate_and_the_order_turns() -> None:
    calls: list[str] = []
    found = measure.alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, runs=4, warmup=1)
    assert "".join(calls) == "ab" + "abba" * 2
    assert {name: len(seconds) for name, seconds in found.items()} == {"a": 4, "b": 4}


def test_seconds_are_seconds() -> None:
    found = measure.alternate({"nap": lambda: time.sleep(0.02)}, runs=2, warmup=0)
    assert min(found["nap"]) >= 0.02


def test_rates_are_work_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_seconds", lambda case: (case(), 0.5)[1])
    assert measure.gemm_rate(CPU, torch.float32, side=10, runs=1) == 2 * 10**3 / 0.5
    assert measure.copy_rate(CPU, nbytes=1000, runs=1) == 2 * 1000 / 0.5
