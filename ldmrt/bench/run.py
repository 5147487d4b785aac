"""`ldmrt bench`: all that is measured of a bundle, in one report."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ldmrt.bench import mlperf
from ldmrt.bench.cold import cold_starts
from ldmrt.bench.intervals import FEWEST
from ldmrt.bench.ledger import provenance
from ldmrt.bench.measure import copy_rate, gemm_rate
from ldmrt.bench.nvml import Watch, watching
from ldmrt.bench.others import Others
from ldmrt.bench.peers import beside, check_peers
from ldmrt.bench.pictures import WARMUP, batches_of, control_picture, draw_times, draws_per_run, work_of
from ldmrt.bench.report import Case, Machine, Place, Report, Settings
from ldmrt.bench.subject import OnProgress, Subject
from ldmrt.bench.trust import doubts
from ldmrt.bundle import Bundle
from ldmrt.errors import BadRequest, EngineMismatch
from ldmrt.graph import dtype_of
from ldmrt.kernels import launch, native
from ldmrt.loader import kinds_of
from ldmrt.opening import builtin_bundle
from ldmrt.pipeline import Pipeline
from ldmrt.request import Job, Request, resolve
from ldmrt.samplers.make import sampler_table

PROMPT = "a red circle on a white background"
SEED = 0
# What is copied on a GPU: far more than its caches, little beside its memory.
_COPIED = 1 << 30


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        device: see `Pipeline.from_bundle`.
        engine: kind; None for every kind that the bundle has.
        dtype: precision; None for the best one that the bundle has here.
        sizes: width and height in pixels; empty for the model's.
        batches: images drawn together; empty for all that the bundle has engines for.
        steps: of the sampler; None for the model's.
        guidance_scale: None for the model's; 1 for none.
        sampler: None for the model's.
        runs: of each case.
        against: other programs, of `ldmrt.bench.peers.PEERS`.
        mlperf: with the parameters of `ldmrt.bench.mlperf`, in the place of the sizes, steps, guidance scale and sampler.
    """

    device: str | None = None
    engine: str | None = None
    dtype: str | None = None
    sizes: Sequence[tuple[int, int]] = ()
    batches: Sequence[int] = ()
    steps: int | None = None
    guidance_scale: float | None = None
    sampler: str | None = None
    runs: int = 9
    against: Sequence[str] = ()
    mlperf: bool = False

    def filled(self) -> Plan:
        """With everything that MLPerf says, if it is asked for. A picture alone is always among its batches."""
        if not self.mlperf:
            return self
        return replace(
            self,
            sizes=(mlperf.SIZE,),
            batches=tuple(dict.fromkeys((1, *self.batches))),
            steps=mlperf.STEPS,
            guidance_scale=mlperf.GUIDANCE_SCALE,
            sampler=mlperf.SAMPLER,
        )


@dataclass(frozen=True)
class _Variant:
    """A case before it is measured: what is drawn, by which pipeline."""

    pipe: Pipeline
    job: Job
    images: int
    controlled: bool

    @property
    def request(self) -> dict[str, Any]:
        """The arguments of the pipeline."""
        job = self.job
        control = {"control_image": control_picture(job.width, job.height)} if self.controlled else {}
        return control | {
            "prompt": job.prompts[0],
            "negative_prompt": job.negative_prompts[0],
            "seed": SEED,
            "num_inference_steps": job.num_inference_steps,
            "guidance_scale": job.guidance_scale,
            "sampler": job.sampler,
            "width": job.width,
            "height": job.height,
            "num_images_per_prompt": self.images,
        }


def bench(subject: Subject, plan: Plan, on_progress: OnProgress = lambda what, done, total: None) -> Report:
    """Measure a bundle: cold starts, pictures of every size and batch, the machine's own rates, other programs.

    The first case is the one to quote; the first size and batch are also drawn without guidance.

    Args:
        subject: what to measure.
        plan: how.
        on_progress: called with (what is being done, runs done, runs in all).

    Raises:
        BadRequest: something cannot be measured; nothing has been by then.
        EngineMismatch: the bundle has no such engine.
        LdmrtError: a process failed, or another program's pictures are not ours.
    """
    plan = plan.filled()
    pipes, notes = _pipelines(subject.bundle, plan)
    if plan.mlperf:
        mlperf.check_model(pipes[0].bundle.manifest.model.kind)
    controlled = subject.controlnet is not None
    variants = [variant for pipe in pipes for variant in _variants(pipe, plan, controlled=controlled)]
    first = variants[0]
    check_peers(plan.against, subject.model, first.pipe, sampler=first.job.sampler, controlled=controlled)
    with tempfile.TemporaryDirectory() as folder:
        cold = cold_starts(
            _generate(subject.bundle, first, Path(folder)),
            runs=min(plan.runs, FEWEST),
            on_run=_counter("cold starts", min(plan.runs, FEWEST), on_progress),
        )
    with watching(first.pipe.device) as (watch, missing):
        cases = [_measured(variant, plan.runs, watch, on_progress) for variant in variants]
    peers = []
    if subject.model is not None:  # else `check_peers` has seen that there are none
        for number, name in enumerate(plan.against):
            on_progress(f"against {name}", number, len(plan.against))
            peers.append(
                beside(
                    name,
                    subject.model,
                    first.pipe,
                    first.request,
                    cases[0].label,
                    runs=plan.runs,
                    controlnet=subject.controlnet,
                )
            )
    job, device = first.job, first.pipe.device
    cuda = device.type == "cuda"
    return Report(
        settings=Settings(
            model=first.pipe.bundle.manifest.model.name,
            steps=job.num_inference_steps,
            sampler=job.sampler,
            guidance_scale=job.guidance_scale,
        ),
        place=Place(
            bundle="built-in" if subject.bundle == builtin_bundle() else subject.bundle.resolve().name,
            dtype=first.pipe.dtype,
            device=str(device),
            threads=torch.get_num_threads(),
            operators=launch.describe(device) if cuda else native.why_not() or "native",
            gpu=torch.cuda.get_device_name(device) if cuda else None,
        ),
        build=subject.build,
        cold=cold,
        cases=tuple(cases),
        against=tuple(peers),
        mlperf=mlperf.scenarios([case for case in cases if case.engine == cases[0].engine]) if plan.mlperf else None,
        warnings=tuple(doubts(cases)),
        notes=tuple(notes) if missing is None else (*notes, missing),
        provenance=provenance(),
    )


def _pipelines(bundle: Path, plan: Plan) -> tuple[list[Pipeline], list[str]]:
    """A pipeline for each kind of engine that was asked for, in the order in which they would be tried; and what cannot run here.

    Raises:
        EngineMismatch: none can.
    """
    wanted = [plan.engine] if plan.engine else kinds_of(Bundle.open(bundle)) or ["torch"]
    pipes, notes = [], []
    for kind in wanted:
        try:
            pipes.append(Pipeline.from_bundle(bundle, plan.device, engine=kind, dtype=plan.dtype))
        except EngineMismatch as error:
            if len(wanted) == 1:
                raise
            notes.append(f"{kind}: {error}")
    if not pipes:
        raise EngineMismatch(notes[0])
    return pipes, notes


def _variants(pipe: Pipeline, plan: Plan, *, controlled: bool) -> list[_Variant]:
    """The cases of a pipeline, the one to quote first.

    Raises:
        BadRequest: a size, a batch or the steps cannot be had, or the model draws into pictures.
    """
    model = pipe.bundle.manifest.model
    if model.inpainting:
        raise BadRequest(f"{pipe.bundle.path} is of an inpainting model, which `ldmrt bench` does not measure")

    def job(size: tuple[int, int] | None, scale: float | None) -> Job:
        width, height = size or (None, None)
        prompt = PROMPT if model.tokenizers else ""
        request = Request(
            prompt=prompt,
            negative_prompt=mlperf.NEGATIVE_PROMPT if plan.mlperf and scale != 1 else None,
            seed=SEED,
            num_inference_steps=plan.steps,
            guidance_scale=scale,
            sampler=plan.sampler,
            width=width,
            height=height,
        )
        return resolve(request, pipe.defaults)

    found = []
    for size in plan.sizes or (None,):
        guided = job(size, plan.guidance_scale)
        found += [_Variant(pipe, guided, images, controlled) for images in _batches(pipe, guided, plan.batches)]
    if found[0].job.do_cfg:
        bare = job(plan.sizes[0] if plan.sizes else None, 1.0)
        found.insert(1, _Variant(pipe, bare, found[0].images, controlled))
    return found


def _batches(pipe: Pipeline, job: Job, wanted: Sequence[int]) -> list[int]:
    there = batches_of(pipe, (job.width, job.height), guidance=job.do_cfg)
    missing = [images for images in wanted if images not in there]
    if missing or not there:
        raise BadRequest(
            f"--batch is {', '.join(map(str, missing or wanted))}, and {pipe.bundle.path} has engines for "
            f"{', '.join(map(str, there)) or 'no'} images at a time; build with `ldmrt build-engines MODEL --out DIR --batch N`"
        )
    return list(dict.fromkeys(wanted)) or there


def _generate(bundle: Path, variant: _Variant, folder: Path) -> list[str]:
    """The arguments of `ldmrt generate` for a case; a control image is written into `folder`."""
    job, pipe = variant.job, variant.pipe
    options: dict[str, object] = {
        "--negative-prompt": job.negative_prompts[0],
        "--seed": SEED,
        "--steps": job.num_inference_steps,
        "--guidance-scale": job.guidance_scale,
        "--sampler": job.sampler,
        "--size": f"{job.width}x{job.height}",
        "--num-images": variant.images,
        "--engines": bundle,
        "--engine": pipe.kind,
        "--dtype": pipe.dtype,
        "--device": pipe.device,
    }
    if variant.controlled:
        path = folder / "control.png"
        control_picture(job.width, job.height).save(path)
        options["--control-image"] = path
    return [job.prompts[0], *(str(part) for option in options.items() for part in option)]


def _measured(variant: _Variant, runs: int, watch: Watch | None, on_progress: OnProgress) -> Case:
    """Measure a case, the machine's own rates before and after it."""
    pipe, job, images = variant.pipe, variant.job, variant.images
    device, dtype = pipe.device, dtype_of(pipe.dtype)
    cuda = device.type == "cuda"
    what = f"{pipe.kind} {job.width}x{job.height}, {images} images{', guidance' if job.do_cfg else ''}"
    count = _counter(what, runs + WARMUP, on_progress)

    def on_run() -> None:
        if watch is not None:
            watch.sample()
        count()

    before = gemm_rate(device, dtype)
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    others = Others()
    times = draw_times(pipe, variant.request, runs=runs, on_run=on_run)
    share = others.share()
    # At once: what the GPU has of its clocks and heat now.
    peak = torch.cuda.max_memory_allocated(device) if cuda else None
    after = gemm_rate(device, dtype)
    evaluations = sampler_table(job.sampler, pipe.schedule, job.num_inference_steps, 0.0).evaluations
    rows = images * (2 if job.do_cfg else 1)
    return Case(
        engine=pipe.kind,
        width=job.width,
        height=job.height,
        images=images,
        guidance=job.do_cfg,
        steps=job.num_inference_steps,
        evaluations=evaluations,
        rows=rows,
        **times.series(),
        work=work_of(pipe, (job.width, job.height), images, rows, evaluations, controlled=variant.controlled),
        machine=Machine(
            gemm_before=before,
            gemm_after=after,
            copy_rate=copy_rate(device, nbytes=_COPIED if cuda else None),
            others=share,
            peak_device_bytes=peak,
            gpu=None if watch is None else watch.reading(images * draws_per_run(pipe)),
        ),
    )


def _counter(what: str, total: int, on_progress: OnProgress) -> Callable[[], None]:
    """To be called after every run."""
    done = 0
    on_progress(what, 0, total)

    def count() -> None:
        nonlocal done
        done += 1
        on_progress(what, done, total)

    return count
