"""A picture kept outside of a mask by models that know of none: the same pictures as diffusers' inpainting pipelines make with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldmrt.cli import app
from ldmrt.errors import BadRequest
from ldmrt.pipeline import Pipeline
from ldmrt.request import Request
from ldmrt.samplers.registry import SAMPLERS
from ldmrt.serving import Batcher
from tests.samplers.oracle import scheduler_class
from tests.test_image_to_image import compare
from tests.test_inpainting import half, picture
from tests.test_parity import LATENTS, NEGATIVE, PROMPT, generator, relative

# diffusers' schedulers make arrays of tensors in ways that NumPy 2 warns of.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
]

QUICK: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 5.0, "seed": 3, "output_type": "latent"}
# Of "dpm++ sde" diffusers draws the noise in another way; its levels are in tests/samplers/test_make.py.
COMPARED = [name for name in SAMPLERS if name != "dpm++ sde"]


def ramp(size: tuple[int, int] = (64, 64)) -> Image.Image:
    """From black on the left to white on the right."""
    return Image.fromarray(np.tile(np.linspace(0, 255, size[0]).round().astype(np.uint8), (size[1], 1)))


def reference(model: Path, sampler: str = "ddim", *, soft: bool = False) -> Any:
    import diffusers
    from diffusers.image_processor import VaeImageProcessor

    xl = (model / "text_encoder_2").is_dir()
    cls = diffusers.StableDiffusionXLInpaintPipeline if xl else diffusers.StableDiffusionInpaintPipeline
    pipe: Any = cls.from_pretrained(model, **({"add_watermarker": False} if xl else {}))
    made = scheduler_class(SAMPLERS[sampler].scheduler)
    options = {"algorithm_type": "sde-dpmsolver++"} if sampler == "dpm++ 2m sde" else {}
    pipe.scheduler = made.from_config(pipe.scheduler.config, **options)
    if sampler == "kdpm2":
        add_noise_in_the_middle(pipe.scheduler)
    if soft:  # theirs knows black and white alone, but for this
        greys = {"do_normalize": False, "do_binarize": False, "do_convert_grayscale": True}
        pipe.mask_processor = VaeImageProcessor(vae_scale_factor=pipe.vae_scale_factor, **greys)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def add_noise_in_the_middle(scheduler: Any) -> None:
    """In the middle of a step theirs adds as much noise as there is at its end; here, as much as the latents have."""
    add_noise = scheduler.add_noise

    def patched(original: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> Any:
        if scheduler.state_in_first_order:
            return add_noise(original, noise, timesteps)
        return original + noise * scheduler.sigmas_interpol[scheduler.step_index]

    scheduler.add_noise = patched


# Their own size is not the bundle's: they take it from the picture; and XL's own strength is a little less than 1.
THEIRS: dict[str, Any] = {"height": 64, "width": 64, "strength": 1.0}


@pytest.fixture(scope="module")
def pipe(tiny_bundle: Path) -> Pipeline:
    return Pipeline.from_bundle(tiny_bundle)


@pytest.mark.covers("Stable Diffusion 1.x", "inpainting")
@pytest.mark.covers("Stable Diffusion 2.x", "inpainting")
@pytest.mark.covers("Stable Diffusion XL", "inpainting")
@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("name", ["tiny", "tiny_v", "tiny_xl"])
def test_the_same_pictures_as_diffusers(name: str, strength: float, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name.replace("tiny", "tiny_model"))
    pipe = Pipeline.from_bundle(request.getfixturevalue(name.replace("tiny", "tiny_bundle")))
    common = {"image": picture(1, (100, 80)), "mask_image": half((50, 90)), "eta": 0.5, "negative_prompt": NEGATIVE}
    ours = {"seed": 3} if strength == 1 else {"seed": 3, "strength": strength}
    compare(pipe, reference(model), ours, {**THEIRS, "strength": strength, "generator": generator(3)}, **common)


@pytest.mark.parametrize("sampler", COMPARED)
def test_with_every_sampler(sampler: str, pipe: Pipeline, tiny_model: Path) -> None:
    # Begun in the middle, ours makes PNDM's first step twice, and has no past for LMS; theirs makes the first of all twice, and takes weights
    # for a past that is not there.
    common = {"image": picture(1), "mask_image": half(), "strength": 1.0 if sampler in ("pndm", "lms") else 0.7}
    theirs = {"height": 64, "width": 64, "generator": generator(3)}
    compare(pipe, reference(tiny_model, sampler), {"seed": 3, "sampler": sampler}, theirs, **common)


def test_greys(pipe: Pipeline, tiny_model: Path) -> None:
    common = {"image": picture(1), "mask_image": ramp()}
    theirs = {**THEIRS, "generator": generator(3)}
    compare(pipe, reference(tiny_model, soft=True), {"seed": 3, "mask_blur": 0}, theirs, **common)


def test_a_blurred_mask(pipe: Pipeline, tiny_model: Path) -> None:
    """Diffusers' blur is Pillow's, too; its pipeline is given the blurred mask."""
    from diffusers.image_processor import VaeImageProcessor

    blurred = VaeImageProcessor.blur(half(), 5)
    theirs = {**THEIRS, "generator": generator(3), "mask_image": blurred}
    ours = {"seed": 3, "mask_image": half(), "mask_blur": 5}
    compare(pipe, reference(tiny_model, soft=True), ours, theirs, image=picture(1))


def test_with_a_controlnet(tiny_bundle_controlled: Path, tiny_model: Path, tiny_controlnets: list[Path]) -> None:
    from diffusers import ControlNetModel, StableDiffusionControlNetInpaintPipeline

    net = ControlNetModel.from_pretrained(tiny_controlnets[0])
    theirs = StableDiffusionControlNetInpaintPipeline(
        **reference(tiny_model).components, controlnet=net, requires_safety_checker=False
    )
    theirs.set_progress_bar_config(disable=True)
    ours = {"seed": 3, "control_image": [picture(4), None], "controlnet_scale": 0.8}
    other = {"control_image": picture(4), "controlnet_conditioning_scale": 0.8, "generator": generator(3), **THEIRS}
    common = {"image": picture(1), "mask_image": half()}
    compare(Pipeline.from_bundle(tiny_bundle_controlled), theirs, ours, other, **common)


@pytest.mark.parametrize("strength", [1.0, 0.7])
def test_latents_in_the_place_of_a_picture(pipe: Pipeline, strength: float) -> None:
    """Under a black mask they come back to the bit; under a white one nothing is left of them that is not begun from."""
    latents = torch.randn(1, 4, 8, 8, generator=generator(9))
    black, white = (Image.new("L", (64, 64), value) for value in (0, 255))
    asked: dict[str, Any] = {"image": latents, "strength": strength, **QUICK}
    assert torch.equal(pipe(PROMPT, mask_image=black, **asked).latents, latents)
    plain = {name: value for name, value in asked.items() if strength < 1 or name not in ("image", "strength")}
    assert relative(pipe(PROMPT, mask_image=white, **asked).latents, pipe(PROMPT, **plain).latents) < LATENTS


def test_images_of_a_batch_are_what_they_are_alone(pipe: Pipeline) -> None:
    masked: dict[str, Any] = {"image": picture(1), "mask_image": half()}
    together = pipe(PROMPT, num_images_per_prompt=3, **masked, **QUICK)
    for seed, latents in zip(together.seeds, together.latents, strict=True):
        alone = pipe(PROMPT, **masked, **{**QUICK, "seed": seed}).latents
        assert relative(latents[None], alone) < LATENTS


def test_in_a_batcher_beside_requests_of_other_kinds(pipe: Pipeline) -> None:
    """Each as the pipeline makes it alone: a mask, another mask with another sampler, a picture, and neither."""
    kinds: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"seed": 3, "num_inference_steps": 4}, {"image": picture(1), "mask_image": half()}),
        ({"seed": 4, "sampler": "heun", "mask_blur": 3}, {"image": picture(2), "mask_image": ramp()}),
        ({"seed": 5, "strength": 0.5}, {"image": picture(3)}),
        ({"seed": 6, "eta": 0.5, "guidance_rescale": 0.5}, {}),
        ({"seed": 7, "apply_overlay": True}, {"image": picture(4), "mask_image": half()}),
    ]
    common: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 5, "guidance_scale": 5.0}
    expected = [pipe(**{**common, **words}, **brought) for words, brought in kinds]
    with Batcher(pipe) as batcher:
        handles = [batcher.submit(Request(**{**common, **words}), **brought) for words, brought in kinds]
        found = [handle.result() for handle in handles]
    for one, other in zip(found, expected, strict=True):
        assert relative(one.latents, other.latents) < LATENTS
        # Where a value lies between two bytes, rounding may go either way.
        ours, theirs = (np.asarray(result.images[0], dtype=int) for result in (one, other))
        assert abs(ours - theirs).max() <= 1
    assert np.array_equal(np.asarray(found[4].images[0])[:, 32:], np.asarray(picture(4))[:, 32:])


@pytest.mark.parametrize("kind", ["ordinary", "inpainting"])
def test_the_overlay_is_diffusers(kind: str, pipe: Pipeline, tiny_bundle_inpainting: Path) -> None:
    from diffusers.image_processor import VaeImageProcessor

    drawing = pipe if kind == "ordinary" else Pipeline.from_bundle(tiny_bundle_inpainting)
    asked: dict[str, Any] = {**QUICK, "image": picture(1), "mask_image": half(), "output_type": "pil"}
    without, laid = (drawing(PROMPT, **asked, apply_overlay=one).images[0] for one in (False, True))
    expected = VaeImageProcessor().apply_overlay(half(), picture(1), without)
    assert np.array_equal(np.asarray(laid), np.asarray(expected))
    assert np.array_equal(np.asarray(laid)[:, 32:], np.asarray(picture(1))[:, 32:])
    assert not np.array_equal(np.asarray(without)[:, 32:], np.asarray(picture(1))[:, 32:])
    # With a soft mask the two are mixed; theirs is rounded to bytes on the way, twice.
    soft = drawing(PROMPT, **{**asked, "mask_image": ramp()}, mask_blur=0, apply_overlay=True).images[0]
    plain = drawing(PROMPT, **{**asked, "mask_image": ramp()}, mask_blur=0).images[0]
    expected = VaeImageProcessor().apply_overlay(ramp(), picture(1), plain)
    assert abs(np.asarray(soft, dtype=int) - np.asarray(expected, dtype=int)).max() <= 2


def test_the_picture_is_only_seen_where_it_is_kept(pipe: Pipeline) -> None:
    base = pipe(PROMPT, image=picture(1), mask_image=half(), **QUICK).latents
    for change in ({"image": picture(2)}, {"mask_image": Image.new("L", (64, 64), 255)}, {"mask_blur": 6}):
        other = pipe(PROMPT, **{"image": picture(1), "mask_image": half(), **QUICK, **change}).latents
        assert relative(other, base) > 100 * LATENTS
    kept = pipe("blue", image=picture(1), mask_image=half(), **QUICK).latents
    assert torch.equal(kept[..., 4:], base[..., 4:])


def test_a_step_with_a_mask_is_captured_when_it_is_asked_for(pipe: Pipeline) -> None:
    job, material = pipe.resolve(Request(prompt=PROMPT), image=picture(1), mask_image=half())
    denoiser = pipe.denoiser((64, 64), 2, tokens=77, evaluations=50)
    table, text = pipe.table(job), pipe.embed([(job, pipe.tokenize(job)[0])], together=False)[0]
    with torch.inference_mode():
        pipe.admit(denoiser, 0, job, table, text, material)
        assert denoiser.slots.adjustments.blends
        denoiser.release(0)
        assert not denoiser.slots.adjustments.blends


def test_what_must_be_given(pipe: Pipeline) -> None:
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({"mask_image": half()}, "image", "image is missing: mask_image says what of it is drawn anew"),
        ({"image": picture(1), "mask_image": "m.png"}, "mask_image", "expected a PIL image or an array of uint8"),
        ({"image": picture(1), "mask_blur": 3.0}, "mask_blur", "there is no mask"),
        (
            {"image": torch.zeros(1, 4, 8, 8), "mask_image": half(), "apply_overlay": True},
            "apply_overlay",
            "give a picture as image",
        ),
        (
            {"image": torch.zeros(1, 4, 8, 8), "mask_image": half(), "denoising_start": 0.5},
            "mask_image",
            "give the mask to that model",
        ),
    ]
    for given, param, message in cases:
        with pytest.raises(BadRequest, match=message) as caught:
            pipe(PROMPT, **given, **QUICK)
        assert caught.value.param == param


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as ended:
        app([str(word) for word in words], prog_name="ldmrt")
    return int(ended.value.code or 0)


def test_generate(tiny_bundle: Path, pipe: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(1).save(tmp_path / "p.png")
    half().save(tmp_path / "m.png")
    command = ["generate", "a circle", "--engines", tiny_bundle, "--steps", 2, "--seed", 1, "--device", "cpu"]
    command += ["--out", tmp_path / "o.png", "--json", "--image", tmp_path / "p.png"]
    masked = ["--mask", tmp_path / "m.png", "--mask-blur", 2, "--apply-overlay"]
    assert run(*command, *masked) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert (settings["strength"], settings["mask_blur"], settings["apply_overlay"]) == (1.0, 2.0, True)
    asked: dict[str, Any] = {"image": picture(1), "mask_image": half(), "mask_blur": 2, "apply_overlay": True}
    expected = pipe("a circle", **asked, num_inference_steps=2, seed=1).images[0]
    with Image.open(tmp_path / "o.png") as found:
        assert np.array_equal(np.asarray(found), np.asarray(expected))
        assert "Mask blur: 2" in found.info["parameters"]
    for wrong, message in (
        (["--mask-blur", 2], "there is no mask"),
        ([*masked, "--refiner", tiny_bundle], "--refiner changes all of them"),
    ):
        assert run(*command, *wrong) in (1, 2)
        assert message in capsys.readouterr().err
