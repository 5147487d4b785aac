"""A guard against lost speed, in under three minutes on two cores: ratios to what runs in the same seconds, beside those of the ledger.

    python benchmarks/quick.py [--factor 1.5] [--record]

Fused operators against their references or torch's own, and the engines and whole pictures of the built-in model against diffusers: in turn in one
process, so that a ratio does not hang on the machine's mood; and how often what a batcher's model takes holds what the batcher itself takes. Compared with the rows of results/quick.jsonl from processors with the same
instructions. The exit code is 1 if a ratio lies far below them: below the median by four times the recorded spread, and by a third at least.
With --record the ratios are appended.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from cpu_operators import AGREE, differ, memory_problems, product_problems
from cpu_suite.contender import eager, ldmrt
from ldmrt.bench.intervals import Ratio, median_of_ratios
from ldmrt.bench.ledger import append
from ldmrt.bench.measure import alternate
from ldmrt.export.verify import noise
from ldmrt.kernels import native
from ldmrt.opening import builtin_bundle
from ldmrt.pipeline import Pipeline
from ldmrt.request import Request
from ldmrt.serving import Batcher
from shapes import PROMPT, diffusers_pipeline

LEDGER = Path(__file__).resolve().parent / "results" / "quick.jsonl"
OPERATORS = (
    "sum, group norm and SiLU, 2 x 320 x 64 x 64",
    "sum and layer norm, 2 x 4096 x 320",
    "GEGLU, 2 x 4096 x 1280",
    "attention, 8 heads of 80, 1024 to 1024",
    "attention, 8 heads of 40, 4096 to 77",
    "linear and GEGLU, 1024 x 640 to 2560",
    "convolution, 640 to 640 at 32 x 32",
    "convolution, 1 x 320 to 320 at 64 x 64",
)
STEPS = 4
# How far below the median of the ledger a ratio fails: so many of its deviations, and by this factor at least. Of fewer rows than three the
# deviation is not known.
DEVIATIONS, FACTOR = 4.0, 1.5


class Pair(NamedTuple):
    """What is compared: ours and the other, and how far their results may differ by L2 norm."""

    name: str
    ours: Callable[[], Any]
    other: Callable[[], Any]
    agree: float


def operators() -> Iterator[Pair]:
    """The fused operators, the C++ bodies for the best instructions there are."""
    for dtype in (torch.float32, torch.bfloat16):
        for problem in (*memory_problems(dtype), *product_problems(dtype)):
            if problem.name in OPERATORS:
                *_, ours = problem.bodies.values()
                other = problem.others.get("reference", next(iter(problem.others.values())))
                yield Pair(f"{problem.name}, {str(dtype).removeprefix('torch.')}", ours, other, AGREE[dtype])


def engines(work: Path) -> Iterator[Pair]:
    """The built-in model's engines against the modules of diffusers and transformers, in float32."""
    for name in ("model", "bundle-float32"):
        (work / name).symlink_to(builtin_bundle())
    config = json.loads((work / "model" / "unet" / "config.json").read_text())
    side, rows = config["sample_size"], 2
    text = json.loads((work / "model" / "text_encoder" / "config.json").read_text())
    tokens, words = text["max_position_embeddings"], text["vocab_size"]
    inputs: Mapping[str, Mapping[str, torch.Tensor]] = {
        "unet": {
            "latents": noise(1, rows, config["in_channels"], side, side),
            "timesteps": torch.full((rows,), 500.0),
            "encoder_hidden_states": noise(2, rows, tokens, config["cross_attention_dim"]),
        },
        "decoder": {"latents": noise(1, 1, config["in_channels"], side, side)},
        "text_encoder": {"input_ids": torch.arange(tokens)[None] * 37 % words},
    }
    for network, given in inputs.items():
        ours, theirs = (make(network, work, torch.float32, given) for make in (ldmrt, eager))
        yield Pair(f"built-in model: {network}", ours, theirs, 1e-3)


def pictures() -> Pair:
    """A picture of the built-in model, from the prompt to the pixels."""
    ours, theirs = Pipeline.from_bundle(device="cpu"), diffusers_pipeline()

    def run_theirs() -> Any:
        generator = torch.Generator().manual_seed(2)
        scale = ours.defaults.guidance_scale
        return theirs(
            PROMPT, num_inference_steps=STEPS, guidance_scale=scale, generator=generator, output_type="np"
        ).images

    def run_ours() -> Any:
        return ours(PROMPT, num_inference_steps=STEPS, seed=2, output_type="np").images

    return Pair(
        f"built-in model: picture of {STEPS} steps",
        lambda: torch.as_tensor(run_ours()),
        lambda: torch.as_tensor(run_theirs()),
        1e-2,
    )


def instructions() -> str:
    """The best instructions that the native library uses here."""
    library = native.library()
    if library is None:
        sys.exit(f"there are no C++ bodies to time: {native.why_not()}")
    return native.LEVELS[int(library.ldmrt_highest_level())]


def recorded(path: Path, level: str) -> dict[str, list[float]]:
    """The ratios of the ledger by name, of processors with these instructions."""
    found: dict[str, list[float]] = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        row = json.loads(line)
        if row["instructions"] == level:
            found.setdefault(row["name"].removeprefix("quick: "), []).append(row["times_faster"])
    return found


def least(ratios: Sequence[float], factor: float = FACTOR) -> float | None:
    """The lowest ratio that passes; None where nothing is recorded. It is below the median by a factor at least."""
    if not ratios:
        return None
    logs = [math.log(ratio) for ratio in ratios]
    deviation = statistics.stdev(logs) if len(logs) > 2 else 0.0
    return math.exp(statistics.median(logs) - max(DEVIATIONS * deviation, math.log(factor)))


def measure(pair: Pair, seconds: float) -> Ratio:
    """How many times faster ours is, from as many rounds as take about that long, five at least and fifty at most.

    Raises:
        AssertionError: the results differ.
    """
    difference = differ(pair.ours(), pair.other())
    assert difference < pair.agree, (
        f"{pair.name}: results differ by {difference:.1e}, expected {pair.agree:.0e} at most"
    )
    [once], [other] = alternate({"ours": pair.ours, "other": pair.other}, runs=1).values()
    runs = min(50, max(5, int(seconds / (once + other))))
    times = alternate({"ours": pair.ours, "other": pair.other}, runs=runs, warmup=0)
    return median_of_ratios(times["other"], times["ours"])


def batcher(seconds: float) -> Ratio:
    """What the model takes over what the batcher itself does, over rounds of four requests that share its batches: the server's own share."""
    model: list[float] = []
    own: list[float] = []
    with Batcher(Pipeline.from_bundle(device="cpu")) as serving:
        end = time.perf_counter() + seconds
        while len(own) < 6 or time.perf_counter() < end:
            before = serving.stats()
            handles = [
                serving.submit(Request(prompt=PROMPT, num_inference_steps=steps, seed=steps), output_type="np")
                for steps in (2, 4, 6, 8)
            ]
            for handle in handles:
                handle.result()
            # The last turn is counted behind its pictures.
            serving.call(lambda pipe: None).result()
            after = serving.stats()
            model.append(after.model_seconds - before.model_seconds)
            own.append(after.own_seconds - before.own_seconds)
    return median_of_ratios(model[1:], own[1:])  # at first engines are loaded


def ratios(work: Path, seconds: float) -> Iterator[tuple[str, Ratio]]:
    """All of them."""
    with torch.inference_mode():
        for pair in (*operators(), *engines(work), pictures()):
            yield pair.name, measure(pair, seconds)
    yield "batcher: its model's time over its own", batcher(seconds)


def main() -> None:
    """Measure, compare, and append if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each ratio")
    parser.add_argument("--factor", type=float, default=FACTOR, help="how far below the median fails, at least")
    parser.add_argument("--record", action="store_true", help="append the ratios to the ledger")
    arguments = parser.parse_args()
    level = instructions()
    before = recorded(LEDGER, level)
    table = Table(title=f"times faster than the other, in turn; {level}, {torch.get_num_threads()} threads")
    for column in ("", "now", "95 % interval", "recorded", "rows", "fails below", ""):
        table.add_column(column, justify="right" if column else "left")
    failed = 0
    with tempfile.TemporaryDirectory() as work:
        for name, ratio in ratios(Path(work), arguments.seconds):
            rows = before.get(name, [])
            limit = least(rows, arguments.factor)
            slower = limit is not None and ratio.value < limit
            failed += slower
            table.add_row(
                name,
                f"{ratio.value:.2f}",
                f"{ratio.low:.2f} to {ratio.high:.2f}",
                f"{statistics.median(rows):.2f}" if rows else "-",
                str(len(rows)),
                "-" if limit is None else f"{limit:.2f}",
                "SLOWER" if slower else "",
            )
            if arguments.record:
                figures = {
                    "times_faster": round(ratio.value, 3),
                    "interval": [round(ratio.low, 3), round(ratio.high, 3)],
                }
                append(
                    LEDGER,
                    f"quick: {name}",
                    {**figures, "instructions": level, "threads": torch.get_num_threads()},
                )
    Console(width=150).print(table)
    sys.exit(f"{failed} ratios lie far below the recorded ones" if failed else 0)


if __name__ == "__main__":
    main()
