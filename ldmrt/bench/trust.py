"""Whether figures are to be trusted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ldmrt.bench.intervals import FEWEST
from ldmrt.bench.report import Case

# Quartiles further apart than this share of the median; rates and clocks before and after; what other processes had of the cores.
_SPREAD, _DRIFT, _CLOCKS, _OTHERS = 0.1, 0.1, 0.05, 0.1


def doubts(cases: Sequence[Case]) -> list[str]:
    """Why the times of cases are not to be trusted, a line for each reason."""
    fewest = min(len(case.picture_seconds.samples) for case in cases)
    few = (
        [f"{fewest} run{'s' * (fewest > 1)} of a case say{'s' * (fewest == 1)} little: use --runs {FEWEST} or more"]
        if fewest < FEWEST
        else []
    )
    return few + [f"{case.label}: {reason}" for case in cases for reason in _of_case(case)]


def _of_case(case: Case) -> Iterator[str]:
    if case.picture_seconds.spread > _SPREAD:
        yield f"the times scatter: the middle half of them spans {case.picture_seconds.spread:.0%} of their median"
    drift = case.machine.gemm_after / case.machine.gemm_before
    if not 1 / (1 + _DRIFT) < drift < 1 + _DRIFT:
        yield f"the machine's own matrix product ran at {drift:.0%} of its first rate after the runs"
    if (case.machine.others or 0) > _OTHERS:
        yield f"other processes had {case.machine.others:.0%} of all processor cores"
    gpu = case.machine.gpu
    if gpu is not None:
        low, high = gpu.sm_clock_mhz
        if low < (1 - _CLOCKS) * high:
            yield f"the GPU's clock moved between {low} and {high} MHz"
        if gpu.held_back:
            yield f"the GPU was held back: {', '.join(gpu.held_back)}"
        if gpu.processes > 1:
            yield f"{gpu.processes} processes computed on the GPU"
