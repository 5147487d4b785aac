"""Captioned pictures of coloured shapes: grammar, geometry, drawing, sampling and hold-outs.

A picture is 128 x 128 pixels of RGB.  A caption is one of

    OBJECT on a COLOR background
    OBJECT RELATION OBJECT on a COLOR background

with OBJECT = ``a|an [small|large] COLOR SHAPE``.  All lengths are in pixels, x grows to the right
and y grows downwards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import cos, pi, sin

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SIDE = 128
SUPERSAMPLING = 4
MARGIN = 2  # pixels kept free at the picture's edge
GAP = 4  # least distance of two objects' boxes along the axis of their relation, in pixels
DOMINANCE = 1.2  # least ratio of the centres' distance along that axis to the other axis
RING_HOLE = 0.56  # a ring's inner diameter over its outer one
STAR_WAIST = 0.45  # a star's inner radius over its outer one
TWO_OBJECTS = 0.65  # share of pictures with two objects

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (140, 60, 180),
    "orange": (240, 130, 30),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
    "gray": (128, 128, 128),
}
COLORS: tuple[str, ...] = tuple(PALETTE)
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "ring")
RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")
INVERSE: dict[str, str] = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
}
SIZES: tuple[str, ...] = ("", "small", "large")
SIDES: dict[str, tuple[int, int]] = {"": (32, 54), "small": (26, 30), "large": (56, 60)}
"""Least and greatest side of an object's bounding box for each size word, in pixels."""

LEFT_OUT: frozenset[tuple[str, str]] = frozenset(
    {
        ("purple", "circle"),
        ("gray", "square"),
        ("yellow", "triangle"),
        ("green", "star"),
        ("red", "ring"),
    }
)
"""(colour, shape) pairs that no training caption holds: they measure generalisation."""

HELD_OUT_MODULUS = 10  # one caption in ten is kept out of training

Mask = NDArray[np.float32]
Picture = NDArray[np.uint8]


@dataclass(frozen=True)
class Thing:
    """What a caption says of one object; ``size`` is empty where it says nothing."""

    color: str
    shape: str
    size: str = ""

    def __str__(self) -> str:
        words = " ".join(word for word in (self.size, self.color, self.shape) if word)
        return f"{article(words)} {words}"


@dataclass(frozen=True)
class Scene:
    """What a caption says of a picture: one thing, or two and how the first lies to the second."""

    things: tuple[Thing, ...]
    background: str
    relation: str = ""

    def __post_init__(self) -> None:
        if len(self.things) != (2 if self.relation else 1):
            raise ValueError("a scene has one thing, or two things and their relation")

    @property
    def caption(self) -> str:
        """The caption of the scene."""
        words = f" {self.relation} ".join(str(thing) for thing in self.things)
        return f"{words} on {article(self.background)} {self.background} background"

    @property
    def roles(self) -> dict[str, Thing]:
        """The things by place: ``only``, or ``left`` and ``right``, or ``top`` and ``bottom``."""
        if not self.relation:
            return {"only": self.things[0]}
        first, second = self.things
        if self.relation in ("right of", "below"):
            first, second = second, first
        sideways = self.relation in ("left of", "right of")
        names = ("left", "right") if sideways else ("top", "bottom")
        return dict(zip(names, (first, second), strict=True))


@dataclass(frozen=True)
class Box:
    """An object's square bounding box: its left and top edge and its side, in pixels."""

    left: int
    top: int
    side: int

    @property
    def center(self) -> tuple[float, float]:
        """The box's centre (x, y)."""
        return self.left + self.side / 2, self.top + self.side / 2


@dataclass(frozen=True)
class Layout:
    """A scene with a bounding box for each of its things, in the order of the caption."""

    scene: Scene
    boxes: tuple[Box, ...]


def article(words: str) -> str:
    """``an`` before a vowel sound, otherwise ``a``."""
    return "an" if words[0] in "aeiou" else "a"


def parse(caption: str) -> Scene:
    """Read a caption of the grammar back into its scene.

    Raises:
        ValueError: The text is not a caption of the grammar.
    """
    try:
        body, background = caption.removesuffix(" background").rsplit(" on ", 1)
        relation = next((word for word in RELATIONS if f" {word} " in body), "")
        parts = body.split(f" {relation} ") if relation else [body]
        scene = Scene(tuple(_thing(part) for part in parts), background.split()[-1], relation)
    except (ValueError, IndexError) as error:
        raise ValueError(f"not a caption of the grammar: {caption!r}") from error
    if scene.caption != caption or scene.background not in PALETTE:
        raise ValueError(f"not a caption of the grammar: {caption!r}")
    return scene


def _thing(words: str) -> Thing:
    _, *middle, color, shape = words.split()
    thing = Thing(color, shape, " ".join(middle))
    if color not in PALETTE or shape not in SHAPES or thing.size not in SIZES:
        raise ValueError(words)
    return thing


def is_held_out(caption: str) -> bool:
    """Whether a caption is one of the tenth kept out of training, by its SHA-256."""
    digest = hashlib.sha256(caption.encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_MODULUS == 0


def has_left_out_pair(scene: Scene) -> bool:
    """Whether a scene shows one of the (colour, shape) pairs left out of training."""
    return any((thing.color, thing.shape) in LEFT_OUT for thing in scene.things)


def is_for_training(scene: Scene) -> bool:
    """Whether a scene may be trained on."""
    return not has_left_out_pair(scene) and not is_held_out(scene.caption)


def sample_scene(rng: np.random.Generator, *, two: bool) -> Scene:
    """A scene with one or two things, uniform over colours and shapes, hold-outs not regarded."""
    background = COLORS[rng.integers(len(COLORS))]
    others = [color for color in COLORS if color != background]
    things: list[Thing] = []
    while len(things) < (2 if two else 1):
        thing = Thing(
            others[rng.integers(len(others))],
            SHAPES[rng.integers(len(SHAPES))],
            SIZES[rng.choice(3, p=(0.5, 0.25, 0.25))],
        )
        if all((thing.color, thing.shape) != (seen.color, seen.shape) for seen in things):
            things.append(thing)
    return Scene(tuple(things), background, RELATIONS[rng.integers(len(RELATIONS))] if two else "")


def sample_training_scene(rng: np.random.Generator, two_objects: float = TWO_OBJECTS) -> Scene:
    """A scene that may be trained on; ``two_objects`` is the share of scenes with two things."""
    two = bool(rng.random() < two_objects)
    while not is_for_training(scene := sample_scene(rng, two=two)):
        pass
    return scene


def sample_layout(scene: Scene, rng: np.random.Generator) -> Layout:
    """Boxes for a scene: inside the margin, apart by the gap, the relation beyond doubt."""
    sides = [int(rng.integers(*SIDES[thing.size], endpoint=True)) for thing in scene.things]
    if not scene.relation:
        left, top = (int(rng.integers(MARGIN, SIDE - MARGIN - sides[0] + 1)) for _ in range(2))
        return Layout(scene, (Box(left, top, sides[0]),))
    flipped = scene.relation in ("right of", "below")
    first, second = reversed(sides) if flipped else sides
    slack = SIDE - 2 * MARGIN - GAP - first - second
    before, after = sorted(int(cut) for cut in rng.integers(0, slack + 1, size=2))
    along = (MARGIN + before, MARGIN + after + first + GAP)
    distance = along[1] + second / 2 - along[0] - first / 2
    across_first = int(rng.integers(MARGIN, SIDE - MARGIN - first + 1))
    middle = across_first + first / 2
    reach = distance / DOMINANCE
    low = max(MARGIN, int(np.ceil(middle - reach - second / 2)))
    high = min(SIDE - MARGIN - second, int(np.floor(middle + reach - second / 2)))
    across = (across_first, int(rng.integers(low, high + 1)))
    boxes = []
    for place, side in enumerate((first, second)):
        left, top = along[place], across[place]
        if scene.relation in ("above", "below"):
            left, top = top, left
        boxes.append(Box(left, top, side))
    return Layout(scene, tuple(reversed(boxes) if flipped else boxes))


@lru_cache(maxsize=1024)
def shape_mask(shape: str, side: int) -> Mask:
    """Coverage (0 to 1) of a shape in its bounding box: float32, ``side`` x ``side`` pixels."""
    full = side * SUPERSAMPLING
    image = Image.new("L", (full, full), 0)
    draw = ImageDraw.Draw(image)
    box = (0, 0, full - 1, full - 1)
    if shape == "circle":
        draw.ellipse(box, fill=255)
    elif shape == "square":
        draw.rectangle(box, fill=255)
    elif shape == "triangle":
        draw.polygon([((full - 1) / 2, 0), (full - 1, full - 1), (0, full - 1)], fill=255)
    elif shape == "star":
        draw.polygon(_star_points(full), fill=255)
    elif shape == "ring":
        inset = full * (1 - RING_HOLE) / 2
        draw.ellipse(box, fill=255)
        draw.ellipse((inset, inset, full - 1 - inset, full - 1 - inset), fill=0)
    else:
        raise ValueError(f"no such shape: {shape!r}")
    coverage: Mask = np.asarray(image.reduce(SUPERSAMPLING), dtype=np.float32) / np.float32(255)
    coverage.setflags(write=False)
    return coverage


def _star_points(full: int) -> list[tuple[float, float]]:
    """The ten corners of an upright star as wide as ``full`` and centred from top to bottom."""
    outer = (full - 1) / (2 * sin(2 * pi / 5))
    drop = outer * (1 + cos(pi / 5)) / 2  # from the star's top to the middle of its height
    center = (full - 1) / 2
    points = []
    for corner in range(10):
        radius = outer if corner % 2 == 0 else outer * STAR_WAIST
        angle = corner * pi / 5
        points.append((center + radius * sin(angle), center - drop + outer - radius * cos(angle)))
    return points


def draw(layout: Layout, mask: Callable[[str, int], Mask] = shape_mask) -> Picture:
    """Draw a layout: uint8 RGB, (128, 128, 3); `mask` gives the coverage of a shape and a side."""
    picture = np.empty((SIDE, SIDE, 3), dtype=np.float32)
    picture[:] = PALETTE[layout.scene.background]
    for thing, box in zip(layout.scene.things, layout.boxes, strict=True):
        region = picture[box.top : box.top + box.side, box.left : box.left + box.side]
        coverage = mask(thing.shape, box.side)[..., None]
        region += coverage * (np.array(PALETTE[thing.color], dtype=np.float32) - region)
    return np.rint(picture).astype(np.uint8)


def single_scenes() -> list[Scene]:
    """Every scene with one thing."""
    return [
        Scene((Thing(color, shape, size),), background)
        for background in COLORS
        for color in COLORS
        if color != background
        for shape in SHAPES
        for size in SIZES
    ]


def sample_unseen_scenes(rng: np.random.Generator, count: int, *, two: bool, left_out: bool = False) -> list[Scene]:
    """Scenes whose captions no training saw.

    Scenes with two things are all different; of scenes with one thing there are only so many,
    and they come around again where ``count`` is greater.

    Args:
        rng: Source of randomness.
        count: Number of scenes.
        two: Whether the scenes have two things.
        left_out: Take scenes with a left-out (colour, shape) pair, rather than held-out captions
            made of pairs seen in training.
    """

    def fits(scene: Scene) -> bool:
        if left_out:
            return has_left_out_pair(scene)
        return not has_left_out_pair(scene) and is_held_out(scene.caption)

    if not two:
        fitting = [scene for scene in single_scenes() if fits(scene)]
        order = rng.permutation(len(fitting))
        return [fitting[order[index % len(order)]] for index in range(count)]
    scenes: dict[str, Scene] = {}
    while len(scenes) < count:
        if fits(scene := sample_scene(rng, two=two)):
            scenes[scene.caption] = scene
    return list(scenes.values())
