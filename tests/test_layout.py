"""What a request for a model of layouts must bring, as tokens. Its pictures are in tests/export/test_original_config.py."""

from __future__ import annotations

import json
from decimal import ROUND_HALF_EVEN, Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, strategies

from ldmrt.bundle import Bundle
from ldmrt.cli import app
from ldmrt.errors import BadRequest
from ldmrt.layout import read, resolve
from ldmrt.manifest import LayoutRecord, ModelRecord

SIXTEENTHS = strategies.integers(0, 16)
OBJECTS = strategies.tuples(strategies.integers(0, 8190), *[SIXTEENTHS] * 4).filter(
    lambda o: o[1] < 16 > o[2] and o[3] and o[4]
)


def model(**layout: int) -> ModelRecord:
    known = Bundle.open(Path(__file__).parents[1] / "ldmrt" / "builtin" / "shapes").manifest.model
    return known.model_copy(update={"layout": LayoutRecord(**layout) if layout else None, "name": "boxes"})


@pytest.fixture
def record() -> ModelRecord:
    """The published model's: 92 tokens of 8192."""
    return model(objects=30, tokens=8192)


def tokens(objects: list[tuple[int, int, int, int, int]], *, most: int, known: int) -> list[int]:
    """By the rules, in exact numbers: the boxes are in sixteenths, which floats hold."""
    side = next(side for side in range(known) if (side + 1) ** 2 > known)

    def cell(x: Fraction, y: Fraction) -> int:
        column, row = (
            int((Decimal(value.numerator) * (side - 1) / value.denominator).to_integral_value(ROUND_HALF_EVEN))
            for value in (x, y)
        )
        return row * side + column

    found = []
    for label, *box in objects:
        left, top, width, height = (Fraction(number, 16) for number in box)
        right, bottom = min(left + width, Fraction(1)), min(top + height, Fraction(1))
        found += [label, cell(left, top), cell(right, bottom)]
    found += [known - 1] * 3 * (most - len(objects))
    return [*found, 0, side * side - 1]


@given(strategies.lists(OBJECTS, max_size=30))
def test_objects_become_tokens(objects: list[tuple[int, int, int, int, int]]) -> None:
    layout = [{"class": label, "box": [number / 16 for number in box]} for label, *box in objects]
    found = resolve(model(objects=30, tokens=8192), layout)["layout"]
    assert found.dtype == torch.int64
    assert found.tolist() == tokens(objects, most=30, known=8192)


def test_by_hand() -> None:
    """The example of the original code: of 16 tokens, 4 x 4 cells, the second row's third is 6, the last 15."""
    boxes = [{"class": 2, "box": [2 / 3, 1 / 3, 1 / 3, 2 / 3]}]
    assert resolve(model(objects=2, tokens=16), boxes)["layout"].tolist() == [2, 6, 15, 15, 15, 15, 0, 15]
    assert resolve(model(objects=1, tokens=16), [])["layout"].tolist() == [15, 15, 15, 0, 15]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "layout is missing: boxes draws up to 30 objects; give a list of"),
        ("a cat", "layout is 'a cat', expected a list"),
        ({"class": 1, "box": [0, 0, 1, 1]}, "expected a list"),
        ([{"class": 1, "box": [0, 0, 1, 1]}] * 31, "layout has 31 objects, expected at most 30; leave some out"),
        ([7], "object 0 of layout has '7', expected"),
        ([{"class": 1}], "object 0 of layout has 'class', expected"),
        ([{"class": 1, "box": [0, 0, 1, 1], "bax": 2}], "has 'class, box, bax', expected"),
        ([{"class": True, "box": [0, 0, 1, 1]}], "has the class 'True', expected a whole number, 0 to 8190"),
        ([{"class": 8191, "box": [0, 0, 1, 1]}], "has the class '8191', expected"),
        ([{"class": "cat", "box": [0, 0, 1, 1]}], "has the class 'cat', expected"),
        ([{"class": 1, "box": [0, 0, 1]}], r"has the box '\[0, 0, 1\]', expected \[left, top, width, height\]"),
        ([{"class": 1, "box": [0, 0, 1, 1.5]}], "each from 0 to 1"),
        ([{"class": 1, "box": [0, 0, 1, float("nan")]}], "each from 0 to 1"),
        ([{"class": 1, "box": [0, 0, 1, "1"]}], "each from 0 to 1"),
        ([{"class": 1, "box": [0, 0, 1, 10**400]}], "each from 0 to 1"),
        ([{"class": 10**400, "box": [0, 0, 1, 1]}], "has the class '1000"),
        ([{"class": 1, "box": [0, 0, 0, 1]}], "of which nothing lies in the picture"),
        ([{"class": 1, "box": [0, 1, 1, 1]}], "of which nothing lies in the picture"),
    ],
)
def test_what_is_no_layout(given: Any, message: str, record: ModelRecord) -> None:
    with pytest.raises(BadRequest, match=message) as caught:
        resolve(record, given)
    assert caught.value.param == "layout"
    assert "\n" not in str(caught.value)


def test_a_model_that_takes_none() -> None:
    assert resolve(model(), None) == {}
    with pytest.raises(BadRequest, match="layout was given, and boxes takes none; leave it out"):
        resolve(model(), [])


def test_a_request_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "layout.json"
    path.write_text(json.dumps([{"class": 3, "box": [0, 0, 1, 0.5]}]))
    with pytest.raises(SystemExit) as ended:
        app(["generate", "a red circle", "--layout", str(path), "--out", str(tmp_path / "p.png")], prog_name="ldmrt")
    assert ended.value.code
    assert "layout was given, and shapes takes none; leave it out" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == [path]


def test_files(tmp_path: Path, record: ModelRecord) -> None:
    path = tmp_path / "layout.json"
    path.write_text(json.dumps([{"class": 3, "box": [0, 0, 1, 0.5]}]))
    assert resolve(record, read(path))["layout"][:3].tolist() == [3, 0, 44 * 90 + 89]
    path.write_text("[{")
    with pytest.raises(BadRequest, match=r"layout.json is not JSON \(.*\); expected a list of"):
        read(path)
    path.write_text("[" * 100_000)
    with pytest.raises(BadRequest, match="is not JSON"):
        read(path)
    path.write_text(" " * (1 << 21))
    with pytest.raises(BadRequest, match="has 2097152 bytes, expected at most 1048576"):
        read(path)
    with pytest.raises(BadRequest, match=r"cannot read .*: No such file or directory; give a JSON file"):
        read(tmp_path / "missing.json")
