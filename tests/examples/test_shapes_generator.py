"""Captions, geometry, drawing and hold-outs of the shapes pictures."""

from __future__ import annotations

import re

import numpy as np
import pytest

import generator
from generator import Scene, Thing


def sampled(count: int, seed: int = 0) -> list[generator.Scene]:
    rng = np.random.default_rng(seed)
    return [generator.sample_scene(rng, two=index % 2 == 0) for index in range(count)]


@pytest.mark.parametrize(
    ("scene", "caption"),
    [
        (Scene((Thing("red", "circle"),), "blue"), "a red circle on a blue background"),
        (
            Scene((Thing("orange", "circle"),), "white"),
            "an orange circle on a white background",
        ),
        (
            Scene((Thing("orange", "ring", "large"),), "orange"),
            "a large orange ring on an orange background",
        ),
        (
            Scene((Thing("red", "star", "small"), Thing("orange", "square")), "gray", "left of"),
            "a small red star left of an orange square on a gray background",
        ),
        (
            Scene((Thing("red", "star"), Thing("red", "ring", "small")), "black", "above"),
            "a red star above a small red ring on a black background",
        ),
    ],
)
def test_captions_follow_the_grammar(scene: generator.Scene, caption: str) -> None:
    assert scene.caption == caption
    assert generator.parse(caption) == scene


def test_articles_go_by_sound() -> None:
    for scene in sampled(500):
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", scene.caption)


def test_captions_parse_back() -> None:
    for scene in sampled(500, seed=1):
        assert generator.parse(scene.caption) == scene


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red circle",
        "an red circle on a blue background",
        "a pink circle on a blue background",
        "a red hexagon on a blue background",
        "a huge red circle on a blue background",
        "a red circle near a blue star on a white background",
        "a red circle on a blue background ",
    ],
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a caption"):
        generator.parse(text)


def test_a_relation_needs_two_things() -> None:
    with pytest.raises(ValueError, match="two things"):
        Scene((Thing("red", "circle"),), "blue", "above")


def test_objects_differ_from_the_background_and_from_each_other() -> None:
    for scene in sampled(500, seed=2):
        pairs = [(thing.color, thing.shape) for thing in scene.things]
        assert len(set(pairs)) == len(pairs)
        assert scene.background not in {thing.color for thing in scene.things}


@pytest.mark.parametrize("relation", generator.RELATIONS)
def test_inverse_relations_have_the_same_roles(relation: str) -> None:
    first, second = Thing("red", "circle"), Thing("blue", "star", "small")
    scene = Scene((first, second), "white", relation)
    swapped = Scene((second, first), "white", generator.INVERSE[relation])
    assert scene.roles == swapped.roles


def test_layouts_keep_to_the_picture_and_the_relation() -> None:
    rng = np.random.default_rng(3)
    for scene in sampled(1000, seed=3):
        boxes = generator.sample_layout(scene, rng).boxes
        for thing, box in zip(scene.things, boxes, strict=True):
            least, greatest = generator.SIDES[thing.size]
            assert least <= box.side <= greatest
            for start in (box.left, box.top):
                assert start >= generator.MARGIN
                assert start + box.side <= generator.SIDE - generator.MARGIN
        if not scene.relation:
            continue
        first, second = boxes
        if scene.relation in ("right of", "below"):
            first, second = second, first
        across, down = (b - a for a, b in zip(first.center, second.center, strict=True))
        if scene.relation in ("left of", "right of"):
            assert second.left - first.left - first.side >= generator.GAP
            assert across >= generator.DOMINANCE * abs(down)
        else:
            assert second.top - first.top - first.side >= generator.GAP
            assert down >= generator.DOMINANCE * abs(across)


@pytest.mark.parametrize("shape", generator.SHAPES)
@pytest.mark.parametrize("side", [26, 45, 60])
def test_shapes_fill_their_box_and_are_symmetric(shape: str, side: int) -> None:
    mask = generator.shape_mask(shape, side)
    assert mask.shape == (side, side)
    assert 0 <= mask.min() <= mask.max() <= 1
    assert (mask > 0).any(axis=0).all(), "as wide as the box"
    assert (mask > 0).any(axis=1).sum() >= 0.93 * side, "about as high as the box"
    assert np.abs(mask - mask[:, ::-1]).mean() < 0.02


def test_pictures_show_the_palette() -> None:
    scene = Scene((Thing("yellow", "square"), Thing("red", "square")), "purple", "above")
    layout = generator.Layout(scene, (generator.Box(10, 10, 40), generator.Box(60, 70, 30)))
    picture = generator.draw(layout)
    assert picture.shape == (128, 128, 3)
    assert picture.dtype == np.uint8
    assert tuple(picture[0, 0]) == generator.PALETTE["purple"]
    assert tuple(picture[30, 30]) == generator.PALETTE["yellow"]
    assert tuple(picture[85, 75]) == generator.PALETTE["red"]


def test_sampling_repeats_with_its_seed() -> None:
    assert sampled(50, seed=7) == sampled(50, seed=7)
    assert sampled(50, seed=7) != sampled(50, seed=8)


def test_left_out_pairs_are_spread() -> None:
    assert len(generator.LEFT_OUT) == 5
    assert len({color for color, _ in generator.LEFT_OUT}) == 5
    assert {shape for _, shape in generator.LEFT_OUT} == set(generator.SHAPES)


def test_training_and_evaluation_captions_are_disjoint() -> None:
    rng = np.random.default_rng(4)
    trained = {generator.sample_training_scene(rng).caption for _ in range(5000)}
    for two in (False, True):
        unseen = generator.sample_unseen_scenes(rng, 100, two=two)
        assert not trained & {scene.caption for scene in unseen}
        assert not any(generator.has_left_out_pair(scene) for scene in unseen)
        left_out = generator.sample_unseen_scenes(rng, 100, two=two, left_out=True)
        assert all(generator.has_left_out_pair(scene) for scene in left_out)
        assert not trained & {scene.caption for scene in left_out}


def test_about_a_tenth_of_captions_is_held_out() -> None:
    captions = {scene.caption for scene in sampled(4000, seed=5)}
    share = sum(map(generator.is_held_out, captions)) / len(captions)
    assert 0.08 < share < 0.12
