"""The detector on pictures whose content is known."""

from __future__ import annotations

import numpy as np
import pytest

import detector
import generator
from generator import Box, Layout, Scene, Thing


def test_ground_truth_is_recognised() -> None:
    rng = np.random.default_rng(11)
    right = 0
    count = 300
    for index in range(count):
        scene = generator.sample_scene(rng, two=index % 2 == 0)
        picture = generator.draw(generator.sample_layout(scene, rng))
        verdict = detector.judge(scene, detector.look(picture))
        right += verdict.background and verdict.objects and verdict.relation
    assert right >= 0.995 * count


def test_noise_and_blur_are_borne() -> None:
    rng = np.random.default_rng(12)
    right = 0
    count = 100
    for index in range(count):
        scene = generator.sample_scene(rng, two=index % 2 == 0)
        picture = generator.draw(generator.sample_layout(scene, rng)).astype(np.float32)
        blurred = (picture + np.roll(picture, 1, axis=0) + np.roll(picture, 1, axis=1)) / 3
        noisy = blurred + rng.normal(0, 6, picture.shape)
        seen = detector.look(np.clip(noisy, 0, 255).astype(np.uint8))
        verdict = detector.judge(scene, seen)
        right += verdict.background and verdict.relation
    assert right >= 0.97 * count


@pytest.mark.parametrize("shape", generator.SHAPES)
def test_boxes_and_centres(shape: str) -> None:
    scene = Scene((Thing("white", shape, "large"),), "black")
    seen = detector.look(generator.draw(Layout(scene, (Box(20, 40, 58),))))
    (found,) = seen.objects
    assert (found.color, found.shape) == ("white", shape)
    assert found.center == pytest.approx((49, 69), abs=1.5)
    assert found.side == pytest.approx(58, abs=2)


def test_an_empty_picture_has_no_objects() -> None:
    picture = np.full((128, 128, 3), generator.PALETTE["blue"], dtype=np.uint8)
    assert detector.look(picture) == detector.Sight("blue", ())


def test_a_shapeless_blot_has_no_shape() -> None:
    picture = np.full((128, 128, 3), 245, dtype=np.uint8)
    picture[20:80, 20:26] = picture[74:80, 20:80] = generator.PALETTE["red"]
    (found,) = detector.look(picture).objects
    assert found.color == "red"
    assert found.shape == ""


def test_verdicts_tell_what_is_wrong() -> None:
    scene = Scene((Thing("red", "circle"), Thing("blue", "star", "small")), "white", "left of")
    layout = Layout(scene, (Box(10, 40, 40), Box(80, 50, 28)))
    seen = detector.look(generator.draw(layout))
    assert detector.judge(scene, seen) == detector.Verdict(True, True, True, True)

    swapped = Scene(scene.things, "white", "right of")
    assert detector.judge(swapped, seen) == detector.Verdict(True, True, False, True)

    elsewhere = Scene(scene.things, "gray", "left of")
    assert not detector.judge(elsewhere, seen).background

    other = Scene((Thing("red", "square"), Thing("blue", "star", "small")), "white", "left of")
    assert detector.judge(other, seen) == detector.Verdict(True, False, False, False)

    great = Scene((Thing("red", "circle"), Thing("blue", "star", "large")), "white", "left of")
    assert detector.judge(great, seen) == detector.Verdict(True, True, True, False)

    alone = Scene(scene.things[:1], "white")
    assert not detector.judge(alone, seen).objects


def test_components_are_taken_apart() -> None:
    mask = np.zeros((9, 9), dtype=bool)
    mask[1:3, 1:3] = mask[5, 2:8] = mask[3, 3] = True
    sizes = sorted(int(part.sum()) for part in detector.components(mask))
    assert sizes == [1, 4, 6]
