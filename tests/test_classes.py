"""Class-conditional models in the diffusers layout: pictures of diffusers' own modules, and what a request must bring. Those of the original
code are in tests/export/test_original_config.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ldmrt
from ldmrt.bundle import Bundle
from ldmrt.cli import app
from ldmrt.errors import BadRequest
from ldmrt.pipeline import Pipeline
from tests.test_parity import LATENTS, PROMPT, PSNR, generator, psnr, relative


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, write_model_ldm: Callable[..., None]) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-classes"
    write_model_ldm(folder, seed=11, classes=5)
    return folder


@pytest.fixture(scope="module")
def bundle(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    built: Bundle = ldmrt.build_engines(model, tmp_path_factory.mktemp("classes") / "b", dtype="float32")
    return built


@pytest.fixture(scope="module")
def pipe(bundle: Bundle) -> Pipeline:
    return Pipeline.from_bundle(bundle.path, "cpu")


@pytest.mark.covers("latent diffusion of classes", "new pictures")
@torch.no_grad()
def test_the_same_pictures_as_the_modules_of_diffusers(pipe: Pipeline, model: Path) -> None:
    """It has no pipeline for them: its U-Net is told the class, the rest is that of `LDMPipeline`."""
    from diffusers import DDIMScheduler, UNet2DModel, VQModel

    unet: Any = UNet2DModel.from_pretrained(model / "unet")
    first: Any = VQModel.from_pretrained(model / "vqvae")
    scheduler: Any = DDIMScheduler.from_pretrained(model / "scheduler")
    scheduler.set_timesteps(4)
    found = pipe(class_labels=[3, 0], num_inference_steps=4, seed=1, output_type="np")
    latents = torch.cat([torch.randn(1, 3, 16, 16, generator=generator(seed)) for seed in (1, 2)])
    for t in scheduler.timesteps:
        latents = scheduler.step(unet(latents, t, class_labels=torch.tensor([3, 0])).sample, t, latents).prev_sample
    images = (first.decode(latents / first.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert relative(found.latents, latents) < LATENTS
    assert min(psnr(a, b) for a, b in zip(found.images, images.numpy(), strict=True)) > PSNR
    other = pipe(class_labels=[2, 4], num_inference_steps=4, seed=1, output_type="latent")
    assert relative(other.latents, found.latents) > 100 * LATENTS


def test_what_must_be_given(pipe: Pipeline, tiny_bundle: Path) -> None:
    wrong: Any = "3"
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({}, "class_labels", "class_labels is missing: tiny-classes draws one of 5 classes; give a number, 0 to 4"),
        ({"class_labels": 5}, "class_labels", "class_labels has 5, expected a whole number, 0 to 4"),
        ({"class_labels": -1}, "class_labels", "expected a whole number, 0 to 4"),
        ({"class_labels": True}, "class_labels", "class_labels has True"),
        ({"class_labels": wrong}, "class_labels", "class_labels has '3'"),
        ({"class_labels": [1.5]}, "class_labels", r"class_labels has 1\.5"),
        ({"class_labels": 2.5}, "class_labels", r"class_labels has 2\.5"),
        ({"class_labels": []}, "prompt", "prompt is an empty list"),
        ({"class_labels": [1, 2], "prompt": ["", "", ""]}, "class_labels", "there are 2 class_labels for 3 prompts"),
        ({"class_labels": 1, "guidance_scale": 2.0}, "guidance_scale", "has no class that stands for none; use 1"),
        ({"class_labels": 1, "prompt": "a cat"}, "prompt", "reads no text"),
    ]
    for given, param, message in cases:
        with pytest.raises(BadRequest, match=message) as caught:
            pipe(num_inference_steps=1, **given)
        assert caught.value.param == param
    with pytest.raises(BadRequest, match="class_labels was given, and tiny draws no classes"):
        Pipeline.from_bundle(tiny_bundle)(PROMPT, class_labels=1, num_inference_steps=1)


def test_generate(bundle: Bundle, pipe: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "o.png"
    options = ["--class", 4, "--steps", 2, "--seed", 1, "--num-images", 2, "--device", "cpu", "--out", out, "--json"]
    with pytest.raises(SystemExit) as ended:
        app([str(word) for word in ["generate", "", "--engines", bundle.path, *options]], prog_name="ldmrt")
    assert not ended.value.code
    document = json.loads(capsys.readouterr().out)
    assert document["settings"]["class_labels"] == 4
    assert len(document["images"]) == 2
    assert document["images"][0]["sha256"] != document["images"][1]["sha256"]
    assert pipe(class_labels=4, num_inference_steps=2, seed=1).job.num_images == 1
