"""From nothing to the first picture: `ldmrt generate` in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ldmrt.bench.report import Cold, Series
from ldmrt.errors import LdmrtError


def cold_starts(arguments: Sequence[str], *, runs: int, on_run: Callable[[], None] = lambda: None) -> Cold:
    """Run `ldmrt generate` some times, from files that the page cache holds after the first.

    Call this before anything is drawn here: Linux lets a child's peak begin with what its parent has.

    Args:
        arguments: of `ldmrt generate`, without `--out` and `--json`.
        runs: processes.
        on_run: called after each.

    Raises:
        LdmrtError: one failed; the message is its own.
    """
    seconds: list[float] = []
    stages: dict[str, list[float]] = {}
    peak = 0
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        command = [sys.executable, "-P", "-m", "ldmrt", "generate", *arguments]
        command += ["--json", "--out", f"{folder}{os.sep}"]
        for _ in range(runs):
            with out.open("wb") as stdout, err.open("wb") as stderr:
                start = time.perf_counter()
                process = subprocess.Popen(command, stdout=stdout, stderr=stderr)
                _, status, usage = os.wait4(process.pid, 0)
                seconds.append(time.perf_counter() - start)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode != 0:
                last = (err.read_text(errors="replace").strip().splitlines() or [""])[-1]
                raise LdmrtError(
                    f"a fresh process ended with exit code {process.returncode}: {last.removeprefix('ldmrt: ')}"
                )
            peak = max(peak, usage.ru_maxrss * 1024)
            for stage, value in json.loads(out.read_text())["timings"].items():
                stages.setdefault(stage, []).append(value)
            on_run()
    return Cold(
        seconds=Series(samples=tuple(seconds)),
        stage_seconds={stage: Series(samples=tuple(values)) for stage, values in stages.items() if stage != "total"},
        peak_resident_bytes=peak,
    )
