"""Where the time of a command goes before and after the first picture: imports, opening, each stage.

    python benchmarks/cold_start.py [--runs 10] [--bundle DIR] [--no-record]

Measures, alternating: an interpreter that does nothing, `import torch`, `import ldmrt`, and the whole of
`ldmrt generate "a red circle on a white background"`, whose own account of its stages is kept too. With a bundle, only that command with
its engines and one step, from files that the page cache has.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ldmrt.bench.ledger import append, summary

RESULTS = Path(__file__).parent / "results" / "cold_start.jsonl"
PROMPT = "a red circle on a white background"


def run(*arguments: str) -> tuple[float, str]:
    """Seconds that an interpreter takes for `arguments`, and what it prints."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-P", *arguments], check=True, capture_output=True, text=True)
    return time.perf_counter() - start, done.stdout


def commands_of(picture: str, bundle: Path | None) -> dict[str, list[str]]:
    """What is timed, by name: the arguments of an interpreter."""
    generate = ["-m", "ldmrt", "generate", PROMPT, "--seed", "0", "--out", picture, "--json"]
    if bundle is not None:
        return {"ldmrt generate": [*generate, "--engines", str(bundle), "--steps", "1"]}
    imports = {f"import {name}": ["-c", f"import {name}"] for name in ("torch", "ldmrt", "ldmrt.pipeline")}
    return {"python": ["-c", "pass"], **imports, "ldmrt generate": generate}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument(
        "--bundle", type=Path, default=None, help="one of real size: a picture of one step from it instead"
    )
    parser.add_argument("--no-record", action="store_true", help="print the row only")
    args = parser.parse_args()
    times: dict[str, list[float]] = {}
    stages: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.runs + 1):
            for name, command in commands_of(f"{folder}/out.png", args.bundle).items():
                seconds, output = run(*command)
                if number == 0:
                    continue  # fills the page cache
                times.setdefault(name, []).append(seconds)
                if name == "ldmrt generate":
                    for stage, value in json.loads(output)["timings"].items():
                        stages.setdefault(stage, []).append(value)
    figures: dict[str, Any] = {
        "seconds": {name: summary(values) for name, values in times.items()},
        "stage_seconds_p50": {name: round(statistics.median(values), 4) for name, values in stages.items()},
    }
    if args.bundle is None:
        ratios = [ours / theirs for ours, theirs in zip(times["import ldmrt"], times["import torch"], strict=True)]
        figures["import_ldmrt_over_import_torch_p50"] = round(statistics.median(ratios), 3)
    name = "cold start" if args.bundle is None else "cold start at real size"
    row = {"name": name, **figures} if args.no_record else append(RESULTS, name, figures)
    sys.stdout.write(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()
