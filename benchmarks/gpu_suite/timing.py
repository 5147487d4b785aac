"""Times of single kernels and of whole loops."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch

from gpu_suite.session import Session
from ldmrt.bench.ledger import summary
from ldmrt.bench.measure import alternate
from ldmrt.capture import Recorder

Case = Callable[[], object]

# Larger than any level-two cache.
_FLUSH = 512 << 20
_IN_A_ROW = 20


def kernel_times(session: Session, case: Case, *, runs: int) -> dict[str, Any]:
    """Seconds of a piece of work of a few launches.

    On a GPU it is replayed as a CUDA graph and timed with events. `cold_seconds`: with 512 MiB written before each run, so that
    nothing of it is in the level-two cache; the launch of the graph, some microseconds, is in them. `warm_seconds`: the mean of
    20 in a row within one graph, whose inputs stay in the cache if they fit.
    """
    if not session.cuda:
        found = alternate({"case": case}, runs=session.runs(runs), warmup=1)["case"]
        return {"cold_seconds": summary(found), "warm_seconds": summary(found)}
    recorder = Recorder(session.device)
    once = recorder.record(lambda: _times(case, 1))
    cold = _with_events(once, runs, before=lambda: _flush(session.device).zero_())
    often = recorder.record(lambda: _times(case, _IN_A_ROW))
    warm = [seconds / _IN_A_ROW for seconds in _with_events(often, max(3, runs // 4))]
    return {"cold_seconds": summary(cold), "warm_seconds": summary(warm)}


def _times(case: Case, count: int) -> None:
    for _ in range(count):
        case()


def _with_events(work: Case, runs: int, before: Case = lambda: None) -> list[float]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]  # type: ignore[no-untyped-call]
    for start, end in events:
        before()
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return [float(start.elapsed_time(end)) / 1e3 for start, end in events]


@cache
def _flush(device: torch.device) -> torch.Tensor:
    return torch.empty(_FLUSH, dtype=torch.uint8, device=device)


def loop_times(
    session: Session, cases: Mapping[str, Case], *, seconds: float, most: int = 20, wall: bool = False
) -> dict[str, list[float]]:
    """Seconds of every run of some long pieces of work, alternating: as many runs as fit into the time, 3 at least.

    Args:
        session: where.
        cases: by name.
        seconds: for all of them together.
        most: runs of each.
        wall: take the clock, not events: for cases that wait for the device themselves.
    """
    start = time.perf_counter()
    for case in cases.values():
        case()
    session.synchronize()
    once = time.perf_counter() - start
    runs = session.runs(max(3, min(most, int(seconds / max(once, 1e-6)))))
    return alternate(cases, runs=runs, warmup=1, device=None if wall else session.device)
