"""What a request for a model of semantic maps must bring. Its pictures are in tests/export/test_original_config.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldmrt.bundle import Bundle
from ldmrt.errors import BadRequest
from ldmrt.manifest import ModelRecord
from ldmrt.segmentation import resolve

LABELS = np.arange(12, dtype=np.uint8).reshape(3, 4)


@pytest.fixture
def record() -> ModelRecord:
    model = Bundle.open(Path(__file__).parents[1] / "ldmrt" / "builtin" / "shapes").manifest.model
    return model.model_copy(update={"segments": 12, "name": "maps"})


def test_a_map_takes_the_size_that_is_drawn(record: ModelRecord) -> None:
    """Each pixel has the class of the one that lies over it, as Pillow finds it."""
    found = resolve(record, (8, 6), LABELS)["segmentation"]
    expected = np.asarray(Image.fromarray(LABELS).resize((8, 6), Image.Resampling.NEAREST))
    assert found.dtype == torch.int64
    assert torch.equal(found, torch.from_numpy(expected.astype(np.int64))[None])


@pytest.mark.parametrize("form", ["array", "wide", "grey", "palette"])
def test_forms(form: str, record: ModelRecord) -> None:
    palette = Image.fromarray(LABELS).convert("P")
    palette.putdata(LABELS.flatten().tolist())
    forms: dict[str, Any] = {
        "array": LABELS,
        "wide": LABELS.astype(np.int64),
        "grey": Image.fromarray(LABELS),
        "palette": palette,
    }
    found = resolve(record, (4, 3), forms[form])["segmentation"]
    assert found.tolist() == [LABELS.tolist()]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "segmentation is missing: maps draws a semantic map of 12 classes"),
        (LABELS + 1, "segmentation has classes from 1 to 12, expected 0 to 11"),
        (LABELS.astype(np.int8) - 1, "classes from -1 to 10"),
        (LABELS[:0], "segmentation has no pixel"),
        (LABELS.astype(np.float32), r"an array of float32 \(3, 4\), expected whole numbers"),
        (Image.new("RGB", (4, 3)), r"an array of uint8 \(3, 4, 3\), expected whole numbers \(H, W\)"),
    ],
)
def test_what_is_no_map(given: Any, message: str, record: ModelRecord) -> None:
    with pytest.raises(BadRequest, match=message) as caught:
        resolve(record, (8, 8), given)
    assert caught.value.param == "segmentation"


def test_a_model_that_takes_none(record: ModelRecord) -> None:
    other = record.model_copy(update={"segments": None})
    assert resolve(other, (8, 8), None) == {}
    with pytest.raises(BadRequest, match="segmentation was given, and maps takes no semantic map"):
        resolve(other, (8, 8), LABELS)
