"""Times of whole pictures, of their stages and of single steps."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from PIL import Image, ImageDraw

from ldmrt.bench.flops import costs
from ldmrt.bench.report import STAGES, Series, Work
from ldmrt.components import CONTROLLED_STEP, STEP, controlnet, parts
from ldmrt.graph import specialize
from ldmrt.pipeline import Pipeline, Result

Clock = Callable[[], float]

WARMUP = 2
# What `Pipeline` calls its stages.
_NAMES = {"encode": "text encoder", "denoise": "loop", "decode": "decoder"}


@dataclass
class Times:
    """Seconds of every run: whole pictures, their stages by name; and of every step."""

    pictures: list[float] = field(default_factory=list)
    stages: dict[str, list[float]] = field(default_factory=lambda: {stage: [] for stage in STAGES})
    steps: list[float] = field(default_factory=list)

    def series(self) -> dict[str, Any]:
        """As a `Case` has them."""
        return {
            "picture_seconds": _series(self.pictures),
            "stage_seconds": {stage: _series(values) for stage, values in self.stages.items()},
            "step_seconds": _series(self.steps),
        }


def draws_per_run(pipe: Pipeline) -> int:
    """How often a run of `draw_times` draws its pictures.

    On a CPU once, which gives all times. On a GPU stages and steps have a drawing of their own, which waits for the GPU after each.
    """
    return 2 if pipe.device.type == "cuda" else 1


def draw_times(
    pipe: Pipeline,
    request: dict[str, Any],
    *,
    runs: int,
    on_run: Callable[[], None] = lambda: None,
    clock: Clock = time.perf_counter,
) -> Times:
    """Draw the pictures of a request again and again; `WARMUP` runs before those that count.

    Args:
        pipe: what draws.
        request: its arguments.
        runs: that count.
        on_run: called after every run, those too that do not count.
        clock: seconds.
    """
    found = Times()
    for number in range(-WARMUP, runs):
        times = found if number >= 0 else Times()
        apart = draws_per_run(pipe) > 1
        if apart:
            times.pictures.append(_draw(pipe, request, clock))
        whole = _draw_in_stages(pipe, request, times, clock)
        if not apart:
            times.pictures.append(whole)
        on_run()
    return found


def _series(values: Sequence[float]) -> Series:
    return Series(samples=tuple(values))


def _draw(pipe: Pipeline, request: dict[str, Any], clock: Clock) -> float:
    start = clock()
    _encode(pipe(**request))
    return clock() - start


def _draw_in_stages(pipe: Pipeline, request: dict[str, Any], times: Times, clock: Clock) -> float:
    """Seconds of it all; stages and steps are added to `times`."""
    ends: list[float] = []

    def on_step(*_: Any) -> None:
        if pipe.device.type == "cuda":
            torch.cuda.synchronize(pipe.device)
        ends.append(clock())

    pipe.exact_timings = True
    try:
        start = clock()
        result = pipe(**request, on_step=on_step)
        drawn = clock()
        _encode(result)
        end = clock()
    finally:
        pipe.exact_timings = False
    for stage, seconds in result.timings.items():
        times.stages[_NAMES.get(stage, stage)].append(seconds)
    times.stages["png"].append(end - drawn)
    # The loop's own beginning is not seen from here: of a single step the loop is the time.
    times.steps += [b - a for a, b in pairwise(ends)] or [result.timings["denoise"]]
    return end - start


def _encode(result: Result) -> None:
    for image in result.images:
        image.save(io.BytesIO(), format="PNG")


def batches_of(pipe: Pipeline, size: tuple[int, int], *, guidance: bool) -> list[int]:
    """The numbers of images that the bundle has step engines for, fewest first; empty if it has none of that size."""
    if size not in pipe.defaults.sizes:
        return []
    rows = {record.rows or 1 for record in pipe.engines("step", size)}
    return sorted({count // (2 if guidance else 1) for count in rows} - {0})


def control_picture(width: int, height: int) -> Image.Image:
    """What a ControlNet is given to follow: the outlines of a circle and a square."""
    picture = Image.new("RGB", (width, height))
    draw, side, line = ImageDraw.Draw(picture), min(width, height), max(1, min(width, height) // 128)
    draw.ellipse((side // 8, side // 8, side // 2, side // 2), outline="white", width=line)
    draw.rectangle((side // 2, side // 2, side - side // 8, side - side // 8), outline="white", width=line)
    return picture


def work_of(
    pipe: Pipeline, size: tuple[int, int], images: int, rows: int, evaluations: int, *, controlled: bool = False
) -> Work | None:
    """What the pictures of a call take, counted in the graphs; None where the steps are not run from a graph of ours.

    The text encoder reads the prompt, and the empty prompt where there is guidance. With `controlled` all ControlNets of the bundle run at every
    step.
    """
    if pipe.kind != "torch":
        return None
    tokens = 1 if pipe.tokenizer is None else pipe.tokenizer.model_max_length

    def count(component: str, entries: int) -> tuple[int, int]:
        """FLOPs and bytes of `entries` rows."""
        records = pipe.engines(component, size)
        fitting = [each for each in records if (each.rows or 1) <= entries] or records[:1]
        record = fitting[-1]
        fixed = record.rows or entries
        found = costs(specialize(pipe.bundle.graph(record), {"rows": fixed, "tokens": tokens}))
        times = -(-entries // fixed)
        return times * sum(one.flops for one in found), times * sum(one.nbytes for one in found)

    networks = [parts(CONTROLLED_STEP if controlled else STEP)]
    if controlled:
        networks += [parts(f"{controlnet(each.name)}.step") for each in pipe.bundle.manifest.controlnets]
    steps = [count(step, rows) for _, _, step in networks]
    step_flops, step_bytes = (sum(each) for each in zip(*steps, strict=True))
    texts = sum(count(name, rows // images)[0] for name in pipe.bundle.manifest.model.tokenizers)
    before = sum(count(context, rows)[0] + count(schedule, evaluations * rows)[0] for context, schedule, _ in networks)
    after = count("decoder", images)[0]
    return Work(
        picture_flops=texts + before + evaluations * step_flops + after, step_flops=step_flops, step_bytes=step_bytes
    )
