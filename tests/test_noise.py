"""Noise: diffusers' numbers from the same generators."""

from __future__ import annotations

import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

from ldmrt.errors import BadRequest
from ldmrt.noise import draw
from ldmrt.samplers.ddim import ddim
from ldmrt.schedule import NoiseSchedule

SHAPE = (4, 8, 6)
QUIET = ddim(NoiseSchedule(), 3)
NOISY = ddim(NoiseSchedule(), 3, 0.5)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def test_seeds_are_a_list_of_generators() -> None:
    latents, noise, *_ = draw([5, 9], SHAPE, QUIET)
    assert torch.equal(latents, randn_tensor((2, *SHAPE), generator=generators(5, 9)))
    assert noise is None


def test_steps_draw_after_the_latents() -> None:
    """From each image's generator diffusers draws the latents, then noise of the same shape in every step."""
    theirs = generators(5, 9)
    latents, noise, *_ = draw([5, 9], SHAPE, NOISY)
    assert torch.equal(latents, randn_tensor((2, *SHAPE), generator=theirs))
    assert noise is not None
    for step in range(3):
        assert torch.equal(noise[:, step], randn_tensor((2, *SHAPE), generator=theirs))


def test_one_generator_for_all_images() -> None:
    (theirs,) = generators(7)
    latents, noise, *_ = draw([0, 0], SHAPE, NOISY, generator=generators(7)[0])
    assert torch.equal(latents, randn_tensor((2, *SHAPE), generator=theirs))
    assert noise is not None
    assert torch.equal(noise[:, 0], randn_tensor((2, *SHAPE), generator=theirs))


def test_given_latents_are_not_drawn() -> None:
    given = torch.randn(1, *SHAPE).half()
    latents, noise, *_ = draw([5], SHAPE, NOISY, latents=given)
    assert torch.equal(latents, given.float())
    assert noise is not None
    assert torch.equal(noise[:, 0], randn_tensor((1, *SHAPE), generator=generators(5)))


def test_an_image_does_not_depend_on_the_others() -> None:
    alone, *_ = draw([6], SHAPE, QUIET)
    together, *_ = draw([5, 6], SHAPE, QUIET)
    assert torch.equal(alone[0], together[1])


@pytest.mark.parametrize(
    ("arguments", "param"),
    [({"generator": generators(1, 2, 3)}, "generator"), ({"latents": torch.zeros(1, *SHAPE)}, "latents")],
)
def test_what_does_not_fit_is_named(arguments: dict[str, object], param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        draw([0, 1], SHAPE, QUIET, **arguments)  # type: ignore[arg-type]
    assert caught.value.param == param


def test_the_encoding_of_a_picture_draws_behind_the_latents() -> None:
    """In diffusers' order, and once for all images of a generator."""
    latents, noise, encoding, _ = draw([5, 9], SHAPE, NOISY, encoding=True)
    assert noise is not None
    assert encoding is not None
    for number, generator in enumerate(generators(5, 9)):
        expected = [torch.randn((1, *SHAPE), generator=generator)[0] for _ in range(3)]
        assert torch.equal(latents[number], expected[0])
        assert torch.equal(encoding[number], expected[1])
        assert torch.equal(noise[number, 0], expected[2])
    shared = draw([0, 0], SHAPE, QUIET, generator=generators(7)[0], encoding=True).encoding
    assert shared is not None
    assert torch.equal(shared[0], shared[1])


def test_the_encoding_of_a_picture_to_begin_from_draws_before_the_latents() -> None:
    """In diffusers' order, with that of an inpainting model's picture behind both."""
    drawn = draw([5], SHAPE, NOISY, encoding=True, picture=True)
    (generator,) = generators(5)
    assert drawn.picture is not None
    assert drawn.encoding is not None
    for found in (drawn.picture, drawn.start, drawn.encoding):
        assert torch.equal(found, torch.randn((1, *SHAPE), generator=generator))
