"""Models that read no text: a U-Net, a first stage with a codebook or without, and diffusers' pipeline as the oracle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ldmrt
from ldmrt.bundle import Bundle
from ldmrt.errors import BadRequest, BuildError
from ldmrt.export.architectures import decoder, reference
from ldmrt.export.build import _Build
from ldmrt.export.folder import BundleFolder
from ldmrt.export.options import Options
from ldmrt.export.source import Checkpoint, Source


@pytest.fixture(scope="module")
def bundle(tiny_model_ldm: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    built: Bundle = ldmrt.build_engines(
        tiny_model_ldm, tmp_path_factory.mktemp("ldm") / "b", dtype="float32", batch_sizes=(2,)
    )
    return built


def theirs(model: Path, seeds: tuple[int, ...], steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and pictures of diffusers' own pipeline."""
    from diffusers import LDMPipeline

    pipe: Any = LDMPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    latents, pictures = [], []
    decode = pipe.vqvae.decode

    def spy(sample: torch.Tensor, **options: Any) -> Any:
        latents.append(sample * pipe.vqvae.config.scaling_factor)
        return decode(sample, **options)

    pipe.vqvae.decode = spy
    for seed in seeds:
        made = pipe(num_inference_steps=steps, generator=torch.Generator().manual_seed(seed), output_type="np")
        pictures.append(torch.from_numpy(made.images))
    return torch.cat(latents), torch.cat(pictures)


def close(found: Any, model: Path, steps: int) -> None:
    """float32 on both sides, sums in another order: latents within 1e-5, pictures within 60 dB."""
    latents, pictures = theirs(model, found.seeds, steps)
    assert (found.latents - latents).norm() / latents.norm() < 1e-5
    assert -10 * (torch.from_numpy(found.images) - pictures).square().mean().log10() > 60


def test_it_is_verified_in_bfloat16(tiny_model_ldm: Path, tmp_path: Path) -> None:
    """Its network casts the times to the precision that it sees its weights in: the original must see float32."""
    built = ldmrt.build_engines(tiny_model_ldm, tmp_path / "b", dtype="bfloat16")
    (step,) = built.find("step")
    assert step.dtype == "bfloat16"
    assert step.certificate.status == "verified"


@pytest.mark.covers("latent diffusion without text", "new pictures")
def test_pictures_are_those_of_diffusers(bundle: Bundle, tiny_model_ldm: Path) -> None:
    pipe = ldmrt.Pipeline.from_bundle(bundle.path, "cpu")
    close(pipe(seed=3, num_inference_steps=4, num_images_per_prompt=2, output_type="np"), tiny_model_ldm, 4)
    model = bundle.manifest.model
    assert (model.kind, model.tokenizers, model.defaults.guidance_scale) == ("latent-diffusion", {}, 1.0)
    # There is no guidance: an image takes one row.
    assert {record.rows for record in bundle.manifest.engines if record.component == "step"} == {2}


@pytest.mark.slow
def test_a_first_stage_without_a_codebook(tmp_path: Path, write_model_ldm: Callable[..., None]) -> None:
    model = tmp_path / "kl"
    write_model_ldm(model, seed=5, codebook=False)
    built = ldmrt.build_engines(model, tmp_path / "b", dtype="float32", engine="onnxruntime")
    pipe = ldmrt.Pipeline.from_bundle(built.path, "cpu")
    close(pipe(seed=1, num_inference_steps=3, output_type="np"), model, 3)


def test_latents_become_the_nearest_code(tiny_model_ldm: Path) -> None:
    """As diffusers finds it, by distance."""
    from diffusers import VQModel

    source = Source.open(tiny_model_ldm)
    component = decoder(source, (64, 64))
    ours = reference(component, Checkpoint(source, "vae", component.original))
    original: Any = VQModel.from_pretrained(tiny_model_ldm, subfolder="vqvae")
    latents = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = original.decode(latents / 0.7).sample
        torch.testing.assert_close(ours(latents)[0], expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(original.decode(latents / 0.7, force_not_quantize=True).sample, expected, atol=1e-2)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_a_codebook_reads_is_not_rounded(dtype: str, tiny_model_ldm: Path, tmp_path: Path) -> None:
    source = Source.open(tiny_model_ldm)
    options = Options.resolve(source, engine="torch", sizes=None, batch_sizes=(1,), dtype=dtype)
    build = _Build(source, BundleFolder(tmp_path), options, lambda _what, _done, _total: None)
    assert (build.precision("unet"), build.precision("vae")) == (dtype, "float32")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"prompt": "a face"}, "reads no text, and draws what it was trained on; leave the prompt empty"),
        ({"negative_prompt": "a cat"}, "leave the prompt empty"),
        ({"prompt_embeds": torch.ones(1, 4, 8)}, "leave the prompt empty"),
        ({"guidance_scale": 3.0}, "guidance_scale is 3, and this model reads no text that it could follow; use 1"),
    ],
)
def test_what_only_a_model_with_text_takes(asked: dict[str, Any], message: str, bundle: Bundle) -> None:
    with pytest.raises(BadRequest, match=message):
        ldmrt.Pipeline.from_bundle(bundle.path, "cpu")(num_inference_steps=1, **asked)


def test_another_first_stage_is_refused(tiny_model_ldm: Path, tmp_path: Path) -> None:
    index = (tiny_model_ldm / "model_index.json").read_text()
    (tmp_path / "model_index.json").write_text(index.replace("VQModel", "AsymmetricAutoencoderKL"))
    with pytest.raises(BuildError, match="its vae is a AsymmetricAutoencoderKL, expected VQModel"):
        Source.open(tmp_path)
