"""Pictures of any size drawn larger in tiles: the pipeline's own where one tile suffices, and no seams where it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ldmrt
from ldmrt.cli import app
from ldmrt.enlarging import enlarge, tiles
from ldmrt.errors import BadRequest
from ldmrt.pipeline import Pipeline
from ldmrt.request import Request
from tests.conftest import write_model
from tests.test_inpainting import picture
from tests.test_parity import PROMPT, generators

QUICK: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 3, "guidance_scale": 3.0, "seed": 3}
TILE = 16  # pixels, of which 64 are drawn


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like Stable Diffusion's x4 upscaler."""
    folder = tmp_path_factory.mktemp("enlarging")
    write_model(folder / "m", version=2, seed=6, upscaling=True)
    built: Path = ldmrt.build_engines(folder / "m", folder / "b", dtype="float32", batch_sizes=(1, 2)).path
    return built


@pytest.fixture(scope="module")
def pipe(bundle: Path) -> Pipeline:
    return Pipeline.from_bundle(bundle, "cpu")


def pixels(image: Image.Image) -> np.ndarray[Any, Any]:
    return np.asarray(image, dtype=int)


@pytest.mark.parametrize("asked", [{}, {"num_images_per_prompt": 2}, {"eta": 0.7}, {"noise_level": 100}])
def test_what_fits_an_engine_is_the_pipelines(asked: dict[str, Any], pipe: Pipeline) -> None:
    small = picture(1, (TILE, TILE))
    found, expected = enlarge(pipe, small, **QUICK, **asked), pipe(image=small, **QUICK, **asked)
    assert found.seeds == expected.seeds
    for ours, theirs in zip(found.images, expected.images, strict=True):
        assert np.array_equal(pixels(ours), pixels(theirs))


def test_a_small_picture_keeps_its_proportions(pipe: Pipeline) -> None:
    """It is as large as a tile where that has its last pixels again, and cut off."""
    small = picture(1, (11, 7))
    found = enlarge(pipe, small, **QUICK).images[0]
    assert found.size == (44, 28)
    padded = np.pad(np.asarray(small), [(0, TILE - 7), (0, TILE - 11), (0, 0)], mode="edge")
    assert np.array_equal(pixels(found), pixels(pipe(image=padded, **QUICK).images[0])[:28, :44])


def seams(image: np.ndarray[Any, Any], columns: list[int]) -> float:
    """The step of all rows together across some columns, in units of that across all others: where tiles differ they do so as a whole,
    while the steps that a picture has of its own go up in one row and down in another.
    """
    steps = abs(np.diff(image.astype(float), axis=1).mean(0)).mean(-1)
    border = np.isin(np.arange(1, image.shape[1]), columns)
    return float(steps[border].mean() / steps[~border].mean())


@pytest.mark.parametrize("asked", [{}, {"eta": 1.0}])
def test_no_seams(asked: dict[str, Any], pipe: Pipeline) -> None:
    """Steps across the edges of tiles are like those elsewhere (0.8 to 1.2 is found); of tiles side by side they are not (1.9 to 2.3)."""
    large = picture(4, (56, TILE))
    found = enlarge(pipe, large, output_type="np", **QUICK, **asked).images[0]
    assert found.shape == (4 * TILE, 4 * 56, 3)
    starts = tiles(pipe, large.size).starts[0]
    assert len(starts) > 2
    edges = [4 * edge for start in starts for edge in (start, start + TILE)]
    assert seams(found, edges) < 1.3
    beside = [
        pipe(image=large.crop((x, 0, x + TILE, TILE)), output_type="np", **{**QUICK, "seed": x}, **asked).images[0]
        for x in range(0, 48, TILE)
    ]
    assert seams(np.concatenate(beside, axis=1), [64, 128]) > 1.6


def test_tiles_agree_where_they_overlap(pipe: Pipeline) -> None:
    """For they get one noise, in the latents, on the picture and in every step; with noise of their own they differ more."""
    large = picture(4, (24, TILE))
    asked: dict[str, Any] = {**QUICK, "eta": 1.0, "noise_level": 100}
    made: list[np.ndarray[Any, Any]] = []

    class Spy(Pipeline):
        def __init__(self) -> None:
            vars(self).update(vars(pipe))

        def __call__(self, *args: Any, **arguments: Any) -> Any:
            result = super().__call__(*args, **arguments)
            made.append(result.images[0])
            return result

    enlarge(Spy(), large, **asked)
    first, second = made
    shared = abs(first[:, 32:] - second[:, :32]).mean()
    own = [
        pipe(image=large.crop((x, 0, x + TILE, TILE)), **{**asked, "output_type": "np", "seed": x}).images[0]
        for x in (0, 8)
    ]
    assert shared < 0.7 * abs(own[0][:, 32:] - own[1][:, :32]).mean()


def test_images_of_several_prompts_are_what_they_are_alone(pipe: Pipeline) -> None:
    large = picture(2, (24, 20))
    asked = {name: value for name, value in QUICK.items() if name not in ("prompt", "seed")}
    together = enlarge(pipe, large, prompt=["red", "blue"], generator=generators(5, 9), **asked).images
    for image, prompt, seed in zip(together, ("red", "blue"), (5, 9), strict=True):
        alone = enlarge(pipe, large, prompt=prompt, seed=seed, **asked).images[0]
        # Two rows are summed in another order than one.
        assert abs(pixels(image) - pixels(alone)).max() <= 1


def test_what_cannot_be(pipe: Pipeline, tiny_bundle: Path) -> None:
    small = picture(1, (TILE, TILE))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"output_type": "latent"}, "has no latents, expected pil or np"),
        ({"image": Image.new("RGB", (4000, 2000))}, "would have 16000x8000 pixels"),
        (
            {"image": Image.new("RGB", (2000, 1500)), "num_images_per_prompt": 2},
            "2 pictures would have 96000000 pixels",
        ),
        (
            {"image": Image.new("RGB", (2000, 1500)), "sampler": "euler-ancestral", "num_inference_steps": 20},
            "euler-ancestral draws noise 20 times for all of the picture, 240000000 numbers",
        ),
        ({"image": Image.new("RGB", (0, 3))}, "image has 0x3 pixels"),
        ({"noise_level": 9999}, "noise_level is 9999"),
        ({"image": torch.zeros(1, 4, 16, 16)}, "expected a PIL image"),
    ]
    for changed, message in cases:
        with pytest.raises(BadRequest, match=message):
            enlarge(pipe, **{"image": small, **QUICK, **changed})
    with pytest.raises(BadRequest, match="tiny is no upscaling model"):
        enlarge(Pipeline.from_bundle(tiny_bundle), small, **QUICK)


def test_noise_that_does_not_fit(pipe: Pipeline) -> None:
    small = picture(1, (TILE, TILE))
    job, material = pipe.resolve(Request(prompt=PROMPT), image=small)
    noise = material.noise(job, pipe.table(job), (TILE, TILE))
    for wrong, message in (
        (noise._replace(low_res=None), "noise is without low_res"),
        (noise.cut(slice(None), 0, 0, 8, 16), r"for latents \(1, 4, 16, 8\)"),
    ):
        with pytest.raises(BadRequest, match=message):
            pipe(image=small, noise=wrong, **QUICK)


def test_generate(bundle: Path, pipe: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A picture of any size; the same for each line of a file of prompts."""
    large = picture(4, (24, 20))
    large.save(tmp_path / "p.png")
    command = ["generate", "--engines", bundle, "--steps", 2, "--device", "cpu", "--image", tmp_path / "p.png"]
    with pytest.raises(SystemExit) as ended:
        app(
            [str(word) for word in [*command, "red", "--seed", 1, "--out", tmp_path / "o.png", "--json"]], prog_name="l"
        )
    assert not ended.value.code
    told = json.loads(capsys.readouterr().out)["images"][0]
    assert (told["width"], told["height"]) == (96, 80)
    expected = enlarge(pipe, large, prompt="red", num_inference_steps=2, seed=1).images[0]
    with Image.open(tmp_path / "o.png") as found:
        assert np.array_equal(pixels(found), pixels(expected))
        assert "Size: 96x80" in found.info["parameters"]
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "blue", "seed": 4}\n{"prompt": "red", "seed": 1}\n')
    many = [*command, "--prompts", tmp_path / "prompts.jsonl", "--out", tmp_path / "all"]
    with pytest.raises(SystemExit) as ended:
        app([str(word) for word in many], prog_name="l")
    assert not ended.value.code
    with Image.open(tmp_path / "all" / "000002-0.png") as found:
        # Two rows are summed in another order than one.
        assert abs(pixels(found) - pixels(expected)).max() <= 1
