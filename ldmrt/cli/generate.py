"""`ldmrt generate`: from a prompt to picture files."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ldmrt.bulk import Album, Order, read_orders
from ldmrt.cli.destination import Destination
from ldmrt.cli.given import (
    ControlKind,
    control_arguments,
    control_maps,
    edge_arguments,
    number_arguments,
    picture_arguments,
)
from ldmrt.cli.options import (
    Device,
    Dtype,
    DtypeOption,
    EmbeddingChoice,
    EngineChoice,
    EngineOption,
    Json,
    LoraChoice,
    Size,
    Verbose,
    lora_option,
    parse_embedding,
    parse_extension,
    parse_size,
)
from ldmrt.cli.output import print_json, progress_bar, shown_warnings
from ldmrt.cli.ways import Way, open_refiner, way_of
from ldmrt.errors import BadRequest
from ldmrt.extension import Extension
from ldmrt.samplers.registry import SAMPLERS, resolve as find_sampler

if TYPE_CHECKING:
    from ldmrt.pipeline import Pipeline
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
            help="The picture to begin from; to draw into (--mask), to continue (--extend), or to draw larger (upscaling models), of any size.",
        ),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            metavar="F", help="How much of --image is drawn anew, 0 to 1. Default: 0.8; 0.3 for SDXL; 1 with --mask."
        ),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="White where --image is to be drawn anew, with any model; best with one for inpainting.",
        ),
    ] = None,
    mask_blur: Annotated[
        float | None,
        typer.Option(metavar="PIXELS", help="Soften the edges of --mask; 0 keeps its greys. Default: black and white."),
    ] = None,
    apply_overlay: Annotated[
        bool, typer.Option("--apply-overlay", help="Give every pixel that --mask leaves out back as it was.")
    ] = False,
    extend: Annotated[
        Extension | None,
        typer.Option(
            metavar="L,R,T,B",
            parser=parse_extension,
            help="Continue --image beyond its edges: pixels to the left, right, above and below. Its own come back as they were.",
        ),
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
    control: Annotated[
        list[ControlKind] | None,
        typer.Option(
            help="What --control-image is: a map that is followed as it is, or a photo of whose edges one is made (Canny), for "
            "ControlNets of that kind; one for all, or repeated. Default: map."
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
    engine: EngineOption = EngineChoice.auto,
    dtype: DtypeOption = Dtype.auto,
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
        picture_arguments(image, mask, segmentation)
        | edge_arguments(mask_blur, apply_overlay, refiner)
        | number_arguments(noise_level, class_label)
        | ({} if layout is None else {"layout": read_layout(layout)})
        | control_arguments(control_image, control_scale, control_start, control_end)
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
        refining = open_refiner(open_bundle, refiner, refiner_start, memory_budget)
        pipe = open_bundle(engines)
    way = way_of(pipe, refining, extend, given)
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
            has_mask="mask_image" in given or extend is not None,
            mask_blur=mask_blur,
            apply_overlay=apply_overlay,
            strength=strength,
            emphasis=emphasis,
            variation_seed=variation_seed,
            variation_strength=variation_strength,
        ),
        pipe.defaults,
    )
    if "image" in given:
        given["strength"] = job.span.strength
    given |= control_maps(given.get("control_image"), control, (job.width, job.height))
    planned = way.plan(pipe, job)
    for path, scale in lora or ():
        pipe.load_lora(path, scale)
    for model in (pipe,) if refining is None else (pipe, refining.refiner):
        for path, token in embedding or ():
            model.load_textual_inversion(path, token)
    timings = {"load": time.perf_counter() - started}
    with shown_warnings():
        if orders is not None:
            album = Album(Path(out or "."), _common(pipe, job, given, way))
            pictures = _draw_all(pipe, job, given, orders, album, timings, way)
        else:
            pictures = _draw(pipe, job, given, destination, timings, planned, way)
    timings["total"] = time.perf_counter() - started
    if json:
        print_json(
            {
                "images": pictures,
                "timings": {stage: round(seconds, 4) for stage, seconds in timings.items()},
                "settings": (_settings if orders is None else _common)(pipe, job, given, way),
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


def _draw(
    pipe: Pipeline,
    job: Job,
    given: dict[str, Any],
    destination: Destination,
    timings: dict[str, float],
    planned: int,
    way: Way,
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
            result = way.draw(pipe, seeds, own, **asked)
            saving = time.perf_counter()
            for number, image in enumerate(result.images, start=first):
                path = destination.path(number, job.seeds[number])
                save(image, path, parameters=_parameters(pipe, job, given, number, way, image.size))
                pictures.append(
                    {
                        "path": str(path),
                        "seed": job.seeds[number],
                        "width": image.width,
                        "height": image.height,
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
    way: Way,
) -> list[dict[str, Any]]:
    """Make the pictures of many prompts that are not there yet, as many at a time as an engine takes. Adds to `timings`."""
    import hashlib

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
            result = way.draw(pipe, seeds, own, **asked)
            saving = time.perf_counter()
            for order, image in zip(batch, result.images, strict=True):
                one = replace(
                    job, prompts=(order.prompt,), negative_prompts=(order.negative_prompt,), seeds=(order.seed,)
                )
                path = album.folder / order.file_name
                save(image, path, parameters=_parameters(pipe, one, given, 0, way, image.size))
                digest = hashlib.sha256(image.tobytes()).hexdigest()
                album.add(order, digest)
                sides = {"width": image.width, "height": image.height}
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


def _common(pipe: Pipeline, job: Job, given: dict[str, Any], way: Way) -> dict[str, Any]:
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
    return {name: value for name, value in _settings(pipe, job, given, way).items() if name not in own}


def _parameters(pipe: Pipeline, job: Job, given: dict[str, Any], number: int, way: Way, size: tuple[int, int]) -> str:
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
    extra |= way.titles
    extra |= {
        title: given[name]
        for name, title in (("noise_level", "Noise level"), ("class_labels", "Class"), ("mask_blur", "Mask blur"))
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
        width=size[0],
        height=size[1],
        model=pipe.bundle.manifest.model.name,
        extra={**extra, "Version": f"ldmrt {ldmrt.__version__}"},
    )


def _memory(pipe: Pipeline, job: Job, given: dict[str, Any]) -> dict[str, Any]:
    plan = pipe.memory_plan(job.width, job.height, picture="image" in given)
    return {} if plan is None else {"memory_plan": plan.to_dict()}


def _settings(pipe: Pipeline, job: Job, given: dict[str, Any], way: Way) -> dict[str, Any]:
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
        **way.settings,
        "model": pipe.bundle.manifest.model.name,
        "bundle": str(pipe.bundle.path.resolve()),
        "engine": pipe.kind,
        "dtype": pipe.dtype,
        "device": str(pipe.device),
    }
