"""What a request brings besides words, put together: what each image starts from, and that each brings only its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldmrt.bundle import Bundle
from ldmrt.errors import BadRequest
from ldmrt.manifest import LayoutRecord, ModelRecord, UpscalingRecord
from ldmrt.material import Start, resolve
from ldmrt.request import Defaults, Job, Request, resolve as resolve_request
from ldmrt.samplers.make import sampler_table
from ldmrt.schedule import NoiseSchedule

CPU = torch.device("cpu")
SIDE, CELLS, CHANNELS, FACTOR = 16, 4, 3, 4
SCHEDULE = NoiseSchedule.from_config({"num_train_timesteps": 1000})
DEFAULTS = Defaults(
    width=SIDE, height=SIDE, num_inference_steps=4, guidance_scale=3.0, sizes=((SIDE, SIDE),), max_images=8
)
PICTURE = Image.fromarray(np.full((SIDE, SIDE, 3), 255, np.uint8))  # 1 as a model sees it


def record(**changes: Any) -> ModelRecord:
    known = Bundle.open(Path(__file__).parents[1] / "ldmrt" / "builtin" / "shapes").manifest.model
    return known.model_copy(update={"name": "mine", "latent_channels": CHANNELS, "downscale": FACTOR, **changes})


def ask(**fields: Any) -> Job:
    asked: dict[str, Any] = {"prompt": "a cat", "seed": 5, **fields}
    return resolve_request(Request(**asked), DEFAULTS)


def encode(picture: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """A VAE: the mean of each cell, of all channels of latents, and a tenth of the noise."""
    cells = torch.nn.functional.avg_pool2d(picture.mean(0, keepdim=True)[None], FACTOR)
    return cells.expand(len(noise), CHANNELS, CELLS, CELLS) + 0.1 * noise


def starts(model: ModelRecord, job: Job, sampler: str = "ddim", **given: Any) -> list[Start]:
    generator = given.pop("generator", None)
    table = sampler_table(sampler, SCHEDULE, job.num_inference_steps, span=job.span)
    return resolve(model, job, **given).starts(job, table, encode, CPU, generator)


def drawn(seed: int, count: int = 1) -> list[torch.Tensor]:
    """What a generator gives, one after the other."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, CHANNELS, CELLS, CELLS, generator=generator)[0] for _ in range(count)]


def test_noise_alone() -> None:
    found = starts(record(), ask(num_images_per_prompt=2))
    assert [one.latents.tolist() for one in found] == [drawn(seed)[0].tolist() for seed in (5, 6)]
    assert all(one.noise is None and not one.cond and not one.uncond for one in found)


def test_noise_of_every_step_goes_to_its_image() -> None:
    """In diffusers' order: the generator of an image gives its latents, then its noise step by step."""
    found = starts(record(), ask(num_images_per_prompt=2), "euler-ancestral")
    for seed, one in zip((5, 6), found, strict=True):
        first, *rest = drawn(seed, 1 + int(one.table.draws_noise.sum()))
        assert torch.equal(one.latents, first)
        assert one.noise is not None
        assert torch.equal(one.noise[torch.from_numpy(one.table.draws_noise)], torch.stack(rest))


def test_a_picture_to_begin_from() -> None:
    """Encoded with the generator's first draw, then mixed with its second at the level of the first step that is made."""
    (one,) = starts(record(), ask(strength=0.5, has_image=True), image=PICTURE)
    encoding, noise = drawn(5, 2)
    of_picture, of_noise = map(float, one.table.levels[0])
    assert 0 < of_noise < 1
    expected = of_picture * (1 + 0.1 * encoding) + of_noise * noise
    assert torch.allclose(one.latents, expected, atol=1e-6)  # a few roundings of float32
    assert one.table.evaluations == 2
    assert one.table.initial_noise_scale == 1


def test_an_inpainting_model_is_shown_what_the_mask_leaves() -> None:
    half = np.zeros((SIDE, SIDE, 3), np.uint8)
    half[:, SIDE // 2 :] = 255
    model = record(inpainting=True, masked_pixel=-1.0)
    material = resolve(model, ask(has_image=True, strength=1), image=PICTURE, mask_image=Image.fromarray(half))
    assert material.is_encoded
    (one,) = starts(model, ask(has_image=True, strength=1), image=PICTURE, mask_image=Image.fromarray(half))
    latents, encoding = drawn(5, 2)
    assert torch.equal(one.latents, latents)
    assert one.cond.keys() == one.uncond.keys() == {"mask", "masked_image_latents"}
    columns = torch.arange(CELLS) >= CELLS // 2
    assert torch.equal(one.cond["mask"][0], columns.float().expand(CELLS, CELLS))
    expected = torch.where(columns, -1.0, 1.0) + 0.1 * encoding
    assert torch.allclose(one.cond["masked_image_latents"], expected, atol=1e-6)


def test_an_upscaling_model_draws_its_noise_before_all_else() -> None:
    model = record(upscaling=UpscalingRecord(schedule=SCHEDULE.to_dict(), noise_level=20, max_noise_level=350))
    (one,) = starts(model, ask(has_image=True, strength=1), image=PICTURE, noise_level=100)
    generator = torch.Generator().manual_seed(5)
    noise, latents = (torch.randn(1, 3, CELLS, CELLS, generator=generator)[0] for _ in range(2))
    assert torch.equal(one.latents, latents)
    assert int(one.cond["class_labels"]) == 100
    share = float(SCHEDULE.alphas_cumprod[100])
    assert torch.allclose(one.cond["low_res_image"], share**0.5 + (1 - share) ** 0.5 * noise, atol=1e-6)


def test_classes_of_each_image_and_of_none() -> None:
    model = record(classes=11, null_class=10)
    job = ask(prompt=["", ""], num_images_per_prompt=2)
    found = starts(model, job, class_labels=[7, 2])
    assert [int(one.cond["class_labels"]) for one in found] == [7, 7, 2, 2]
    assert [int(one.uncond["class_labels"]) for one in found] == [10] * 4


@pytest.mark.parametrize(
    ("changes", "given", "name"),
    [
        ({"segments": 3}, {"segmentation": np.ones((SIDE, SIDE), np.uint8)}, "segmentation"),
        ({"layout": LayoutRecord(objects=2, tokens=50)}, {"layout": [{"class": 3, "box": [0, 0, 1, 1]}]}, "layout"),
    ],
)
def test_what_all_images_of_a_call_share(changes: dict[str, Any], given: dict[str, Any], name: str) -> None:
    found = starts(record(**changes), ask(num_images_per_prompt=3), **given)
    assert len(found) == 3
    for one in found:
        assert one.cond.keys() == one.uncond.keys() == {name}
        assert torch.equal(one.cond[name], found[0].cond[name])
        assert torch.equal(one.uncond[name], found[0].cond[name])


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_part_of_one_image_is_what_it_is_among_all(number: int) -> None:
    """How a batcher runs each by itself: with its own seed, latents and class."""
    model = record(classes=11, null_class=10)
    latents = torch.stack([one for seed in (1, 2, 3) for one in drawn(seed)])
    job = ask(prompt=["", "", ""])
    whole = resolve(model, job, latents=latents, class_labels=[4, 5, 6])
    table = sampler_table("ddim", SCHEDULE, 4)
    among = whole.starts(job, table, encode, CPU)[number]
    single = ask(prompt=[""], seed=job.seeds[number])
    (alone,) = whole.of(number).starts(single, table, encode, CPU)
    assert torch.equal(alone.latents, among.latents)
    assert torch.equal(alone.latents, latents[number])
    assert int(alone.cond["class_labels"]) == int(among.cond["class_labels"]) == 4 + number


def test_the_part_of_one_image_that_begins_from_latents() -> None:
    begun = torch.stack([one for seed in (1, 2) for one in drawn(seed)])
    job = ask(num_images_per_prompt=2, strength=0.5, has_image=True)
    material = resolve(record(), job, image=begun)
    assert not material.is_encoded
    part = material.of(1).beginning.latents
    assert part is not None
    assert torch.equal(part, begun[1:])


def test_generators_instead_of_seeds() -> None:
    given = [torch.Generator().manual_seed(seed) for seed in (8, 9)]
    found = starts(record(), ask(num_images_per_prompt=2), generator=given)
    assert [one.latents.tolist() for one in found] == [drawn(seed)[0].tolist() for seed in (8, 9)]


@pytest.mark.parametrize(
    ("given", "param", "message"),
    [
        ({"mask_image": PICTURE}, "image", "image is missing: mask_image says what of it is drawn anew"),
        ({"noise_level": 3}, "noise_level", "gives its picture no noise"),
        ({"class_labels": 3}, "class_labels", "mine draws no classes"),
        ({"segmentation": np.ones((2, 2), np.uint8)}, "segmentation", "mine takes no semantic map"),
        ({"layout": []}, "layout", "mine takes none"),
        ({"latents": torch.zeros(2, 3, 4, 4)}, "latents", r"has the shape \(2, 3, 4, 4\), expected \(1, 3, 4, 4\)"),
    ],
)
def test_what_a_model_has_no_use_for(given: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(BadRequest, match=message) as caught:
        starts(record(), ask(), **given)
    assert caught.value.param == param
