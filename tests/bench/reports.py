"""Reports whose figures are known, for the tests of what is done with reports."""

from __future__ import annotations

from typing import Any

from ldmrt.bench.intervals import Ratio
from ldmrt.bench.report import STAGES, Case, Cold, Machine, Peer, Place, Report, Series, Settings, Work

SCALES = (1, 1.01, 0.99, 1, 1)


def series(*samples: float) -> Series:
    return Series(samples=samples)


PEER = Peer(
    name="another <program>",
    label="torch 64x64, 2 images, guidance",
    dtype="float32",
    psnr=50.0,
    setup_seconds=2.0,
    peak_resident_bytes=None,
    ours_seconds=series(1.0),
    theirs_seconds=series(1.5),
    times_faster=Ratio(value=1.5, low=1.4, high=1.7),
)


def machine(gemm: float = 1e11, **changes: Any) -> Machine:
    return Machine(**({"gemm_before": gemm, "gemm_after": gemm, "copy_rate": 1e10} | changes))


def case(loop: float = 2.0, images: int = 2, **changes: Any) -> Case:
    guidance = changes.get("guidance", True)
    stages = {stage: series(*[0.01 * scale for scale in SCALES]) for stage in STAGES}
    stages["loop"] = series(*[loop * scale for scale in SCALES])
    values: dict[str, Any] = {
        "engine": "torch",
        "width": 64,
        "height": 64,
        "images": images,
        "guidance": guidance,
        "steps": 10,
        "evaluations": 19,
        "rows": images * (1 + guidance),
        "picture_seconds": series(*[2 * loop * scale for scale in SCALES]),
        "stage_seconds": stages,
        "step_seconds": series(*[loop / 10] * 40),
        "work": Work(picture_flops=10**12, step_flops=10**9, step_bytes=10**8),
        "machine": machine(),
    }
    return Case(**(values | changes))


def report(**changes: Any) -> Report:
    settings = Settings(model="m", steps=10, sampler="heun", guidance_scale=5.0)
    place = Place(bundle="b", dtype="float32", device="cpu", threads=2, operators="native", gpu=None)
    cold = Cold(seconds=series(*[3.0] * 5), stage_seconds={"load": series(*[2.0] * 5)}, peak_resident_bytes=1000)
    values: dict[str, Any] = {"settings": settings, "place": place, "cold": cold, "cases": (case(),), "build": None}
    values |= {"provenance": {"machine": {"cpu": "x"}}}
    return Report(**(values | changes))
