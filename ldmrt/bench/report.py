"""What `ldmrt bench` found: one versioned document, with every single time in it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, computed_field

from ldmrt.bench.intervals import Ratio
from ldmrt.bench.ledger import summary
from ldmrt.bench.nvml import GpuReading
from ldmrt.errors import BadRequest
from ldmrt.files import replacing

FORMAT: Literal[1] = 1
STAGES = ("tokenize", "text encoder", "prepare", "loop", "decoder", "copy", "png")


class _Record(BaseModel):
    # What is computed is written too, and ignored when it is read.
    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class Series(_Record):
    """Times of one thing, in seconds, in the order in which they were taken."""

    samples: tuple[float, ...] = Field(min_length=1)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def summary(self) -> dict[str, float | int]:
        """n, p50, p90, p99 and min."""
        return summary(self.samples)

    @property
    def median(self) -> float:
        """The median."""
        return float(np.median(self.samples))

    @property
    def spread(self) -> float:
        """The distance of the quartiles over the median."""
        low, high = np.percentile(self.samples, [25, 75])
        return float(high - low) / self.median


class Settings(_Record):
    """What was drawn. Reports whose settings differ are not compared.

    Attributes:
        model: its name in the bundle.
        steps: of the sampler.
        sampler: its name.
        guidance_scale: of the cases with guidance.
    """

    model: str
    steps: int
    sampler: str
    guidance_scale: float


class Place(_Record):
    """What drew it.

    Attributes:
        bundle: its folder's name, without where that lies; or `built-in`.
        dtype: precision of the engines.
        device: torch's name of it.
        threads: torch's, on the CPU.
        operators: what computes the fused operators.
        gpu: its name; None on a CPU.
    """

    bundle: str
    dtype: str
    device: str
    threads: int
    operators: str
    gpu: str | None


class Build(_Record):
    """The bundle, as it was built for this.

    Attributes:
        seconds: of `build_engines`, verification included.
        engines: made.
        reused: engines that were there; they take next to nothing of the time.
        peak_resident_bytes: the most memory that the build, a process of its own, had; None where that was not measured.
    """

    seconds: float
    engines: int
    reused: int
    peak_resident_bytes: int | None = None


class Cold(_Record):
    """`ldmrt generate` in a process of its own, from its start to its end, with the picture's file written.

    Attributes:
        seconds: of each process.
        stage_seconds: what it says itself of its stages; `load` includes its imports from the command on.
        peak_resident_bytes: the most memory that one of them had.
    """

    seconds: Series
    stage_seconds: dict[str, Series]
    peak_resident_bytes: int


class Work(_Record):
    """What the graphs must do at least (`ldmrt.bench.flops`) for the pictures of a case.

    Attributes:
        picture_flops: from tokens to pixels.
        step_flops: one run of the step's engine.
        step_bytes: read and written by it, if every operand passes once between memory and processor.
    """

    picture_flops: int
    step_flops: int
    step_bytes: int


class Machine(_Record):
    """How the machine was while a case ran.

    Attributes:
        gemm_before: FLOP/s of a large matrix product in the same precision, just before.
        gemm_after: the same, just after.
        copy_rate: bytes per second, read and written, of a large copy just after.
        others: the share of all processor cores that other processes had meanwhile; None where the system does not tell.
        peak_device_bytes: the most memory that torch had on the GPU; None on a CPU.
        gpu: what NVML says; None without a GPU or nvidia-ml-py.
    """

    gemm_before: float
    gemm_after: float
    copy_rate: float
    others: float | None = None
    peak_device_bytes: int | None = None
    gpu: GpuReading | None = None

    @property
    def gemm(self) -> float:
        """FLOP/s, between before and after."""
        return math.sqrt(self.gemm_before * self.gemm_after)


class Case(_Record):
    """Pictures drawn together.

    Attributes:
        engine: the kind of engine that runs the steps.
        width: in pixels.
        height: in pixels.
        images: drawn together.
        guidance: whether with classifier-free guidance.
        steps: of the sampler.
        evaluations: of the network for one picture; second-order samplers take two a step.
        rows: of the network's batch: with guidance two an image.
        picture_seconds: from the prompt to PNG files in memory, all images.
        stage_seconds: its parts, by name, in `STAGES`' order.
        step_seconds: one step of the loop.
        work: None for engines that are no graphs of ours.
        machine: while it ran.
    """

    engine: str
    width: int
    height: int
    images: int
    guidance: bool
    steps: int
    evaluations: int
    rows: int
    picture_seconds: Series
    stage_seconds: dict[str, Series]
    step_seconds: Series
    work: Work | None
    machine: Machine

    @computed_field  # type: ignore[prop-decorator]
    @property
    def steps_per_second(self) -> float:
        """Steps of the sampler, all images in one: what is called it/s."""
        return self.steps / self.stage_seconds["loop"].median

    @computed_field  # type: ignore[prop-decorator]
    @property
    def rows_per_second(self) -> float:
        """Rows through the network: with guidance two for each image and evaluation."""
        return self.evaluations * self.rows / self.stage_seconds["loop"].median

    @computed_field  # type: ignore[prop-decorator]
    @property
    def images_per_second(self) -> float:
        """Whole pictures."""
        return self.images / self.picture_seconds.median

    @computed_field  # type: ignore[prop-decorator]
    @property
    def gemm_share(self) -> float | None:
        """FLOP/s of the loop over those of the large matrix product. Direct convolutions are counted: what computes them with fewer
        products may pass 1.
        """
        return self._rate(self.work.step_flops) / self.machine.gemm if self.work else None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def copy_share(self) -> float | None:
        """Bytes per second of the loop over those of the large copy."""
        return self._rate(self.work.step_bytes) / self.machine.copy_rate if self.work else None

    @property
    def label(self) -> str:
        """`torch 512x512, 4 images, guidance`."""
        what = f"{self.images} image{'s' * (self.images > 1)}, {'guidance' if self.guidance else 'no guidance'}"
        return f"{self.engine} {self.width}x{self.height}, {what}"

    def _rate(self, per_step: int) -> float:
        return per_step * self.evaluations / self.stage_seconds["loop"].median


class Peer(_Record):
    """Another program on the same weights, prompt, seeds and steps, drawing in turn with ours.

    Attributes:
        name: which.
        label: of the case that it draws.
        dtype: its precision.
        psnr: of its pictures to ours, in dB, of the worst of them, at most 120.
        setup_seconds: from the start of its process until it has drawn once.
        peak_resident_bytes: the most memory of its process; None where that process exported the networks, too.
        ours_seconds: from the prompt to the pixels.
        theirs_seconds: the same.
        times_faster: median over rounds of theirs over ours.
    """

    name: str
    label: str
    dtype: str
    psnr: float
    setup_seconds: float
    peak_resident_bytes: int | None
    ours_seconds: Series
    theirs_seconds: Series
    times_faster: Ratio


class MlPerf(_Record):
    """Two scenarios in the manner of MLPerf Inference; unofficial (`ldmrt.bench.mlperf`).

    Attributes:
        single_stream_p90_seconds: the 90th percentile of one picture's latency, from the prompt to a PNG file in memory.
        single_stream_pictures: of so many.
        offline_images_per_second: whole pictures a second.
        offline_batch: drawn so many at a time.
    """

    single_stream_p90_seconds: float
    single_stream_pictures: int
    offline_images_per_second: float
    offline_batch: int


class Report(_Record):
    """All of a run.

    Attributes:
        format: version of this document.
        settings: what was drawn.
        place: what drew it.
        build: None where the bundle was there.
        cold: from nothing to the first picture, as in the first case.
        cases: the first is the one to quote.
        against: other programs.
        mlperf: the two scenarios; None where they were not asked for.
        warnings: why the figures are not to be trusted; empty if nothing speaks against them.
        notes: what could not be measured.
        provenance: machine, versions, commit, command, date.
    """

    format: Literal[1] = FORMAT
    settings: Settings
    place: Place
    build: Build | None
    cold: Cold
    cases: tuple[Case, ...] = Field(min_length=1)
    against: tuple[Peer, ...] = ()
    mlperf: MlPerf | None = None
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    provenance: dict[str, Any]

    @property
    def best(self) -> Case:
        """Of the cases with as much guidance as the first, the one that draws most images a second."""
        alike = (case for case in self.cases if case.guidance == self.cases[0].guidance)
        return max(alike, key=lambda case: case.images_per_second)

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        return self.model_dump(mode="json")

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        with replacing(path) as file:
            file.write((json.dumps(self.document(), indent=1) + "\n").encode())

    @classmethod
    def read(cls, path: Path) -> Report:
        """Read a file that `write` wrote.

        Raises:
            BadRequest: it cannot be read, is no report, or one of another version.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise BadRequest(
                f"{path} cannot be read ({error.strerror}); give a file of `ldmrt bench --output`"
            ) from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise BadRequest(
                f"{path} is no report of `ldmrt bench --output` in format {FORMAT} ({where}: {first['msg']}); measure again"
            ) from error
