"""The networks of SD1.5, or SDXL's U-Net, at real size on a CPU, beside torch eager, torch.compile, OpenVINO, ONNX Runtime and stable-diffusion.cpp.

    python benchmarks/cpu_unet.py [--architecture sd15] [--network unet] [--batch 1] [--dtype bfloat16] [--runs 7] [--work DIR] [--contenders A,B]

Each contender has a process and loads the network once. Their outputs are compared with torch's in float32 first. Then they run in
turn, one at a time, and between two of them the machine's own rate of matrix products is measured. The rows go to
results/cpu_unet.jsonl. DIR keeps the checkpoint (random weights), the bundle and the ONNX between calls: 20 GB with both precisions.

The contenders need `pip install ldmrt[export,onnxruntime] --group peers`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from safetensors.torch import save_file

from cpu_suite.contender import CONTENDERS, FOLDERS, UNCOMPARED
from ldmrt.bench.flops import costs
from ldmrt.bench.ledger import append, summary
from ldmrt.bench.measure import gemm_rate
from ldmrt.bench.original_layout import write_original_layout
from ldmrt.bundle import Bundle
from ldmrt.export.random_checkpoint import write_checkpoint
from ldmrt.export.verify import noise
from ldmrt.graph import dtype_of, specialize
from ldmrt.verify import relative_error

RESULTS = Path(__file__).parent / "results" / "cpu_unet.jsonl"
CONTENDER = Path(__file__).parent / "cpu_suite" / "contender.py"
OURS = "ldmrt"
TOKENS = 77
# The most that a peer may be off torch's float32 by before its time means nothing, by L2 norm.
AGREE = {"float32": 1e-3, "bfloat16": 5e-2}
# ONNX Runtime has float32 alone, whatever is asked for.
PRECISION = {("ONNX Runtime", "bfloat16"): "float32"}
ORIGINAL = "stable-diffusion.cpp"  # reads only the original layout


class Contender:
    """A process that runs a network on demand.

    Attributes:
        name: who it is.
        load_seconds: from an empty process with its libraries imported to the end of its first run.
        peak_resident_bytes: the most memory it has had.
    """

    def __init__(self, name: str, arguments: argparse.Namespace, work: Path, dtype: str) -> None:
        self.name = name
        command = [sys.executable, "-P", str(CONTENDER), name, arguments.network, str(work), "--dtype", dtype]
        command += ["--batch", str(arguments.batch)]
        with (work / f"{name.replace(' ', '-')}.log").open("w") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        self._log = work / f"{name.replace(' ', '-')}.log"
        self.load_seconds: float = self._answer()["load_seconds"]
        self.peak_resident_bytes = 0

    def run(self) -> float:
        """Run once; seconds."""
        return self._ask("run")

    def output(self, path: Path) -> np.ndarray[Any, Any]:
        """The network's output, in float32."""
        self._ask(f"write {path}")
        found: np.ndarray[Any, Any] = np.load(path)
        return found

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def _ask(self, command: str) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        self.peak_resident_bytes = int(answer["peak_resident_bytes"])
        return float(answer["seconds"])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            last = [each for each in self._log.read_text().splitlines() if each.strip()][-1:]
            raise RuntimeError(f"{self.name} stopped with exit code {self._process.wait()}: {' '.join(last)}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def opened(name: str, arguments: argparse.Namespace, work: Path, dtype: str) -> Iterator[Contender]:
    """A contender, until the end of the block."""
    contender = Contender(name, arguments, work, dtype)
    try:
        yield contender
    finally:
        contender.close()


def prepare(arguments: argparse.Namespace, work: Path) -> None:
    """Write what the contenders read, unless it is there."""
    if not (work / "model").is_dir():
        write_checkpoint(arguments.architecture, work / "model", dtype=torch.float16)
    bundle = work / f"bundle-{arguments.dtype}"
    if not (bundle / "ldmrt.json").is_file():
        command = [sys.executable, "-P", "-m", "ldmrt", "build-engines", str(work / "model"), "--out", str(bundle)]
        subprocess.run([*command, "--dtype", arguments.dtype, "--engine", "torch"], check=True)
    if ORIGINAL in arguments.contenders.split(",") and not (work / "original.safetensors").is_file():
        write_original_layout(work / "model", work / "original.safetensors")
    batch = arguments.batch
    config = json.loads((work / "model" / "unet" / "config.json").read_text())
    side = config["sample_size"]
    inputs = {
        "unet": {
            "latents": noise(1, batch, 4, side, side),
            "timesteps": torch.full((batch,), 500.0),
            "encoder_hidden_states": noise(2, batch, TOKENS, config["cross_attention_dim"]),
        },
        "decoder": {"latents": noise(1, batch, 4, side, side)},
        "text_encoder": {"input_ids": torch.arange(batch * TOKENS).view(batch, TOKENS) * 37 % 49408},
    }
    if config["addition_embed_type"] == "text_time":
        size = 8.0 * side
        inputs["unet"] |= {
            "text_embeds": noise(
                3, batch, config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
            ),
            "time_ids": torch.tensor([[size, size, 0.0, 0.0, size, size]]).expand(batch, -1).contiguous(),
        }
    save_file(inputs[arguments.network], work / f"inputs-{arguments.network}-{batch}.safetensors")


def work_of(arguments: argparse.Namespace, bundle: Bundle) -> int:
    """Floating-point operations of the network, counted in our graph of it."""
    names = ("context", "schedule", "step") if arguments.network == "unet" else (arguments.network,)
    total = 0
    for name in names:
        records = [r for r in bundle.find(name, kind="torch") if r.rows in (None, arguments.batch)]
        graph = specialize(bundle.graph(records[0]), {"rows": arguments.batch, "tokens": TOKENS})
        total += sum(cost.flops for cost in costs(graph))
    return total


def main() -> None:
    """Compare, time, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="sd15", choices=("sd15", "sdxl"))
    parser.add_argument("--network", default="unet", choices=sorted(FOLDERS))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(AGREE))
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--work", type=Path, default=None)
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="all by default")
    parser.add_argument("--no-record", action="store_true", help="print only")
    arguments = parser.parse_args()
    names = arguments.contenders.split(",")
    if OURS not in names or not set(names) <= set(CONTENDERS):
        parser.error(f"--contenders {arguments.contenders}: expected {OURS} and others of {', '.join(CONTENDERS)}")
    if arguments.network != "unet" and "ldmrt step" in names:
        names.remove("ldmrt step")
    console = Console(width=130)
    with ExitStack() as stack:
        work = arguments.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work = work.resolve()
        work.mkdir(parents=True, exist_ok=True)
        prepare(arguments, work)
        flops = work_of(arguments, Bundle.open(work / f"bundle-{arguments.dtype}"))
        with opened("torch eager", arguments, work, "float32") as reference:
            expected = torch.from_numpy(reference.output(work / "expected.npy"))
        contenders: dict[str, Contender] = {}
        errors: dict[str, float] = {}
        failures: dict[str, str] = {}
        progress = stack.enter_context(Progress(console=console, transient=True))
        loading = progress.add_task("loading", total=len(names))
        for name in names:
            progress.update(loading, description=f"loading {name}")
            dtype = PRECISION.get((name, arguments.dtype), arguments.dtype)
            try:
                contender = stack.enter_context(opened(name, arguments, work, dtype))
            except RuntimeError as error:
                failures[name] = str(error)
                continue
            if name not in UNCOMPARED:
                errors[name] = relative_error(torch.from_numpy(contender.output(work / "found.npy")), expected)
            contenders[name] = contender
            progress.advance(loading)
        if OURS not in contenders:
            sys.exit(failures[OURS])
        wrong = {n: e for n, e in errors.items() if not e < AGREE[PRECISION.get((n, arguments.dtype), arguments.dtype)]}
        if wrong:
            sys.exit(f"outputs differ from torch's in float32 by more than {AGREE[arguments.dtype]}: {wrong}")
        seconds, rates = measure(contenders, arguments, progress)
    report(arguments, flops, contenders, errors, failures, seconds, rates, console)


def measure(
    contenders: Mapping[str, Contender], arguments: argparse.Namespace, progress: Progress
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of every run of every contender, and the rate of matrix products just before each, in FLOP/s."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    cpu, dtype = torch.device("cpu"), dtype_of(arguments.dtype)
    task = progress.add_task("timing", total=arguments.runs * len(contenders))
    for number in range(arguments.runs):
        for name in list(contenders) if number % 2 == 0 else list(contenders)[::-1]:
            progress.update(task, description=f"timing {name}")
            before = gemm_rate(cpu, dtype, runs=3)
            seconds[name].append(contenders[name].run())
            rates[name].append(math.sqrt(before * gemm_rate(cpu, dtype, runs=3)))
            progress.advance(task)
    return seconds, rates


def report(
    arguments: argparse.Namespace,
    flops: int,
    contenders: Mapping[str, Contender],
    errors: Mapping[str, float],
    failures: Mapping[str, str],
    seconds: Mapping[str, list[float]],
    rates: Mapping[str, list[float]],
    console: Console,
) -> None:
    """Write a row for each contender, and print them as a table."""
    title = f"{arguments.architecture} {arguments.network}, batch {arguments.batch}, {arguments.dtype}, {torch.get_num_threads()} threads"
    table = Table(title=f"{title}: {flops / 1e12:.3f} TFLOP")
    for column in ("", "s (median)", "min", "p90", "times ours", "of GEMM rate", "off fp32", "load s", "peak GB"):
        table.add_column(column, justify="left" if not column else "right")
    for name, contender in contenders.items():
        ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds[OURS], strict=True))
        share = statistics.median(flops / s / r for s, r in zip(seconds[name], rates[name], strict=True))
        figures = {
            "architecture": arguments.architecture,
            "network": arguments.network,
            "batch": arguments.batch,
            "dtype": PRECISION.get((name, arguments.dtype), arguments.dtype),
            "asked_dtype": arguments.dtype,
            "threads": torch.get_num_threads(),
            "flops": flops,
            "seconds": summary(seconds[name]),
            "times_of_ldmrt": round(ratio, 3),
            "gemm_flops_per_second": summary(rates[name]),
            "share_of_gemm_rate": round(share, 3),
            "relative_error": float(f"{errors[name]:.2e}") if name in errors else "not compared",
            "load_seconds": contender.load_seconds,
            "peak_resident_bytes": contender.peak_resident_bytes,
        }
        if not arguments.no_record:
            append(RESULTS, f"cpu {arguments.network}: {name}", figures)
        times = summary(seconds[name])
        table.add_row(
            name,
            *(f"{times[key]:.3f}" for key in ("p50", "min", "p90")),
            f"{ratio:.2f}",
            f"{share:.0%}",
            f"{errors[name]:.1e}" if name in errors else "",
            f"{contender.load_seconds:.0f}",
            f"{contender.peak_resident_bytes / 1e9:.1f}",
        )
    console.print(table)
    for name, reason in failures.items():
        console.print(f"{name} did not run: {reason}")
        if not arguments.no_record:
            append(RESULTS, f"cpu {arguments.network}: {name}", {"failed": reason, "batch": arguments.batch})


if __name__ == "__main__":
    main()
