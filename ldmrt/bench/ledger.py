"""The ledger: every figure that is claimed anywhere stands there, with what it takes to believe or repeat it.

One JSON object a line, appended, never changed: what was measured, on which machine, with which versions, at which commit, by which
command.
"""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_PACKAGES = ("ldmrt", "torch", "triton", "numpy", "diffusers", "transformers", "onnx", "onnxruntime")


def append(path: Path, name: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    """Add a row to the ledger and return it.

    Args:
        path: the .jsonl file.
        name: what was measured.
        figures: the figures; units belong in their names (`seconds`, `peak_rss_bytes`).
    """
    row = {"name": name, **figures, **provenance()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    return row


def summary(seconds: Sequence[float]) -> dict[str, float | int]:
    """n, p50, p90, p99 and the smallest of a series of times."""
    p50, p90, p99 = np.percentile(seconds, [50, 90, 99])
    values = {"p50": p50, "p90": p90, "p99": p99, "min": min(seconds)}
    return {"n": len(seconds), **{key: float(f"{value:.4g}") for key, value in values.items()}}


def provenance() -> dict[str, Any]:
    """Machine, versions, commit, command and date."""
    return {
        "date": dt.datetime.now(dt.UTC).strftime("%Y-%m-%d"),
        "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "commit": _commit(),
        "machine": _machine(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES if _version(name)},
    }


def _machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        cpu = " ".join(fields.get("model name\t", cpu).split())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": cpu, "cores": os.cpu_count(), "memory_gib": round(memory / 2**30), "system": platform.system()}


def _commit() -> str:
    """The commit of the source tree, with a plus sign where it has changes."""
    here = Path(__file__).resolve().parent

    program = shutil.which("git")
    if program is None:
        return "unknown"

    def git(*arguments: str) -> str:
        return subprocess.run(
            [program, *arguments], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!/benchmarks/results")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
