"""From what a caller asked for to what will be done: checked, complete, and without None.

Everything that can be wrong with a request is found here, before any work; what comes after trusts the `Job`.
"""

from __future__ import annotations

import math
import numbers
import operator
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

from ldmrt.errors import BadRequest
from ldmrt.manifest import LARGEST
from ldmrt.samplers.registry import Choice, resolve as find_sampler
from ldmrt.samplers.span import Span

T = TypeVar("T")
LongPrompt = Literal["chunk", "cut"]

_SEED_LIMIT = 2**63
# Drawn seeds stay short enough for every tool that reads them back.
_DRAWN_SEED_LIMIT = 2**32
# In pixels; beyond it a mask is grey all over.
_MOST_BLUR = 256.0


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a caller may give. None stands for the model's default, in `seed` for a seed to be drawn.

    Attributes:
        prompt: one prompt, or several.
        negative_prompt: one for all prompts, or as many as there are prompts. Used only when guidance_scale > 1.
        num_inference_steps: steps of the sampler.
        guidance_scale: how far to follow the prompt (arXiv 2207.12598, as 1 + w there); 1 or less: without guidance.
        guidance_rescale: how far to bring the deviation of the guided output back to that of the unguided one, 0 to 1
            (arXiv 2305.08891, section 3.4). Used only when guidance_scale > 1.
        sampler: a name that `ldmrt.samplers.registry.resolve` knows.
        eta: the noise of the samplers that have it, 0 to 1.
        seed: of the first image; image i of the whole call gets seed + i.
        num_images_per_prompt: images for each prompt.
        width: in pixels.
        height: in pixels.
        clip_skip: how many of the text encoder's last layers are left out.
        long_prompt: what to do with a prompt longer than the text encoder takes: "chunk" it into windows, or "cut" it.
        has_image: whether there is a picture to begin from, or latents in its place.
        has_mask: whether there is a mask of what is drawn anew.
        mask_blur: the radius in pixels by which the mask's edges are softened, 0 to keep its greys; None for black and white alone.
        apply_overlay: whether what the mask leaves out is given back as it was.
        strength: how much of the picture is drawn anew: the share of the steps that are made, 0 to 1.
        denoising_start: the share of the schedule that another model has made, whose latents are in the picture's place.
        denoising_end: the share of the schedule after which the latents are left to another model.
        aesthetic_score: for a model that takes one, as refiners do, that of the prompt's pictures; 6 if None.
        negative_aesthetic_score: that of the negative prompt's; 2.5 if None.
        emphasis: whether brackets in prompts weigh what is in them (`ldmrt.emphasis`); else they are characters like others.
        variation_seed: of another noise, towards which the first image's is turned; image i has this plus i, and all have the same seed.
        variation_strength: how far, 0, not at all, to 1.
    """

    prompt: str | Sequence[str]
    negative_prompt: str | Sequence[str] | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_rescale: float = 0.0
    sampler: str | None = None
    eta: float = 0.0
    seed: int | None = None
    num_images_per_prompt: int = 1
    width: int | None = None
    height: int | None = None
    clip_skip: int | None = None
    long_prompt: LongPrompt = "chunk"
    has_image: bool = False
    has_mask: bool = False
    mask_blur: float | None = None
    apply_overlay: bool = False
    strength: float | None = None
    denoising_start: float | None = None
    denoising_end: float | None = None
    aesthetic_score: float | None = None
    negative_aesthetic_score: float | None = None
    emphasis: bool = False
    variation_seed: int | None = None
    variation_strength: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a bundle says about its model: the values for what is left out, and the bounds.

    Attributes:
        width: in pixels.
        height: in pixels.
        num_inference_steps: steps of the sampler.
        guidance_scale: see `Request`.
        sampler: see `Request`.
        sizes: the (width, height) that the bundle has engines for.
        size_multiple: pixels that a latent is wide.
        max_steps: the steps the model was trained with.
        max_images: the most images of one call.
        max_clip_skip: the layers that can be left out.
        guidance_embedded: whether the model takes the guidance scale as an input, in the place of classifier-free guidance.
        strength: how much of a picture is drawn anew where there is no mask.
        refines: whether the model does nothing but finish pictures.
        takes_aesthetic_scores: whether the model takes aesthetic scores.
    """

    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    sizes: tuple[tuple[int, int], ...]
    sampler: str = "ddim"
    size_multiple: int = 8
    max_steps: int = 1000
    max_images: int = 1000
    max_clip_skip: int = 11
    guidance_embedded: bool = False
    strength: float = 0.8
    refines: bool = False
    takes_aesthetic_scores: bool = False


@dataclass(frozen=True, kw_only=True)
class Job:
    """A request that can be done. Image i belongs to prompt i // num_images_per_prompt.

    Attributes:
        prompts: at least one.
        negative_prompts: one for each prompt.
        seeds: one for each image.
        variation_seeds: likewise; none without variation.
        sampler: its name in `ldmrt.samplers.registry`, with its noise levels.
        num_images_per_prompt: see `Request`, as are the others.
        seed_was_drawn: no seed was given; whoever wants the images again needs `seeds`.
        guidance_embedded: see `Defaults`.
        span: which of the steps are made.
        soft_mask: whether the mask's greys stay.
        aesthetic_score: see `Request`, as the next.
    """

    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...]
    num_images_per_prompt: int
    seeds: tuple[int, ...]
    variation_seeds: tuple[int, ...]
    variation_strength: float
    seed_was_drawn: bool
    num_inference_steps: int
    guidance_scale: float
    guidance_rescale: float
    sampler: str
    eta: float
    width: int
    height: int
    clip_skip: int
    long_prompt: LongPrompt
    emphasis: bool
    guidance_embedded: bool
    span: Span
    soft_mask: bool
    mask_blur: float
    apply_overlay: bool
    aesthetic_score: float
    negative_aesthetic_score: float

    @property
    def num_images(self) -> int:
        """Images of the whole call."""
        return len(self.seeds)

    @property
    def do_cfg(self) -> bool:
        """Whether the model runs twice for each image, with the prompt and with the negative prompt."""
        return self.guidance_scale > 1 and not self.guidance_embedded


def resolve(request: Request, defaults: Defaults) -> Job:
    """Fill in what was left out, and check all of it.

    Raises:
        BadRequest: something cannot be done; `param` names the field of `Request`.
    """
    prompts = _prompts(request.prompt)
    per_prompt = _whole("num_images_per_prompt", request.num_images_per_prompt, low=1)
    images = len(prompts) * per_prompt
    if images > defaults.max_images:
        raise BadRequest(
            f"{len(prompts)} prompts with {per_prompt} images each are {images} images, expected at most"
            f" {defaults.max_images}: ask for fewer at a time",
            param="num_images_per_prompt",
        )
    seed = request.seed
    if seed is None:
        seed = secrets.randbelow(_DRAWN_SEED_LIMIT)
    seed = _whole("seed", seed, low=0, high=_SEED_LIMIT - images)
    strength, variations = _variation(request, images)
    width, height = _size(request, defaults)
    sampler = _sampler(_either(request.sampler, defaults.sampler))
    eta = _number("eta", request.eta, low=0.0, high=1.0)
    sampler.check_eta(eta)
    return Job(
        prompts=prompts,
        negative_prompts=_negative_prompts(request.negative_prompt, len(prompts)),
        num_images_per_prompt=per_prompt,
        seeds=(seed,) * images if variations else tuple(range(seed, seed + images)),
        variation_seeds=variations,
        variation_strength=strength,
        seed_was_drawn=request.seed is None,
        num_inference_steps=_whole(
            "num_inference_steps",
            _either(request.num_inference_steps, defaults.num_inference_steps),
            low=1,
            high=defaults.max_steps,
        ),
        guidance_scale=_number("guidance_scale", _either(request.guidance_scale, defaults.guidance_scale), low=0.0),
        guidance_rescale=_number("guidance_rescale", request.guidance_rescale, low=0.0, high=1.0),
        sampler=sampler.name,
        eta=eta,
        width=width,
        height=height,
        clip_skip=_whole("clip_skip", _either(request.clip_skip, 0), low=0, high=defaults.max_clip_skip),
        long_prompt=_one_of("long_prompt", request.long_prompt, get_args(LongPrompt)),
        emphasis=bool(request.emphasis),
        guidance_embedded=defaults.guidance_embedded,
        span=_span(request, defaults),
        soft_mask=request.mask_blur is not None,
        mask_blur=_mask_blur(request),
        apply_overlay=bool(request.apply_overlay),
        aesthetic_score=_score("aesthetic_score", request.aesthetic_score, defaults, 6.0),
        negative_aesthetic_score=_score("negative_aesthetic_score", request.negative_aesthetic_score, defaults, 2.5),
    )


def _span(request: Request, defaults: Defaults) -> Span:
    """The part of the steps that a request asks for."""
    if not request.has_image:
        for name in ("strength", "denoising_start"):
            if getattr(request, name) is not None:
                raise BadRequest(
                    f"{name} was given, and there is no picture to begin from; give image, or leave out {name}",
                    param=name,
                )
        if defaults.refines:
            raise BadRequest(
                "this model is a refiner, which finishes pictures, and there is none; give image and strength, or let its base model "
                "begin one: ldmrt generate PROMPT --engines BASE --refiner DIR",
                param="image",
            )
    if request.strength is not None and request.denoising_start is not None:
        raise BadRequest(
            "strength and denoising_start both say where to begin; give strength for a picture, denoising_start for the latents of another "
            "model",
            param="strength",
        )
    if request.has_mask and request.denoising_start is not None:
        raise BadRequest(
            "mask_image keeps a part of a picture, and with denoising_start there is none but another model's latents; give the mask to that "
            "model",
            param="mask_image",
        )
    begins = request.has_image and request.denoising_start is None
    start = _number("denoising_start", _either(request.denoising_start, 0.0), low=0.0, high=1.0)
    end = _number("denoising_end", _either(request.denoising_end, 1.0), low=0.0, high=1.0)
    if start >= end:
        raise BadRequest(
            f"denoising is to begin at {start:g} and to end at {end:g} of the schedule, expected denoising_start < denoising_end",
            param="denoising_end",
        )
    usual = 1.0 if request.has_mask else defaults.strength
    strength = _either(request.strength, usual) if begins else 1.0
    return Span(strength=_number("strength", strength, low=0.0, high=1.0), denoising_start=start, denoising_end=end)


def _mask_blur(request: Request) -> float:
    """The radius by which a mask is softened."""
    if not request.has_mask:
        for name, given in (("mask_blur", request.mask_blur is not None), ("apply_overlay", request.apply_overlay)):
            if given:
                raise BadRequest(
                    f"{name} was given, and there is no mask; give mask_image, or leave out {name}", param=name
                )
    return _number("mask_blur", _either(request.mask_blur, 0.0), low=0.0, high=_MOST_BLUR)


def _score(name: str, value: float | None, defaults: Defaults, default: float) -> float:
    if value is not None and not defaults.takes_aesthetic_scores:
        raise BadRequest(f"{name} was given, and this model takes none; leave it out", param=name)
    return _number(name, _either(value, default), low=0.0)


def _variation(request: Request, images: int) -> tuple[float, tuple[int, ...]]:
    """How far each image's noise is turned, and the seeds of the noises towards which it is."""
    strength = _number("variation_strength", request.variation_strength, low=0.0, high=1.0)
    if strength == 0:
        if request.variation_seed is not None:
            raise BadRequest(
                "variation_strength is 0, at which variation_seed says nothing; give both", param="variation_strength"
            )
        return 0.0, ()
    if request.denoising_start:
        raise BadRequest(
            "variation_strength turns the noise that is begun from, and with denoising_start there is none; vary what the other model begins",
            param="variation_strength",
        )
    seed = secrets.randbelow(_DRAWN_SEED_LIMIT) if request.variation_seed is None else request.variation_seed
    seed = _whole("variation_seed", seed, low=0, high=_SEED_LIMIT - images)
    return strength, tuple(range(seed, seed + images))


def _sampler(value: object) -> Choice:
    if not isinstance(value, str):
        raise BadRequest(f"sampler is of type {type(value).__name__}, expected str", param="sampler")
    return find_sampler(value)


def _prompts(value: object) -> tuple[str, ...]:
    prompts = _texts("prompt", value)
    if not prompts:
        raise BadRequest("prompt is an empty list, expected at least one prompt", param="prompt")
    return prompts


def _negative_prompts(value: object, count: int) -> tuple[str, ...]:
    if value is None or isinstance(value, str):
        return (value or "",) * count
    negatives = _texts("negative_prompt", value)
    if len(negatives) != count:
        raise BadRequest(
            f"there are {len(negatives)} negative prompts for {count} prompts, expected one, or one for each prompt",
            param="negative_prompt",
        )
    return negatives


def _texts(name: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list | tuple):
        raise BadRequest(f"{name} is of type {type(value).__name__}, expected str or a list of str", param=name)
    for index, text in enumerate(value):
        if not isinstance(text, str):
            raise BadRequest(f"{name}[{index}] is of type {type(text).__name__}, expected str", param=name)
    return tuple(value)


def _size(request: Request, defaults: Defaults) -> tuple[int, int]:
    width = _whole("width", _either(request.width, defaults.width), low=1)
    height = _whole("height", _either(request.height, defaults.height), low=1)
    for name, value in (("width", width), ("height", height)):
        if value % defaults.size_multiple:
            raise BadRequest(f"{name} is {value}, expected a multiple of {defaults.size_multiple}", param=name)
    if (width, height) not in defaults.sizes:
        known = ", ".join(f"{w}x{h}" for w, h in defaults.sizes)
        raise BadRequest(
            f"there is no engine for {width}x{height}, this bundle has: {known}; to add one:"
            f" ldmrt build-engines MODEL --out DIR --size {width}x{height}",
            param="height" if any(w == width for w, _ in defaults.sizes) else "width",
        )
    return width, height


def _either(value: T | None, default: T) -> T:
    return default if value is None else value


def _whole(name: str, value: object, *, low: int, high: int | None = None) -> int:
    """An int from low to high, or a NumPy integer; a bool is neither."""
    wanted = f"{low} or more" if high is None else f"{low} to {high}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise BadRequest(f"{name} is {value!r}, expected a whole number, {wanted}", param=name)
    number = operator.index(value)
    if number < low or (high is not None and number > high):
        raise BadRequest(f"{name} is {number}, expected {wanted}", param=name)
    return number


def _number(name: str, value: object, *, low: float, high: float = math.inf) -> float:
    """A float32 from low to high, as a float; a bool is none."""
    wanted = f"a number from {low:g} to {high:g}" if math.isfinite(high) else f"a number, {low:g} or more"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise BadRequest(f"{name} is {value!r}, expected {wanted}", param=name)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if number > LARGEST:
        raise BadRequest(f"{name} is {number}, expected {wanted}, that float32 holds", param=name)
    if not low <= number <= high:
        raise BadRequest(f"{name} is {number}, expected {wanted}", param=name)
    return number


def _one_of(name: str, value: T, known: tuple[Any, ...]) -> T:
    if value not in known:
        raise BadRequest(f"{name} is {value!r}, expected one of: {', '.join(known)}", param=name)
    return value
