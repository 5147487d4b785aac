"""In the manner of MLPerf: what is asked of the model, and what is made of the times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ldmrt.bench import mlperf, run
from ldmrt.bench.run import Plan
from ldmrt.bench.subject import Subject
from ldmrt.errors import BadRequest
from ldmrt.pipeline import Pipeline
from tests.bench.reports import case, report as made


def test_single_stream_is_of_one_picture_and_offline_of_the_best_batch() -> None:
    bare = case(loop=0.1, images=8, guidance=False)
    alone, few, many = case(loop=2.0, images=1), case(loop=3.0, images=4), case(loop=60.0, images=8)
    found = mlperf.scenarios([many, bare, alone, few])
    assert found.single_stream_p90_seconds == alone.picture_seconds.summary["p90"]
    assert found.single_stream_pictures == 5
    assert (found.offline_images_per_second, found.offline_batch) == (few.images_per_second, 4)


def test_a_plan_is_filled_with_its_parameters() -> None:
    found = Plan(mlperf=True, batches=(4, 1), steps=3, runs=7).filled()
    assert (found.sizes, found.steps, found.sampler) == (((1024, 1024),), 20, "euler")
    assert (found.guidance_scale, found.batches, found.runs) == (8.0, (1, 4), 7)
    assert Plan(steps=3).filled() == Plan(steps=3)


def test_it_is_of_sdxl_alone(tiny_bundle: Path) -> None:
    mlperf.check_model("stable-diffusion-xl")
    with pytest.raises(BadRequest, match="this model is stable-diffusion: use --arch sdxl"):
        run.bench(Subject(tiny_bundle, None), Plan(mlperf=True, device="cpu"))


def test_a_small_model_is_measured_so(tiny_bundle_xl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    call = Pipeline.__call__

    def heard(self: Pipeline, **request: Any) -> Any:
        asked.append(request)
        return call(self, **request)

    monkeypatch.setattr(Pipeline, "__call__", heard)
    monkeypatch.setattr(mlperf, "SIZE", (64, 64))
    monkeypatch.setattr(mlperf, "STEPS", 2)
    monkeypatch.setattr(run, "gemm_rate", lambda *_, **__: 1e11)
    monkeypatch.setattr(run, "copy_rate", lambda *_, **__: 1e10)
    monkeypatch.setattr(run, "cold_starts", lambda *_, **__: made().cold)
    report = run.bench(Subject(tiny_bundle_xl, None), Plan(mlperf=True, device="cpu", runs=2, batches=(2,)))
    assert report.mlperf is not None
    assert report.mlperf.single_stream_pictures == 2
    assert report.mlperf.offline_images_per_second == report.best.images_per_second
    assert {case.images for case in report.cases if case.guidance} == {1, 2}
    guided = [request for request in asked if request["guidance_scale"] == 8.0]
    assert {request["negative_prompt"] for request in guided} == {mlperf.NEGATIVE_PROMPT}
    assert {request["sampler"] for request in asked} == {"euler"}
