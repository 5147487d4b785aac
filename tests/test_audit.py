"""What `make audit` says of an audit, with pip-audit's answers made up."""

from __future__ import annotations

import json
import runpy
import subprocess
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / ".ci" / "audit.py"
SOUND = {"name": "a", "version": "1", "vulns": []}
FLAWED = {"name": "b", "version": "2", "vulns": [{"id": "PYSEC-1", "fix_versions": ["3"], "aliases": []}]}
UNKNOWN = {"name": "c", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("found", "flaws", "words"),
    [
        ([SOUND], 0, "1 of 1 packages looked up, 0 known vulnerabilities"),
        ([SOUND, FLAWED, UNKNOWN], 1, "not looked up: c\n  b 2: PYSEC-1, fixed in 3"),
        ([UNKNOWN], 0, "NOT AUDITED: 0 of 1 packages looked up"),  # never as if there were no flaws
        (None, 0, "NOT AUDITED: Could not connect"),
    ],
)
def test_what_was_not_looked_up_is_said(
    found: list[Any] | None, flaws: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = "" if found is None else json.dumps({"dependencies": found})
    answer = subprocess.CompletedProcess([], int(not found), told, "Traceback\nCould not connect")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: answer)
    assert runpy.run_path(str(SCRIPT))["audit"]("lock.txt") == flaws
    assert words in capsys.readouterr().out
