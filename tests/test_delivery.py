"""The ways in which pictures are handed out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ldmrt.delivery import check_output_type, delivered
from ldmrt.errors import BadRequest, NumericalError


def test_the_same_picture_either_way() -> None:
    images = torch.linspace(-1.2, 1.2, 2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    floats, pictures = delivered(images, "np"), delivered(images, "pil")
    assert floats.shape == (2, 4, 5, 3)
    assert (floats.min(), floats.max()) == (0.0, 1.0)
    assert [picture.size for picture in pictures] == [(5, 4)] * 2
    assert abs(np.stack([np.asarray(picture) for picture in pictures]) / 255 - floats).max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize("output_type", ["np", "pil"])
def test_nan_is_no_picture(output_type: str) -> None:
    with pytest.raises(NumericalError):
        delivered(torch.full((1, 3, 2, 2), float("nan")), output_type)  # type: ignore[arg-type]


def test_no_other_way() -> None:
    for known in ("pil", "np", "latent"):
        check_output_type(known)
    for other in ("pt", "", None, 3):
        with pytest.raises(BadRequest, match="expected pil, np or latent") as caught:
            check_output_type(other)
        assert caught.value.param == "output_type"
