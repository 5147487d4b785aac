"""Recognise from pixels alone what a picture shows: background, objects, colours, shapes, boxes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import generator

BoolMask = NDArray[np.bool_]
IntBox = tuple[int, int, int, int]

FOREGROUND_DISTANCE = 40.0  # RGB distance from the background's colour; palette colours: 80 apart
LEAST_AREA = 60  # pixels; smaller specks are no objects
LEAST_OVERLAP = 0.7  # shared over joint area with the best shape; below, the shape is unknown
TEMPLATE_SIDE = 120
PADDING = 4  # pixels around a picture, so that boxes may reach beyond its edge
SIZE_SLACK = 3  # pixels by which a small object may be greater, a large one smaller


@dataclass(frozen=True)
class Found:
    """An object in a picture.

    Attributes:
        color: Name of the palette's nearest colour.
        shape: Name of the shape, empty if none fits.
        box: Left, top, right and bottom edge in pixels, right and bottom exclusive.
        overlap: Shared over joint area with the shape, partly covered pixels in part.
    """

    color: str
    shape: str
    box: tuple[int, int, int, int]
    overlap: float

    @property
    def center(self) -> tuple[float, float]:
        """The box's centre (x, y) in pixels."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @property
    def side(self) -> int:
        """The box's longer side in pixels."""
        return max(self.box[2] - self.box[0], self.box[3] - self.box[1])


@dataclass(frozen=True)
class Sight:
    """All that is seen in a picture, the objects from the greatest to the smallest."""

    background: str
    objects: tuple[Found, ...]


_NAMES = list(generator.PALETTE)
_PALETTE = np.array(list(generator.PALETTE.values()), dtype=np.float32)


def nearest_colors(pixels: NDArray[np.float32]) -> NDArray[np.intp]:
    """Index of the nearest palette colour for pixels (..., 3)."""
    indices: NDArray[np.intp] = np.square(pixels[..., None, :] - _PALETTE).sum(axis=-1).argmin(axis=-1)
    return indices


def look(picture: generator.Picture) -> Sight:
    """Recognise a uint8 RGB picture (H, W, 3)."""
    pixels = picture.astype(np.float32)
    counts = np.bincount(nearest_colors(pixels).ravel(), minlength=len(_NAMES))
    background = int(counts.argmax())
    distance = np.sqrt(np.square(pixels - _PALETTE[background]).sum(axis=-1))
    parts = components(distance > FOREGROUND_DISTANCE)
    objects = [_recognise(pixels, part, background) for part in parts if part.sum() >= LEAST_AREA]
    objects.sort(key=lambda found: -found.side)
    return Sight(_NAMES[background], tuple(objects))


def components(mask: BoolMask) -> list[BoolMask]:
    """The parts of a mask (H, W) connected by edges, each as a mask of its own."""
    left = mask.copy()
    parts = []
    while left.any():
        part = np.zeros_like(left)
        part.ravel()[left.argmax()] = True
        size = 0
        while (count := int(part.sum())) != size:
            size = count
            for _ in range(4):
                part = _grown(part) & left
        parts.append(part)
        left &= ~part
    return parts


def _grown(mask: BoolMask) -> BoolMask:
    """A mask with the four neighbours of its pixels."""
    grown = mask.copy()
    grown[1:] |= mask[:-1]
    grown[:-1] |= mask[1:]
    grown[:, 1:] |= mask[:, :-1]
    grown[:, :-1] |= mask[:, 1:]
    return grown


def _recognise(pixels: NDArray[np.float32], part: BoolMask, background: int) -> Found:
    inside = part & ~_grown(~part)
    color = np.median(pixels[inside if inside.any() else part], axis=0)
    # How much of each pixel the object covers, from how far its colour is from the background's to the object's.
    across = color - _PALETTE[background]
    coverage = np.clip((pixels - _PALETTE[background]) @ across / np.square(across).sum(), 0, 1)
    coverage = np.pad(coverage * _grown(_grown(part)), PADDING)
    solid = coverage > 0.5
    rows, columns = np.flatnonzero(solid.any(axis=1)), np.flatnonzero(solid.any(axis=0))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    fits = [(*_fit(coverage, box, shape), shape) for shape in generator.SHAPES]
    overlap, (left, top, right, bottom), shape = max(fits)
    return Found(
        color=_NAMES[int(nearest_colors(color))],
        shape=shape if overlap >= LEAST_OVERLAP else "",
        box=(left - PADDING, top - PADDING, right - PADDING, bottom - PADDING),
        overlap=overlap,
    )


def _fit(coverage: NDArray[np.float32], box: IntBox, shape: str) -> tuple[float, IntBox]:
    """The best overlap of a shape with a coverage (H, W), and the shape's box there.

    Thin points fade when a picture is blurred, so boxes somewhat greater than the seen one are tried as well.
    """
    left, top, right, bottom = box
    total = float(coverage.sum())
    best = (0.0, box)
    for growth, shift in itertools.product((0, 1, 2), (-1, 0, 1)):
        tried = (left - growth, top - growth + shift, right + growth, bottom + growth + shift)
        template = _template(shape, tried[2] - tried[0], tried[3] - tried[1])
        window = coverage[tried[1] : tried[3], tried[0] : tried[2]]
        shared = float(np.minimum(window, template).sum())
        best = max(best, (shared / (total + float(template.sum()) - shared), tried))
    return best


@lru_cache(maxsize=4096)
def _template(shape: str, width: int, height: int) -> generator.Mask:
    """A shape's coverage (height, width), stretched so that it touches all four edges."""
    mask = generator.shape_mask(shape, TEMPLATE_SIDE)
    rows, columns = np.flatnonzero(mask.max(axis=1)), np.flatnonzero(mask.max(axis=0))
    tight = Image.fromarray(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    return np.asarray(tight.resize((width, height), Image.Resampling.BOX), dtype=np.float32)


@dataclass(frozen=True)
class Verdict:
    """What of a scene a picture shows rightly.

    Attributes:
        background: The background's colour.
        objects: As many objects as in the scene, each with its colour and shape.
        relation: The objects, and their centres as the relation says; true for one object.
        sizes: The objects, and the size of each to which the caption gives a size word.
    """

    background: bool
    objects: bool
    relation: bool
    sizes: bool


def judge(scene: generator.Scene, sight: Sight) -> Verdict:
    """Compare what is seen with what the caption asked for."""
    matched = _match(scene, sight)
    return Verdict(
        background=sight.background == scene.background,
        objects=bool(matched),
        relation=bool(matched) and (not scene.relation or _holds(scene.relation, *matched)),
        sizes=bool(matched)
        and all(_fits(thing.size, found.side) for thing, found in zip(scene.things, matched, strict=True)),
    )


def _match(scene: generator.Scene, sight: Sight) -> list[Found]:
    """The found objects in the order of the caption's things, empty unless they are the same."""
    found = {(item.color, item.shape): item for item in sight.objects}
    wanted = [(thing.color, thing.shape) for thing in scene.things]
    if len(sight.objects) != len(wanted) or set(found) != set(wanted):
        return []
    return [found[pair] for pair in wanted]


def _holds(relation: str, first: Found, second: Found) -> bool:
    """Whether the centres differ as the relation says, and more so than along the other axis."""
    across = second.center[0] - first.center[0]
    down = second.center[1] - first.center[1]
    along, other = (across, down) if relation in ("left of", "right of") else (down, across)
    if relation in ("right of", "below"):
        along = -along
    return along > abs(other)


def _fits(size: str, side: int) -> bool:
    """Whether a side in pixels agrees with a size word, give or take a little."""
    if size == "small":
        return side <= generator.SIDES["small"][1] + SIZE_SLACK
    if size == "large":
        return side >= generator.SIDES["large"][0] - SIZE_SLACK
    return True
