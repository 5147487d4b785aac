"""Other programs: the same pictures, or no times."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from ldmrt.bench import peers
from ldmrt.bench.peer import PROGRAMS, Task, serve
from ldmrt.bench.peers import beside, check_peers, in_turn, process, psnr
from ldmrt.bench.pictures import control_picture
from ldmrt.errors import BadRequest, LdmrtError
from ldmrt.pipeline import Pipeline
from ldmrt.request import Request

REQUEST: dict[str, Any] = {"prompt": "a red circle", "seed": 3, "num_inference_steps": 3, "guidance_scale": 5.0}
REQUEST |= {"num_images_per_prompt": 2, "width": 64, "height": 64, "sampler": "ddim"}  # not its model's own


@pytest.fixture(scope="module")
def pipe(tiny_bundle: Path) -> Pipeline:
    return Pipeline.from_bundle(tiny_bundle, "cpu")


def test_psnr_is_of_the_worst_picture() -> None:
    expected = np.zeros((2, 4, 4, 3))
    found = expected.copy()
    found[1] += 0.1
    assert psnr(found, expected) == pytest.approx(20.0)
    assert psnr(expected, expected) == 120.0


def test_rounds_are_in_turn_and_the_first_does_not_count() -> None:
    order: list[str] = []

    def run(name: str) -> float:
        order.append(name)
        return float(len(order))

    ours, theirs = in_turn(lambda: run("a"), lambda: run("b"), runs=3)
    assert "".join(order) == "ba" + "ab" + "ba" + "ab"
    assert (ours, theirs) == ((3.0, 6.0, 7.0), (4.0, 5.0, 8.0))


def test_diffusers_draws_the_same_in_its_own_process(pipe: Pipeline, tiny_model: Path) -> None:
    found = beside("diffusers", tiny_model, pipe, REQUEST, "a case", runs=2)
    assert found.psnr > 60  # float32 twice, 3 steps
    assert len(found.ours_seconds.samples) == len(found.theirs_seconds.samples) == 2
    assert found.times_faster.low <= found.times_faster.value <= found.times_faster.high
    assert found.setup_seconds > found.theirs_seconds.median > 0
    assert found.peak_resident_bytes is not None
    assert found.peak_resident_bytes > 50e6  # of a process with torch in it


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler, about torch
@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "torch.compile"])
def test_the_others_draw_the_same(name: str, pipe: Pipeline, tiny_model: Path) -> None:
    pytest.importorskip("torch" if name == "torch.compile" else name)
    task = task_of(name, tiny_model, pipe)
    with ExitStack() as stack, torch.inference_mode():
        found = PROGRAMS[name](task, stack)()
    assert psnr(found, pipe(**REQUEST, output_type="np").images) > 60  # float32 twice, 3 steps


@pytest.mark.slow
def test_diffusers_follows_the_same_control_image(
    tiny_model: Path, tiny_bundle_controlled: Path, tiny_controlnets: list[Path]
) -> None:
    pipe = Pipeline.from_bundle(tiny_bundle_controlled, "cpu")
    task = task_of("diffusers", tiny_model, pipe).model_copy(update={"controlnet": tiny_controlnets[0]})
    with ExitStack() as stack, torch.inference_mode():
        found = PROGRAMS["diffusers"](task, stack)()
    # The bundle has two ControlNets.
    ours = pipe(**REQUEST, control_image=[control_picture(64, 64), None], output_type="np").images
    assert psnr(found, ours) > 60  # float32 twice, 3 steps
    assert psnr(pipe(**REQUEST, output_type="np").images, ours) < 50
    with pytest.raises(BadRequest, match="without ControlNets"):
        check_peers(["onnxruntime"], tiny_model, pipe, sampler="ddim", controlled=True)


def task_of(name: str, model: Path, pipe: Pipeline) -> Task:
    shape = (1, pipe.bundle.manifest.model.latent_channels, 8, 8)
    return Task(name=name, model=model, device="cpu", dtype="float32", threads=1, latent_shape=shape, **REQUEST)


def test_a_process_answers_every_line(tmp_path: Path) -> None:
    replies = io.StringIO()
    serve(lambda: np.arange(3), io.StringIO(f"draw\nwrite {tmp_path / 'a.npy'}\n"), replies)
    answers = [json.loads(line) for line in replies.getvalue().splitlines()]
    assert len(answers) == 3  # the first says that it is ready
    assert all(answer["peak_resident_bytes"] > 0 <= answer["seconds"] for answer in answers)
    assert np.load(tmp_path / "a.npy").tolist() == [0, 1, 2]


def test_times_of_other_pictures_are_not_compared(
    pipe: Pipeline, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_another_seed = pipe(**REQUEST | {"seed": 77}, output_type="np").images

    class Other:
        def ask(self, command: str) -> float:
            assert command.startswith("write "), "timed"
            np.save(command.removeprefix("write "), of_another_seed)
            return 1.0

    @contextmanager
    def other(*_: Any, **__: Any) -> Iterator[Other]:
        yield Other()

    monkeypatch.setattr(peers, "process", other)
    with pytest.raises(LdmrtError, match="PSNR"):
        beside("diffusers", tiny_model, pipe, REQUEST, "a case", runs=2)


def test_a_process_that_ends_is_named_with_its_last_word(pipe: Pipeline, tmp_path: Path) -> None:
    failing = process("diffusers", tmp_path / "none", pipe, REQUEST, tmp_path)
    with pytest.raises(LdmrtError, match=r"diffusers stopped with exit code 1: .*none"):
        failing.__enter__()


@pytest.mark.parametrize(
    ("names", "words"), [(["other"], "expected diffusers, torch.compile"), (["diffusers"], "built from")]
)
def test_what_cannot_be_compared_is_refused(names: list[str], words: str, pipe: Pipeline) -> None:
    with pytest.raises(BadRequest, match=words):
        check_peers(names, None, pipe, sampler="ddim")


def test_a_package_that_is_missing_is_named(pipe: Pipeline, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "openvino" else sys)
    check_peers(["diffusers"], tiny_model, pipe, sampler="ddim")
    with pytest.raises(BadRequest, match=r"needs openvino, .*: pip install"):
        check_peers(["openvino"], tiny_model, pipe, sampler="ddim")


@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_noise_levels_and_a_beginning_make_the_picture_of_eulers_method(
    sampler: str, pipe: Pipeline, tiny_model: Path
) -> None:
    """stable-diffusion.cpp's loop, written down: noise of the first level's deviation, then Euler's method in the levels it is given."""
    request = REQUEST | {"sampler": sampler, "num_images_per_prompt": 1, "guidance_scale": 1.0}
    sigmas = peers._levels(pipe, request)
    unet = diffusers.UNet2DConditionModel.from_pretrained(tiny_model, subfolder="unet")
    trained = pipe.schedule.sigmas
    states = pipe.embed(
        [(job, pipe.tokenize(job)[0]) for job in [pipe.resolve(Request(prompt=request["prompt"]))[0]]], together=False
    )[0][0].states[None]
    x = sigmas[0] * torch.randn((1, *unet_shape(unet)), generator=torch.Generator().manual_seed(request["seed"]))
    with torch.inference_mode():
        for sigma, following in pairwise(sigmas):
            timestep = float(np.interp(np.log(sigma), np.log(trained), np.arange(len(trained))))
            noise = unet(x / (1 + sigma**2) ** 0.5, timestep, states).sample
            x = x + (following - sigma) * noise
        expected = x / (1 + sigmas[-1] ** 2) ** 0.5
    start = peers._start("stable-diffusion.cpp", pipe, request)
    found = pipe(**request, latents=start, output_type="latent").latents
    # Timesteps that are looked up again by their levels are off by rounding, and the embedding of them is not.
    assert (found - expected).norm() / expected.norm() < 1e-3
    assert peers._start("diffusers", pipe, request) is None


def unet_shape(unet: Any) -> tuple[int, int, int]:
    return unet.config.in_channels, 8, 8


def test_stable_diffusion_cpp_is_asked_for_the_same(
    pipe: Pipeline, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It knows no architecture as small as this one, so another stands in its place; what it draws is compared by `ldmrt bench`."""
    asked: dict[str, Any] = {}

    class StableDiffusion:
        def __init__(self, **options: Any) -> None:
            asked.update(options)

        def generate_image(self, **options: Any) -> list[Image.Image]:
            asked.update(options)
            return [Image.new("RGB", (64, 64), (255, 0, 51))] * options["batch_count"]

    monkeypatch.setitem(sys.modules, "stable_diffusion_cpp", SimpleNamespace(StableDiffusion=StableDiffusion))
    sigmas = peers._levels(pipe, REQUEST)
    task = task_of("stable-diffusion.cpp", tiny_model, pipe).model_copy(update={"sigmas": sigmas})
    with ExitStack() as stack:
        images = PROGRAMS["stable-diffusion.cpp"](task, stack)()
    assert images.shape == (2, 64, 64, 3)
    assert images[1, 0, 0].tolist() == pytest.approx([1.0, 0.0, 0.2])
    assert [float(part) for part in asked["sigmas"].split(",")] == list(sigmas)
    assert len(sigmas) == 1 + asked["sample_steps"] == 4
    assert list(sigmas) == sorted(sigmas, reverse=True)
    assert (asked["rng_type"], asked["wtype"], asked["seed"], asked["cfg_scale"]) == ("cpu", "f32", 3, 5.0)


def test_a_sampler_that_levels_do_not_say_is_refused(
    pipe: Pipeline, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: sys)
    with pytest.raises(BadRequest, match="the samplers ddim and euler, and this is heun: add --sampler ddim"):
        check_peers(["stable-diffusion.cpp"], tiny_model, pipe, sampler="heun")
