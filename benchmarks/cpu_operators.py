"""The operators on the CPU: the C++ bodies at each instruction set, the plain-torch references, and torch's own operators.

    python benchmarks/cpu_operators.py [--runs 15] [--only attention]

All bodies of a size run in turn, in one process, and are compared first. The rows go to results/cpu_operators.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from ldmrt.bench.ledger import append, summary
from ldmrt.bench.measure import alternate, copy_rate, gemm_rate
from ldmrt.graph import dtype_name
from ldmrt.kernels import native, winograd
from ldmrt.kernels.add_group_norm import add_group_norm_silu_native, add_group_norm_silu_reference
from ldmrt.kernels.attention import attention_native, attention_reference
from ldmrt.kernels.convolution import arranged_weight, conv2d, library_weight
from ldmrt.kernels.geglu import geglu_native, geglu_reference
from ldmrt.kernels.group_norm import group_norm_silu_native, group_norm_silu_reference
from ldmrt.kernels.layer_norm import add_layer_norm_native, add_layer_norm_reference
from ldmrt.kernels.linear import arranged_gated, arranged_linear, linear
from ldmrt.kernels.linear_geglu import linear_geglu
from ldmrt.verify import relative_error

LEDGER = Path(__file__).resolve().parent / "results" / "cpu_operators.jsonl"
EPS, GROUPS = 1e-5, 32
CPU = torch.device("cpu")
# The instruction sets that most bodies are compiled for.
VECTOR_LEVELS = ("baseline", "avx2", "avx512")
# What two bodies may differ by: the references and torch round to the dtype more than once, minimal filtering loses digits.
AGREE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}

Body = Callable[[], Any]


class Problem(NamedTuple):
    """What is computed, by whom, and what it takes at least.

    `bodies` are the C++ ones by name; `others` come after them, the first of which is what is compared with.
    """

    name: str
    dtype: torch.dtype
    bodies: Mapping[str, Body]
    others: Mapping[str, Body]
    nbytes: int = 0
    flops: int = 0


def random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def picture(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return random(*shape, dtype=dtype, seed=seed).contiguous(memory_format=torch.channels_last)


def at(level: int, body: Body) -> Any:
    """The body with an instruction set; the best one is back after it."""
    library = native.library()
    assert library is not None
    assert library.ldmrt_use_level(level)
    try:
        return body()
    finally:
        library.ldmrt_use_level(library.ldmrt_highest_level())


def levels(body: Body) -> dict[str, Body]:
    """The body with every instruction set that the processor has and that is compiled for, by name."""
    library = native.library()
    assert library is not None
    highest = int(library.ldmrt_highest_level())
    return {name: partial(at, level, body) for level, name in enumerate(native.LEVELS[: highest + 1])}


def memory_problems(dtype: torch.dtype) -> Iterator[Problem]:
    """Norms and the gate, which memory bounds: each with the instruction sets that have bodies of their own."""
    for name, nbytes, body, reference, torchs in _memory_problems(dtype):
        bodies = {level: case for level, case in levels(body).items() if level in VECTOR_LEVELS}
        yield Problem(name, dtype, bodies, {"torch": torchs, "reference": reference}, nbytes=nbytes)


def product_problems(dtype: torch.dtype) -> Iterator[Problem]:
    """Attention, linear layers and convolutions of SD1.5's U-Net at 512 x 512, one row."""
    for queries, keys, heads, size in ((4096, 4096, 8, 40), (1024, 1024, 8, 80), (256, 256, 8, 160), (4096, 77, 8, 40)):
        tensors = [random(1, tokens, heads * size, dtype=dtype, seed=tokens) for tokens in (queries, keys, keys)]
        arguments = (*tensors, heads, size**-0.5)
        bodies = levels(partial(attention_native, *arguments))
        if queries * keys > 1 << 20:  # seconds, with the others
            bodies = dict([*bodies.items()][-1:])
        elif dtype == torch.float32:
            bodies = {level: case for level, case in bodies.items() if level in VECTOR_LEVELS}
        yield Problem(
            f"attention, {heads} heads of {size}, {queries} to {keys}",
            dtype,
            bodies,
            {"torch": partial(attention_reference, *arguments)},
            flops=4 * queries * keys * heads * size,
        )
    if dtype == torch.float32 and native.takes_winograd():
        yield from winograd_problems()
    if dtype != torch.bfloat16 or not native.takes_packed():
        return
    for rows, inner, out in ((4096, 320, 320), (1024, 640, 640), (256, 1280, 1280), (4096, 1280, 320)):
        x, weight = random(rows, inner, dtype=dtype, seed=0), random(out, inner, dtype=dtype, seed=1)
        yield Problem(
            f"linear, {rows} x {inner} to {out}",
            dtype,
            {"amx": partial(linear, x, arranged_linear(weight))},
            {"torch": partial(F.linear, x, weight)},
            flops=2 * rows * inner * out,
        )
    for rows, inner, width in ((4096, 320, 1280), (1024, 640, 2560), (256, 1280, 5120)):
        x, weight = random(rows, inner, dtype=dtype, seed=0), random(2 * width, inner, dtype=dtype, seed=1) / inner**0.5
        yield Problem(
            f"linear and GEGLU, {rows} x {inner} to {width}",
            dtype,
            {"amx": partial(linear_geglu, x, arranged_gated(weight))},
            {"torch": partial(torch_gated, x, weight)},
            flops=4 * rows * inner * width,
        )
    for channels, out, side in ((320, 320, 64), (640, 640, 32), (1280, 1280, 16), (1280, 1280, 8), (256, 256, 256)):
        x, weight = (
            picture(1, channels, side, side, dtype=dtype, seed=0),
            random(out, channels, 3, 3, dtype=dtype, seed=1),
        )
        yield Problem(
            f"convolution, {channels} to {out} at {side} x {side}",
            dtype,
            {"amx": partial(conv2d, x, arranged_weight(weight, 1, 1), 1, 1)},
            {"torch": partial(conv2d, x, library_weight(weight, 1, 1), 1, 1)},
            flops=18 * channels * out * side**2,
        )


def winograd_problems() -> Iterator[Problem]:
    """Convolutions of the built-in model, with guidance, and of SD1.5 in float32: by tiles of 2 and of 4; the one that an engine
    would take comes last.
    """
    for rows, channels, out, side in (
        (2, 64, 64, 16), (2, 128, 128, 16), (2, 128, 128, 8), (2, 160, 160, 4), (2, 320, 160, 4), (1, 16, 16, 128), (1, 16, 32, 128),
        (1, 32, 32, 128), (1, 64, 64, 64), (1, 320, 320, 64), (1, 640, 640, 32), (1, 1280, 1280, 32), (1, 1280, 1280, 16), (1, 1280, 1280, 8),
        (1, 2560, 1280, 8), (1, 256, 256, 256),
    ):  # fmt: skip
        x = picture(rows, channels, side, side, dtype=torch.float32, seed=0)
        weight = random(out, channels, 3, 3, dtype=torch.float32, seed=1)
        chosen = winograd.tile(weight.shape, side, side)
        bodies = {
            f"tiles of {size}": partial(winograd.conv2d_winograd, x, winograd.pack(weight, size))
            for size in sorted(get_args(winograd.Tile), key=lambda size: size == chosen)
        }
        yield Problem(
            f"convolution, {rows} x {channels} to {out} at {side} x {side}",
            torch.float32,
            bodies,
            {"torch": partial(conv2d, x, library_weight(weight, 1, 1), 1, 1)},
            flops=18 * rows * channels * out * side**2,
        )


def torch_gated(x: Tensor, weight: Tensor) -> Tensor:
    """The linear layer and the gate by torch."""
    value, gate = F.linear(x, weight).chunk(2, -1)
    return value * F.gelu(gate)


def _memory_problems(dtype: torch.dtype) -> Iterator[tuple[str, int, Body, Body, Body]]:
    """A name, the bytes that must be moved, and the C++ body, the reference and torch's own for the same."""
    size = dtype.itemsize
    for channels, side in ((320, 64), (1280, 16)):
        x, residual = (picture(2, channels, side, side, dtype=dtype, seed=seed) for seed in (0, 1))
        weight, bias, x_bias = (random(channels, dtype=dtype, seed=seed) for seed in (2, 3, 4))
        norm = (weight, bias, GROUPS, EPS, True)

        def torch_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return F.silu(F.group_norm(x, GROUPS, weight, bias, EPS))

        def torch_sum(
            x: Tensor, residual: Tensor, x_bias: Tensor, weight: Tensor, bias: Tensor
        ) -> tuple[Tensor, Tensor]:
            total = x + residual + x_bias[:, None, None]
            return total, F.silu(F.group_norm(total, GROUPS, weight, bias, EPS))

        yield (
            f"group norm and SiLU, 2 x {channels} x {side} x {side}",
            2 * x.numel() * size,
            partial(group_norm_silu_native, x, *norm),
            partial(group_norm_silu_reference, x, *norm),
            partial(torch_norm, x, weight, bias),
        )
        yield (
            f"sum, group norm and SiLU, 2 x {channels} x {side} x {side}",
            4 * x.numel() * size,
            partial(add_group_norm_silu_native, x, residual, None, *norm, x_bias),
            partial(add_group_norm_silu_reference, x, residual, None, *norm, x_bias),
            partial(torch_sum, x, residual, x_bias, weight, bias),
        )
    x, residual = (random(2, 4096, 320, dtype=dtype, seed=seed) for seed in (0, 1))
    weight, bias, x_bias = (random(320, dtype=dtype, seed=seed) for seed in (2, 3, 4))

    def torch_layer(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual + x_bias
        return total, F.layer_norm(total, (320,), weight, bias, EPS)

    yield (
        "sum and layer norm, 2 x 4096 x 320",
        4 * x.numel() * size,
        partial(add_layer_norm_native, x, residual, weight, bias, EPS, x_bias),
        partial(add_layer_norm_reference, x, residual, weight, bias, EPS, x_bias),
        partial(torch_layer, x, residual),
    )
    wide = random(2, 4096, 2560, dtype=dtype, seed=5)

    def torch_geglu(x: Tensor) -> Tensor:
        value, gate = x.chunk(2, -1)
        return value * F.gelu(gate)

    yield (
        "GEGLU, 2 x 4096 x 1280",
        wide.numel() * 3 // 2 * size,
        partial(geglu_native, wide),
        partial(geglu_reference, wide),
        partial(torch_geglu, wide),
    )


def differ(found: Any, expected: Any) -> float:
    """The largest relative difference of the results, by L2 norm."""
    pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
    return max(relative_error(a, b) for a, b in pairs)


def main() -> None:
    """Check, time, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--only", default="", help="what the names of the problems begin with")
    arguments = parser.parse_args()
    if not native.available():
        parser.error(f"there are no C++ bodies to time: {native.why_not()}")
    copy = copy_rate(CPU)
    print(f"{torch.get_num_threads()} threads, copies {copy / 1e9:.1f} GB/s")
    for dtype in (torch.float32, torch.bfloat16):
        gemm = gemm_rate(CPU, dtype)
        print(f"{dtype_name(dtype)}: matrix products {gemm / 1e9:.0f} GFLOP/s")
        for problem in (*memory_problems(dtype), *product_problems(dtype)):
            if problem.name.startswith(arguments.only):
                measure(problem, arguments.runs, copy, gemm)


def measure(problem: Problem, runs: int, copy: float, gemm: float) -> None:
    """Compare the bodies of a problem, time them in turn, and write the row."""
    cases = {**problem.bodies, **problem.others}
    expected = next(iter(problem.others.values()))()
    worst = max(differ(case(), expected) for case in cases.values())
    assert worst < AGREE[problem.dtype], f"{problem.name}: bodies differ by {worst:.2e}"
    times = alternate(cases, runs=runs)
    best = times[[*problem.bodies][-1]]
    if problem.flops:
        least = {
            "flops": problem.flops,
            "gemm_flops_per_second": gemm,
            "share_of_gemm_rate": round(problem.flops / gemm / statistics.median(best), 3),
        }
    else:
        least = {
            "bytes": problem.nbytes,
            "copy_bytes_per_second": copy,
            "share_of_copy": round(problem.nbytes / copy / statistics.median(best), 3),
        }
    figures: dict[str, Any] = {
        "dtype": dtype_name(problem.dtype),
        "threads": torch.get_num_threads(),
        "seconds": {case: summary(seconds) for case, seconds in times.items()},
        **least,
        "times_faster": {
            case: round(statistics.median(a / b for a, b in zip(times[case], best, strict=True)), 2)
            for case in problem.others
        },
        "relative_difference": float(f"{worst:.2e}"),
    }
    append(LEDGER, f"cpu operators: {problem.name}", figures)
    medians = ", ".join(f"{case} {1e3 * statistics.median(seconds):.2f}" for case, seconds in times.items())
    print(
        f"{problem.name}, {dtype_name(problem.dtype)}: ms: {medians}; {figures['times_faster']['torch']} times torch's"
    )


if __name__ == "__main__":
    main()
