"""The same pictures as diffusers' pipelines with DDIM, in float32, after every step, on both CPU engines."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import ldmrt
from ldmrt.pipeline import Pipeline, Result

PROMPT = "a red circle left of the blue square, on white background"
NEGATIVE = "a small green photo"

# Both compute the same sums in float32; the merged update and ONNX Runtime take them in another order. One model evaluation is
# off by some 1e-7, six steps with guidance 7.5 make 1e-6 of it (found on both engines), and other CPUs sum in other orders again.
LATENTS = 1e-5
PSNR = 90.0  # dB; eight bits a colour show 48 at best, and what is found is above 120
# 8 bits of precision a value, amplified by guidance in the same way: 0.018 and 49 dB are found.
LATENTS_BFLOAT16 = 0.05
PSNR_BFLOAT16 = 40.0


@dataclass
class Case:
    """What to ask of both. `ours` and `theirs` hold what has another name, or is made anew for each."""

    common: dict[str, Any] = field(default_factory=dict)
    ours: Callable[[], dict[str, Any]] = dict
    theirs: Callable[[], dict[str, Any]] = dict


def generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def generators(*seeds: int) -> list[torch.Generator]:
    return [generator(seed) for seed in seeds]


def noise(count: int) -> torch.Tensor:
    return torch.randn(count, 4, 8, 8, generator=generator(99))


CASES: dict[str, Case] = {
    "guidance": Case({"guidance_scale": 7.5}, lambda: {"seed": 3}, lambda: {"generator": generator(3)}),
    "no guidance": Case({"guidance_scale": 1.0}, lambda: {"seed": 3}, lambda: {"generator": generator(3)}),
    "eta and a negative prompt": Case(
        {"guidance_scale": 5.0, "eta": 0.7, "negative_prompt": NEGATIVE},
        lambda: {"seed": 4},
        lambda: {"generator": generator(4)},
    ),
    "a seed for each of several images": Case(
        {"guidance_scale": 5.0, "eta": 0.7, "num_images_per_prompt": 3},
        lambda: {"seed": 10},
        lambda: {"generator": generators(10, 11, 12)},
    ),
    "one generator for several images": Case(
        {"guidance_scale": 5.0, "eta": 0.7, "num_images_per_prompt": 3},
        lambda: {"generator": generator(5)},
        lambda: {"generator": generator(5)},
    ),
    "a list of generators, without guidance": Case(
        {"guidance_scale": 1.0, "num_images_per_prompt": 2},
        lambda: {"generator": generators(8, 6)},
        lambda: {"generator": generators(8, 6)},
    ),
    "two prompts": Case(
        {"prompt": [PROMPT, "the big green square"], "negative_prompt": ["", NEGATIVE], "num_images_per_prompt": 2},
        lambda: {"seed": 0},
        lambda: {"generator": generators(0, 1, 2, 3)},
    ),
    "latents given": Case(
        {"guidance_scale": 5.0, "num_images_per_prompt": 2},
        lambda: {"latents": noise(2)},
        lambda: {"latents": noise(2)},
    ),
    "latents given, and noise from a generator": Case(
        {"guidance_scale": 5.0, "eta": 1.0},
        lambda: {"latents": noise(1), "generator": generator(2)},
        lambda: {"latents": noise(1), "generator": generator(2)},
    ),
    "one step": Case(
        {"guidance_scale": 5.0, "num_inference_steps": 1}, lambda: {"seed": 3}, lambda: {"generator": generator(3)}
    ),
    "no prompt": Case({"prompt": "", "guidance_scale": 5.0}, lambda: {"seed": 3}, lambda: {"generator": generator(3)}),
}


def reference_pipeline(model: Path, **options: Any) -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    xl = (model / "text_encoder_2").is_dir()
    options |= {"add_watermarker": False} if xl else {}
    pipe = (StableDiffusionXLPipeline if xl else StableDiffusionPipeline).from_pretrained(model, **options)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> Any:
    return reference_pipeline(tiny_model)


@pytest.fixture(scope="module")
def reference_v(tiny_model_v: Path) -> Any:
    return reference_pipeline(tiny_model_v)


@pytest.fixture(scope="module")
def reference_xl(tiny_model_xl: Path) -> Any:
    return reference_pipeline(tiny_model_xl)


def draw_theirs(pipe: Any, arguments: dict[str, Any]) -> tuple[list[torch.Tensor], np.ndarray]:
    steps: list[torch.Tensor] = []

    def on_step(_pipe: Any, _index: int, _timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        steps.append(tensors["latents"].clone())
        return tensors

    images = pipe(**arguments, callback_on_step_end=on_step, output_type="np").images
    return steps, images


def draw_ours(pipe: Pipeline, arguments: dict[str, Any]) -> tuple[list[torch.Tensor], Result]:
    """The latents after each step, of all images in order: groups that run one after the other are put together."""
    calls: list[tuple[int, torch.Tensor]] = []
    result = pipe(**arguments, on_step=lambda index, latents: calls.append((index, latents)), output_type="np")
    count = arguments["num_inference_steps"]
    assert [index for index, _ in calls] == list(range(count)) * (len(calls) // count)
    groups = [[latents for _, latents in calls[start : start + count]] for start in range(0, len(calls), count)]
    return [torch.cat(step) for step in zip(*groups, strict=True)], result


def psnr(ours: np.ndarray, theirs: np.ndarray) -> float:
    error = float(np.mean((ours.astype(np.float64) - theirs) ** 2))
    return math.inf if error == 0 else -10 * math.log10(error)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest relative error of any image."""
    errors = (ours - theirs).flatten(1).norm(dim=1) / theirs.flatten(1).norm(dim=1)
    return float(errors.max())


def compare(pipe: Pipeline, reference: Any, case: Case, limit: float = LATENTS, decibels: float = PSNR) -> None:
    common = {"prompt": PROMPT, "num_inference_steps": 6, "guidance_scale": 7.5, **case.common}
    expected, images = draw_theirs(reference, {**common, **case.theirs()})
    found, result = draw_ours(pipe, {**common, **case.ours()})
    assert len(found) == len(expected) == common["num_inference_steps"]
    errors = [relative(a, b) for a, b in zip(found, expected, strict=True)]
    assert max(errors) < limit, errors
    assert torch.equal(result.latents, found[-1])
    assert result.images.shape == images.shape
    assert min(psnr(a, b) for a, b in zip(result.images, images, strict=True)) > decibels
    # The pictures are pictures: were they all grey or saturated, the above would say little.
    assert 0.05 < images.std() < 0.5


def check_that_it_can_fail(reference: Any, arguments: Sequence[dict[str, Any]]) -> None:
    base, *others = [draw_theirs(reference, one)[0][-1] for one in arguments]
    assert all(relative(other, base) > 1000 * LATENTS for other in others)


@pytest.mark.covers("Stable Diffusion 1.x", "new pictures")
@pytest.mark.parametrize("name", CASES)
def test_torch(tiny_bundle: Path, reference: Any, name: str) -> None:
    compare(Pipeline.from_bundle(tiny_bundle), reference, CASES[name])


@pytest.mark.covers("Stable Diffusion 2.x", "new pictures")
@pytest.mark.parametrize("name", CASES)
def test_torch_v_prediction(tiny_bundle_v: Path, reference_v: Any, name: str) -> None:
    compare(Pipeline.from_bundle(tiny_bundle_v), reference_v, CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_onnxruntime(tiny_bundle_onnx: Path, reference: Any, name: str) -> None:
    compare(Pipeline.from_bundle(tiny_bundle_onnx, engine="onnxruntime"), reference, CASES[name])


@pytest.mark.slow  # the bundle alone takes twenty seconds
@pytest.mark.parametrize("name", CASES)
def test_onnxruntime_v_prediction(tiny_bundle_v_onnx: Path, reference_v: Any, name: str) -> None:
    compare(Pipeline.from_bundle(tiny_bundle_v_onnx), reference_v, CASES[name])


def for_xl(name: str) -> Case:
    """Two prompts: to diffusers an empty negative prompt that was given is not zeros, to us it is; so it is given to neither."""
    case = CASES[name]
    return Case({**case.common, "negative_prompt": NEGATIVE}, case.ours, case.theirs) if name == "two prompts" else case


@pytest.mark.covers("Stable Diffusion XL", "new pictures")
@pytest.mark.parametrize("name", CASES)
def test_torch_xl(tiny_bundle_xl: Path, reference_xl: Any, name: str) -> None:
    compare(Pipeline.from_bundle(tiny_bundle_xl), reference_xl, for_xl(name))


@pytest.mark.slow  # the bundle alone takes twenty seconds
@pytest.mark.parametrize("name", CASES)
def test_onnxruntime_xl(tiny_bundle_xl_onnx: Path, reference_xl: Any, name: str) -> None:
    compare(Pipeline.from_bundle(tiny_bundle_xl_onnx), reference_xl, for_xl(name))


def test_prompt_embeds_xl(tiny_bundle_xl: Path, reference_xl: Any) -> None:
    states = 0.7 * torch.randn(2, 77, 72, generator=generator(1))
    pooled = torch.randn(2, 24, generator=generator(2))
    case = Case(
        {
            "prompt": None,
            "prompt_embeds": states[:1],
            "negative_prompt_embeds": states[1:],
            "pooled_prompt_embeds": pooled[:1],
            "negative_pooled_prompt_embeds": pooled[1:],
            "guidance_scale": 5.0,
        },
        lambda: {"prompt": "", "seed": 0},
        lambda: {"generator": generator(0)},
    )
    compare(Pipeline.from_bundle(tiny_bundle_xl), reference_xl, case)


@pytest.mark.parametrize("skip", [1, 2])
def test_clip_skip_xl(tiny_bundle_xl: Path, reference_xl: Any, skip: int) -> None:
    # diffusers skips layers of the prompt, and never of the negative prompt: encoded by diffusers, given to ours.
    embeds = reference_xl.encode_prompt(PROMPT, negative_prompt=NEGATIVE, clip_skip=skip)
    pipe = Pipeline.from_bundle(tiny_bundle_xl)
    ours = pipe(PROMPT, num_inference_steps=2, guidance_scale=1.0, clip_skip=skip, seed=1, output_type="latent").latents
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    given = dict(zip(names, embeds, strict=True))
    theirs = pipe(**given, num_inference_steps=2, guidance_scale=1.0, seed=1, output_type="latent").latents
    assert relative(ours, theirs) < LATENTS


def test_every_argument_matters(reference: Any) -> None:
    """Were an argument ignored by both, comparing them would find nothing."""

    def ask(**changes: Any) -> dict[str, Any]:
        base = {
            "prompt": PROMPT,
            "num_inference_steps": 4,
            "guidance_scale": 5.0,
            "eta": 0.0,
            "generator": generator(0),
        }
        return {**base, **changes}

    check_that_it_can_fail(
        reference,
        [
            ask(),
            ask(prompt="the big green square"),
            ask(negative_prompt=NEGATIVE),
            ask(guidance_scale=1.0),
            ask(guidance_scale=7.5),
            ask(eta=0.7),
            ask(
                prompt=None,
                prompt_embeds=encode(reference, PROMPT, skip=1),
                negative_prompt_embeds=encode(reference, "", skip=1),
            ),
            ask(generator=generator(1)),
            ask(num_inference_steps=5),
        ],
    )


def test_prompt_embeds(tiny_bundle: Path, reference: Any) -> None:
    embeds = 0.7 * torch.randn(2, 77, 32, generator=generator(1))
    negative = 0.7 * torch.randn(2, 77, 32, generator=generator(2))
    case = Case(
        {
            "prompt": None,
            "prompt_embeds": embeds,
            "negative_prompt_embeds": negative,
            "num_images_per_prompt": 2,
            "guidance_scale": 5.0,
        },
        lambda: {"prompt": "", "seed": 0},
        lambda: {"generator": generators(0, 1, 2, 3)},
    )
    compare(Pipeline.from_bundle(tiny_bundle), reference, case)


def encode(pipe: Any, prompt: str, *, skip: int = 0, windows: int = 1) -> torch.Tensor:
    """A prompt's windows of 75 tokens, each encoded by itself, one behind the other; without the last `skip` layers."""
    ids = pipe.tokenizer(prompt, add_special_tokens=False, truncation=False).input_ids
    room = pipe.tokenizer.model_max_length - 2
    bos, eos, pad = (getattr(pipe.tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad"))
    model = getattr(pipe.text_encoder, "text_model", pipe.text_encoder)
    states = []
    for number in range(windows):
        part = ids[number * room : (number + 1) * room]
        row = torch.tensor([[bos, *part, eos, *[pad] * (room - len(part))]])
        with torch.no_grad():
            hidden = pipe.text_encoder(row, output_hidden_states=True).hidden_states
            states.append(model.final_layer_norm(hidden[-1 - skip]))
    assert len(ids) <= windows * room
    return torch.cat(states, dim=1)


@pytest.mark.parametrize("skip", [0, 1, 2])
@pytest.mark.parametrize("bundle", ["tiny_bundle", "tiny_bundle_v"])
def test_clip_skip(request: pytest.FixtureRequest, bundle: str, skip: int) -> None:
    """Encoded by hand: diffusers' own clip_skip looks for an attribute that newer versions of transformers do not have."""
    theirs = request.getfixturevalue("reference_v" if bundle.endswith("_v") else "reference")
    case = Case(
        {"guidance_scale": 5.0},
        lambda: {"prompt": PROMPT, "negative_prompt": NEGATIVE, "clip_skip": skip, "seed": 1},
        lambda: {
            "prompt": None,
            "prompt_embeds": encode(theirs, PROMPT, skip=skip),
            "negative_prompt_embeds": encode(theirs, NEGATIVE, skip=skip),
            "generator": generator(1),
        },
    )
    compare(Pipeline.from_bundle(request.getfixturevalue(bundle)), theirs, case)


LONG = "a red circle left of the blue square on white background highly detailed photo of a green circle " * 6


@pytest.mark.parametrize("negative", ["", NEGATIVE, LONG + "the small square"])
@pytest.mark.parametrize("bundle", ["tiny_bundle", "tiny_bundle_v"])
def test_long_prompts_in_windows(request: pytest.FixtureRequest, bundle: str, negative: str) -> None:
    pipe = Pipeline.from_bundle(request.getfixturevalue(bundle))
    theirs = request.getfixturevalue("reference_v" if bundle.endswith("_v") else "reference")
    assert pipe.tokenizer is not None
    count = -(-max(len(pipe.tokenizer.encode(text)) for text in (LONG, negative)) // 75)
    assert count >= 2
    case = Case(
        {"guidance_scale": 5.0},
        lambda: {"prompt": LONG, "negative_prompt": negative, "seed": 1},
        lambda: {
            "prompt": None,
            "prompt_embeds": encode(theirs, LONG, windows=count),
            "negative_prompt_embeds": encode(theirs, negative, windows=count),
            "generator": generator(1),
        },
    )
    compare(pipe, theirs, case)


def test_long_prompts_cut(tiny_bundle: Path, reference: Any) -> None:
    pipe = Pipeline.from_bundle(tiny_bundle)
    case = Case(
        {"prompt": LONG, "guidance_scale": 5.0},
        lambda: {"seed": 1, "long_prompt": "cut"},
        lambda: {"generator": generator(1)},  # diffusers always cuts
    )
    with pytest.warns(UserWarning, match="the prompt is longer than the text encoder's 77 tokens; dropped:"):
        compare(pipe, reference, case)


def test_bfloat16(tiny_model: Path, reference: Any, tmp_path: Path) -> None:
    bundle = ldmrt.build_engines(tiny_model, tmp_path / "bundle", dtype="bfloat16")
    pipe = Pipeline.from_bundle(bundle.path)
    assert pipe.dtype == "bfloat16"
    for name in ("guidance", "no guidance", "eta and a negative prompt"):
        compare(pipe, reference, CASES[name], limit=LATENTS_BFLOAT16, decibels=PSNR_BFLOAT16)


@pytest.mark.slow
def test_weights_of_several_precisions_in_one_file(tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "mixed")
    precisions = (torch.float32, torch.float16, torch.bfloat16)
    for path in model.glob("*/*.safetensors"):
        held = load_file(path)
        save_file({name: tensor.to(precisions[i % 3]) for i, (name, tensor) in enumerate(held.items())}, path)
    bundle = ldmrt.build_engines(model, tmp_path / "bundle", dtype="float32")
    compare(Pipeline.from_bundle(bundle.path), reference_pipeline(model, dtype=torch.float32), CASES["guidance"])
    in_place = ldmrt.build_engines(model, model, dtype="float32")
    arguments = {"prompt": PROMPT, "num_inference_steps": 2, "seed": 3}
    ours = [draw_ours(Pipeline.from_bundle(one.path), arguments)[0][-1] for one in (bundle, in_place)]
    assert torch.equal(*ours)


def test_weights_changed_in_place(tiny_model: Path, tiny_bundle: Path) -> None:
    """The pictures of a model that has had the new weights from the start: keys, convolutions, time embedding, text encoder."""
    reference, pipe = reference_pipeline(tiny_model), Pipeline.from_bundle(tiny_bundle)
    before = draw_ours(pipe, {"prompt": PROMPT, "num_inference_steps": 6, "seed": 3})[0]
    names = {
        "unet": (
            "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight",
            "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight",
            "conv_in.weight",
            "time_embedding.linear_1.bias",
        ),
        "text_encoder": tuple(key for key in reference.text_encoder.state_dict() if "layers.0.self_attn.v_proj" in key),
    }
    for component, chosen in names.items():
        module = getattr(reference, component)
        changed = {name: 1.5 * module.state_dict()[name] + 0.01 for name in chosen}
        module.load_state_dict({**module.state_dict(), **changed})
        pipe.update_weights(component, changed)
    compare(pipe, reference, CASES["guidance"])
    for component in names:
        pipe.restore_weights(component)
    assert torch.equal(draw_ours(pipe, {"prompt": PROMPT, "num_inference_steps": 6, "seed": 3})[0][-1], before[-1])
