from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from ldmrt.errors import BadRequest
from ldmrt.request import Defaults, Job, Request, resolve
from ldmrt.samplers.span import WHOLE, Span

DEFAULTS = Defaults(
    width=512,
    height=512,
    num_inference_steps=50,
    guidance_scale=7.5,
    sizes=((512, 512), (512, 768)),
    max_images=8,
)


def ask(**fields: Any) -> Job:
    return resolve(Request(**({"prompt": "a cat"} | fields)), DEFAULTS)


def test_defaults_of_the_model() -> None:
    job = ask(seed=5)
    assert job == Job(
        prompts=("a cat",),
        negative_prompts=("",),
        num_images_per_prompt=1,
        seeds=(5,),
        variation_seeds=(),
        variation_strength=0.0,
        seed_was_drawn=False,
        num_inference_steps=50,
        guidance_scale=7.5,
        guidance_rescale=0.0,
        sampler="ddim",
        eta=0.0,
        width=512,
        height=512,
        clip_skip=0,
        long_prompt="chunk",
        emphasis=False,
        guidance_embedded=False,
        span=WHOLE,
        soft_mask=False,
        mask_blur=0.0,
        apply_overlay=False,
        aesthetic_score=6.0,
        negative_aesthetic_score=2.5,
    )
    assert job.do_cfg
    assert job.num_images == 1
    assert None not in dataclasses.astuple(job)
    with pytest.raises(dataclasses.FrozenInstanceError):
        job.eta = 1.0  # type: ignore[misc]


def test_masks() -> None:
    for blur, found in ((None, (False, 0.0)), (0, (True, 0.0)), (4.5, (True, 4.5))):
        job = ask(has_image=True, has_mask=True, mask_blur=blur)
        assert (job.soft_mask, job.mask_blur) == found
    assert ask(has_image=True, has_mask=True, apply_overlay=True).apply_overlay
    refused: list[tuple[dict[str, Any], str]] = [
        ({"mask_blur": 1.0}, "mask_blur"),
        ({"apply_overlay": True}, "apply_overlay"),
        ({"has_mask": True, "mask_blur": -1.0}, "mask_blur"),
        ({"has_mask": True, "mask_blur": math.inf}, "mask_blur"),
        ({"has_image": True, "has_mask": True, "denoising_start": 0.5}, "mask_image"),
    ]
    for asked, param in refused:
        with pytest.raises(BadRequest) as caught:
            ask(**asked)
        assert caught.value.param == param


def test_everything_given() -> None:
    job = ask(
        prompt=["a", ""],
        negative_prompt=("c", "d"),
        num_inference_steps=np.int64(4),
        guidance_scale=1,
        guidance_rescale=0.7,
        sampler="TCD",
        eta=np.float32(0.5),
        seed=2**63 - 4,
        num_images_per_prompt=2,
        height=768,
        clip_skip=2,
        long_prompt="cut",
    )
    assert job.prompts == ("a", "")
    assert job.negative_prompts == ("c", "d")
    assert job.seeds == tuple(range(2**63 - 4, 2**63))
    assert (job.width, job.height) == (512, 768)
    assert (job.num_inference_steps, job.eta, job.guidance_scale, job.clip_skip) == (4, 0.5, 1.0, 2)
    assert type(job.num_inference_steps) is int
    assert (job.sampler, job.guidance_rescale) == ("tcd", 0.7)
    assert type(job.eta) is float
    assert type(job.guidance_scale) is float
    assert not job.do_cfg
    assert ask(guidance_scale=1.01).do_cfg
    assert job.num_images == 4


def test_a_negative_prompt_for_all() -> None:
    assert ask(prompt=["a", "b"], negative_prompt="blurry").negative_prompts == ("blurry", "blurry")


def test_a_seed_is_drawn_and_reported() -> None:
    jobs = [ask(num_images_per_prompt=2) for _ in range(20)]
    assert len({job.seeds for job in jobs}) == 20
    for job in jobs:
        assert job.seed_was_drawn
        assert 0 <= job.seeds[0] < 2**32
        assert job.seeds[1] == job.seeds[0] + 1


def test_variations_of_a_picture_have_its_seed() -> None:
    job = ask(seed=5, variation_seed=70, variation_strength=0.25, num_images_per_prompt=3)
    assert (job.seeds, job.variation_seeds, job.variation_strength) == ((5, 5, 5), (70, 71, 72), 0.25)
    assert len({ask(seed=5, variation_strength=1).variation_seeds for _ in range(20)}) == 20


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"prompt": []}, "prompt", "prompt is an empty list, expected at least one prompt"),
        ({"prompt": None}, "prompt", "prompt is of type NoneType, expected str or a list of str"),
        ({"prompt": b"a cat"}, "prompt", "prompt is of type bytes"),
        ({"prompt": ["a", 3]}, "prompt", "prompt[1] is of type int, expected str"),
        ({"negative_prompt": 3}, "negative_prompt", "negative_prompt is of type int"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt", "there are 2 negative prompts for 1 prompts"),
        ({"negative_prompt": []}, "negative_prompt", "there are 0 negative prompts for 1 prompts"),
        ({"num_inference_steps": 0}, "num_inference_steps", "num_inference_steps is 0, expected 1 to 1000"),
        ({"num_inference_steps": 1001}, "num_inference_steps", "is 1001, expected 1 to 1000"),
        ({"num_inference_steps": True}, "num_inference_steps", "is True, expected a whole number"),
        ({"num_inference_steps": 4.0}, "num_inference_steps", "is 4.0, expected a whole number, 1 to 1000"),
        ({"num_inference_steps": "4"}, "num_inference_steps", "is '4', expected a whole number"),
        ({"guidance_scale": -1}, "guidance_scale", "guidance_scale is -1.0, expected a number, 0 or more"),
        ({"guidance_scale": math.nan}, "guidance_scale", "guidance_scale is nan"),
        ({"guidance_scale": math.inf}, "guidance_scale", "guidance_scale is inf"),
        ({"guidance_scale": True}, "guidance_scale", "guidance_scale is True"),
        (
            {"guidance_scale": 1e39},
            "guidance_scale",
            "guidance_scale is 1e+39, expected a number, 0 or more, that float32 holds",
        ),
        ({"guidance_scale": 10**400}, "guidance_scale", "guidance_scale is inf"),
        ({"eta": 1.1}, "eta", "eta is 1.1, expected a number from 0 to 1"),
        ({"eta": math.nan}, "eta", "eta is nan"),
        ({"eta": None}, "eta", "eta is None"),
        ({"eta": 0.5, "sampler": "Euler a"}, "eta", "eta is 0.5, but euler-ancestral has none"),
        ({"guidance_rescale": 1.5}, "guidance_rescale", "guidance_rescale is 1.5, expected a number from 0 to 1"),
        ({"sampler": "magic"}, "sampler", "sampler is 'magic', expected one of: ddim"),
        ({"sampler": 3}, "sampler", "sampler is of type int, expected str"),
        ({"seed": -1}, "seed", "seed is -1, expected 0 to 9223372036854775807"),
        ({"seed": 2**63}, "seed", "seed is 9223372036854775808"),
        ({"seed": 2**63 - 1, "num_images_per_prompt": 2}, "seed", "expected 0 to 9223372036854775806"),
        ({"seed": False}, "seed", "seed is False"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt", "num_images_per_prompt is 0, expected 1 or more"),
        (
            {"prompt": ["a"] * 3, "num_images_per_prompt": 3},
            "num_images_per_prompt",
            "3 prompts with 3 images each are 9 images, expected at most 8",
        ),
        ({"width": 500}, "width", "width is 500, expected a multiple of 8"),
        ({"height": 0}, "height", "height is 0, expected 1 or more"),
        ({"width": 64}, "width", "there is no engine for 64x512, this bundle has: 512x512, 512x768;"),
        ({"height": 64}, "height", "ldmrt build-engines MODEL --out DIR --size 512x64"),
        ({"clip_skip": -1}, "clip_skip", "clip_skip is -1, expected 0 to 11"),
        ({"variation_strength": 1.1}, "variation_strength", "is 1.1, expected a number from 0 to 1"),
        ({"variation_seed": 3}, "variation_strength", "at which variation_seed says nothing; give both"),
        ({"variation_seed": -3, "variation_strength": 1}, "variation_seed", "is -3, expected 0 to"),
        ({"long_prompt": "wrap"}, "long_prompt", "long_prompt is 'wrap', expected one of: chunk, cut"),
    ],
)
def test_what_cannot_be_done(fields: dict[str, Any], param: str, says: str) -> None:
    with pytest.raises(BadRequest) as caught:
        ask(**fields)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.param == param


def test_an_embedded_guidance_scale_needs_no_negative_row() -> None:
    request = Request(prompt="a", guidance_scale=8.0)
    assert resolve(request, DEFAULTS).do_cfg
    assert not resolve(request, dataclasses.replace(DEFAULTS, guidance_embedded=True)).do_cfg


def test_the_part_of_the_steps() -> None:
    assert ask(has_image=True).span == Span(strength=0.8)
    assert ask(has_image=True, strength=0.25).span == Span(strength=0.25)
    # Another model's latents say where to begin.
    assert ask(has_image=True, has_mask=True).span == WHOLE
    assert ask(has_image=True, has_mask=True, strength=0.5).span == Span(strength=0.5)
    assert ask(has_image=True, denoising_start=0.7).span == Span(denoising_start=0.7)
    assert ask(denoising_end=0.7).span == Span(denoising_end=0.7)
    assert ask(has_image=True, strength=0.5, denoising_end=0.7).span == Span(strength=0.5, denoising_end=0.7)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"strength": 0.5}, "strength"),
        ({"denoising_start": 0.5}, "denoising_start"),
        ({"has_image": True, "strength": math.nan}, "strength"),
        ({"has_image": True, "denoising_start": 1.0}, "denoising_end"),
        ({"denoising_end": -0.1}, "denoising_end"),
        ({"aesthetic_score": 6.0}, "aesthetic_score"),
    ],
)
def test_parts_that_cannot_be(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        ask(**fields)
    assert caught.value.param == param
