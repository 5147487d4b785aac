"""What can be asked of a model."""

from __future__ import annotations

import pytest
import torch

from ldmrt.asking import check_text, checked, default_strength, prompts_of
from ldmrt.bundle import Bundle
from ldmrt.errors import BadRequest
from ldmrt.manifest import ModelRecord
from ldmrt.opening import builtin_bundle
from ldmrt.pipeline import Pipeline
from ldmrt.request import Request, resolve
from ldmrt.text import Given


@pytest.fixture(scope="module")
def model() -> ModelRecord:
    return Bundle.open(builtin_bundle()).manifest.model


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_bundle(device="cpu")


def test_an_empty_prompt_for_each_thing_in_its_place() -> None:
    assert prompts_of("a", torch.zeros(2, 77, 8), None) == "a"
    assert prompts_of("", torch.zeros(2, 77, 8), None) == ["", ""]
    assert prompts_of("", None, [1, 2, 3]) == ["", "", ""]
    assert prompts_of("", None, 1) == prompts_of("", None, None) == ""


def test_how_much_is_drawn_anew(model: ModelRecord) -> None:
    """As diffusers has it."""
    assert default_strength(model) == 0.8
    assert default_strength(model.model_copy(update={"kind": "stable-diffusion-xl"})) == 0.3
    assert default_strength(model.model_copy(update={"inpainting": True})) == 1.0


def test_a_request_is_checked_without_an_engine(model: ModelRecord, pipe: Pipeline) -> None:
    job, material = checked(model, pipe.defaults, Request(prompt="a", seed=3))
    assert (job.prompts, job.seeds) == (("a",), (3,))
    assert not material.is_encoded
    with pytest.raises(BadRequest) as caught:
        checked(model, pipe.defaults, Request(prompt="a", num_inference_steps=0))
    assert caught.value.param == "num_inference_steps"
    with pytest.raises(BadRequest) as caught:
        checked(model, pipe.defaults, Request(prompt="a"), image="a picture")  # type: ignore[arg-type]
    assert caught.value.param == "image"


def test_a_model_without_text_is_told_nothing(model: ModelRecord, pipe: Pipeline) -> None:
    silent = model.model_copy(update={"tokenizers": {}, "null_class": None})
    job = resolve(Request(prompt="", guidance_scale=1.0), pipe.defaults)
    check_text(silent, job, Given())
    with pytest.raises(BadRequest, match="reads no text, and draws what it was trained on") as caught:
        check_text(silent, job, Given(prompt_embeds=torch.zeros(1, 77, 8)))
    assert caught.value.param == "prompt"
    guided = resolve(Request(prompt="", guidance_scale=5.0), pipe.defaults)
    with pytest.raises(BadRequest, match="guidance_scale is 5") as caught:
        check_text(silent, guided, Given())
    assert caught.value.param == "guidance_scale"
    check_text(silent.model_copy(update={"null_class": 10}), guided, Given())
    check_text(model, guided, Given())
