"""What makes figures doubtful."""

from __future__ import annotations

from typing import Any

from ldmrt.bench.nvml import GpuReading
from ldmrt.bench.report import Case, Machine, Series
from ldmrt.bench.trust import doubts

QUIET = (1.0, 1.01, 0.99, 1.0, 1.0)


def case(samples: tuple[float, ...] = QUIET, **machine: Any) -> Case:
    times = Series(samples=samples)
    rates = {"gemm_before": 1e11, "gemm_after": 1e11, "copy_rate": 1e10, "others": 0.01}
    return Case(
        engine="torch",
        width=64,
        height=64,
        images=2,
        guidance=True,
        steps=4,
        evaluations=4,
        rows=4,
        picture_seconds=times,
        stage_seconds={"loop": times},
        step_seconds=times,
        work=None,
        machine=Machine(**(rates | machine)),
    )


def gpu(**changes: Any) -> GpuReading:
    values: dict[str, Any] = {
        "driver": "1",
        "sm_clock_mhz": (1950, 1980),
        "memory_clock_mhz": (1, 1),
        "power_watts": 1.0,
    }
    values |= {"temperature_celsius": 50, "used_bytes": 1, "processes": 1, "held_back": (), "joules_per_image": None}
    return GpuReading(**(values | changes))


def test_nothing_speaks_against_a_quiet_run() -> None:
    assert doubts([case(), case(gpu=gpu()), case(others=None)]) == []


def test_doubts_have_reasons() -> None:
    few, scatter, drift, others = doubts([case(), case((1.0, 2.0, 3.0), gemm_after=5e10, others=0.4)])
    assert few.startswith("3 runs")
    assert "torch 64x64, 2 images, guidance" in scatter
    assert "50%" in scatter
    assert "50%" in drift
    assert "40%" in others


def test_of_a_gpu() -> None:
    reading = gpu(sm_clock_mhz=(1500, 1980), held_back=("power cap",), processes=2)
    clock, held, processes = doubts([case(gpu=reading)])
    assert "1500" in clock
    assert "power cap" in held
    assert "2 processes" in processes
