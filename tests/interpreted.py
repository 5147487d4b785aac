"""Tests marked `interpreted` run in Triton's interpreter, in a process of their own.

Triton decides when a function is decorated, so TRITON_INTERPRET=1 must be in the environment before triton itself is imported:
its own library (`tl.sum`) is decorated too. The session may have imported triton long before (torch.export does), and its
other tests compile kernels, which that variable would prevent. Hence: the first such test of a file starts one pytest for
all of the file's, with the variable set; each test then has its own outcome from there. In that process, and where a person
has set the variable, the tests simply run.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

VARIABLE = "TRITON_INTERPRET"
OUTCOMES = "LDMRT_TEST_OUTCOMES"  # the file in which that process leaves one line of JSON per test

_outcomes: dict[Path, dict[str, tuple[str, str]]] = {}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "interpreted: runs in Triton's interpreter, in a process of its own")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if pyfuncitem.get_closest_marker("interpreted") is None or os.environ.get(VARIABLE) == "1":
        return None
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton")
    if pyfuncitem.path not in _outcomes:
        _outcomes[pyfuncitem.path] = _interpret(pyfuncitem)
    outcome, report = _outcomes[pyfuncitem.path].get(pyfuncitem.nodeid, ("failed", "it did not run in the interpreter"))
    if outcome == "skipped":
        pytest.skip(report)
    if outcome != "passed":
        pytest.fail(report, pytrace=False)
    return True


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    path = os.environ.get(OUTCOMES)
    # A test passes in its call; it can fail or be skipped in its setup and teardown too.
    if path is not None and (report.when == "call" or report.outcome != "passed"):
        text = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps([report.nodeid, report.outcome, text]) + "\n")


def _interpret(first: pytest.Function) -> dict[str, tuple[str, str]]:
    chosen = [
        item.nodeid
        for item in first.session.items
        if item.path == first.path and item.get_closest_marker("interpreted") is not None
    ]
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "outcomes.jsonl"
        environment = {**os.environ, VARIABLE: "1", OUTCOMES: str(path)}
        done = subprocess.run(
            command,
            cwd=first.config.rootpath,
            env=environment,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        if not path.exists():
            raise RuntimeError(f"pytest in the interpreter ended with {done.returncode}: {done.stdout}{done.stderr}")
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {name: (outcome, report) for name, outcome, report in lines}
