"""The files of benchmarks/ that pytest-benchmark times: that they run, compare first, and say how near to the floor an operator is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tables
from ldmrt.kernels import native


def run(*arguments: str) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    # Not as a part of this run, whose processes time nothing.
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=tables.ROOT, env=own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(not native.available(), reason="there are no C++ bodies to time")
@pytest.mark.slow
def test_operators_are_timed_beside_their_floor(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    few = ("--benchmark-min-rounds=1", "--benchmark-max-time=0.01", "--benchmark-warmup=off")
    run("benchmarks/test_operators.py", "-k", "sum and layer and float32", f"--benchmark-json={out}", *few)
    found = json.loads(out.read_text())["benchmarks"]
    assert {one["group"] for one in found} == {"sum and layer norm, 2 x 4096 x 320, float32"}
    assert {"baseline", "torch", "reference"} <= {one["name"].rpartition("-")[2].rstrip("]") for one in found}
    assert all(0 < one["extra_info"]["share of floor"] < 10 for one in found)


@pytest.mark.slow
def test_components_are_compared() -> None:
    assert "2 passed" in run("benchmarks/test_components.py", "-k", "decoder", "--benchmark-disable")
