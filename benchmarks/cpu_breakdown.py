"""Where the time of an engine goes on a CPU, by kind of work.

    python benchmarks/cpu_breakdown.py [BUNDLE] [--component step] [--batch 1] [--runs 15] [--source COMMIT]

Every call of the engine's list is timed; what is left of the whole is `between calls`: the list itself, and the timing. What counts is each kind's least time of all runs, since a shared machine slows down for
seconds at a time. The row goes to results/cpu_breakdown.jsonl. `--source` is for a tree that does not know its commit.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ldmrt.bench.ledger import append
from ldmrt.bench.measure import gemm_rate
from ldmrt.bundle import Bundle
from ldmrt.graph import dtype_name
from ldmrt.opening import builtin_bundle

RESULTS = Path(__file__).parent / "results" / "cpu_breakdown.jsonl"
# By the start of a function's name; the rest is `other`.
KINDS = {
    "conv2d": "convolution",
    "attention": "attention",
    "linear_geglu": "linear and GEGLU",
    "linear": "linear",
    "add_group_norm": "group norm",
    "group_norm": "group norm",
    "add_layer_norm": "layer norm",
    "geglu": "GEGLU",
}


def kind_of(function: Callable[..., Any]) -> str:
    """The kind of work of a function that an instruction calls."""
    name = getattr(function, "__name__", str(function))
    return next((kind for start, kind in KINDS.items() if name.startswith(start)), "other")


def main() -> None:
    """Time, and write the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?", default=builtin_bundle(), help="default: the built-in model's")
    parser.add_argument("--component", default="step")
    parser.add_argument("--batch", type=int, default=1, help="rows, two for an image with guidance")
    parser.add_argument("--tokens", type=int, default=77, help="of the text; the built-in model has 20")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--source", default=None)
    arguments = parser.parse_args()
    cpu = torch.device("cpu")
    bundle = Bundle.open(arguments.bundle)
    records = [r for r in bundle.find(arguments.component, kind="torch") if r.rows in (None, arguments.batch)]
    engine: Any = bundle.load(records[0], cpu)
    generator = torch.Generator().manual_seed(0)
    inputs = {
        name: torch.randn(
            [{"rows": arguments.batch, "tokens": arguments.tokens}.get(size, size) for size in spec.shape],
            generator=generator,
        ).to(spec.dtype)
        for name, spec in engine.inputs.items()
    }
    times: dict[str, float] = {}

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        kind = kind_of(function)

        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            times[kind] = times.get(kind, 0.0) + time.perf_counter() - start
            return result

        return call

    engine._instructions = [each._replace(function=timed(each.function)) for each in engine._instructions]
    dtype = engine.graph.nodes[-1].dtype
    runs, rates = [], []
    for number in range(arguments.runs + 2):
        times.clear()
        rates.append(gemm_rate(cpu, dtype, runs=3))
        start = time.perf_counter()
        engine.run(inputs)
        seconds = time.perf_counter() - start
        if number >= 2:
            runs.append({**times, "between calls": seconds - sum(times.values()), "all": seconds})
    least = {kind: float(f"{min(run[kind] for run in runs):.4g}") for kind in runs[0]}
    figures = {
        "model": bundle.manifest.model.name,
        "component": arguments.component,
        "batch": arguments.batch,
        "dtype": dtype_name(dtype),
        "threads": torch.get_num_threads(),
        "runs": arguments.runs,
        "calls": len(engine._instructions),
        "least_seconds": dict(sorted(least.items(), key=lambda item: -item[1])),
        "most_gemm_flops_per_second": max(rates),
    }
    if arguments.source:
        figures["source"] = arguments.source
    row = append(RESULTS, f"cpu breakdown: {arguments.component}", figures)
    sys.stdout.write(f"{row['least_seconds']}\n")


if __name__ == "__main__":
    main()
