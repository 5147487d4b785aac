"""How the cost of a step grows with the picture's side and with the batch, and by which exponent.

    python benchmarks/scaling.py [--architecture sd15] [--side 32 --side 64 ...] [--batch 1 --batch 2 ...] [--runs 3] [--no-record]

Steps of the U-Net on a CPU with random weights, engines of all sizes over one set of them. Sides are of latents, an eighth of a picture's in
pixels, at batch 1; batches are at the first architecture's own side. An exponent is the slope of the logarithms, between neighbours and over all.
Beside each time stand the operations that the graph counts, and the rate of torch's large matrix product around the runs. The rows go
to results/scaling.jsonl.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from gpu_suite.models import TOKENS, Model
from ldmrt.bench.flops import by_class, costs
from ldmrt.bench.ledger import append, summary
from ldmrt.bench.measure import alternate, gemm_rate
from ldmrt.export.options import has_native_bfloat16
from ldmrt.graph import dtype_name, specialize

RESULTS = Path(__file__).resolve().parent / "results" / "scaling.jsonl"
CPU = torch.device("cpu")
SIDES, BATCHES = (32, 48, 64, 96, 128), (1, 2, 4, 8)


def exponents(sizes: Sequence[float], values: Sequence[float]) -> tuple[list[float], float]:
    """Slopes of log(value) over log(size): between neighbours, and of the line that fits all best."""
    x, y = ([math.log(one) for one in many] for many in (sizes, values))
    between = [(y[i + 1] - y[i]) / (x[i + 1] - x[i]) for i in range(len(x) - 1)]
    middle, height = sum(x) / len(x), sum(y) / len(y)
    over_all = sum((a - middle) * (b - height) for a, b in zip(x, y, strict=True)) / sum((a - middle) ** 2 for a in x)
    return between, over_all


def measure(model: Model, side: int, batch: int, runs: int) -> dict[str, Any]:
    """A step of a batch of latents of a side: seconds, operations, and the machine's own rate around it."""
    engine: Any = model.engine("step", batch)
    inputs = {
        name: model.noise(*({"rows": batch, "tokens": TOKENS}.get(size, size) for size in spec.shape), seed=number).to(
            spec.dtype
        )
        for number, (name, spec) in enumerate(engine.inputs.items())
    }
    before = gemm_rate(CPU, model.dtype, runs=3)
    with torch.inference_mode():
        seconds = alternate({"step": lambda: engine.run(inputs)}, runs=runs, warmup=1)["step"]
    rate = (before + gemm_rate(CPU, model.dtype, runs=3)) / 2
    counted = by_class(costs(specialize(engine.graph, {"tokens": TOKENS})))
    flops = sum(cost.flops for cost in counted.values())
    return {
        "architecture": model.name,
        "side": side,
        "batch": batch,
        "dtype": dtype_name(model.dtype),
        "threads": torch.get_num_threads(),
        "seconds": summary(seconds),
        "flops": flops,
        "share_of_attention": round(counted["attention"].flops / flops, 3),
        "gemm_flops_per_second": rate,
        "share_of_gemm_rate": round(flops / min(seconds) / rate, 3),
    }


def of_size(name: str, side: int, dtype: torch.dtype, weights: Model | None) -> Model:
    """A model whose latents have a side, over the weights of another if there is one."""
    model = Model(name, tiny=False, dtype=dtype, device=CPU)
    factor = model.side // model.latent_shape[1]
    model.side, model.latent_shape = side * factor, (model.latent_shape[0], side, side)
    return model if weights is None else model.sharing(weights)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="sd15", choices=("sd15", "sd21", "sdxl"))
    parser.add_argument("--side", type=int, action="append", default=[], help=f"default: {SIDES}")
    parser.add_argument("--batch", type=int, action="append", default=[], help=f"default: {BATCHES}")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--no-record", action="store_true")
    arguments = parser.parse_args()
    dtype = torch.bfloat16 if has_native_bfloat16() else torch.float32
    sides, batches = arguments.side or SIDES, arguments.batch or BATCHES
    usual = Model(arguments.architecture, tiny=False, dtype=dtype, device=CPU)
    own = usual.latent_shape[1]
    cases = dict.fromkeys([*((side, 1) for side in sides), *((own, batch) for batch in batches)])
    rows: dict[tuple[int, int], dict[str, Any]] = {}
    for side, batch in track([*cases], "steps", console=Console(stderr=True)):
        model = of_size(arguments.architecture, side, dtype, usual)
        row = rows[side, batch] = measure(model, side, batch, arguments.runs)
        if not arguments.no_record:
            append(RESULTS, f"scaling: side {side}, batch {batch}", row)
    for what, chosen in (("side", [(s, 1) for s in sides]), ("batch", [(own, b) for b in batches])):
        found = [rows[case] for case in chosen if case in rows]
        if len(found) < 2:
            continue
        sizes = [row[what] for row in found]
        times, counts = [row["seconds"]["min"] for row in found], [row["flops"] for row in found]
        of_times, of_counts = exponents(sizes, times), exponents(sizes, counts)
        table = Table(what, "seconds, least", "exponent", "TFLOP", "exponent", "of it attention", "of GEMM rate")
        for number, row in enumerate(found):
            steps = [f"{many[0][number - 1]:.2f}" if number else "" for many in (of_times, of_counts)]
            table.add_row(
                str(row[what]),
                f"{row['seconds']['min']:.3g}",
                steps[0],
                f"{row['flops'] / 1e12:.3g}",
                steps[1],
                f"{row['share_of_attention']:.0%}",
                f"{row['share_of_gemm_rate']:.0%}",
            )
        table.add_row("all", "", f"{of_times[1]:.2f}", "", f"{of_counts[1]:.2f}", "", "")
        Console(file=sys.stdout).print(table)


if __name__ == "__main__":
    main()
