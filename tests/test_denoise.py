"""The sampling loop: images at different places side by side, each as it would be alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from ldmrt.bundle import Bundle
from ldmrt.denoise import Denoiser
from ldmrt.engines.protocol import Engine
from ldmrt.errors import BadRequest, EngineMismatch
from ldmrt.network import Network
from ldmrt.samplers.ddim import ddim
from ldmrt.schedule import NoiseSchedule

CPU = torch.device("cpu")
TOKENS, WIDTH = 77, 32


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@dataclass(frozen=True)
class Image:
    """One image to be made."""

    seed: int
    steps: int
    guidance_scale: float
    eta: float = 0.0
    guided: bool = True


IMAGES = (
    Image(seed=1, steps=4, guidance_scale=7.5),
    Image(seed=2, steps=11, guidance_scale=3.0, eta=0.8),
    Image(seed=3, steps=5, guidance_scale=0.0, guided=False),
    Image(seed=4, steps=2, guidance_scale=12.0, eta=1.0),
)


def step_engine(bundle: Bundle, rows: int) -> Engine:
    return bundle.load(next(record for record in bundle.find("step") if record.rows == rows), CPU)


def denoiser(bundle: Bundle, rows: int, *, evaluations: int = 16) -> Denoiser:
    context, schedule = (bundle.load(bundle.find(name)[0], CPU) for name in ("context", "schedule"))
    step = step_engine(bundle, rows)
    return Denoiser(context, schedule, step, rows=rows, tokens=TOKENS, evaluations=evaluations, device=CPU)


def embeddings(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(TOKENS, WIDTH, generator=generator), torch.randn(TOKENS, WIDTH, generator=generator)


def admit(loop: Denoiser, slot: int, image: Image, schedule: NoiseSchedule) -> None:
    generator = torch.Generator().manual_seed(image.seed)
    cond, uncond = embeddings(image.seed)
    loop.admit(
        slot,
        latents=torch.randn(4, 8, 8, generator=generator),
        table=ddim(schedule, image.steps, image.eta),
        guidance_scale=image.guidance_scale,
        cond={"encoder_hidden_states": cond},
        uncond={"encoder_hidden_states": uncond} if image.guided else None,
        noise=torch.randn(image.steps, 4, 8, 8, generator=generator),
    )


@pytest.fixture(scope="module")
def schedule(bundle: Bundle) -> NoiseSchedule:
    return NoiseSchedule.from_dict(bundle.manifest.model.schedule)


def alone(bundle: Bundle, schedule: NoiseSchedule, image: Image, rows: int, *, slot: int = 0) -> list[torch.Tensor]:
    """The latents after each step, nothing else in the batch."""
    loop = denoiser(bundle, rows)
    admit(loop, slot, image, schedule)
    steps = []
    for _ in range(image.steps):
        loop.step()
        steps.append(loop.latents(slot).clone())
    return steps


def test_images_at_other_places_do_not_touch_each_other(bundle: Bundle, schedule: NoiseSchedule) -> None:
    """Two slots, four images of different prompts, guidance, noise and step counts, each admitted when a slot is free."""
    expected = {image: alone(bundle, schedule, image, 4) for image in IMAGES}
    loop = denoiser(bundle, 4)
    waiting: Iterator[Image] = iter(IMAGES)
    running: dict[int, Image] = {}
    finished: list[Image] = []
    while True:
        for slot in loop.slots.free[: len(loop.slots.free_rows) // 2]:
            image = next(waiting, None)
            if image is not None:
                admit(loop, slot, image, schedule)
                running[slot] = image
        if not running:
            break
        loop.step()
        for slot, image in list(running.items()):
            made = loop.slots.made(slot)
            # The same rows in a batch of the same size: the same bits.
            assert torch.equal(loop.latents(slot), expected[image][made - 1]), (image, made)
            if loop.slots.done(slot):
                loop.release(slot)
                finished.append(running.pop(slot))
    assert set(finished) == set(IMAGES)
    assert finished != list(IMAGES)  # the long one was overtaken


def test_the_slot_does_not_matter(bundle: Bundle, schedule: NoiseSchedule) -> None:
    first, second = (alone(bundle, schedule, IMAGES[1], 4, slot=slot) for slot in (0, 1))
    assert torch.equal(first[-1], second[-1])


def test_the_batch_size_matters_no_more_than_rounding(bundle: Bundle, schedule: NoiseSchedule) -> None:
    small, large = (alone(bundle, schedule, IMAGES[0], rows)[-1] for rows in (2, 4))
    # Products of other shapes may be summed in another order.
    assert (small - large).norm() / small.norm() < 1e-5


def test_every_step_runs_on_the_smallest_engines_that_hold_the_images(
    bundle: Bundle, schedule: NoiseSchedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without guidance side by side; rows are moved where an image that leaves lets a smaller batch do."""
    loop = denoiser(bundle, 4)
    for rows in (1, 2):
        loop.add([step_engine(bundle, rows)])
    assert loop.batches == [1, 2, 4]
    ran: list[int] = []
    enqueue = Network.enqueue

    def spy(network: Network, entry: torch.Tensor) -> None:
        ran.append(len(entry))
        enqueue(network, entry)

    monkeypatch.setattr(Network, "enqueue", spy)
    short, long = Image(seed=6, steps=2, guidance_scale=4.0), Image(seed=7, steps=6, guidance_scale=5.0, eta=0.5)
    plain = Image(seed=8, steps=1, guidance_scale=1.0, guided=False)
    admit(loop, 0, short, schedule)
    loop.step()
    admit(loop, 1, long, schedule)
    loop.step()
    loop.release(0)
    loop.steps(2)
    admit(loop, 3, plain, schedule)
    loop.step()
    loop.release(3)
    loop.step(least_rows=3)
    loop.release(1)
    admit(loop, 0, plain, schedule)
    loop.step()
    assert ran == [2, 4, 2, 2, 4, 4, 1]
    # In batches of other sizes sums are taken in another order.
    for slot, image, steps in ((1, long, 5), (0, plain, 1), (3, plain, 1)):
        expected = alone(bundle, schedule, image, 4)[steps - 1]
        assert (loop.latents(slot) - expected).norm() / expected.norm() < 1e-5


def test_a_row_that_is_moved_stays_itself(bundle: Bundle, schedule: NoiseSchedule) -> None:
    """In a batch of the same size, to the bit."""
    expected = alone(bundle, schedule, IMAGES[1], 4)[-1]
    loop = denoiser(bundle, 4)
    admit(loop, 0, IMAGES[0], schedule)
    admit(loop, 1, IMAGES[1], schedule)
    loop.steps(3)
    loop.release(0)
    loop.add([step_engine(bundle, 2)])
    assert loop._gather(0) == 2
    assert loop.slots.rows_of(1) == (0, 1)
    loop.steps(8, least_rows=4)
    assert torch.equal(loop.latents(1), expected)


def test_a_finished_image_rests_while_others_go_on(bundle: Bundle, schedule: NoiseSchedule) -> None:
    loop = denoiser(bundle, 4)
    admit(loop, 0, IMAGES[0], schedule)
    admit(loop, 1, IMAGES[1], schedule)
    for _ in range(IMAGES[0].steps):
        loop.step()
    finished = loop.latents(0).clone()
    for _ in range(IMAGES[0].steps, IMAGES[1].steps):
        loop.step()
    assert torch.equal(loop.latents(0), finished)
    assert loop.slots.done(0)
    assert loop.slots.done(1)


def test_a_step_allocates_no_new_state(bundle: Bundle, schedule: NoiseSchedule) -> None:
    loop = denoiser(bundle, 2)
    admit(loop, 0, IMAGES[0], schedule)
    address = loop.latents(0).data_ptr()
    for _ in range(IMAGES[0].steps):
        loop.step()
    assert loop.latents(0).data_ptr() == address


def test_the_result_is_the_network_and_the_formula(bundle: Bundle, schedule: NoiseSchedule) -> None:
    """One step by hand: three parts run as one, guidance, and DDIM's equation 12, in float64."""
    image = Image(seed=5, steps=1, guidance_scale=4.0)
    loop = denoiser(bundle, 2)
    admit(loop, 0, image, schedule)
    loop.step()
    x = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(5))
    cond, uncond = embeddings(5)
    context, timetable, step = (
        bundle.load(next(r for r in bundle.find(name) if r.rows in (None, 2)), CPU)
        for name in ("context", "schedule", "step")
    )
    timestep = ddim(schedule, 1).timesteps[0]
    values = {
        **context.run({"encoder_hidden_states": torch.stack([cond, uncond])}),
        **timetable.run({"timesteps": torch.full((2,), timestep, dtype=torch.float32)}),
        "latents": torch.stack([x, x]),
    }
    guided, unguided = step.run(values)["model_output"].double()
    noise = unguided + 4.0 * (guided - unguided)
    alpha, last = float(schedule.alphas_cumprod[int(timestep)]), schedule.final_alpha_cumprod
    denoised = (x - (1 - alpha) ** 0.5 * noise) / alpha**0.5
    expected = last**0.5 * denoised + (1 - last) ** 0.5 * noise
    # One float32 update on values near 10.
    assert (loop.latents(0) - expected).norm() / expected.norm() < 1e-6


# ---------------------------------------------------------------------------------------------------- refusals


def test_guidance_needs_two_rows(bundle: Bundle, schedule: NoiseSchedule) -> None:
    loop = denoiser(bundle, 2)
    admit(loop, 0, IMAGES[2], schedule)
    with pytest.raises(EngineMismatch, match="1 of 2 rows are free, and the image takes 2: guidance takes two"):
        admit(loop, 1, IMAGES[0], schedule)
    admit(loop, 1, IMAGES[2], schedule)


def test_too_many_steps(bundle: Bundle, schedule: NoiseSchedule) -> None:
    loop = denoiser(bundle, 2, evaluations=3)
    with pytest.raises(BadRequest, match="at most 3"):
        admit(loop, 0, IMAGES[0], schedule)


def test_a_taken_slot(bundle: Bundle, schedule: NoiseSchedule) -> None:
    loop = denoiser(bundle, 4)
    admit(loop, 1, IMAGES[0], schedule)
    with pytest.raises(BadRequest, match="slot 1 is taken"):
        admit(loop, 1, IMAGES[1], schedule)


def test_more_rows_than_any_engine_has(bundle: Bundle) -> None:
    loop = denoiser(bundle, 2)
    with pytest.raises(EngineMismatch, match=r"3 rows are to be run, and the engines at hand have \[2\]: add one"):
        loop.step(least_rows=3)


def test_an_image_that_cannot_be_prepared_leaves_its_slot(bundle: Bundle, schedule: NoiseSchedule) -> None:
    loop = denoiser(bundle, 2)
    arguments: dict[str, Any] = {"table": ddim(schedule, 2), "guidance_scale": 1.0, "uncond": None}
    with pytest.raises(EngineMismatch, match="encoder_hidden_states"):
        loop.admit(0, latents=torch.zeros(4, 8, 8), cond={"encoder_hidden_states": torch.zeros(77, 5)}, **arguments)
    assert loop.slots.free == [0, 1]
    assert loop.slots.free_rows == [0, 1]
