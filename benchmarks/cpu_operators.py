"""The fused operators on the CPU: the C++ bodies at each instruction set, the plain-torch references, and torch's own operators.

    python benchmarks/cpu_operators.py [--runs 15]

All bodies of a size run in turn, in one process, and are compared first. The rows go to results/cpu_operators.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ldmrt.bench.ledger import append, summary
from ldmrt.bench.measure import alternate, copy_rate
from ldmrt.export.verify import relative_error
from ldmrt.graph import dtype_name
from ldmrt.kernels import native
from ldmrt.kernels.add_group_norm import add_group_norm_silu_native, add_group_norm_silu_reference
from ldmrt.kernels.geglu import geglu_native, geglu_reference
from ldmrt.kernels.group_norm import group_norm_silu_native, group_norm_silu_reference
from ldmrt.kernels.layer_norm import add_layer_norm_native, add_layer_norm_reference

LEDGER = Path(__file__).resolve().parent / "results" / "cpu_operators.jsonl"
EPS, GROUPS = 1e-5, 32
CPU = torch.device("cpu")
# What two bodies may differ by: the references and torch round to the dtype more than once.
AGREE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

Body = Callable[[], Any]


def random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def picture(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return random(*shape, dtype=dtype, seed=seed).contiguous(memory_format=torch.channels_last)


def at(level: int, body: Body) -> Any:
    """The body with an instruction set."""
    library = native.library()
    assert library is not None
    assert library.ldmrt_use_level(level)
    return body()


def problems(dtype: torch.dtype) -> Iterator[tuple[str, int, Body, Body, Body]]:
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
    runs = parser.parse_args().runs
    library = native.library()
    if library is None:
        parser.error(f"there are no C++ bodies to time: {native.why_not()}")
    highest = int(library.ldmrt_highest_level())
    copy = copy_rate(CPU)
    print(f"{torch.get_num_threads()} threads, copies {copy / 1e9:.1f} GB/s")
    for dtype in (torch.float32, torch.bfloat16):
        for name, nbytes, body, reference, torchs in problems(dtype):
            cases: Mapping[str, Body] = {
                **{native.LEVELS[level]: partial(at, level, body) for level in range(highest + 1)},
                "reference": reference,
                "torch": torchs,
            }
            expected = reference()
            worst = max(differ(case(), expected) for case in cases.values())
            assert worst < AGREE[dtype], f"{name}, {dtype_name(dtype)}: bodies differ by {worst:.2e}"
            times = alternate(cases, runs=runs)
            best = times[native.LEVELS[highest]]
            figures = {
                "dtype": dtype_name(dtype),
                "threads": torch.get_num_threads(),
                "seconds": {case: summary(seconds) for case, seconds in times.items()},
                "bytes": nbytes,
                "copy_bytes_per_second": copy,
                "share_of_copy": round(nbytes / copy / statistics.median(best), 3),
                "times_faster": {
                    case: round(statistics.median(a / b for a, b in zip(times[case], best, strict=True)), 2)
                    for case in ("reference", "torch")
                },
                "relative_difference": float(f"{worst:.2e}"),
            }
            append(LEDGER, f"cpu operators: {name}", figures)
            medians = ", ".join(f"{case} {1e3 * statistics.median(seconds):.2f}" for case, seconds in times.items())
            print(f"{name}, {dtype_name(dtype)}: ms: {medians}; {figures['share_of_copy']:.0%} of a copy's rate")


if __name__ == "__main__":
    main()
