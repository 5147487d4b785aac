"""The documents' tables of figures, written from the ledger.

    python benchmarks/tables.py [--check]

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`; what lies there is replaced. With --check nothing is written, and the
exit code is 1 if a document differs from what would be written. Rows are the last of their kind in the ledger, or those of the commit that a
table names.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "performance.md", ROOT / "docs" / "reliability.md")
_BLOCK = re.compile(r"(<!-- table: (?P<name>[^>]+) -->\n)(?P<body>.*?)(<!-- end of table -->)", re.DOTALL)

# Of `ldmrt bench`, by what is drawn.
BENCH_REPORTS = {
    "bench-sd15": "SD1.5, 512 x 512",
    "bench-sd15-onnxruntime": "SD1.5, 512 x 512, float32",
    "bench-sd15-ddim": "SD1.5, 256 x 256, DDIM",
    "bench-sd15-controlnet": "SD1.5 and a ControlNet, 512 x 512",
    "bench-sdxl": "SDXL, 1024 x 1024",
}

Row = dict[str, Any]
Table = list[list[str]]  # the first is the header

# ---------------------------------------------------------------------------------------------------- rows of the ledger


@cache
def _ledger(file: str) -> list[Row]:
    return [json.loads(line) for line in (RESULTS / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()]


def find(file: str, name: str, **fields: object) -> Row:
    """The last row of a name whose fields are as given.

    Raises:
        LookupError: there is none.
    """
    for row in reversed(_ledger(file)):
        if row["name"] == name and all(row.get(key) == value for key, value in fields.items()):
            return row
    raise LookupError(f"{file}.jsonl has no row {name!r} with {fields}")


# ---------------------------------------------------------------------------------------------------- cells


def seconds(value: float) -> str:
    """Three figures."""
    return f"{value:.3g}"


def milliseconds(value: float) -> str:
    """Seconds as milliseconds."""
    return f"{1000 * value:.4g}"


def spread(times: Row) -> str:
    """The median and the 90th percentile of a series of times."""
    return f"{seconds(times['p50'])} ({seconds(times['p90'])})"


def gigabytes(value: float) -> str:
    """Bytes in 10^9."""
    return f"{value / 1e9:.1f} GB"


def percent(share: float) -> str:
    """A share of one."""
    return f"{100 * share:.0f} %"


def times(value: float) -> str:
    """A quotient."""
    return f"{value:.2f}"


# ---------------------------------------------------------------------------------------------------- SD1.5 and SDXL on a GPU

# The commits whose figures are kept, and which GPU each ran on.
_SD15 = {
    "c3fcc51: fused operators as first written": ("c3fcc51", "gpu: sd15: batch 1"),
    "122e0a8 and two kernels of 88814ba: sums, skip connections, biases and upsampling in the operators that follow; one-pixel convolutions "
    "as matrix products; GEGLU in its matrix product; convolutions at 8 x 8 split": ("122e0a8", "gpu: sd15: batch 1"),
    "88814ba: group norm in programs of one warp, programmatic dependent launch": ("88814ba", "gpu: sd15: batch 1"),
    "the same kernels, with the defaults of sm_90": (None, "gpu: peers.sd15: diffusers eager"),
}
KERNELS = {
    "convolution": ("convolution",),
    "matrix products, those with GEGLU included": ("gemm", "gemm with geglu"),
    "attention": ("attention",),
    "group norm": ("group norm",),
    "layer norm": ("layer norm",),
    "GEGLU alone": ("geglu",),
    "sums, joins, biases, upsampling, copies": ("elementwise and copies", "sums and upsampling"),
    "sampler": ("sampler",),
}


def gpu(name: str, commit: str | None) -> Row:
    """The last row of the GPU suite of a name, at a commit if one is given."""
    return find("gpu", name, **({} if commit is None else {"commit": commit}))


def _model(row: Row) -> str:
    """A GPU's name without its maker and memory."""
    return str(row["device"]).removeprefix("NVIDIA ").split()[0]


def gpu_sd15() -> Table:
    """Steps of SD1.5, commit by commit."""
    table = [["at commit", "GPU", "ms/step", "steps/s", "share of that floor", "kernels"]]
    for what, (commit, name) in _SD15.items():
        row = gpu(name, commit)
        figures = row.get("ldmrt", row)
        try:
            kernels = str(gpu("gpu: breakdown.sd15: step", commit)["kernels"]) if commit else ""
        except LookupError:
            kernels = ""
        step = figures["step_seconds"]["p50"]
        table.append(
            [
                what,
                _model(row),
                milliseconds(step),
                f"{figures['steps_per_second']:.1f}",
                percent(figures["share_of_flop_floor"]),
                kernels,
            ]
        )
    return table


def gpu_sd15_kernels() -> Table:
    """What a step's kernels take."""
    first, last = (gpu("gpu: breakdown.sd15: step", commit) for commit in ("c3fcc51", "88814ba"))
    table = [["", f"first ({_model(first)})", f"last ({_model(last)})"]]
    for label, names in KERNELS.items():
        sums = [
            sum(row["classes"][name]["seconds"] for name in names if name in row["classes"]) for row in (first, last)
        ]
        table.append([label, *(f"{1000 * value:.3f}" for value in sums)])
    return table


def gpu_sd15_pictures() -> Table:
    """Decoding and whole pictures."""
    commits = ("c3fcc51", "122e0a8", "88814ba")
    decode = [gpu("gpu: decode.sd15: captured", commit) for commit in commits]
    whole = [gpu("gpu: sd15: end to end", commit) for commit in commits]
    names = [f"{order} ({_model(row)})" for order, row in zip(("first", "second", "last"), decode, strict=True)]
    return [
        ["", *names],
        ["decode 512 x 512, ms", *(f"{1000 * row['seconds']['p50']:.2f}" for row in decode)],
        ["from token ids to pixels, 50 steps, ms", *(f"{1000 * row['seconds']['p50']:.0f}" for row in whole)],
        [
            "batch 4 and 8, steps/s",
            ", ".join(str(gpu(f"gpu: sd15: batch {n}", "c3fcc51")["steps_per_second"]) for n in (4, 8)),
            "",
            "",
        ],
    ]


def gpu_sdxl() -> Table:
    """SDXL at two commits."""
    commits = ("122e0a8", "6848b87")
    steps = [gpu("gpu: sdxl: batch 1", commit) for commit in commits]
    decode = [gpu("gpu: decode.sdxl: captured", commit) for commit in commits]
    whole = gpu("gpu: sdxl: end to end", commits[1])
    first, last = (_model(row) for row in steps)
    return [
        ["", f"second commit above, defaults ({first})", f"6848b87, as tuned just before ({last})"],
        ["ms/step", *(f"{1000 * row['step_seconds']['p50']:.2f}" for row in steps)],
        ["share of the floor", *(percent(row["share_of_flop_floor"]) for row in steps)],
        ["decode, ms (25 asked)", *(f"{1000 * row['seconds']['p50']:.2f}" for row in decode)],
        ["from token ids to pixels, ms (600 are the goal)", "", f"{1000 * whole['seconds']['p50']:.0f}"],
    ]


# ---------------------------------------------------------------------------------------------------- many requests, start, build


def serving() -> Table:
    """A load that the batcher alone can carry."""
    return latencies({what: f"serving: {what}" for what in ("batcher", "static batching", "one at a time")})


def serving_http() -> Table:
    """The same load, asked within the process and over HTTP."""
    return latencies({what: f"serving over HTTP: {what}" for what in ("batcher", "over HTTP")})


def replicas() -> Table:
    """Pictures a second against servers, on the cores of one machine."""
    table = [["", "1 replica, 1 thread", "2 replicas, 1 thread each", "1 replica, 2 threads"]]
    for what, label in (("engines", "engine processes, asked by one program"), ("ray serve", "Ray Serve, over HTTP")):
        rows = [
            find("replicas", f"replicas: {what}", replicas=count, threads=threads)
            for count, threads in ((1, 1), (2, 1), (1, 2))
        ]
        table.append([label, *(f"{row['images_per_second']:.2f} ({times(row['times_one'])})" for row in rows)])
    return table


def latencies(names: Mapping[str, str]) -> Table:
    """What clients saw of each way to serve, by the name of its row."""
    table = [["", "p50", "p95", "p99", "to the first preview, p50", "images/s"]]
    for what, name in names.items():
        row = find("serving", name)
        latency = row["latency_seconds"]
        table.append(
            [
                what,
                *(f"{seconds(latency[key])} s" for key in ("p50", "p95", "p99")),
                f"{seconds(row['preview_seconds']['p50'])} s",
                f"{row['images_per_second']:.2f}",
            ]
        )
    return table


def soak() -> Table:
    """Mixed traffic, with faults in the first half."""
    row = find("soak", "soak with faults")
    memory, faults, requests, pictures = (row[name] for name in ("memory", "faults", "requests", "images"))
    ends = ", ".join(f"{requests[end]} {end}" for end in ("served", "failed", "rejected", "cancelled"))
    gained = {name: f"{memory[f'{name}_mib_per_100_requests']:+.2f} MiB" for name in ("server", "engine")}
    ready = faults["seconds_until_ready"]
    return [
        ["", ""],
        ["how long, by how many clients", f"{row['seconds'] / 60:.0f} minutes, {row['clients']}"],
        ["requests that came to the engine", f"{requests['received']}: {ends}"],
        ["clients that went in the midst of it; requests for what cannot be", f"{row['gone']}; {row['bad']}"],
        ["connections that only take room", f"{row['idle_connections']}, {row['turned_out']} times turned out"],
        ["pictures compared; least PSNR", f"{pictures}; {row['least_decibels']:.0f} dB"],
        ["of them to the bit as alone", percent(row["same_bits"] / pictures)],
        ["anything wrong", str(row["wrong"] or "nothing")],
        ["engine killed; stopped, as if it hung", f"{faults['killed']}; {faults['stopped']} times"],
        ["503 after a kill, the latest in the two seconds after it", f"{faults['most_seconds_until_503']} s"],
        ["ready again after a loss, p50; at the latest", f"{ready['p50']} s; {ready['most']} s"],
        [
            "answers of 503; refused as lost twice",
            f"{row['errors'].get('engine_unavailable', 0)}; {row['errors'].get('request_quarantined', 0)}",
        ],
        [
            "the server's memory at the end; gained with 100 requests",
            f"{memory['server_mib']:.0f} MiB; {gained['server']}",
        ],
        ["the engine's", f"{memory['engine_mib']:.0f} MiB; {gained['engine']}"],
    ]


def overload() -> Table:
    """More than can be served."""
    table = [
        [
            "asked, as a multiple of what can be served",
            "requests/s",
            "goodput, of what can be served",
            "refused: p50, p99",
            "most images that waited (64 may)",
            "server's memory gained",
        ]
    ]
    for factor in (2, 5, 10):
        row = find("soak", f"overload: {factor} times")
        refused = row["seconds_until_rejected"]
        table.append(
            [
                str(factor),
                f"{row['asked_per_second']:.1f}",
                percent(row["goodput"]),
                f"{milliseconds(refused['p50'])} ms, {milliseconds(refused['p99'])} ms",
                str(row["most_waiting"]),
                f"{row['server_mib_gained']:+.1f} MiB",
            ]
        )
    return table


def cold_start() -> Table:
    """From nothing to a picture."""
    times = find("cold_start", "cold start")["seconds"]
    names = {
        "`import torch`": "import torch",
        "`import ldmrt`": "import ldmrt",
        "`import ldmrt.pipeline`": "import ldmrt.pipeline",
        '`ldmrt generate "a red circle on a white background"`, whole process': "ldmrt generate",
    }
    return [["", "seconds"], *([label, seconds(times[name]["p50"])] for label, name in names.items())]


def busy_cores() -> Table:
    """A picture beside processes that compute without end."""
    settings = {
        "torch's default": "torch's default",
        "as ldmrt starts": "as `ldmrt` starts: 1,000 turns",
        "no spinning": "no spinning",
    }
    table = [["beside", *settings.values()]]
    for number, beside in enumerate(("none", "one", "two")):
        row = find("busy_cores", f"a picture beside {number} busy processes")["seconds"]
        table.append([beside, *(f"{row[name]['p50']:.2f} ({row[name]['min']:.2f})" for name in settings)])
    return table


def real_size() -> Table:
    """Builds, and a picture, of models of real size on a CPU."""
    table = [["", "seconds", "peak resident memory, mapped files included"]]
    torch = {"architecture": "sd15", "engine": "torch", "dtype": "bfloat16"}
    plans = {"engine": "tensorrt-rtx", "targets": ["sm_86", "sm_89", "sm_120"]}
    for label, name, fields in (
        ("SD1.5, `ldmrt build-engines`, torch engine, bfloat16", "build-engines", torch),
        ("SD1.5, `ldmrt generate --steps 4` from it, whole process", "generate", torch),
        ("SD1.5, plans for three GPUs that are not there, float16", "build-engines", {"architecture": "sd15", **plans}),
        ("SDXL at 1024 x 1024, the same", "build-engines", {"architecture": "sdxl", **plans}),
    ):
        row = find("real_size", name, **fields)
        table.append([label, str(row["seconds"]), gigabytes(row["peak_rss_bytes"])])
    return table


# ---------------------------------------------------------------------------------------------------- the CPU


def _network(title: str, rows: Iterable[tuple[str, Row]]) -> Table:
    """A network beside others' of the same run."""
    header = [
        title,
        "seconds, p50 (p90)",
        "times ldmrt's",
        "of GEMM rate",
        "off float32",
        "peak memory",
        "seconds to load",
    ]
    return [
        header,
        *(
            [
                label,
                spread(row["seconds"]),
                times(row["times_of_ldmrt"]),
                percent(row["share_of_gemm_rate"]),
                f"{row['relative_error']:.1e}",
                gigabytes(row["peak_resident_bytes"]),
                f"{row['load_seconds']:.0f}",
            ]
            for label, row in rows
        ),
    ]


def bench_reports() -> Table:
    """What `ldmrt bench` found at real size beside other programs."""
    table = [
        ["", "ldmrt, s", "its, s", "ldmrt is faster by (95 %)", "pictures agree", "its peak memory", "its start, s"]
    ]
    for file, what in BENCH_REPORTS.items():
        report = json.loads((RESULTS / f"{file}.json").read_text(encoding="utf-8"))
        for peer in report["against"]:
            ours, theirs = (peer[name]["summary"]["p50"] for name in ("ours_seconds", "theirs_seconds"))
            faster, memory = peer["times_faster"], peer["peak_resident_bytes"]
            table.append(
                [
                    f"{what}, beside {peer['name']}",
                    seconds(ours),
                    seconds(theirs),
                    f"{times(faster['value'])} ({times(faster['low'])} to {times(faster['high'])})",
                    f"{peer['psnr']:.0f} dB",
                    "" if memory is None else gigabytes(memory),
                    f"{peer['setup_seconds']:.0f}",
                ]
            )
    return table


def contenders(network: str, names: Sequence[str], commit: str, **fields: object) -> list[tuple[str, Row]]:
    """Programs that ran a network in one run in bfloat16, each with its row."""
    return [
        (name, find("cpu_unet", f"cpu {network}: {name}", commit=commit, asked_dtype="bfloat16", **fields))
        for name in names
    ]


ALL = ("ldmrt", "ldmrt step", "torch eager", "torch.compile", "OpenVINO", "ONNX Runtime")


def scaling_rows(by: str) -> list[Row]:
    """Steps of SD1.5's U-Net, the last row for each `side` at batch 1, or for each `batch` at the model's own size."""
    fixed = ("batch", 1) if by == "side" else ("side", 64)
    found = {row[by]: row for row in _ledger("scaling") if row["architecture"] == "sd15" and row[fixed[0]] == fixed[1]}
    return [found[key] for key in sorted(found)]


def scaling() -> Table:
    """What a step costs by size, and how fast that grows: exponents between neighbours."""
    table = [
        ["side, batch", "seconds, least", "exponent", "TFLOP", "exponent", "of it attention", "of GEMM rate"],
    ]
    for by in ("side", "batch"):
        before: Row | None = None
        for row in scaling_rows(by):
            grown = ["", ""]
            if before is not None:
                log = math.log(row[by] / before[by])
                grown = [
                    f"{math.log(now / then) / log:.2f}"
                    for now, then in (
                        (row["seconds"]["min"], before["seconds"]["min"]),
                        (row["flops"], before["flops"]),
                    )
                ]
            table.append(
                [
                    f"{row['side']}, {row['batch']}",
                    seconds(row["seconds"]["min"]),
                    grown[0],
                    seconds(row["flops"] / 1e12),
                    grown[1],
                    percent(row["share_of_attention"]),
                    percent(row["share_of_gemm_rate"]),
                ]
            )
            before = row
    return table


def cpu_unet() -> Table:
    """One row of the U-Net."""
    return _network("U-Net, batch 1, bfloat16: 0.803 TFLOP", contenders("unet", ALL, "81f3b3ebdd2c+", batch=1))


def cpu_unet_batch_2() -> Table:
    """Two rows."""
    return _network("U-Net, batch 2, bfloat16", contenders("unet", ALL, "e258fa8df7ae+", batch=2))


def cpu_sdxl() -> Table:
    """SDXL's U-Net."""
    title = "SDXL's U-Net, 1024 x 1024, batch 1, bfloat16: 6.76 TFLOP"
    return _network(title, contenders("unet", ALL[:3], "e258fa8df7ae", architecture="sdxl"))


def cpu_decoder() -> Table:
    """The VAE's decoder."""
    names = ("ldmrt", "torch.compile", "OpenVINO")
    return _network("decoder, 512 x 512, bfloat16: 2.5 TFLOP", contenders("decoder", names, "8e0609cdbc90"))


def cpu_text_encoder() -> Table:
    """CLIP."""
    return _network("text encoder, bfloat16", contenders("text_encoder", (ALL[0], *ALL[2:]), "81f3b3ebdd2c"))


def cpu_float32() -> Table:
    """The U-Net in float32, in as many runs as memory asked for."""
    rows = [
        (name, find("cpu_unet", f"cpu unet: {name}", commit="a9f2ded8c109", asked_dtype="float32"))
        for name in ("ldmrt", "torch eager", "OpenVINO")
    ]
    # The row of ldmrt that stands before the other's is of the same run.
    ledger = _ledger("cpu_unet")
    for label, other in (("another", "ONNX Runtime"), ("a third", "torch.compile")):
        row = find("cpu_unet", f"cpu unet: {other}", commit="e258fa8df7ae+", asked_dtype="float32")
        rows += [(f"ldmrt, {label} run", ledger[ledger.index(row) - 1]), (other, row)]
    return _network("U-Net, batch 1, float32", rows)


_LADDER = {
    "attention": "flash attention with AMX; scores transposed, so that a softmax never adds across a vector",
    "convolution": "AMX tiles read the picture where it lies; weights packed once; sums rounded while the next are made. In this run no gain; "
    "alone and against oneDNN in turn 1.1 to 1.5 times (below)",
    "linear": "the same products as the convolutions', with packed weights",
    "linear and GEGLU": "one operator: 16 values and their gates leave the tiles side by side",
    "group norm": "sums in registers over runs of positions, a reciprocal for the division in SiLU",
    "layer norm": "whole vectors, four sums at a time",
    "all": "",
}


def cpu_ladder() -> Table:
    """What a step was made of before the CPU's own operators, and is now."""
    before, now = (
        find("cpu_breakdown", "cpu breakdown: step", commit=commit) for commit in ("unknown", "81f3b3ebdd2c+")
    )
    table = [["", "before", "now", "what was done"]]
    for name, done in _LADDER.items():
        label = {"linear": "linear layers", "linear and GEGLU": "linear layers with GEGLU"}.get(name, name)
        table.append([label, *(f"{row['least_seconds'][name]:.3f}" for row in (before, now)), done])
    return table


def _operators(commit: str, *, products: bool) -> list[Row]:
    """The operators of one run: attention and products, or the others."""
    rows = [row for row in _ledger("cpu_operators") if row["commit"] == commit]
    return [row for row in rows if ("reference" not in row["seconds"]) == products]


def _operator(row: Row) -> str:
    return str(row["name"]).removeprefix("cpu operators: ")


def shapes_step() -> Table:
    """What a step of the built-in model is made of."""
    rows = [find("cpu_breakdown", "cpu breakdown: step", model="shapes", batch=batch) for batch in (2, 8)]
    kinds = [kind for kind in rows[0]["least_seconds"] if kind != "all"]
    return [
        ["milliseconds", *(f"{row['batch']} rows, {row['calls']} calls" for row in rows)],
        *([kind, *(f"{1000 * row['least_seconds'][kind]:.2f}" for row in rows)] for kind in (*kinds, "all")),
    ]


def cpu_products() -> Table:
    """Attention, linear layers and convolutions."""
    bodies = {"avx512": "C++ AVX-512", "avx512_bf16": "AVX512-BF16", "amx": "AMX", "torch": "torch's own"}
    table = [["milliseconds", "dtype", *bodies.values(), "times faster", "of the rate of a large product"]]
    for row in _operators("d513bb4d8afa", products=True):
        found = row["seconds"]
        cells = [f"{1000 * found[body]['p50']:.2f}" if body in found else "" for body in bodies]
        share = row.get("share_of_gemm_rate")
        faster = times(row["times_faster"]["torch"])
        table.append([_operator(row), row["dtype"], *cells, faster, percent(share) if share else ""])
    return table


def cpu_winograd() -> Table:
    """Convolutions of 3 x 3 in float32 by minimal filtering: least times, and the tile that would be taken."""
    header = [
        "rows, channels, picture",
        "tiles of 2 x 2, ms",
        "4 x 4, ms",
        "oneDNN, ms",
        "times faster, the tile for this size",
        "relative difference",
    ]
    table = [header]
    for row in _operators("e7cfec37f769", products=True):
        least = {body: found["min"] for body, found in row["seconds"].items()}
        if "tiles of 2" not in least:
            continue
        taken = [body for body in least if body != "torch"][-1]
        faster = least["torch"] / least[taken]
        cells = [f"{1000 * least[body]:.2f}" for body in ("tiles of 2", "tiles of 4", "torch")]
        name = _operator(row).removeprefix("convolution, ")
        table.append([name, *cells, times(faster), f"{row['relative_difference']:.0e}"])
    return table


def cpu_norms() -> Table:
    """What is bound by memory."""
    bodies = {
        "baseline": "C++ baseline",
        "avx2": "AVX2",
        "avx512": "AVX-512",
        "reference": "plain-torch reference",
        "torch": "torch's own operators",
    }
    table = [["milliseconds", "dtype", *bodies.values(), "of the rate of a copy"]]
    for row in _operators("81f3b3ebdd2c+", products=False):
        cells = [f"{1000 * row['seconds'][body]['p50']:.2f}" for body in bodies]
        table.append([_operator(row), row["dtype"], *cells, percent(row["share_of_copy"])])
    return table


def lora() -> Table:
    """LoRAs put in and taken out."""
    times = find("lora", "lora", device="cpu")["seconds"]
    names = {"`load_lora`, the file read included": "load", "`set_lora_scale`": "set scale", "`unload_lora`": "unload"}
    return [["", "seconds"], *([label, f"{times[name]['p50']:.3f}"] for label, name in names.items())]


def shapes() -> Table:
    """Whole pictures of the built-in model."""
    table = [["images at a time", "ldmrt", "diffusers", "times faster"]]
    for images in (1, 4):
        row = find("shapes", f"shapes: {images} images from prompt to pixels")
        table.append(
            [
                str(images),
                *(f"{row['seconds'][name]['p50']:.3f} s" for name in ("ldmrt", "diffusers")),
                times(row["times_faster"]),
            ]
        )
    return table


# ---------------------------------------------------------------------------------------------------- README


def speed() -> Table:
    """The figures that people ask for first."""
    unet = dict(contenders("unet", ALL, "81f3b3ebdd2c+", batch=1))
    others = ", ".join(f"{name} {times(unet[name]['times_of_ldmrt'])}" for name in ALL[2:5])
    peer = gpu("gpu: peers.sd15: diffusers eager", None)
    ours, theirs = (peer[name]["step_seconds"]["p50"] for name in ("ldmrt", "diffusers eager"))
    sdxl, decode = gpu("gpu: sdxl: batch 1", None), gpu("gpu: decode.sdxl: captured", "6848b87")
    whole = gpu("gpu: sd15: end to end", "88814ba")
    beside = f"diffusers eager {milliseconds(theirs)} ms: {times(theirs / ours)} times as long"
    share = f"{percent(unet['ldmrt']['share_of_gemm_rate'])} of the rate of torch's own large matrix product"
    start = find("cold_start", "cold start")["seconds"]
    plans = find("real_size", "build-engines", architecture="sd15", engine="tensorrt-rtx")
    pictures = [find("shapes", f"shapes: {n} images from prompt to pixels")["times_faster"] for n in (1, 4)]
    return [
        ["what", "where", ""],
        [
            "SD1.5, 512 x 512, a step with guidance, float16",
            _model(peer),
            f"{milliseconds(ours)} ms, {peer['ldmrt']['steps_per_second']:.0f} steps/s; {beside}",
        ],
        ["SD1.5, from token ids to pixels, 50 steps", _model(whole), f"{1000 * whole['seconds']['p50']:.0f} ms"],
        [
            "SDXL base, 1024 x 1024, a step with guidance; its decoder",
            _model(sdxl),
            f"{1000 * sdxl['step_seconds']['p50']:.1f} ms; {1000 * decode['seconds']['p50']:.1f} ms",
        ],
        [
            "SD1.5's U-Net, batch 1, bfloat16",
            "2 cores with AMX",
            f"{seconds(unet['ldmrt']['seconds']['p50'])} s, {share}; times as long: {others}",
        ],
        [
            "a picture of the built-in model, one and four at once",
            "2 cores with AMX",
            f"{times(pictures[0])} and {times(pictures[1])} times as fast as diffusers",
        ],
        [
            '`ldmrt generate "a red circle on a white background"`, whole process',
            "2 cores",
            f"{seconds(start['ldmrt generate']['p50'])} s, of which `import torch` {seconds(start['import torch']['p50'])}",
        ],
        [
            "TensorRT plans of SD1.5 for three GPUs that are not there, audited and tried",
            "2 cores with AMX",
            f"{plans['seconds']:.0f} s, {gigabytes(plans['peak_rss_bytes'])} at most",
        ],
    ]


TABLES: dict[str, Callable[[], Table]] = {
    function.__name__.replace("_", " "): function
    for function in (
        speed,
        gpu_sd15,
        gpu_sd15_kernels,
        gpu_sd15_pictures,
        gpu_sdxl,
        serving,
        serving_http,
        replicas,
        soak,
        overload,
        cold_start,
        busy_cores,
        real_size,
        bench_reports,
        scaling,
        cpu_unet,
        cpu_unet_batch_2,
        cpu_sdxl,
        cpu_decoder,
        cpu_text_encoder,
        cpu_float32,
        cpu_ladder,
        cpu_products,
        cpu_winograd,
        cpu_norms,
        lora,
        shapes,
        shapes_step,
    )
}


def markdown(table: Table) -> str:
    """A table's lines."""
    header, *rows = (f"| {' | '.join(cells)} |" for cells in table)
    return "\n".join([header, "|" + "---|" * len(table[0]), *rows]) + "\n"


def written(text: str) -> str:
    """A document with its tables made anew.

    Raises:
        LookupError: it has a table of another name, or the ledger has no such row.
    """

    def make(block: re.Match[str]) -> str:
        name = block["name"]
        if name not in TABLES:
            raise LookupError(f"no table is called {name!r}; there are {', '.join(TABLES)}")
        return block[1] + markdown(TABLES[name]()) + block[4]

    return _BLOCK.sub(make, text)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = False
    for path in DOCUMENTS:
        old = path.read_text(encoding="utf-8")
        new = written(old)
        if new == old:
            continue
        stale = True
        sys.stdout.write(f"{path.relative_to(ROOT)} {'differs from the ledger' if check else 'written'}\n")
        if not check:
            path.write_text(new, encoding="utf-8")
    sys.exit(1 if check and stale else 0)


if __name__ == "__main__":
    main()
