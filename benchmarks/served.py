"""`ldmrt serve` as a process that a script starts, asks and watches."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, Self

import httpx2

_PATIENCE = 120.0
_TICKS = os.sysconf("SC_CLK_TCK")


class Served:
    """The built-in model, served at a port that is free.

    Args:
        options: of `ldmrt serve`.
        threads: of the model, 0 for torch's own choice.

    Attributes:
        url: where it is.
        client: to ask it, from any thread.
    """

    def __init__(self, *options: str, threads: int = 0) -> None:
        self._log = tempfile.NamedTemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 - it is closed by `__exit__`
        command = [sys.executable, "-P", "-m", "ldmrt", "serve", "--port", "0", *options]
        self._process = subprocess.Popen(command, stderr=self._log, env={**os.environ, "LDMRT_THREADS": str(threads)})
        self.url = self._listening()
        self.client = httpx2.Client(
            base_url=self.url,
            timeout=_PATIENCE,
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=64),
        )

    def _listening(self) -> str:
        end = time.monotonic() + _PATIENCE
        while time.monotonic() < end and self._process.poll() is None:
            for line in self.lines():
                if line["message"] == "listening":
                    return str(line["url"])
            time.sleep(0.05)
        self._process.kill()
        raise RuntimeError(f"the server did not start: {Path(self._log.name).read_text(encoding='utf-8')}")

    def lines(self) -> Iterator[dict[str, Any]]:
        """What it has logged."""
        for line in Path(self._log.name).read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                yield json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.client.close()
        self._process.kill()
        self._process.wait()
        self._log.close()

    def stop(self) -> int:
        """Let it finish what it has; its exit code."""
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(_PATIENCE)

    def metrics(self) -> dict[str, float]:
        """What it counts, by the names that Prometheus reads."""
        text = self.client.get("/metrics").text
        pairs = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def ready(self) -> bool:
        """Whether it says that it is."""
        return self.client.get("/health/ready").status_code == 200

    @property
    def pid(self) -> int:
        """The number of the process that speaks with clients."""
        return self._process.pid

    @property
    def engine_pid(self) -> int | None:
        """That of the one that makes pictures; None between two."""
        for file in Path(f"/proc/{self.pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):  # of a thread that has ended
                if children := file.read_text().split():
                    return int(children[0])
        return None


def resident(pid: int) -> int:
    """Bytes that a process has in memory now, without files that it has mapped; 0 if it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return 0
    return 1024 * sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon:"))


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has taken so far."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def account(before: dict[str, float], after: dict[str, float]) -> dict[str, int]:
    """How many requests came to the engine, and how they ended."""
    names = {end: f'ldmrt_requests_total{{end="{end}"}}' for end in ("served", "failed", "rejected", "cancelled")}
    names |= {"received": "ldmrt_requests_received_total", "present": "ldmrt_requests_present"}
    return {name: int(after[metric] - before[metric]) for name, metric in names.items()}


def conclude(wrong: Sequence[str]) -> NoReturn:
    """Say what is wrong, and end with exit code 1 if anything is."""
    for text in wrong[:20]:
        sys.stdout.write(f"wrong: {text}\n")
    sys.exit(1 if wrong else 0)
