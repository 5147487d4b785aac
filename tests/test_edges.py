"""Edge maps: OpenCV's to the pixel."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from ldmrt.edges import canny
from ldmrt.errors import BadRequest
from tests.test_inpainting import picture


def shapes() -> Image.Image:
    """Circles and lines of several colours on a gradient."""
    image = picture(7, (90, 70))
    draw = ImageDraw.Draw(image)
    for number in range(6):
        colour = (40 * number, 255 - 40 * number, 120)
        draw.ellipse([8 * number, 6 * number, 8 * number + 30, 6 * number + 22], fill=colour, outline=(0, 0, 0))
        draw.line([0, 10 * number, 89, 69 - 9 * number], fill=colour, width=1 + number % 3)
    return image


def spiral() -> Image.Image:
    """A line that is bright where it begins, and faint all of its long way."""
    image = np.zeros((64, 64, 3), dtype=np.uint8)
    x, y, side, value = 4, 4, 56, 90
    for turn in range(12):
        dx, dy = ((1, 0), (0, 1), (-1, 0), (0, -1))[turn % 4]
        for _ in range(side):
            image[y, x] = value
            x, y, value = x + dx, y + dy, max(35, value - 1)
        side -= 8 if turn % 2 else 0
    return Image.fromarray(image)


def noise(seed: int, *size: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


PICTURES = {
    "blobs": picture(1, (120, 90)),
    "shapes": shapes(),
    "spiral": spiral(),
    "noise": noise(1, 40, 50),
    "soft noise": noise(2, 12, 9).resize((100, 70), Image.Resampling.BICUBIC),
    "one row": noise(3, 1, 30),
    "one column": noise(4, 30, 1),
    "one pixel": noise(5, 1, 1),
    "one colour": Image.new("RGB", (20, 10), (9, 200, 3)),
    "greys": shapes().convert("L"),
}


@pytest.mark.parametrize("thresholds", [(100, 200), (20, 60), (50.5, 50.5), (0, 500)])
@pytest.mark.parametrize("name", PICTURES)
def test_opencvs(name: str, thresholds: tuple[float, float]) -> None:
    cv2: Any = pytest.importorskip("cv2")
    given = PICTURES[name]
    expected = cv2.Canny(np.asarray(given.convert("RGB")), *thresholds)
    found = np.asarray(canny(given, *thresholds))
    assert np.array_equal(found, np.repeat(expected[..., None], 3, axis=2))
    if name == "shapes":
        assert 0.02 < (expected > 0).mean() < 0.5


def test_an_edge_follows_a_step_and_ends_with_it() -> None:
    """Without OpenCV: a square is outlined, one pixel wide; a faint one is not; one that goes from bright to faint is, all of it."""
    image = Image.new("L", (60, 40))
    draw = ImageDraw.Draw(image)
    draw.rectangle([10, 10, 29, 29], fill=120)
    draw.rectangle([40, 10, 49, 29], fill=20)
    edges = np.asarray(canny(image))[..., 0] > 0
    assert edges[15:25, 8:12].sum(1).tolist() == [1] * 10
    assert edges[15:25, 27:32].sum(1).tolist() == [1] * 10
    assert not edges[:, 36:].any()
    fading = np.zeros((40, 40, 3), dtype=np.uint8)
    fading[:, 20:] = np.linspace(60, 30, 40)[:, None, None]  # from above `high` to above `low`
    assert np.asarray(canny(fading))[..., 0].any(1).all()
    fading[:, 20:] = np.linspace(49, 30, 40)[:, None, None]  # nowhere above `high`
    assert not np.asarray(canny(fading)).any()


def test_no_picture() -> None:
    wrong: Any = "photo.png"
    with pytest.raises(BadRequest, match="control_image is str, expected a PIL image"):
        canny(wrong)
