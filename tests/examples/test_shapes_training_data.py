"""What the shapes model's companions learn from: masks, edges, outlines, small pictures, narrowed weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

generator = pytest.importorskip("generator")
edges = pytest.importorskip("edges")
masks = pytest.importorskip("masks")
outlines = pytest.importorskip("outlines")
degradation = pytest.importorskip("degradation")
narrowing = pytest.importorskip("narrowing")


def layouts(count: int) -> list[Any]:
    rng = np.random.default_rng(3)
    return [generator.sample_layout(generator.sample_training_scene(rng), rng) for _ in range(count)]


def test_masks_are_of_every_kind() -> None:
    rng = np.random.default_rng(0)
    shares = [masks.sample_mask(layout, rng).mean() for layout in layouts(60)]
    assert min(shares) > 0
    assert 1.0 in shares
    assert np.median(shares) < 0.5


def test_edges_lie_where_the_colours_change() -> None:
    rng = np.random.default_rng(0)
    for layout in layouts(10):
        found = edges.draw_edges(layout, rng)
        picture = generator.draw(layout).astype(int)
        changes = np.zeros(found.shape, dtype=bool)
        changes[1:-1, 1:-1] = [
            [np.ptp(picture[y - 1 : y + 2, x - 1 : x + 2], axis=(0, 1)).max() > 0 for x in range(1, 127)]
            for y in range(1, 127)
        ]
        assert not (found & ~changes).any()
        assert found.sum() > 2 * min(box.side for box in layout.boxes)


def test_an_outline_is_the_border_of_its_shape() -> None:
    for shape in ("circle", "square"):
        whole, outline = generator.shape_mask(shape, 56), outlines.outline_mask(shape, 56)
        inner = generator.shape_mask(shape, 56 - 2 * outlines.WIDTH)
        padded = np.pad(inner, outlines.WIDTH)
        assert (
            np.abs(whole - padded - outline).mean() < 0.02
        )  # drawn anew, the inner shape's border differs in part of a pixel


def test_small_pictures() -> None:
    picture = generator.draw(layouts(1)[0])
    small = degradation.shrink(picture, np.random.default_rng(0))
    assert small.shape == (32, 32, 3)
    assert np.abs(small.mean(axis=(0, 1)) - picture.mean(axis=(0, 1))).max() < 2
    several = torch.zeros(64, 3, 32, 32)
    noisy = degradation.add_noise(several, torch.Generator().manual_seed(0)).std(dim=(1, 2, 3))
    assert (noisy == 0).any()
    assert 0.1 < noisy.max() <= degradation.GREATEST_NOISE * 1.05


def test_narrowed_weights() -> None:
    """The first channels of each group, in layers that read one or two of the others; new inputs count for nothing."""
    wide = {
        "conv.weight": torch.randn(32, 4, 3, 3),
        "join.weight": torch.randn(32, 96, 1, 1),
        "norm.bias": torch.arange(32.0),
    }
    into = {
        "conv.weight": torch.zeros(16, 9, 3, 3),
        "join.weight": torch.zeros(16, 40, 1, 1),
        "norm.bias": torch.zeros(16),
    }
    made = narrowing.narrow(wide, into, {64: 24, 32: 16})
    of_32 = [4 * group + place for group in range(8) for place in range(2)]
    of_64 = [8 * group + place for group in range(8) for place in range(3)]
    assert made["norm.bias"].tolist() == of_32
    assert torch.equal(made["conv.weight"][:, :4], wide["conv.weight"][of_32])
    assert not made["conv.weight"][:, 4:].any()
    chosen = [*of_64, *(64 + place for place in of_32)]
    torch.testing.assert_close(made["join.weight"], wide["join.weight"][of_32][:, chosen] * (96 / 40) ** 0.5)
