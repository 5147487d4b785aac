"""ControlNets: the same pictures as diffusers' pipelines, and what a request may say of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ldmrt
from ldmrt.bundle import Bundle
from ldmrt.cli import app
from ldmrt.control import resolve
from ldmrt.denoise import Denoiser
from ldmrt.edges import canny
from ldmrt.errors import BadRequest, EngineMismatch
from ldmrt.network import Parts
from ldmrt.pipeline import Pipeline
from ldmrt.samplers.ddim import ddim
from ldmrt.schedule import NoiseSchedule
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

CPU = torch.device("cpu")
QUICK: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 5.0, "seed": 3, "output_type": "latent"}


def picture(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """Smooth blobs of colour."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def reference(model: Path, controlnets: list[Path]) -> Any:
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionXLControlNetPipeline

    base = reference_pipeline(model)
    nets = [ControlNetModel.from_pretrained(path) for path in controlnets]
    controlnet: Any = nets if len(nets) > 1 else nets[0]
    if (model / "text_encoder_2").is_dir():
        options = {"add_watermarker": False, "force_zeros_for_empty_prompt": True}
        pipe: Any = StableDiffusionXLControlNetPipeline(**base.components, controlnet=controlnet, **options)
    else:
        pipe = StableDiffusionControlNetPipeline(
            **base.components, controlnet=controlnet, requires_safety_checker=False
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def theirs(tiny_model: Path, tiny_controlnets: list[Path]) -> Any:
    return reference(tiny_model, tiny_controlnets)


@pytest.fixture(scope="module")
def pipe(tiny_bundle_controlled: Path) -> Pipeline:
    return Pipeline.from_bundle(tiny_bundle_controlled)


def case(scale: Any, start: Any = 0.0, end: Any = 1.0, **common: Any) -> Case:
    """Both ControlNets, on pictures of another size than the one that is drawn."""
    pictures, seeds = [picture(1, (80, 48)), picture(2)], common.pop("seeds", (3,))
    return Case(
        {"guidance_scale": 5.0, **common},
        lambda: {
            "seed": seeds[0], "control_image": pictures, "controlnet_scale": scale, "control_start": start, "control_end": end,
        },
        lambda: {
            "generator": generators(*seeds), "image": pictures, "controlnet_conditioning_scale": scale,
            "control_guidance_start": start, "control_guidance_end": end, "height": 64, "width": 64,
        },
    )  # fmt: skip


CASES = {
    "two": case([1.0, 0.6]),
    "one scale for both": case(0.5, negative_prompt=NEGATIVE),
    "without guidance": case([1.0, 0.6], guidance_scale=1.0),
    "for a part of the steps": case([1.0, 0.8], [0.0, 0.3], [0.5, 0.9]),
    "several images": case([1.0, 0.6], num_images_per_prompt=3, seeds=(5, 6, 7)),
}


@pytest.mark.covers("Stable Diffusion 1.x", "ControlNet")
@pytest.mark.parametrize("name", CASES)
def test_the_same_pictures_as_diffusers(pipe: Pipeline, theirs: Any, name: str) -> None:
    compare(pipe, theirs, CASES[name])


@pytest.mark.covers("Stable Diffusion XL", "ControlNet")
@pytest.mark.slow
def test_the_same_pictures_as_diffusers_xl(tiny_model_xl: Path, tiny_controlnet_xl: Path, tmp_path: Path) -> None:
    bundle = ldmrt.build_engines(tiny_model_xl, tmp_path / "xl", dtype="float32", controlnets=[tiny_controlnet_xl])
    one = Case(
        {"guidance_scale": 5.0, "num_inference_steps": 4},
        lambda: {"seed": 3, "control_image": picture(1), "controlnet_scale": 0.7},
        lambda: {"generator": generator(3), "image": picture(1), "controlnet_conditioning_scale": 0.7},
    )
    compare(Pipeline.from_bundle(bundle.path), reference(tiny_model_xl, [tiny_controlnet_xl]), one)


def test_one_of_two(tiny_model: Path, tiny_controlnets: list[Path], pipe: Pipeline) -> None:
    alone = Case(
        {"guidance_scale": 5.0},
        lambda: {"seed": 3, "control_image": [None, picture(2)], "controlnet_scale": [9.0, 0.6]},
        lambda: {"generator": generator(3), "image": picture(2), "controlnet_conditioning_scale": 0.6},
    )
    compare(pipe, reference(tiny_model, tiny_controlnets[1:]), alone)


@pytest.mark.slow
def test_onnxruntime(tiny_model: Path, tiny_controlnets: list[Path], pipe: Pipeline, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    path = tmp_path / "onnx"
    ldmrt.build_engines(tiny_model, path, engine="onnxruntime", controlnets=tiny_controlnets)
    arguments = {**QUICK, "control_image": [picture(1), picture(2)]}
    ours, other = (p(PROMPT, **arguments).latents for p in (pipe, Pipeline.from_bundle(path)))
    assert 0 < relative(ours, other) < LATENTS  # sums in another order


def test_what_a_control_says_is_heard(pipe: Pipeline) -> None:
    """Were it ignored by both pipelines, comparing them would find nothing."""
    both = [picture(1), picture(2)]
    base = pipe(PROMPT, control_image=both, **QUICK).latents
    changes: list[dict[str, Any]] = [
        {"control_image": None},
        {"control_image": [picture(3), both[1]]},
        {"control_image": [both[0], None]},
        {"controlnet_scale": [1.0, 0.9]},
        {"control_start": 0.5},
        {"control_end": [1.0, 0.5]},
    ]
    for change in changes:
        assert relative(pipe(PROMPT, **{"control_image": both, **QUICK, **change}).latents, base) > 100 * LATENTS, (
            change
        )


def test_a_bundle_with_controlnets_makes_plain_pictures_too(pipe: Pipeline, tiny_bundle: Path) -> None:
    plain = Pipeline.from_bundle(tiny_bundle)(PROMPT, **QUICK).latents
    assert torch.equal(pipe(PROMPT, **QUICK).latents, plain)
    # A scale of nothing adds zeros.
    none = pipe(PROMPT, control_image=[picture(1), picture(2)], controlnet_scale=0.0, **QUICK).latents
    assert relative(none, plain) < LATENTS
    assert torch.equal(pipe(PROMPT, **QUICK).latents, plain)


def test_weights_of_a_controlnet_change_in_place(pipe: Pipeline) -> None:
    arguments = {**QUICK, "control_image": [picture(1), None]}
    before = pipe(PROMPT, **arguments).latents
    shapes = pipe.bundle.shapes("controlnet.edges.float32")
    name = "controlnet_cond_embedding.conv_in.weight"
    pipe.update_weights("controlnet.edges", {name: torch.zeros(shapes[name])})
    assert relative(pipe(PROMPT, **arguments).latents, before) > 100 * LATENTS
    pipe.restore_weights("controlnet.edges")
    assert torch.equal(pipe(PROMPT, **arguments).latents, before)


def test_images_of_other_settings_share_a_batch(tiny_bundle_controlled: Path) -> None:
    """Each slot has its own picture, scale and steps, and is as it would be alone."""
    bundle = Bundle.open(tiny_bundle_controlled)
    schedule = NoiseSchedule.from_dict(bundle.manifest.model.schedule)

    def network(prefix: str, step: str) -> Parts:
        names = (f"{prefix}context", f"{prefix}schedule", f"{prefix}{step}")
        return Parts(*(bundle.load(next(r for r in bundle.find(n) if r.rows in (None, 2)), CPU) for n in names))

    def loop() -> Denoiser:
        unet, edges = network("", "controlled.step"), network("controlnet.edges.", "step")
        options: dict[str, Any] = {"rows": 2, "tokens": 77, "evaluations": 8, "device": CPU}
        return Denoiser(*unet, controlnets=[edges], **options)

    def admit(denoiser: Denoiser, slot: int, seed: int) -> int:
        steps = 3 + seed
        (control,) = resolve(["edges"], (64, 64), pictures=picture(seed), scale=0.3 * seed, end=0.7)
        denoiser.admit(
            slot,
            latents=torch.randn(4, 8, 8, generator=generator(seed)),
            table=ddim(schedule, steps),
            guidance_scale=1.0,
            cond={"encoder_hidden_states": torch.randn(77, 32, generator=generator(10 + seed))},
            uncond=None,
            controls=[control.conditioning(steps, CPU)],
        )
        return steps

    alone = []
    for seed in (1, 2):
        denoiser = loop()
        denoiser.steps(admit(denoiser, 0, seed))
        alone.append(denoiser.latents(0).clone())
    together = loop()
    admit(together, 1, 2)
    together.step()
    admit(together, 0, 1)
    together.steps(4)
    assert torch.equal(together.latents(0), alone[0])
    assert torch.equal(together.latents(1), alone[1])
    with pytest.raises(EngineMismatch, match="0 controls were given for 1 ControlNets"):
        together.admit(0, latents=alone[0], table=ddim(schedule, 2), guidance_scale=1.0, cond={}, uncond=None)


# ---------------------------------------------------------------------------------------------------- what is asked


def test_scales_of_evaluations() -> None:
    """As diffusers' `controlnet_keep`: a step counts if all of it lies inside."""
    (control,) = resolve(["a"], (8, 8), pictures=picture(0), scale=0.5, start=0.25, end=0.8)
    assert control.scales(4).tolist() == [0.0, 0.5, 0.5, 0.0]
    assert control.scales(1).tolist() == [0.0]
    assert control.picture.shape == (3, 8, 8)


def test_a_picture_of_bytes_is_the_same() -> None:
    (one,), (other,) = (resolve(["a"], (40, 24), pictures=p) for p in (picture(1), np.asarray(picture(1))))
    assert torch.equal(one.picture, other.picture)
    assert 0 <= one.picture.min() < one.picture.max() <= 1


@pytest.mark.parametrize(
    ("arguments", "param", "message"),
    [
        ({"pictures": [picture(0)]}, "control_image", "1 control images, expected 2, one for each .*: a, b"),
        ({"pictures": ["x.png", None]}, "control_image", "is str, expected a PIL image"),
        ({"scale": [1.0]}, "controlnet_scale", "1 values of controlnet_scale for 2"),
        ({"scale": float("nan")}, "controlnet_scale", "expected a number"),
        ({"start": 0.5, "end": 0.5}, "control_start", "from 0.5 to 0.5 of the steps"),
        ({"end": [1.0, 1.5]}, "control_start", "from 0 to 1.5"),
    ],
)
def test_values_that_cannot_be_used(arguments: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(BadRequest, match=message) as caught:
        resolve(["a", "b"], (64, 64), **{"pictures": [picture(0), picture(1)], **arguments})
    assert caught.value.param == param


def test_generate_with_a_map_of_edges(
    tiny_bundle_controlled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a photo that first gets the size of the picture; the other ControlNet's is followed as it is."""
    photo, depth = picture(1).resize((150, 90)).quantize(8), picture(2)
    photo.save(tmp_path / "photo.png")
    depth.save(tmp_path / "depth.png")
    command = [
        "generate",
        "a circle",
        "--engines",
        tiny_bundle_controlled,
        "--steps",
        2,
        "--seed",
        1,
        "--device",
        "cpu",
    ]
    command += ["--control-image", tmp_path / "photo.png", "--out", tmp_path / "o.png"]
    both = [*command, "--control-image", tmp_path / "depth.png", "--control", "edges", "--control", "map"]

    def run(*words: object) -> str:
        with pytest.raises(SystemExit):
            app([str(word) for word in words], prog_name="ldmrt")
        return capsys.readouterr().err

    run(*both)
    edges = canny(photo.convert("RGB").resize((64, 64), Image.Resampling.LANCZOS))
    expected = Pipeline.from_bundle(tiny_bundle_controlled)(
        "a circle", control_image=[edges, depth], num_inference_steps=2, seed=1
    )
    with Image.open(tmp_path / "o.png") as found:
        assert np.array_equal(np.asarray(found), np.asarray(expected.images[0]))
    assert "--control is given 2 times for 1 pictures" in run(*command, "--control", "edges", "--control", "map")
    assert "--control is given 1 times for 0 pictures" in run(*command[:10], "--control", "edges")


def test_a_bundle_without_controlnets(tiny_bundle: Path) -> None:
    with pytest.raises(
        BadRequest, match="has no ControlNet; to add one: ldmrt build-engines MODEL --out DIR --controlnet PATH"
    ):
        Pipeline.from_bundle(tiny_bundle)(PROMPT, control_image=picture(1))
