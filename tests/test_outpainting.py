"""Pictures continued beyond their edges: their own pixels stay, all of the canvas is drawn, and each window as the pipeline draws it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from PIL import Image

from ldmrt.cli import app
from ldmrt.errors import BadRequest
from ldmrt.outpainting import outpaint, windows
from ldmrt.pipeline import Pipeline
from tests.test_inpainting import half, picture
from tests.test_parity import PROMPT

QUICK: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 2, "guidance_scale": 3.0, "seed": 3}
WINDOW = 64


@pytest.fixture(scope="module")
def pipe(tiny_bundle: Path) -> Pipeline:
    return Pipeline.from_bundle(tiny_bundle, "cpu")


@pytest.fixture(scope="module", params=["ordinary", "inpainting"])
def either(request: pytest.FixtureRequest, pipe: Pipeline) -> Pipeline:
    if request.param == "ordinary":
        return pipe
    return Pipeline.from_bundle(request.getfixturevalue("tiny_bundle_inpainting"), "cpu")


def pixels(image: Image.Image) -> np.ndarray[Any, Any]:
    return np.asarray(image, dtype=int)


@pytest.mark.parametrize(
    ("size", "extend"), [((64, 64), (0, 24, 0, 0)), ((50, 37), (13, 40, 5, 30)), ((150, 30), (0, 0, 9, 70))]
)
def test_the_picture_stays_and_the_rest_is_drawn(
    size: tuple[int, int], extend: tuple[int, int, int, int], either: Pipeline
) -> None:
    """Pixels of the picture to the bit, on canvases of one window and of many, at places that are no multiples of a cell."""
    given, (left, right, top, bottom) = picture(1, size), extend
    found = outpaint(either, given, extend, **QUICK)
    image = pixels(found.images[0])
    assert image.shape == (size[1] + top + bottom, size[0] + left + right, 3)
    kept = (slice(top, top + size[1]), slice(left, left + size[0]))
    assert np.array_equal(image[kept], pixels(given))
    # What is there before anything is drawn: the picture's edges drawn out.
    before = np.pad(pixels(given), [(top, bottom), (left, right), (0, 0)], mode="edge")
    changed = (image != before).any(-1)
    changed[kept] = True
    assert changed.mean() > 0.95


def test_one_window_is_the_pipelines(pipe: Pipeline) -> None:
    """A canvas as large as a window, with the picture on cells: the pipeline's own inpainting, with the picture laid over."""
    small = picture(1, (32, 64))
    found = outpaint(pipe, small, (32, 0, 0, 0), **QUICK).images[0]
    drawn_out = np.pad(np.asarray(small), [(0, 0), (32, 0), (0, 0)], mode="edge")
    expected = pipe(image=drawn_out, mask_image=half(), apply_overlay=True, **QUICK).images[0]
    assert np.array_equal(pixels(found), pixels(expected))


def test_the_same_seed_is_the_same_picture_and_another_is_another(pipe: Pipeline) -> None:
    small, extend = picture(1, (40, 64)), (0, 60, 0, 0)
    together = outpaint(pipe, small, extend, num_images_per_prompt=2, **QUICK)
    assert together.seeds == (3, 4)
    for seed, image in zip(together.seeds, together.images, strict=True):
        alone = outpaint(pipe, small, extend, **{**QUICK, "seed": seed}).images[0]
        assert np.array_equal(pixels(alone), pixels(image))
    first, second = (pixels(image)[:, 40:] for image in together.images)
    assert abs(first - second).mean() > 2
    # Each window has noise of its own: nothing repeats from one to the next.
    noisy = outpaint(pipe, small, extend, **{**QUICK, "eta": 1.0}).images[0]
    assert not np.array_equal(pixels(noisy), pixels(together.images[0]))


def test_windows_see_what_was_drawn(pipe: Pipeline) -> None:
    """The far end of a canvas of several windows follows from the picture at the other end, by way of those between."""
    extend = (0, 100, 0, 0)
    one, other = (outpaint(pipe, picture(seed, (40, 64)), extend, **QUICK).images[0] for seed in (1, 2))
    assert abs(pixels(one)[:, -16:] - pixels(other)[:, -16:]).max() > 0


def test_where_windows_join(pipe: Pipeline) -> None:
    """No step of all rows together across the edges of windows that there is not elsewhere on what was drawn."""
    canvas = outpaint(pipe, picture(3, (40, 64)), (0, 152, 0, 0), output_type="np", **QUICK).images[0]
    steps = abs(np.diff(canvas, axis=1).mean(0)).mean(-1)[48:]
    plan = windows(pipe, (40, 64), (0, 152, 0, 0))
    edges = {8 * (x + width) for x, _ in plan.windows for width in (0, plan.window[0])}
    border = np.isin(np.arange(49, canvas.shape[1]), list(edges))
    assert border.sum() >= 3
    assert steps[border].mean() < 2 * steps[~border].mean()


sides = st.integers(1, 200)
by = st.integers(0, 130)


class Engines:
    """What `windows` asks of a pipeline: one with cells of 8 pixels and windows of 64."""

    bundle = SimpleNamespace(manifest=SimpleNamespace(model=SimpleNamespace(downscale=8)))
    defaults = SimpleNamespace(width=WINDOW, height=WINDOW)


@given(st.tuples(sides, sides), st.tuples(by, by, by, by).filter(any))
def test_windows_cover_the_canvas_and_grow_from_the_picture(
    size: tuple[int, int], extend: tuple[int, int, int, int]
) -> None:
    engines: Any = Engines()
    plan = windows(engines, size, extend)
    left, right, top, bottom = extend
    assert plan.canvas == (size[0] + left + right, size[1] + top + bottom)
    assert plan.window == (8, 8)
    known = np.zeros((8 * plan.cells[1], 8 * plan.cells[0]), dtype=bool)
    known[top : top + size[1], left : left + size[0]] = True
    for number, (x, y) in enumerate(plan.windows):
        place = (slice(8 * y, 8 * y + WINDOW), slice(8 * x, 8 * x + WINDOW))
        assert known[place].shape == (WINDOW, WINDOW)
        assert known[place].any() or number == 0
        known[place] = True
    assert known[: plan.canvas[1], : plan.canvas[0]].all()


def test_what_cannot_be(pipe: Pipeline) -> None:
    small = picture(1, (40, 40))
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({"extend": (0, 0, 0, 0)}, "extend", "not all 0"),
        ({"extend": (8, 8)}, "extend", "expected pixels to the left, right, top and bottom"),
        ({"extend": (8, 8, -1, 0)}, "extend", "0 or more"),
        ({"extend": (8.5, 0, 0, 0)}, "extend", "expected pixels"),
        ({"extend": (10000, 0, 10000, 0)}, "image", "expected at most 67108864"),
        ({"mask_image": half()}, "mask_image", "extend continues a whole picture"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, "latents", "extend continues a whole picture"),
        ({"output_type": "latent"}, "output_type", "has no latents"),
        ({"image": "p.png"}, "image", "expected a PIL image"),
        ({"image": Image.new("L", (0, 0))}, "image", "image has 0x0 pixels"),
    ]
    for changed, param, message in cases:
        with pytest.raises(BadRequest, match=message) as caught:
            outpaint(pipe, **{"image": small, "extend": (8, 8, 8, 8), **QUICK, **changed})
        assert caught.value.param == param


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as ended:
        app([str(word) for word in words], prog_name="ldmrt")
    return int(ended.value.code or 0)


def test_generate(tiny_bundle: Path, pipe: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = picture(1, (40, 30))
    small.save(tmp_path / "p.png")
    command = ["generate", "a circle", "--engines", tiny_bundle, "--steps", 2, "--seed", 1, "--device", "cpu", "--json"]
    extended = [*command, "--image", tmp_path / "p.png", "--extend", "8,40,0,50"]
    assert run(*extended, "--num-images", 3, "--out", tmp_path / "o.png") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["images"][0]["width"], told["images"][0]["height"]) == (88, 80)
    assert (told["settings"]["extend"], told["settings"]["strength"]) == ([8, 40, 0, 50], 1.0)
    asked: dict[str, Any] = {"prompt": "a circle", "num_inference_steps": 2, "seed": 1, "num_images_per_prompt": 3}
    expected = outpaint(pipe, small, (8, 40, 0, 50), **asked).images
    for number, image in enumerate(expected):
        with Image.open(tmp_path / f"o-{number}.png") as found:
            assert np.array_equal(pixels(found), pixels(image))
            assert "Size: 88x80" in found.info["parameters"]
            assert 'Extend: "8, 40, 0, 50"' in found.info["parameters"]
    for wrong, message in (
        ([*command, "--extend", "8,40,0,50"], "--extend continues a picture, and there is none"),
        ([*extended, "--mask", tmp_path / "p.png"], "extend continues a whole picture"),
        ([*extended, "--refiner", tiny_bundle], "--refiner changes all of them"),
        ([*extended[:-1], "8,40"], "is no extension, expected pixels"),
        ([*extended[:-1], "0,0,0,0"], "not all 0"),
    ):
        assert run(*wrong, "--out", tmp_path / "w.png") in (1, 2)
        error = capsys.readouterr().err
        assert message in " ".join(error.replace("│", "").split())
        assert "Traceback" not in error
