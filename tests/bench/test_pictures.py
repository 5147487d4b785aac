"""Times of pictures: on a clock that only the drawing moves, and of a small model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from ldmrt.bench.flops import costs
from ldmrt.bench.pictures import WARMUP, batches_of, draw_times, work_of
from ldmrt.bench.report import STAGES
from ldmrt.graph import specialize
from ldmrt.pipeline import Pipeline


class Drawing:
    """A pipeline whose stages take known times."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.exact_timings = False
        self.now = 0.0
        self.calls: list[int] = []

    def __call__(self, *, images: int, on_step: Any) -> Any:
        assert self.exact_timings
        self.calls.append(images)
        timings = {"tokenize": 1.0, "encode": 2.0, "prepare": 3.0, "denoise": 0.0, "decode": 5.0, "copy": 6.0}
        self.now += 6.0
        for step in range(4):
            self.now += 10.0 * images
            timings["denoise"] += 10.0 * images
            on_step(step, None)
        self.now += 11.0

        class Slow(Image.Image):
            def save(picture, *_: Any, **__: Any) -> None:  # noqa: N805 - self is the pipeline
                self.now += 7.0

        return SimpleNamespace(images=[Slow()] * images, timings=timings)


def test_stages_add_up_to_the_picture() -> None:
    drawing: Any = Drawing()
    counted: list[int] = []
    found = draw_times(drawing, {"images": 3}, runs=5, on_run=lambda: counted.append(1), clock=lambda: drawing.now)
    assert list(found.stages) == list(STAGES)
    assert found.pictures == [17 + 40 * 3 + 7 * 3] * 5
    for number, whole in enumerate(found.pictures):
        assert sum(values[number] for values in found.stages.values()) == whole
    assert found.stages["png"] == [7.0 * 3] * 5
    assert found.steps == [10.0 * 3] * 15  # the first step of each run has no beginning
    assert len(drawing.calls) == len(counted) == 5 + WARMUP
    assert not drawing.exact_timings


@pytest.fixture(scope="module")
def pipe(tiny_bundle: Path) -> Pipeline:
    return Pipeline.from_bundle(tiny_bundle, "cpu")


def test_batches_are_those_that_engines_are_for(pipe: Pipeline) -> None:
    assert batches_of(pipe, (64, 64), guidance=True) == [1, 2]
    assert batches_of(pipe, (64, 64), guidance=False) == [1, 2, 4]
    assert batches_of(pipe, (72, 64), guidance=True) == []


def test_work_is_that_of_the_graphs(pipe: Pipeline) -> None:
    one, two = (work_of(pipe, (64, 64), images, 2 * images, 5) for images in (1, 2))
    bare = work_of(pipe, (64, 64), 1, 1, 5)
    assert one is not None
    assert two is not None
    assert bare is not None
    # A convolution of twice as many rows takes twice as much; so does all else of the step.
    assert two.step_flops == 2 * one.step_flops == 4 * bare.step_flops
    assert pipe.tokenizer is not None
    record = next(each for each in pipe.engines("step", (64, 64)) if each.rows == 2)
    expected = costs(specialize(pipe.bundle.graph(record), {"tokens": pipe.tokenizer.model_max_length}))
    assert one.step_flops == sum(cost.flops for cost in expected)
    assert one.step_bytes == sum(cost.nbytes for cost in expected)
    assert one.picture_flops > 5 * one.step_flops
