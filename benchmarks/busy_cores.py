"""What a picture costs while other processes take part of the CPU, by how long a thread that waits for another spins.

    python benchmarks/busy_cores.py [--runs 5] [--no-record]

The built-in model, from prompt to pixels, 20 steps with guidance: alone, and beside one and two processes that compute. Every setting has
a process of its own, and they run in turn: torch's threads as they are by default, as `ldmrt` starts them (`ldmrt.config.THREADS`), and
without any spinning. The rows go to results/busy_cores.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ldmrt.bench.ledger import append, summary
from ldmrt.config import THREADS

RESULTS = Path(__file__).parent / "results" / "busy_cores.jsonl"
SETTINGS: dict[str, dict[str, str]] = {
    "torch's default": {},
    "as ldmrt starts": dict(THREADS),
    "no spinning": {"OMP_WAIT_POLICY": "passive"},
}
PICTURE = """
import sys, time
from ldmrt.pipeline import Pipeline
pipe = Pipeline.from_bundle()
pipe("a red circle on a white background", seed=0)
print("ready", flush=True)
for _line in sys.stdin:
    start = time.perf_counter()
    pipe("a red circle on a white background", seed=0)
    print(time.perf_counter() - start, flush=True)
"""
BUSY = "while True: sum(range(100_000))"


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """So many processes that compute without end."""
    running = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


@contextmanager
def drawing(setting: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A process that draws a picture for each line that it gets, and prints the seconds."""
    environ = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    command = [sys.executable, "-P", "-c", PICTURE]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ | setting
    ) as process:
        try:
            answer(process)
            yield process
        finally:
            process.kill()


def answer(process: subprocess.Popen[str]) -> str:
    """The next line that it prints."""
    assert process.stdout is not None
    return process.stdout.readline()


def seconds_of(process: subprocess.Popen[str]) -> float:
    """Seconds for a picture."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return float(answer(process))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--no-record", action="store_true", help="print the rows only")
    args = parser.parse_args()
    with ExitStack() as stack:
        processes = {name: stack.enter_context(drawing(setting)) for name, setting in SETTINGS.items()}
        for count in (0, 1, 2):
            seconds: dict[str, list[float]] = {name: [] for name in SETTINGS}
            with neighbours(count):
                for _ in range(args.runs):
                    for name, process in processes.items():
                        seconds[name].append(seconds_of(process))
            figures = {
                "steps": 20,
                "settings": SETTINGS,
                "seconds": {name: summary(times) for name, times in seconds.items()},
            }
            name = f"a picture beside {count} busy processes"
            row = {"name": name, **figures} if args.no_record else append(RESULTS, name, figures)
            print(json.dumps({key: row[key] for key in ("name", "seconds")}, indent=1))


if __name__ == "__main__":
    main()
