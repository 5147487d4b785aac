"""`ldmrt generate`: from a prompt to picture files."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ldmrt.bulk import Album, Order, read_orders
from ldmrt.cli.options import (
    Device,
    Dtype,
    EmbeddingChoice,
    EngineChoice,
    Json,
    LoraChoice,
    Size,
    Verbose,
    lora_option,
    parse_embedding,
    parse_size,
)
from ldmrt.cli.output import print_json, progress_bar, shown_warnings
from ldmrt.errors import BadRequest
from ldmrt.samplers.registry import SAMPLERS, resolve as find_sampler

if TYPE_CHECKING:
    from ldmrt.pipeline import Pipeline
    from ldmrt.refining import Refining
    from ldmrt.request import Job


_SAMPLER_HELP = (
    f"{', '.join(SAMPLERS)}, or what other programs call them (Euler a); most with karras or exponential behind the name."
    " Default: the model's."
)


class LongPromptChoice(StrEnum):
    """What to do with a prompt that is longer than the text encoder's window."""

    chunk = "chunk"
    cut = "cut"


def generate(
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="What the picture shows; not for a model that reads no text.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='Instead of PROMPT: lines of JSON, each with "prompt" and perhaps "negative_prompt" and "seed". Pictures go into the folder '
            "--out, which is gone on with where it was stopped.",
        ),
    ] = None,
    engines: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A bundle made by build-engines. Default: the built-in model.")
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="What it does not show.")] = None,
    steps: Annotated[int | None, typer.Option(metavar="N", help="Denoising steps. Default: the model's.")] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(metavar="F", help="How closely to follow the prompt; 1: without guidance. Default: the model's."),
    ] = None,
    guidance_rescale: Annotated[
        float, typer.Option(metavar="F", help="Keeps guidance from making pictures too bright, 0 (off) to 1.")
    ] = 0.0,
    sampler: Annotated[str | None, typer.Option(metavar="NAME", help=_SAMPLER_HELP)] = None,
    eta: Annotated[float, typer.Option(metavar="F", help="Noise added by ddim and tcd in each step, 0 to 1.")] = 0.0,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Image i is drawn from seed N + i. Default: drawn, and reported.")
    ] = None,
    variation_seed: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Turn the noise of all pictures, which is that of --seed, towards that of seed N + i."
        ),
    ] = None,
    variation_strength: Annotated[
        float, typer.Option(metavar="F", help="How far, 0 (not at all) to 1 (the picture of the other seed).")
    ] = 0.0,
    num_images: Annotated[int, typer.Option(metavar="N", help="How many pictures.")] = 1,
    size: Annotated[
        Size | None,
        typer.Option(metavar="WxH", parser=parse_size, help="Width and height in pixels, of an engine in the bundle."),
    ] = None,
    clip_skip: Annotated[
        int, typer.Option(metavar="N", help="Layers of the text encoder to leave out at its end.")
    ] = 0,
    long_prompt: Annotated[
        LongPromptChoice, typer.Option(help="A prompt beyond the text encoder's window: in several windows, or cut.")
    ] = LongPromptChoice.chunk,
    emphasis: Annotated[
        bool,
        typer.Option(
            "--emphasis",
            help="(word), (word:1.3) and [word] weigh the word, BREAK begins a new window, as in AUTOMATIC1111's web UI.",
        ),
    ] = False,
    lora: Annotated[list[LoraChoice] | None, lora_option("LoRA to add to the weights")] = None,
    embedding: Annotated[
        list[EmbeddingChoice] | None,
        typer.Option(
            metavar="PATH[:WORD]",
            parser=parse_embedding,
            help="Textual inversion, and the word that stands for it (default: its own); repeatable.",
        ),
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The picture to begin from; to draw into (inpainting models), or to draw larger (upscaling models).",
        ),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            metavar="F", help="How much of --image is drawn anew, 0 to 1. Default: 0.8; 0.3 for SDXL; 1 for inpainting."
        ),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="For an inpainting model: white where the picture is to be drawn anew."),
    ] = None,
    refiner: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The bundle of a refiner, which finishes what the model begins.")
    ] = None,
    refiner_start: Annotated[
        float | None,
        typer.Option(metavar="F", help="Share of the schedule after which the refiner takes over. Default: 0.8."),
    ] = None,
    noise_level: Annotated[
        int | None, typer.Option(metavar="N", help="For an upscaling model: how much noise the picture is given.")
    ] = None,
    segmentation: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="For a model of semantic maps: a picture whose values are numbers of classes."
        ),
    ] = None,
    layout: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='For a model of layouts: a JSON file, [{"class": N, "box": [left, top, width, height]}, ...], boxes in shares of the picture.',
        ),
    ] = None,
    class_label: Annotated[
        int | None, typer.Option("--class", metavar="N", help="For a class-conditional model: which class to draw.")
    ] = None,
    control_image: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="Picture to follow, one for each ControlNet of the bundle, in its order; repeatable."
        ),
    ] = None,
    control_scale: Annotated[
        list[float] | None,
        typer.Option(metavar="F", help="How much of each ControlNet; one for all, or repeated. Default: 1."),
    ] = None,
    control_start: Annotated[
        list[float] | None,
        typer.Option(metavar="F", help="Share of the steps after which each begins, likewise. Default: 0."),
    ] = None,
    control_end: Annotated[
        list[float] | None,
        typer.Option(metavar="F", help="Share of the steps after which each ends, likewise. Default: 1."),
    ] = None,
    engine: Annotated[
        EngineChoice, typer.Option(help="Which engines to use where the bundle has several kinds.")
    ] = EngineChoice.auto,
    dtype: Annotated[
        Dtype, typer.Option(help="Which engines to use where the bundle has several precisions.")
    ] = Dtype.auto,
    fallback: Annotated[
        bool,
        typer.Option(
            "--fallback", help="Let another of the bundle's engines run where this one cannot, with a warning."
        ),
    ] = False,
    weight_budget: Annotated[
        int | None,
        typer.Option(
            metavar="MIB",
            min=0,
            help="The most memory that the weights of a plan built with --weight-streaming take on the GPU. Default: TensorRT's choice.",
        ),
    ] = None,
    device: Device = None,
    memory_budget: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="The most memory to take, such as 6GB: parts of the model then come and go, large pictures are decoded in tiles.",
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|DIR",
            help="A .png, .jpg or .webp file, which is overwritten, or a folder. Default: ldmrt-SEED.png here, never overwritten.",
        ),
    ] = None,
    json: Json = False,
    _verbose: Verbose = False,
) -> None:
    """Draw pictures from a prompt. The files say how they were made."""
    started = time.perf_counter()
    from ldmrt.config import from_env

    config = from_env(os.environ)
    destination = Destination.of(out, several=num_images > 1)
    orders = None
    if prompts is not None:
        _check_bulk(prompt, out, variation_strength)
        orders = read_orders(prompts, negative_prompt=negative_prompt or "", seed=seed, per_prompt=num_images)
    else:
        destination.check()

    import torch

    from ldmrt.layout import read as read_layout
    from ldmrt.pipeline import Pipeline
    from ldmrt.request import Request, resolve

    given = (
        _pictures(image, mask, segmentation)
        | _numbers(noise_level, class_label)
        | ({} if layout is None else {"layout": read_layout(layout)})
        | _controls(control_image, control_scale, control_start, control_end)
    )
    if config.threads:
        torch.set_num_threads(config.threads)
    open_bundle = partial(
        Pipeline.from_bundle,
        device=device or config.device,
        engine=None if engine is EngineChoice.auto else engine.value,
        dtype=None if dtype is Dtype.auto else dtype.value,
        fallback=fallback,
        weight_budget=None if weight_budget is None else weight_budget << 20,
        memory_budget=memory_budget,
    )
    with shown_warnings():
        refining = _refining(open_bundle, refiner, refiner_start, memory_budget)
        pipe = open_bundle(engines)
    if prompt is None and orders is None and pipe.bundle.manifest.model.tokenizers:
        name = pipe.bundle.manifest.model.name
        raise typer.BadParameter(
            f'it is missing, and {name} draws what a text says; give one, "" for none, or --prompts FILE',
            param_hint="PROMPT",
        )
    job = resolve(
        Request(
            prompt=prompt or "",
            negative_prompt=negative_prompt,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            sampler=sampler,
            eta=eta,
            seed=seed,
            num_images_per_prompt=num_images,
            width=size.width if size else None,
            height=size.height if size else None,
            clip_skip=clip_skip,
            long_prompt=long_prompt.value,
            has_image="image" in given,
            strength=strength,
            emphasis=emphasis,
            variation_seed=variation_seed,
            variation_strength=variation_strength,
        ),
        pipe.defaults,
    )
    if "image" in given:
        given["strength"] = job.span.strength
    planned = pipe.table(job).num_steps if refining is None else refining.plan(pipe, job)
    for path, scale in lora or ():
        pipe.load_lora(path, scale)
    for model in (pipe,) if refining is None else (pipe, refining.refiner):
        for path, token in embedding or ():
            model.load_textual_inversion(path, token)
    timings = {"load": time.perf_counter() - started}
    with shown_warnings():
        if orders is not None:
            album = Album(Path(out or "."), _common(pipe, job, given, refining))
            pictures = _draw_all(pipe, job, given, orders, album, timings, refining)
        else:
            pictures = _draw(pipe, job, given, destination, timings, planned, refining)
    timings["total"] = time.perf_counter() - started
    if json:
        print_json(
            {
                "images": pictures,
                "timings": {stage: round(seconds, 4) for stage, seconds in timings.items()},
                "settings": (_settings if orders is None else _common)(pipe, job, given, refining),
                **_memory(pipe, job, given),
            }
        )
        return
    if orders is not None:
        typer.echo(f"{len(pictures)} pictures made, {len(orders) - len(pictures)} were there: {out}")
    for picture in pictures if orders is None else ():
        typer.echo(f"{picture['path']}  {picture['width']}x{picture['height']}  seed {picture['seed']}")
    stages = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in timings.items() if stage != "total")
    typer.echo(f"{timings['total']:.2f} s: {stages}")


def _refining(
    open_bundle: Callable[[Path], Pipeline], refiner: Path | None, start: float | None, memory_budget: str | None
) -> Refining | None:
    """The refiner that finishes the pictures, if there is one.

    Raises:
        BadRequest: there is none, and a start was given; there is one, and a memory budget.
        LdmrtError: its bundle cannot be used.
    """
    from ldmrt.refining import START, Refining

    if refiner is None:
        if start is not None:
            raise BadRequest(
                "--refiner-start says nothing without --refiner; give --refiner DIR", param="refiner_start"
            )
        return None
    if memory_budget is not None:
        raise BadRequest(
            "--memory-budget is kept by one model, and --refiner brings another; leave one of them out", param="refiner"
        )
    return Refining(open_bundle(refiner), START if start is None else start)


def _pictures(image: Path | None, mask: Path | None, segmentation: Path | None) -> dict[str, Any]:
    """The pipeline's arguments for models that take pictures.

    Raises:
        BadRequest: a file is no picture.
    """
    from ldmrt.conditioning import open_picture

    paths = {"image": image, "mask_image": mask, "segmentation": segmentation}
    return {name: open_picture(path, param=name) for name, path in paths.items() if path is not None}


def _numbers(noise_level: int | None, class_label: int | None) -> dict[str, Any]:
    """The pipeline's arguments for an upscaling model, and for a class-conditional one."""
    numbers = {"noise_level": noise_level, "class_labels": class_label}
    return {name: value for name, value in numbers.items() if value is not None}


def _controls(
    images: list[Path] | None, scales: list[float] | None, starts: list[float] | None, ends: list[float] | None
) -> dict[str, Any]:
    """The pipeline's arguments for ControlNets; one number stands for all of them.

    Raises:
        BadRequest: a file is no picture, or numbers are given without pictures.
    """
    from ldmrt.conditioning import open_picture

    given = {"controlnet_scale": scales, "control_start": starts, "control_end": ends}
    numbers: dict[str, Any] = {
        name: values[0] if len(values) == 1 else values for name, values in given.items() if values
    }
    if not images:
        if numbers:
            raise BadRequest(
                f"{next(iter(numbers))} says nothing without a picture to follow; give --control-image",
                param="control_image",
            )
        return {}
    return {"control_image": [open_picture(path, param="control_image") for path in images], **numbers}


def _draw(
    pipe: Pipeline,
    job: Job,
    given: dict[str, Any],
    destination: Destination,
    timings: dict[str, float],
    planned: int,
    refining: Refining | None,
) -> list[dict[str, Any]]:
    """Make the pictures batch by batch, each in `planned` steps, and save each batch when it is done. Adds to `timings`."""
    import hashlib

    from ldmrt.image import save

    at_a_time = pipe.images_at_a_time(job.width, job.height, guidance=job.do_cfg)
    pictures = []
    with progress_bar("denoising") as update:
        update(total=job.num_images * planned)
        for first in range(0, job.num_images, at_a_time):
            seeds = job.seeds[first : first + at_a_time]
            asked: dict[str, Any] = {
                "prompt": job.prompts[0],
                "negative_prompt": job.negative_prompts[0],
                **_arguments(job),
                "on_step": lambda step, latents: update(advance=len(latents)),
            }
            own = {
                "clip_skip": job.clip_skip,
                "variation_seed": job.variation_seeds[first] if job.variation_seeds else None,
                "variation_strength": job.variation_strength,
                **given,
            }
            if refining is None:
                result = pipe(**asked, **own, seed=seeds[0], num_images_per_prompt=len(seeds))
            else:
                result = refining.draw(pipe, seeds, own, **asked)
            saving = time.perf_counter()
            for number, image in enumerate(result.images, start=first):
                path = destination.path(number, job.seeds[number])
                save(image, path, parameters=_parameters(pipe, job, given, number, refining))
                pictures.append(
                    {
                        "path": str(path),
                        "seed": job.seeds[number],
                        "width": job.width,
                        "height": job.height,
                        "sha256": hashlib.sha256(image.tobytes()).hexdigest(),
                    }
                )
            for stage, seconds in {**result.timings, "save": time.perf_counter() - saving}.items():
                timings[stage] = timings.get(stage, 0.0) + seconds
    return pictures


def _draw_all(
    pipe: Pipeline,
    job: Job,
    given: dict[str, Any],
    orders: list[Order],
    album: Album,
    timings: dict[str, float],
    refining: Refining | None,
) -> list[dict[str, Any]]:
    """Make the pictures of many prompts that are not there yet, as many at a time as an engine takes. Adds to `timings`."""
    import hashlib

    import torch

    from ldmrt.image import save

    left = album.missing(orders)
    at_a_time = pipe.images_at_a_time(job.width, job.height, guidance=job.do_cfg)
    pictures = []
    with progress_bar("pictures") as update:
        update(total=len(orders), completed=len(orders) - len(left))
        started = time.perf_counter()
        for first in range(0, len(left), at_a_time):
            batch = left[first : first + at_a_time]
            seeds = [order.seed for order in batch]
            asked: dict[str, Any] = {
                "prompt": [order.prompt for order in batch],
                "negative_prompt": [order.negative_prompt for order in batch],
                **_arguments(job),
            }
            own = {"clip_skip": job.clip_skip, **given}
            if refining is None:
                generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
                result = pipe(**asked, **own, generator=generators)
            else:
                result = refining.draw(pipe, seeds, own, **asked)
            saving = time.perf_counter()
            for order, image in zip(batch, result.images, strict=True):
                one = replace(
                    job, prompts=(order.prompt,), negative_prompts=(order.negative_prompt,), seeds=(order.seed,)
                )
                path = album.folder / order.file_name
                save(image, path, parameters=_parameters(pipe, one, given, 0, refining))
                digest = hashlib.sha256(image.tobytes()).hexdigest()
                album.add(order, digest)
                sides = {"width": job.width, "height": job.height}
                pictures.append({"path": str(path), "seed": order.seed, **sides, "sha256": digest})
            for stage, seconds in {**result.timings, "save": time.perf_counter() - saving}.items():
                timings[stage] = timings.get(stage, 0.0) + seconds
            rate = len(pictures) / (time.perf_counter() - started)
            rest = round((len(left) - len(pictures)) / rate)
            shown = f"{rate:.2f} images/s, {rest // 3600}:{rest // 60 % 60:02d}:{rest % 60:02d} left"
            update(advance=len(batch), description=shown)
    return pictures


def _arguments(job: Job) -> dict[str, Any]:
    """What calls are told of a job, the base model's and a refiner's, besides prompts and seeds."""
    names = ("num_inference_steps", "guidance_scale", "guidance_rescale", "sampler", "eta", "width", "height")
    return {name: getattr(job, name) for name in (*names, "long_prompt", "emphasis")}


def _check_bulk(prompt: str | None, out: str | None, variation_strength: float) -> None:
    """Refuse what does not go with a file of prompts.

    Raises:
        BadRequest: see the messages.
    """
    if prompt is not None:
        raise BadRequest("prompts are given twice, as PROMPT and as --prompts; leave one of them out", param="prompts")
    if out is None or Path(out).is_file():
        raise BadRequest("the pictures of --prompts need a folder; give --out DIR", param="out")
    if variation_strength:
        raise BadRequest(
            f"variation_strength is {variation_strength:g}, and variations are of one picture; leave it out with --prompts",
            param="variation_strength",
        )


def _common(pipe: Pipeline, job: Job, given: dict[str, Any], refining: Refining | None) -> dict[str, Any]:
    """What pictures of many prompts have in common, and what must be the same for going on with them."""
    own = (
        "prompt",
        "negative_prompt",
        "seed",
        "num_images",
        "variation_seed",
        "variation_strength",
        "bundle",
        "device",
    )
    return {name: value for name, value in _settings(pipe, job, given, refining).items() if name not in own}


def _parameters(pipe: Pipeline, job: Job, given: dict[str, Any], number: int, refining: Refining | None) -> str:
    import ldmrt
    from ldmrt.image import parameters_text

    extra: dict[str, object] = {"Eta": f"{job.eta:g}"} if job.eta else {}
    if job.guidance_rescale:
        extra["Guidance rescale"] = f"{job.guidance_rescale:g}"
    if job.clip_skip:
        extra["Clip skip"] = job.clip_skip + 1  # AUTOMATIC1111 counts from 1
    if job.variation_seeds:  # the names of AUTOMATIC1111
        extra["Variation seed"] = job.variation_seeds[number]
        extra["Variation seed strength"] = f"{job.variation_strength:g}"
    if pipe.loras:
        extra["LoRAs"] = ", ".join(f"{name}: {scale:g}" for name, scale in pipe.loras.items())
    if pipe.textual_inversions:
        extra["TI"] = ", ".join(pipe.textual_inversions)
    if "strength" in given:
        extra["Denoising strength"] = f"{given['strength']:g}"
    if refining is not None:
        extra["Refiner"] = refining.refiner.bundle.manifest.model.name
        extra["Refiner switch at"] = f"{refining.start:g}"
    extra |= {
        title: given[name]
        for name, title in (("noise_level", "Noise level"), ("class_labels", "Class"))
        if name in given
    }
    if "control_image" in given:
        extra["ControlNets"] = ", ".join(record.name for record in pipe.bundle.manifest.controlnets)
        for name in ("controlnet_scale", "control_start", "control_end"):
            if name in given:
                extra[name.replace("_", " ").capitalize()] = given[name]
    return parameters_text(
        job.prompts[0],
        job.negative_prompts[0],
        steps=job.num_inference_steps,
        sampler=find_sampler(job.sampler).title,
        guidance_scale=job.guidance_scale,
        seed=job.seeds[number],
        width=job.width,
        height=job.height,
        model=pipe.bundle.manifest.model.name,
        extra={**extra, "Version": f"ldmrt {ldmrt.__version__}"},
    )


def _memory(pipe: Pipeline, job: Job, given: dict[str, Any]) -> dict[str, Any]:
    plan = pipe.memory_plan(job.width, job.height, picture="image" in given)
    return {} if plan is None else {"memory_plan": plan.to_dict()}


def _settings(pipe: Pipeline, job: Job, given: dict[str, Any], refining: Refining | None) -> dict[str, Any]:
    refined: dict[str, Any] = {}
    if refining is not None:
        refined = {"refiner": str(refining.refiner.bundle.path.resolve()), "refiner_start": refining.start}
    return {
        "prompt": job.prompts[0],
        "negative_prompt": job.negative_prompts[0],
        "num_inference_steps": job.num_inference_steps,
        "guidance_scale": job.guidance_scale,
        "guidance_rescale": job.guidance_rescale,
        "sampler": job.sampler,
        "eta": job.eta,
        "seed": job.seeds[0],
        "num_images": job.num_images,
        "width": job.width,
        "height": job.height,
        "clip_skip": job.clip_skip,
        "long_prompt": job.long_prompt,
        "emphasis": job.emphasis,
        "variation_seed": job.variation_seeds[0] if job.variation_seeds else None,
        "variation_strength": job.variation_strength,
        "loras": pipe.loras,
        "embeddings": list(pipe.textual_inversions),
        "controlnets": [record.name for record in pipe.bundle.manifest.controlnets] if "control_image" in given else [],
        **{name: value for name, value in given.items() if not name.endswith(("image", "segmentation"))},
        **refined,
        "model": pipe.bundle.manifest.model.name,
        "bundle": str(pipe.bundle.path.resolve()),
        "engine": pipe.kind,
        "dtype": pipe.dtype,
        "device": str(pipe.device),
    }


@dataclass(frozen=True)
class Destination:
    """Where pictures go.

    Attributes:
        folder: the folder.
        name: the file in it, or None for names made of the seed.
        several: whether there is more than one picture; their number then becomes part of `name`.
    """

    folder: Path
    name: str | None
    several: bool

    @classmethod
    def of(cls, out: str | None, *, several: bool) -> Destination:
        """Read `--out`: nothing, a file, or a folder (one that exists, or ends in a slash)."""
        path = Path(out or ".")
        if out is None or out.endswith(("/", os.sep)) or path.is_dir():
            return cls(path, None, several)
        return cls(path.parent, path.name, several)

    def check(self) -> None:
        """Find out before anything is loaded that nothing could be written.

        Raises:
            BadRequest: see `ldmrt.image.check_writable`.
        """
        from ldmrt.image import check_writable

        if self.name is not None:
            check_writable(self.path(0, 0))
            return
        folder = self.folder.absolute()
        while (
            not folder.exists() and folder != folder.parent
        ):  # what is missing is made when the first picture is there
            folder = folder.parent
        check_writable(folder / "ldmrt-0.png")

    def path(self, number: int, seed: int) -> Path:
        """The file of a picture; a name that we choose is never one that is taken."""
        if self.name is not None:
            chosen = Path(self.name)
            return self.folder / (f"{chosen.stem}-{number}{chosen.suffix}" if self.several else self.name)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadRequest(f"cannot make the folder {self.folder}: {error.strerror}; choose another --out") from error
        path = self.folder / f"ldmrt-{seed}.png"
        again = 1
        while path.exists():
            path = self.folder / f"ldmrt-{seed}-{again}.png"
            again += 1
        return path
