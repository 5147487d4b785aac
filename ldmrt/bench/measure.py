"""Taking times that can be compared: warmed up, alternating, beside the machine's own rates."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

Case = Callable[[], object]


def alternate(
    cases: Mapping[str, Case], *, runs: int, warmup: int = 2, device: torch.device | None = None
) -> dict[str, list[float]]:
    """Time several things against each other: one run of each in turn, so that what the machine does meanwhile hits all alike.

    The order is reversed in every other round, since what ran before leaves caches and clocks behind.

    Args:
        cases: what to time, by name.
        runs: timed runs of each.
        warmup: runs of each before that.
        device: a CUDA device takes its times from events on the stream; else from the clock.

    Returns:
        Seconds of every run, by name.
    """
    timed = _cuda_seconds if device is not None and device.type == "cuda" else _seconds
    for _ in range(warmup):
        for case in cases.values():
            timed(case)
    found: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(runs):
        order = list(cases) if number % 2 == 0 else list(cases)[::-1]
        for name in order:
            found[name].append(timed(cases[name]))
    return found


def gemm_rate(device: torch.device, dtype: torch.dtype, *, side: int | None = None, runs: int = 7) -> float:
    """FLOP/s of a square matrix product through torch, the best of some runs: the roof for what is made of products.

    Random operands: on a GPU zeros run faster, since they draw less power.
    """
    side = side or (8192 if device.type == "cuda" else 2048)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty(side, side, device=device, dtype=dtype)
    seconds = alternate({"gemm": lambda: torch.mm(left, right, out=out)}, runs=runs, device=device)["gemm"]
    return 2 * side**3 / min(seconds)


def copy_rate(device: torch.device, *, nbytes: int | None = None, runs: int = 7) -> float:
    """Bytes per second, read and written, of a copy far larger than the caches, the best of some runs."""
    nbytes = nbytes or (4 << 30 if device.type == "cuda" else 512 << 20)
    source = torch.empty(nbytes, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    seconds = alternate({"copy": lambda: target.copy_(source)}, runs=runs, device=device)["copy"]
    return 2 * nbytes / min(seconds)


def _seconds(case: Case) -> float:
    start = time.perf_counter()
    case()
    return time.perf_counter() - start


def _cuda_seconds(case: Case) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    case()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3
