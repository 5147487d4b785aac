"""What the built-in model and its companions draw: judged by content, on captions that no training saw."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import ldmrt
from ldmrt.companions import companion
from ldmrt.enlarging import enlarge
from ldmrt.errors import BadRequest
from ldmrt.opening import builtin_bundle

detector = pytest.importorskip("detector")
edges = pytest.importorskip("edges")
evaluate = pytest.importorskip("evaluate_companions")
generator = pytest.importorskip("generator")

MOST_BYTES = 16_000_000
COUNT = 6
QUICK: dict[str, Any] = {"num_inference_steps": 12}


@pytest.fixture(scope="module")
def shapes() -> ldmrt.Pipeline:
    return ldmrt.Pipeline.from_bundle(device="cpu")


@pytest.fixture(scope="module")
def controlled(tmp_path_factory: pytest.TempPathFactory) -> ldmrt.Pipeline:
    folder = tmp_path_factory.mktemp("companions") / "edges"
    ldmrt.build_engines(builtin_bundle(), folder, dtype="float32", controlnets=[companion("edges")])
    return ldmrt.Pipeline.from_bundle(folder, "cpu")


def test_they_are_small_and_tell_nothing_of_where_they_were_made() -> None:
    files = [path for path in (builtin_bundle().parent / "companions").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MOST_BYTES
    for path in files:
        assert path.suffix == ".safetensors" or '"/' not in path.read_text()
    with pytest.raises(
        BadRequest, match=r"name is 'edge', and the companions are edges, inpainting, outlines, upscaler"
    ):
        companion("edge")


def test_shapes_follow_their_edges(controlled: ldmrt.Pipeline) -> None:
    """With a scale of nothing they lie where they like."""
    rng = np.random.default_rng(8)
    followed, free = 0, 0
    for seed, layout in enumerate(evaluate.unseen_layouts(COUNT, two=False)):
        picture = evaluate.as_edges(edges.draw_edges(layout, rng))
        for scale in (1.0, 0.0):
            made = evaluate.drawn(
                controlled, layout.scene, seed, control_image=picture, controlnet_scale=scale, **QUICK
            )
            held = evaluate.follows(layout, detector.look(made))
            followed, free = (followed + held, free) if scale else (followed, free + held)
    assert followed >= COUNT - 1
    assert free <= 1


@pytest.fixture(scope="module")
def inpainting(tmp_path_factory: pytest.TempPathFactory) -> ldmrt.Pipeline:
    folder = tmp_path_factory.mktemp("companions") / "inpainting"
    ldmrt.build_engines(companion("inpainting"), folder, base=builtin_bundle(), dtype="float32")
    return ldmrt.Pipeline.from_bundle(folder, "cpu")


@pytest.mark.parametrize(("kind", "least", "change"), [("add", 4, 25), ("replace", 4, 25), ("outpaint", 3, 50)])
def test_what_is_asked_for_is_drawn_under_the_mask(
    kind: str, least: int, change: float, inpainting: ldmrt.Pipeline
) -> None:
    """An object is put on a background, or in the place of another; the sides of a picture are continued. The rest stays what it was, roughly:
    the model draws all of the picture anew (root mean square, of 255; two unlike colours differ by 100 and more).
    """
    found = evaluate.score_inpainting(inpainting, kind, COUNT)
    assert found["right"] >= least
    assert found["change_outside"] < change


def test_pixels_outside_the_mask_are_given_back_to_the_bit(inpainting: ldmrt.Pipeline) -> None:
    right = 0
    for seed, case in enumerate(evaluate.inpaintings("add", COUNT)):
        given = {"image": case.picture, "mask_image": evaluate.as_mask(case.mask), "apply_overlay": True}
        made = evaluate.drawn(inpainting, case.scene, seed, **given, **QUICK)
        assert np.array_equal(made[~case.mask], case.picture[~case.mask])
        verdict = detector.judge(case.scene, detector.look(made))
        right += verdict.background and verdict.relation
    assert right >= COUNT - 2


@pytest.fixture(scope="module")
def upscaler(tmp_path_factory: pytest.TempPathFactory) -> ldmrt.Pipeline:
    folder = tmp_path_factory.mktemp("companions") / "upscaler"
    ldmrt.build_engines(companion("upscaler"), folder, dtype="float32")
    return ldmrt.Pipeline.from_bundle(folder, "cpu")


@pytest.mark.parametrize(("noise", "least"), [(0.0, 2.0), (evaluate.NOISE, 6.0)])
def test_an_enlarged_picture_is_nearer_to_the_truth_than_a_bicubic_filter_comes(
    noise: float, least: float, upscaler: ldmrt.Pipeline
) -> None:
    """In dB of PSNR, on average of all pictures; and its edges are nearly as steep as the truth's, which a filter's never are."""
    found = evaluate.score_upscaler(upscaler, COUNT, noise)
    assert found["psnr_db"] >= found["bicubic_psnr_db"] + least
    assert found["sharpness"] > 0.7
    assert found["bicubic_sharpness"] < 0.5


def test_a_larger_picture_is_enlarged_in_tiles_without_seams(upscaler: ldmrt.Pipeline) -> None:
    rng = np.random.default_rng(3)
    truth = np.concatenate([generator.draw(layout) for layout in evaluate.unseen_layouts(2, two=False)], axis=1)
    small, smooth = evaluate.smaller(truth, evaluate.NOISE, rng)
    made = np.asarray(enlarge(upscaler, small, seed=1).images[0])
    assert made.shape == truth.shape
    assert evaluate.psnr(made, truth) > evaluate.psnr(smooth, truth) + 2


def test_the_lora_changes_the_style_and_its_removal_restores_it(shapes: ldmrt.Pipeline) -> None:
    scenes = evaluate.solid_scenes(COUNT)

    def draw() -> tuple[int, list[NDArray[np.uint8]]]:
        made = [evaluate.drawn(shapes, scene, seed, **QUICK) for seed, scene in enumerate(scenes)]
        return sum(evaluate.is_outlined(picture, scene) for picture, scene in zip(made, scenes, strict=True)), made

    plain, before = draw()
    shapes.load_lora(companion("outlines"))
    outlined, _ = draw()
    shapes.unload_lora("outlines")
    _, after = draw()
    assert plain == 0
    assert outlined >= COUNT // 2
    assert all(np.array_equal(first, second) for first, second in zip(before, after, strict=True))


def test_a_picture_to_begin_from_keeps_its_layout_or_gives_way_to_the_prompt(shapes: ldmrt.Pipeline) -> None:
    """At strength 0.3 a circle's place is kept, whatever the prompt draws there; at 0.9 the prompt alone is followed."""
    circle, square = (
        generator.parse(f"a large {words} on a white background") for words in ("red circle", "blue square")
    )
    layout = generator.sample_layout(circle, np.random.default_rng(2))
    start = generator.draw(layout)
    moved: dict[float, list[float]] = {0.3: [], 0.9: []}
    followed = 0
    for seed, strength in itertools.product(range(COUNT), moved):
        seen = detector.look(evaluate.drawn(shapes, square, seed, image=start, strength=strength))
        moved[strength] += [np.hypot(*np.subtract(seen.objects[0].center, layout.boxes[0].center))]
        followed += strength == 0.9 and detector.judge(square, seen).relation
    assert max(moved[0.3]) < 10  # pixels, of a circle of 56 to 60
    assert np.median(moved[0.9]) > np.median(moved[0.3])
    assert followed >= COUNT - 1
