"""The fused operators under pytest-benchmark: each body of a problem, and what the machine does at best beside it.

    pytest benchmarks/test_operators.py [-k "group norm"] [--benchmark-save=NAME] [--benchmark-compare=NAME]

Groups are problems. `share of floor` in a benchmark's extra information is the time that the machine's own rate of matrix products, or of
copies, allows, over the median. Results are compared before anything is timed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch

from cpu_operators import AGREE, Problem, differ, memory_problems, product_problems
from ldmrt.graph import dtype_name
from ldmrt.kernels import native

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

    from conftest import Machine

pytestmark = pytest.mark.skipif(not native.available(), reason="there are no C++ bodies to time")


def problems() -> Iterator[Problem]:
    if native.available():
        for dtype in (torch.float32, torch.bfloat16):
            yield from memory_problems(dtype)
            yield from product_problems(dtype)


CASES = [
    pytest.param(problem, body, id=f"{problem.name}, {dtype_name(problem.dtype)}-{body}")
    for problem in problems()
    for body in (*problem.bodies, *problem.others)
]


@pytest.mark.parametrize(("problem", "body"), CASES)
def test_operator(benchmark: BenchmarkFixture, machine: Machine, problem: Problem, body: str) -> None:
    run = {**problem.bodies, **problem.others}[body]
    expected = next(iter(problem.others.values()))()
    assert differ(run(), expected) < AGREE[problem.dtype]
    benchmark.group = f"{problem.name}, {dtype_name(problem.dtype)}"
    benchmark(run)
    if benchmark.stats is not None:  # with --benchmark-disable nothing is timed
        floor = problem.flops / machine.gemm(problem.dtype) if problem.flops else problem.nbytes / machine.copy()
        benchmark.extra_info["share of floor"] = round(floor / benchmark.stats.stats.median, 3)
