"""Models that draw a small picture larger: the same pictures as diffusers' pipelines, and what a request must bring."""

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

import ldmrt
from ldmrt.bundle import Bundle
from ldmrt.cli import app
from ldmrt.errors import BadRequest, BuildError
from ldmrt.export.source import Source
from ldmrt.pipeline import Pipeline
from tests.conftest import write_model
from tests.test_inpainting import picture
from tests.test_parity import LATENTS, NEGATIVE, PROMPT, PSNR, generator, psnr, relative


@pytest.fixture(scope="module")
def model_x4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like that of Stable Diffusion's x4 upscaler: 16 x 16 pixels become 64 x 64."""
    folder = tmp_path_factory.mktemp("models") / "tiny-x4"
    write_model(folder, version=2, seed=6, upscaling=True)
    return folder


@pytest.fixture(scope="module")
def bundle_x4(model_x4: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("x4") / "b"
    built: Bundle = ldmrt.build_engines(model_x4, out, dtype="float32", batch_sizes=(1, 2))
    return built


@pytest.fixture(scope="module")
def pipe(bundle_x4: Bundle) -> Pipeline:
    return Pipeline.from_bundle(bundle_x4.path, "cpu")


@pytest.fixture(scope="module")
def theirs(model_x4: Path) -> Any:
    from diffusers import DDIMScheduler, StableDiffusionUpscalePipeline

    pipe: Any = StableDiffusionUpscalePipeline.from_pretrained(model_x4)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


CASES: dict[str, dict[str, Any]] = {
    "guidance": {"guidance_scale": 5.0},
    "no guidance": {"guidance_scale": 1.0},
    "much noise, and a negative prompt": {"guidance_scale": 5.0, "noise_level": 350, "negative_prompt": NEGATIVE},
    "no noise": {"guidance_scale": 5.0, "noise_level": 0},
    "noise in every step": {"guidance_scale": 5.0, "eta": 0.7},
    "several images": {"guidance_scale": 5.0, "num_images_per_prompt": 2},
}


@pytest.mark.covers("Stable Diffusion x4 upscaler", "enlarging")
@pytest.mark.parametrize("name", CASES)
def test_the_same_pictures_as_diffusers(name: str, pipe: Pipeline, theirs: Any) -> None:
    """One generator for the noise on the picture, the latents, and the steps, in the order in which diffusers draws."""
    asked = {"prompt": PROMPT, "num_inference_steps": 4, **CASES[name]}
    steps: list[torch.Tensor] = []
    expected = theirs(
        **asked,
        image=picture(1, (16, 16)),
        generator=generator(3),
        output_type="np",
        callback=lambda _step, _timestep, latents: steps.append(latents.clone()),
    ).images
    found = pipe(**asked, image=picture(1, (16, 16)), generator=generator(3), output_type="np")
    assert relative(found.latents, steps[-1]) < LATENTS
    assert min(psnr(a, b) for a, b in zip(found.images, expected, strict=True)) > PSNR
    assert found.images.shape == (len(steps[-1]), 64, 64, 3)


def test_an_image_of_a_batch_is_what_it_is_alone(pipe: Pipeline) -> None:
    asked: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 5.0, "image": picture(1, (16, 16))}
    together = pipe(PROMPT, seed=7, num_images_per_prompt=2, **asked).latents
    alone = torch.cat([pipe(PROMPT, seed=seed, **asked).latents for seed in (7, 8)])
    assert relative(together, alone) < LATENTS
    for change in ({"image": picture(2, (16, 16))}, {"noise_level": 200}):
        assert relative(pipe(PROMPT, seed=7, **{**asked, **change}).latents, alone[:1]) > 100 * LATENTS


def test_the_manifest_says_what_is_taken(bundle_x4: Bundle) -> None:
    model = bundle_x4.manifest.model
    assert model.upscaling is not None
    assert model.upscaling.schedule is not None
    assert (model.upscaling.noise_level, model.upscaling.max_noise_level, model.classes) == (20, 350, None)
    assert (model.kind, model.downscale, model.defaults.guidance_scale) == ("stable-diffusion", 4, 9.0)
    assert "low_res_scheduler/scheduler_config.json" in {record.file for record in bundle_x4.manifest.source}


@pytest.fixture(scope="module")
def super_resolution(tmp_path_factory: pytest.TempPathFactory, write_model_ldm: Callable[..., None]) -> Path:
    """A folder like that of latent diffusion for super-resolution."""
    folder = tmp_path_factory.mktemp("models") / "tiny-sr"
    write_model_ldm(folder, seed=8, upscaling=True)
    return folder


@pytest.mark.covers("latent diffusion for super-resolution", "enlarging")
@pytest.mark.parametrize("engine", ["torch", pytest.param("onnxruntime", marks=pytest.mark.slow)])
def test_super_resolution(engine: str, super_resolution: Path, tmp_path: Path) -> None:
    """Without text, and without the scaling factor, which the pipeline of diffusers ignores. Theirs takes multiples of 32 pixels."""
    from diffusers import LDMSuperResolutionPipeline

    theirs: Any = LDMSuperResolutionPipeline.from_pretrained(super_resolution)
    theirs.set_progress_bar_config(disable=True)
    decode, latents = theirs.vqvae.decode, []

    def spy(sample: torch.Tensor) -> Any:
        latents.append(sample)
        return decode(sample)

    theirs.vqvae.decode = spy
    small = picture(3, (32, 32))
    expected = theirs(small, num_inference_steps=3, generator=generator(5), output_type="np").images
    built = ldmrt.build_engines(super_resolution, tmp_path / "b", sizes=[(128, 128)], dtype="float32", engine=engine)
    found = Pipeline.from_bundle(built.path, "cpu")(image=small, num_inference_steps=3, seed=5, output_type="np")
    assert relative(found.latents, latents[0]) < LATENTS
    assert psnr(found.images, expected) > PSNR
    assert built.manifest.model.scaling_factor == 1.0


def test_what_must_be_given(pipe: Pipeline, tiny_bundle: Path) -> None:
    small = picture(1, (16, 16))
    quick: dict[str, Any] = {"num_inference_steps": 1}
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({}, "image", "image is missing: tiny-x4 draws a small picture larger; give one of 16x16 pixels"),
        ({"image": small, "mask_image": small}, "mask_image", "draws a small picture larger, all of it"),
        ({"image": small, "noise_level": 351}, "noise_level", "noise_level is 351, expected a whole number, 0 to 350"),
        ({"image": small, "noise_level": 1.5}, "noise_level", "expected a whole number"),
        ({"image": small, "class_labels": 1}, "class_labels", "tiny-x4 draws no classes"),
    ]
    for given, param, message in cases:
        with pytest.raises(BadRequest, match=message) as caught:
            pipe(PROMPT, **given, **quick)
        assert caught.value.param == param
    with pytest.raises(BadRequest, match="noise_level was given, and tiny gives its picture no noise"):
        Pipeline.from_bundle(tiny_bundle)(PROMPT, noise_level=3, **quick)


def test_generate(bundle_x4: Bundle, pipe: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(1, (16, 16)).save(tmp_path / "small.png")
    options = ["--image", tmp_path / "small.png", "--noise-level", 40, "--steps", 2, "--seed", 1, "--device", "cpu"]
    command = ["generate", "a circle", "--engines", bundle_x4.path, *options, "--out", tmp_path / "o.png", "--json"]
    with pytest.raises(SystemExit) as ended:
        app([str(word) for word in command], prog_name="ldmrt")
    assert not ended.value.code
    assert json.loads(capsys.readouterr().out)["settings"]["noise_level"] == 40
    image = picture(1, (16, 16))
    expected = pipe("a circle", image=image, noise_level=40, num_inference_steps=2, seed=1).images[0]
    with Image.open(tmp_path / "o.png") as found:
        assert np.array_equal(np.asarray(found), np.asarray(expected))
        assert "Noise level: 40" in found.info["parameters"]


@pytest.mark.parametrize("level", [400, -1, "20", True])
def test_more_noise_than_the_model_knows(level: Any, model_x4: Path, tmp_path: Path) -> None:
    path = shutil.copytree(model_x4, tmp_path / "m")
    index = json.loads((path / "model_index.json").read_text())
    (path / "model_index.json").write_text(json.dumps({**index, "max_noise_level": level}))
    with pytest.raises(BuildError, match=r"max_noise_level is .*, expected 0 to 399"):
        Source.open(path)
