"""Pictures made of pictures: the same as diffusers' image-to-image pipelines make, a refiner's among them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ldmrt.cli import app
from ldmrt.errors import BadRequest, BuildError
from ldmrt.export.source import Source
from ldmrt.pipeline import Pipeline
from ldmrt.refining import Refining
from tests.test_inpainting import half, picture
from tests.test_parity import LATENTS, NEGATIVE, PROMPT, PSNR, generator, generators, psnr, relative

# diffusers' schedulers make arrays of tensors in ways that NumPy 2 warns of.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
]

STEPS = 6
QUICK: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 5.0, "seed": 3, "output_type": "latent"}


def reference(model: Path, sampler: str = "DDIMScheduler") -> Any:
    import diffusers

    xl = (model / "text_encoder_2").is_dir()
    index = json.loads((model / "model_index.json").read_text())
    cls = diffusers.StableDiffusionXLImg2ImgPipeline if xl else diffusers.StableDiffusionImg2ImgPipeline
    # What from_pretrained knows of a refiner; a base model's own file says nothing of it.
    options: dict[str, Any] = {"add_watermarker": False} if xl else {}
    if "requires_aesthetics_score" in index:
        options["requires_aesthetics_score"] = index["requires_aesthetics_score"]
    pipe: Any = cls.from_pretrained(model, **options)
    pipe.scheduler = getattr(diffusers, sampler).from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def compare(pipe: Pipeline, theirs: Any, ours: dict[str, Any], other: dict[str, Any], **common: Any) -> None:
    """Latents after every step, and pictures."""
    found: list[torch.Tensor] = []
    expected: list[torch.Tensor] = []

    def on_step(_pipe: Any, _index: int, _timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        expected.append(tensors["latents"].clone())
        return tensors

    common = {"prompt": PROMPT, "num_inference_steps": STEPS, "guidance_scale": 5.0, **common}
    images = theirs(**common, **other, callback_on_step_end=on_step, output_type="np").images
    result = pipe(**common, **ours, on_step=lambda _index, latents: found.append(latents), output_type="np")
    if len(expected) == 2 * len(found) - 1:  # they also call in the middle of a step of two evaluations
        expected = [*expected[1::2], expected[-1]]
    elif len(expected) == len(found) + 1:  # and of the first step of PNDM, which is made twice
        del expected[0]
    assert len(found) == len(expected)
    assert max(relative(a, b) for a, b in zip(found, expected, strict=True)) < LATENTS
    assert min(psnr(a, b) for a, b in zip(result.images, images, strict=True)) > PSNR
    assert 0.05 < images.std() < 0.5


@pytest.mark.covers("Stable Diffusion 1.x", "image to image")
@pytest.mark.covers("Stable Diffusion 2.x", "image to image")
@pytest.mark.covers("Stable Diffusion XL", "image to image")
@pytest.mark.parametrize("sampler", ["ddim", "euler", "euler-ancestral", "dpm++ 2m", "heun"])
@pytest.mark.parametrize("name", ["tiny", "tiny_v", "tiny_xl"])
def test_the_same_pictures_as_diffusers(name: str, sampler: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name.replace("tiny", "tiny_model"))
    pipe = Pipeline.from_bundle(request.getfixturevalue(name.replace("tiny", "tiny_bundle")))
    classes = {
        "ddim": "DDIMScheduler",
        "euler": "EulerDiscreteScheduler",
        "euler-ancestral": "EulerAncestralDiscreteScheduler",
        "dpm++ 2m": "DPMSolverMultistepScheduler",
        "heun": "HeunDiscreteScheduler",
    }
    ours = {"seed": 3, "sampler": sampler}
    theirs = reference(model, classes[sampler])
    compare(pipe, theirs, ours, {"generator": generator(3)}, image=picture(1), strength=0.6, negative_prompt=NEGATIVE)


@pytest.fixture(scope="module")
def refiner(tiny_bundle_refiner: Path) -> Pipeline:
    return Pipeline.from_bundle(tiny_bundle_refiner)


@pytest.fixture(scope="module")
def their_refiner(tiny_model_refiner: Path) -> Any:
    return reference(tiny_model_refiner)


@pytest.mark.covers("Stable Diffusion XL refiner", "image to image")
@pytest.mark.parametrize("strength", [1.0, 0.3])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_a_refiner(refiner: Pipeline, their_refiner: Any, strength: float, guidance: float) -> None:
    given = {"image": picture(2), "strength": strength, "guidance_scale": guidance, "num_inference_steps": 7}
    compare(refiner, their_refiner, {"seed": 1}, {"generator": generator(1)}, **given)


def test_aesthetic_scores(refiner: Pipeline, their_refiner: Any, tiny_bundle_xl: Path) -> None:
    given = {"image": picture(2), "strength": 0.5, "aesthetic_score": 7.5, "negative_aesthetic_score": 1.0}
    compare(refiner, their_refiner, {"seed": 1}, {"generator": generator(1)}, **given)
    base = refiner(PROMPT, image=picture(2), **QUICK).latents
    scores: list[dict[str, Any]] = [{"aesthetic_score": 9.0}, {"negative_aesthetic_score": 9.0}]
    for score in scores:
        assert relative(refiner(PROMPT, image=picture(2), **score, **QUICK).latents, base) > 100 * LATENTS
    with pytest.raises(BadRequest, match="aesthetic_score was given, and this model takes none"):
        Pipeline.from_bundle(tiny_bundle_xl)(PROMPT, aesthetic_score=6.0, **QUICK)


@pytest.mark.covers("Stable Diffusion XL refiner", "new pictures")
@pytest.mark.parametrize(
    ("sampler", "scheduler"),
    [("euler", "EulerDiscreteScheduler"), ("euler-ancestral", "EulerAncestralDiscreteScheduler")],
)
def test_a_base_and_a_refiner(
    sampler: str, scheduler: str, refiner: Pipeline, tiny_bundle_xl: Path, tiny_model_xl: Path, tiny_model_refiner: Path
) -> None:
    """As in diffusers' documentation: one generator for each picture goes through both."""
    import diffusers

    base = Pipeline.from_bundle(tiny_bundle_xl)
    asked: dict[str, Any] = {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "guidance_scale": 5.0,
        "num_inference_steps": 10,
    }
    theirs: Any = diffusers.StableDiffusionXLPipeline.from_pretrained(tiny_model_xl, add_watermarker=False)
    theirs.scheduler = getattr(diffusers, scheduler).from_config(theirs.scheduler.config)
    theirs.set_progress_bar_config(disable=True)
    draws = generators(3, 4)
    sizes = {"height": 64, "width": 64, "num_images_per_prompt": 2}
    begun = theirs(**asked, **sizes, denoising_end=0.8, generator=draws, output_type="latent").images
    their_refiner = reference(tiny_model_refiner, scheduler)
    expected = their_refiner(
        **asked, num_images_per_prompt=2, image=begun, denoising_start=0.8, generator=draws, output_type="np"
    ).images
    refining = Refining(refiner)
    found = refining.draw(base, [3, 4], {}, **asked, sampler=sampler, output_type="np")
    assert found.seeds == (3, 4)
    assert min(psnr(a, b) for a, b in zip(found.images, expected, strict=True)) > PSNR
    assert refining.plan(base, base(**asked, sampler=sampler, num_images_per_prompt=2, output_type="latent").job) == 10
    # By hand, as users of diffusers write it.
    mine = base(**asked, sampler=sampler, seed=3, denoising_end=0.8, output_type="latent").latents
    assert relative(mine, begun[:1]) < LATENTS


SEVERAL: dict[str, tuple[Callable[[], dict[str, Any]], Callable[[], dict[str, Any]]]] = {
    "a seed for each": (lambda: {"seed": 3}, lambda: {"generator": generators(3, 4, 5)}),
    "one generator": (lambda: {"generator": generator(7)}, lambda: {"generator": generator(7)}),
}


@pytest.mark.filterwarnings("ignore:You have passed 3 text prompts:FutureWarning")  # and one picture for all
@pytest.mark.parametrize("name", SEVERAL)
def test_several_images(name: str, tiny_bundle: Path, tiny_model: Path) -> None:
    ours, theirs = SEVERAL[name]
    asked: dict[str, Any] = {"image": picture(1), "strength": 0.5, "num_inference_steps": 4, "eta": 0.5}
    asked |= {"num_images_per_prompt": 3, "output_type": "latent"}
    found = Pipeline.from_bundle(tiny_bundle)(PROMPT, **asked, **ours()).latents
    assert relative(found, reference(tiny_model)(PROMPT, **asked, **theirs()).images) < LATENTS


def test_latents_in_the_place_of_a_picture(tiny_bundle: Path, tiny_model: Path) -> None:
    latents = torch.randn(1, 4, 8, 8, generator=generator(9))
    pipe = Pipeline.from_bundle(tiny_bundle)
    compare(pipe, reference(tiny_model), {"seed": 3}, {"generator": generator(3)}, image=latents, strength=0.7)
    with pytest.raises(BadRequest, match=r"image is latents of shape \(3, 4, 8, 8\), expected \(1, 4, 8, 8\)"):
        pipe(PROMPT, image=latents.expand(3, 4, 8, 8), **QUICK)


def test_variations_turn_the_noise_that_a_picture_is_given(tiny_bundle: Path) -> None:
    """All of the way there is the other seed's picture; the picture itself is not turned."""
    pipe = Pipeline.from_bundle(tiny_bundle)
    asked: dict[str, Any] = {**QUICK, "image": torch.randn(1, 4, 8, 8, generator=generator(2)), "strength": 0.5}
    plain, other = (pipe(PROMPT, **{**asked, "seed": seed}).latents for seed in (3, 9))
    there, near = (
        pipe(PROMPT, **asked, variation_seed=9, variation_strength=strength).latents for strength in (1.0, 0.1)
    )
    assert relative(there, other) < LATENTS
    assert 100 * LATENTS < relative(near, plain) < relative(other, plain)


def test_with_a_controlnet(tiny_bundle_controlled: Path, tiny_model: Path, tiny_controlnets: list[Path]) -> None:
    from diffusers import ControlNetModel, StableDiffusionControlNetImg2ImgPipeline

    net = ControlNetModel.from_pretrained(tiny_controlnets[0])
    theirs = StableDiffusionControlNetImg2ImgPipeline(
        **reference(tiny_model).components, controlnet=net, requires_safety_checker=False
    )
    theirs.set_progress_bar_config(disable=True)
    ours = {"seed": 3, "control_image": [picture(4), None], "controlnet_scale": 0.8, "control_end": 0.7}
    other = {
        "generator": generator(3), "control_image": picture(4), "controlnet_conditioning_scale": 0.8,
        "control_guidance_end": 0.7, "height": 64, "width": 64,
    }  # fmt: skip
    compare(Pipeline.from_bundle(tiny_bundle_controlled), theirs, ours, other, image=picture(1), strength=0.8)


def test_inpainting_with_a_part_of_the_steps(tiny_bundle_inpainting: Path, tiny_model_inpainting: Path) -> None:
    from diffusers import DDIMScheduler, StableDiffusionInpaintPipeline

    theirs: Any = StableDiffusionInpaintPipeline.from_pretrained(tiny_model_inpainting)
    theirs.scheduler = DDIMScheduler.from_config(theirs.scheduler.config)
    theirs.set_progress_bar_config(disable=True)
    given = {"image": picture(1), "mask_image": half(), "strength": 0.6, "eta": 0.3}
    other = {"generator": generator(3), "height": 64, "width": 64}
    compare(Pipeline.from_bundle(tiny_bundle_inpainting), theirs, {"seed": 3}, other, **given)


def test_without_strength_it_is_the_models(tiny_bundle: Path, refiner: Pipeline) -> None:
    for pipe, strength in ((Pipeline.from_bundle(tiny_bundle), 0.8), (refiner, 0.3)):
        job = pipe(PROMPT, image=picture(1), **QUICK).job
        assert job.span.strength == strength
        assert pipe.table(job).num_steps == int(4 * strength)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"strength": 0.5}, "strength was given, and there is no picture to begin from"),
        ({"denoising_start": 0.5}, "denoising_start was given, and there is no picture to begin from"),
        ({"image": picture(1), "strength": 1.5}, "strength is 1.5, expected a number from 0 to 1"),
        ({"image": picture(1), "strength": 0.1}, "strength 0.1 of 4 steps is no step at all"),
        ({"image": picture(1), "denoising_start": 0.5}, "image is a picture; give strength for a picture"),
        ({"image": picture(1), "strength": 0.5, "denoising_start": 0.5}, "both say where to begin"),
        (
            {"image": torch.zeros(1, 4, 8, 8), "denoising_start": 0.7, "denoising_end": 0.6},
            "expected denoising_start <",
        ),
        ({"denoising_end": 0.0}, "expected denoising_start < denoising_end"),
        (
            {"image": torch.zeros(1, 4, 8, 8), "denoising_start": 0.7, "latents": torch.zeros(1, 4, 8, 8)},
            "latents stands for noise",
        ),
        (
            {"image": torch.zeros(1, 4, 8, 8), "denoising_start": 0.7, "variation_strength": 0.5},
            "with denoising_start there is none; vary what the other model begins",
        ),
        ({"image": np.zeros((64, 64, 3))}, "image is an array of float64"),
    ],
)
def test_what_cannot_be(asked: dict[str, Any], message: str, tiny_bundle: Path) -> None:
    with pytest.raises(BadRequest, match=message):
        Pipeline.from_bundle(tiny_bundle)(PROMPT, **asked, **QUICK)


def test_a_refiner_alone(refiner: Pipeline) -> None:
    with pytest.raises(
        BadRequest, match="this model is a refiner, which finishes pictures, and there is none"
    ) as caught:
        refiner(PROMPT, **QUICK)
    assert caught.value.param == "image"


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as ended:
        app([str(word) for word in words], prog_name="ldmrt")
    return int(ended.value.code or 0)


def test_generate(
    tiny_bundle_xl: Path, tiny_bundle_refiner: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(1).save(tmp_path / "p.png")
    command = ["generate", "a circle", "--steps", 10, "--seed", 1, "--device", "cpu", "--out", tmp_path / "o.png"]
    base, refined = Pipeline.from_bundle(tiny_bundle_xl), Pipeline.from_bundle(tiny_bundle_refiner)
    asked: dict[str, Any] = {"prompt": "a circle", "num_inference_steps": 10}
    engines = ["--engines", tiny_bundle_xl]

    assert run(*command, *engines, "--image", tmp_path / "p.png", "--strength", 0.5, "--json") == 0
    assert json.loads(capsys.readouterr().out)["settings"]["strength"] == 0.5
    expected = base(**asked, image=picture(1), strength=0.5, seed=1).images[0]
    with Image.open(tmp_path / "o.png") as found:
        assert np.array_equal(np.asarray(found), np.asarray(expected))
        assert "Denoising strength: 0.5" in found.info["parameters"]

    assert run(*command, *engines, "--refiner", tiny_bundle_refiner, "--refiner-start", 0.7, "--json") == 0
    assert json.loads(capsys.readouterr().out)["settings"]["refiner_start"] == 0.7
    expected = Refining(refined, 0.7).draw(base, [1], {}, **asked).images[0]
    with Image.open(tmp_path / "o.png") as found:
        assert np.array_equal(np.asarray(found), np.asarray(expected))
        assert "Refiner: tiny-refiner, Refiner switch at: 0.7" in found.info["parameters"]

    lines = ['{"prompt": "a blue square", "seed": 9}', '{"prompt": "a circle", "seed": 1}']
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    bulk = ["generate", "--prompts", tmp_path / "prompts.jsonl", *engines, "--refiner", tiny_bundle_refiner]
    bulk += ["--refiner-start", 0.7, "--steps", 10, "--device", "cpu", "--out", tmp_path / "all"]
    assert run(*bulk) == 0
    assert run(*bulk) == 0
    assert "0 pictures made, 2 were there" in capsys.readouterr().out
    with Image.open(tmp_path / "all" / "000002-0.png") as found:
        # Two at a time: sums may be taken in another order.
        assert np.allclose(np.asarray(found, dtype=int), np.asarray(expected, dtype=int), atol=1)

    # Both models learn a word.
    word = tmp_path / "w.safetensors"
    save_file({"clip_l": 3 * torch.ones(1, 32), "clip_g": 3 * torch.ones(1, 40)}, word)
    refining = [*engines, "--refiner", tiny_bundle_refiner, "--embedding", f"{word}:circle"]
    assert run(*command, *refining) == 0
    capsys.readouterr()
    for pipe in (base, refined):
        pipe.load_textual_inversion(word, "circle")
    other = Refining(refined).draw(base, [1], {}, **asked).images[0]
    with Image.open(tmp_path / "o.png") as found:
        assert np.array_equal(np.asarray(found), np.asarray(other))

    for wrong, message in (
        (["--engines", tiny_bundle_refiner], "this model is a refiner"),
        ([*engines, "--refiner-start", 0.7], "--refiner-start says nothing without --refiner"),
        ([*engines, "--refiner", tiny_bundle_refiner, "--refiner-start", 0.01], "is no step at all"),
        ([*engines, "--refiner", tmp_path], "is not a bundle"),
        (
            [*engines, "--refiner", tiny_bundle_refiner, "--memory-budget", "1GB"],
            "--memory-budget is kept by one model",
        ),
    ):
        assert run(*command, *wrong) in (1, 2)
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error


def test_what_a_folder_says_of_aesthetic_scores(tiny_model_refiner: Path, tiny_model_xl: Path, tmp_path: Path) -> None:
    """The refiner's class is that of a base model's image-to-image pipeline too."""
    model = shutil.copytree(tiny_model_xl, tmp_path / "base")
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, "_class_name": "StableDiffusionXLImg2ImgPipeline"}))
    assert Source.open(model).kind == Source.open(tiny_model_xl).kind
    refiner = shutil.copytree(tiny_model_refiner, tmp_path / "refiner")
    assert Source.open(refiner).kind.name == "stable-diffusion-xl-refiner"
    index = json.loads((refiner / "model_index.json").read_text())
    (refiner / "model_index.json").write_text(json.dumps({**index, "requires_aesthetics_score": False}))
    with pytest.raises(
        BuildError, match=r"takes 64 numbers beside the text, and .* gives 24 \+ 6 x 8 = 72; requires_aesth"
    ):
        Source.open(refiner)
