"""Inpainting models: the same pictures as diffusers' pipelines, and what a request must bring."""

from __future__ import annotations

import json
import shutil
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
from tests.test_parity import LATENTS, NEGATIVE, PROMPT, Case, compare, generator, relative

QUICK: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 5.0, "seed": 3, "output_type": "latent"}


def picture(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """Smooth blobs of colour."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def half(size: tuple[int, int] = (64, 64), mode: str = "L") -> Image.Image:
    """White on the left, black on the right."""
    pixels = np.zeros((size[1], size[0]), dtype=np.uint8)
    pixels[:, : size[0] // 2] = 255
    return Image.fromarray(pixels).convert(mode)


def reference(model: Path, controlnet: Path | None = None) -> Any:
    from diffusers import (
        ControlNetModel,
        DDIMScheduler,
        StableDiffusionControlNetInpaintPipeline,
        StableDiffusionInpaintPipeline,
        StableDiffusionXLInpaintPipeline,
    )

    pipe: Any
    if (model / "text_encoder_2").is_dir():
        pipe = StableDiffusionXLInpaintPipeline.from_pretrained(model, add_watermarker=False)
    else:
        pipe = StableDiffusionInpaintPipeline.from_pretrained(model)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    if controlnet is not None:
        net = ControlNetModel.from_pretrained(controlnet)
        pipe = StableDiffusionControlNetInpaintPipeline(
            **pipe.components, controlnet=net, requires_safety_checker=False
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def theirs(tiny_model_inpainting: Path) -> Any:
    return reference(tiny_model_inpainting)


@pytest.fixture(scope="module")
def pipe(tiny_bundle_inpainting: Path) -> Pipeline:
    return Pipeline.from_bundle(tiny_bundle_inpainting)


@pytest.fixture(scope="module")
def bundle_xl(tiny_model_xl_inpainting: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundles") / "xl-inpainting"
    bundle: Bundle = ldmrt.build_engines(tiny_model_xl_inpainting, out, dtype="float32")
    return bundle.path


def case(**common: Any) -> Case:
    common = {"image": picture(1, (100, 80)), "mask_image": half((50, 90)), "guidance_scale": 5.0, **common}
    # Their own size is not the bundle's: they take it from the picture; and XL's own strength is a little less than 1.
    theirs = {"height": 64, "width": 64, "strength": 1.0}
    return Case(common, lambda: {"seed": 3}, lambda: {"generator": generator(3), **theirs})


CASES = {
    "guidance": case(),
    "no guidance": case(guidance_scale=1.0),
    "noise, and a negative prompt": case(eta=0.7, negative_prompt=NEGATIVE),
    "a mask in colour": case(mask_image=half(mode="RGB"), image=picture(2)),
}


@pytest.mark.covers("Stable Diffusion 1.x", "inpainting")
@pytest.mark.parametrize("name", CASES)
def test_the_same_pictures_as_diffusers(pipe: Pipeline, theirs: Any, name: str) -> None:
    compare(pipe, theirs, CASES[name])


@pytest.mark.covers("Stable Diffusion XL", "inpainting")
@pytest.mark.parametrize("name", CASES)
def test_the_same_pictures_as_diffusers_xl(bundle_xl: Path, theirs_xl: Any, name: str) -> None:
    compare(Pipeline.from_bundle(bundle_xl), theirs_xl, CASES[name])


@pytest.fixture(scope="module")
def theirs_xl(tiny_model_xl_inpainting: Path) -> Any:
    return reference(tiny_model_xl_inpainting)


@pytest.mark.slow
@pytest.mark.covers("Stable Diffusion 2.x", "inpainting")
def test_the_same_pictures_as_diffusers_v(tmp_path: Path) -> None:
    write_model(tmp_path / "v", version=2, seed=6, inpainting=True)
    bundle = ldmrt.build_engines(tmp_path / "v", tmp_path / "b", dtype="float32")
    compare(Pipeline.from_bundle(bundle.path), reference(tmp_path / "v"), CASES["noise, and a negative prompt"])


def test_with_a_controlnet(pipe: Pipeline, tiny_model_inpainting: Path, tiny_controlnets: list[Path]) -> None:
    both = {"image": picture(1), "mask_image": half(), "guidance_scale": 5.0}
    one = Case(
        both,
        lambda: {"seed": 3, "control_image": picture(4), "controlnet_scale": 0.8},
        lambda: {
            "generator": generator(3), "control_image": picture(4), "controlnet_conditioning_scale": 0.8, "strength": 1.0,
        },
    )  # fmt: skip
    compare(pipe, reference(tiny_model_inpainting, tiny_controlnets[0]), one)


def test_images_of_a_batch_are_what_they_are_alone(pipe: Pipeline) -> None:
    masked: dict[str, Any] = {"image": picture(1), "mask_image": half()}
    together = pipe(PROMPT, num_images_per_prompt=3, **masked, **QUICK)
    for seed, latents in zip(together.seeds, together.latents, strict=True):
        alone = pipe(PROMPT, **masked, **{**QUICK, "seed": seed}).latents[0]
        assert float((alone - latents).norm() / latents.norm()) < LATENTS


def test_picture_and_mask_matter(pipe: Pipeline) -> None:
    base = pipe(PROMPT, image=picture(1), mask_image=half(), **QUICK).latents
    changes: list[dict[str, Any]] = [{"image": picture(2)}, {"mask_image": Image.new("L", (64, 64), 255)}]
    for change in changes:
        other = pipe(PROMPT, **{"image": picture(1), "mask_image": half(), **QUICK, **change}).latents
        assert relative(other, base) > 100 * LATENTS
    # What the mask covers is not seen.
    left, covered = np.asarray(half()) > 0, np.asarray(picture(1)).copy()
    covered[left] = 7
    assert torch.equal(pipe(PROMPT, image=covered, mask_image=half(), **QUICK).latents, base)


def test_what_must_be_given(pipe: Pipeline) -> None:
    wrong: Any = np.zeros((64, 64, 3))
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "image"),
        ({"image": picture(1)}, "mask_image"),
        ({"mask_image": half()}, "image"),
    ]
    for given, missing in cases:
        with pytest.raises(BadRequest, match=f"{missing} is missing: tiny-inpainting is an inpainting model") as caught:
            pipe(PROMPT, **given, **QUICK)
        assert caught.value.param == missing
    with pytest.raises(BadRequest, match="expected a PIL image or an array of uint8"):
        pipe(PROMPT, image=wrong, mask_image=half(), **QUICK)


def test_generate(tiny_bundle_inpainting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(1).save(tmp_path / "p.png")
    half().save(tmp_path / "m.png")
    command = [
        "generate",
        "a circle",
        "--engines",
        tiny_bundle_inpainting,
        "--steps",
        2,
        "--seed",
        1,
        "--device",
        "cpu",
    ]
    options = ["--image", tmp_path / "p.png", "--mask", tmp_path / "m.png", "--out", tmp_path / "o.png"]
    with pytest.raises(SystemExit) as ended:
        app([str(word) for word in [*command, *options, "--json"]], prog_name="ldmrt")
    assert not ended.value.code
    assert json.loads(capsys.readouterr().out)["images"][0]["path"] == str(tmp_path / "o.png")
    made = Pipeline.from_bundle(tiny_bundle_inpainting)
    expected = made("a circle", image=picture(1), mask_image=half(), num_inference_steps=2, seed=1).images[0]
    with Image.open(tmp_path / "o.png") as found:
        assert np.array_equal(np.asarray(found), np.asarray(expected))


def test_a_unet_of_other_channels_than_its_kind(tiny_model: Path, tiny_model_inpainting: Path, tmp_path: Path) -> None:
    for number, (model, folder) in enumerate(
        ((tiny_model, tiny_model_inpainting), (tiny_model_inpainting, tiny_model))
    ):
        path = shutil.copytree(model, tmp_path / str(number))
        shutil.copy(folder / "model_index.json", path)
        with pytest.raises(BuildError, match=r"its U-Net takes [49] channels, expected [49] of Stable Diffusion"):
            Source.open(path)
