"""Models that take the guidance scale as an input, and models used without guidance: the same pictures as diffusers'."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import ldmrt
from ldmrt.bundle import Bundle
from ldmrt.errors import BuildError
from ldmrt.export.source import Source
from ldmrt.guidance import embedding
from ldmrt.pipeline import Pipeline
from tests.conftest import write_model
from tests.test_inpainting import picture
from tests.test_parity import (
    LATENTS,
    NEGATIVE,
    PROMPT,
    Case,
    compare,
    generator,
    generators,
    reference_pipeline,
    relative,
)

QUICK: dict[str, Any] = {"num_inference_steps": 3, "seed": 3, "output_type": "latent"}


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a latent consistency model's."""
    folder = tmp_path_factory.mktemp("models") / "tiny-lcm"
    write_model(folder, version=1, seed=4, guidance_embedding=16)
    return folder


@pytest.fixture(scope="module")
def bundle(distilled: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("bundles") / "lcm"
    return ldmrt.build_engines(distilled, out, dtype="float32", batch_sizes=(1, 2))


@pytest.mark.parametrize("scale", [1.0, 3.5, 8.0])
@pytest.mark.parametrize("width", [16, 256, 9])
def test_the_embedding_is_diffusers(scale: float, width: int) -> None:
    from diffusers import StableDiffusionPipeline

    made: Any = StableDiffusionPipeline.get_guidance_scale_embedding(None, torch.tensor([scale - 1.0]), width)
    torch.testing.assert_close(embedding(scale, width), made[0], rtol=0, atol=1e-3)  # sines of thousands, in float32


CASES = {
    "strong": Case({"guidance_scale": 8.5}, lambda: {"seed": 3}, lambda: {"generator": generator(3)}),
    "weak, and several images": Case(
        {"guidance_scale": 2.0, "num_images_per_prompt": 3, "eta": 0.5},
        lambda: {"seed": 3},
        lambda: {"generator": generators(3, 4, 5)},
    ),
}


@pytest.fixture(scope="module")
def reference(distilled: Path) -> Any:
    return reference_pipeline(distilled)


@pytest.mark.covers("latent consistency models", "new pictures")
@pytest.mark.parametrize("name", CASES)
def test_the_same_pictures_as_diffusers(bundle: Bundle, reference: Any, name: str) -> None:
    compare(Pipeline.from_bundle(bundle.path), reference, CASES[name])


@pytest.mark.covers("latent consistency models", "image to image")
def test_a_picture_of_a_picture(bundle: Bundle, distilled: Path) -> None:
    from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline

    theirs: Any = StableDiffusionImg2ImgPipeline.from_pretrained(distilled)
    theirs.scheduler = DDIMScheduler.from_config(theirs.scheduler.config)
    theirs.set_progress_bar_config(disable=True)
    asked = {"image": picture(1), "strength": 0.5, "guidance_scale": 4.0, "num_inference_steps": 6}
    expected = theirs(PROMPT, **asked, generator=generator(3), output_type="latent").images
    assert relative(Pipeline.from_bundle(bundle.path)(PROMPT, **{**QUICK, **asked}).latents, expected) < LATENTS


def test_guidance_takes_no_second_row(bundle: Bundle) -> None:
    assert {record.rows for record in bundle.find("step")} == {1, 2}
    schedule = bundle.graph(bundle.find("schedule")[0])
    assert {spec.name for spec in schedule.inputs} == {"timesteps", "timestep_cond"}
    pipe = Pipeline.from_bundle(bundle.path)
    assert pipe.images_at_a_time(64, 64, guidance=False) == 2
    base = pipe(PROMPT, guidance_scale=8.5, **QUICK)
    assert not base.job.do_cfg
    assert torch.equal(pipe(PROMPT, negative_prompt=NEGATIVE, guidance_scale=8.5, **QUICK).latents, base.latents)
    assert relative(pipe(PROMPT, guidance_scale=4.0, **QUICK).latents, base.latents) > 100 * LATENTS


def test_the_pipeline_class_of_latent_consistency_models(distilled: Path, tmp_path: Path) -> None:
    path = shutil.copytree(distilled, tmp_path / "model")
    index = json.loads((path / "model_index.json").read_text())
    (path / "model_index.json").write_text(json.dumps({**index, "_class_name": "LatentConsistencyModelPipeline"}))
    source = Source.open(path)
    assert source.kind.guidance_scale == 8.5
    assert source.guidance_embedding == 16
    config = json.loads((path / "unet" / "config.json").read_text())
    (path / "unet" / "config.json").write_text(json.dumps({**config, "time_cond_proj_dim": "many"}))
    with pytest.raises(BuildError, match="time_cond_proj_dim is 'many', expected a whole number"):
        Source.open(path)


def test_one_to_four_steps_without_guidance(tiny_model: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    """As SD-Turbo is used: trailing timesteps, from its files; steps and guidance, from the defaults beside them."""
    path = shutil.copytree(tiny_model, tmp_path / "turbo")
    file = path / "scheduler" / "scheduler_config.json"
    config = {**json.loads(file.read_text()), "_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}
    file.write_text(json.dumps(config))
    (path / "ldmrt-defaults.json").write_text(
        json.dumps({"num_inference_steps": 1, "guidance_scale": 0, "sampler": "ddim"})
    )
    pipe = Pipeline.from_bundle(ldmrt.build_engines(path, tmp_path / "bundle", dtype="float32").path)
    job = pipe(PROMPT, seed=0, output_type="latent").job
    assert (job.num_inference_steps, job.guidance_scale, job.do_cfg) == (1, 0.0, False)
    reference = reference_pipeline(path)
    for steps in (1, 4):
        case = Case(
            {"num_inference_steps": steps, "guidance_scale": 0.0},
            lambda: {"seed": 3},
            lambda: {"generator": generator(3)},
        )
        compare(pipe, reference, case)
