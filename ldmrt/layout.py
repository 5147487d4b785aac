"""What a request for a model of layouts brings: objects, each a class and a box of the picture, as the tokens that its encoder reads.

Rombach et al. 2022, arXiv 2112.10752, section 4.3.1. The tokens are those of the original code's bounding boxes (taming-transformers,
`objects_bbox`): for each object its class and the two corners of its box, then corners of the part of the picture that is shown, which is
all of it. A corner is a cell of a square grid of as many cells as there are tokens, counted by rows. The last token stands for nothing.
"""

from __future__ import annotations

import json
import math
import numbers
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ldmrt.components import LAYOUT
from ldmrt.errors import BadRequest
from ldmrt.manifest import LayoutRecord, ModelRecord

Layout = Sequence[Mapping[str, Any]]

_FORM = '{"class": 12, "box": [left, top, width, height]}, the box in shares of the picture'
# A layout has some kilobytes.
_LARGEST = 1 << 20


def resolve(model: ModelRecord, layout: Layout | None) -> dict[str, torch.Tensor]:
    """The U-Net's input `layout` (tokens,) int64; empty for a model that takes none.

    Args:
        model: how many objects it takes, and how many tokens it knows.
        layout: the objects, in an order that may matter little: `{"class": N, "box": [left, top, width, height]}`, from 0 to 1. N is the
            token of the class, as the model's data numbers them.

    Raises:
        BadRequest: the model needs a layout and it is not there, or it has no use for it, or it is none, or it has too many objects.
    """
    if model.layout is None:
        if layout is not None:
            raise _bad(f"layout was given, and {model.name} takes none; leave it out")
        return {}
    if layout is None:
        raise _bad(
            f"layout is missing: {model.name} draws up to {model.layout.objects} objects; give a list of {_FORM}, or an empty one"
        )
    if not isinstance(layout, Sequence) or isinstance(layout, str | bytes):
        raise _bad(f"layout is {str(layout)[:40]!r}, expected a list of {_FORM}")
    if len(layout) > model.layout.objects:
        raise _bad(f"layout has {len(layout)} objects, expected at most {model.layout.objects}; leave some out")
    none = model.layout.tokens - 1
    tokens = [token for number, each in enumerate(layout) for token in _object(each, number, model.layout)]
    tokens += [none] * (3 * model.layout.objects - len(tokens))
    return {LAYOUT: torch.tensor([*tokens, *_corners((0.0, 0.0, 1.0, 1.0), model.layout)])}


def read(path: Path) -> Layout:
    """The layout in a JSON file; `resolve` says whether it is one.

    Raises:
        BadRequest: the file cannot be read, or is no JSON.
    """
    try:
        size = path.stat().st_size
        content = path.read_bytes() if size <= _LARGEST else b""
    except OSError as error:
        raise _bad(f"cannot read {path}: {error.strerror or error}; give a JSON file, a list of {_FORM}") from error
    if size > _LARGEST:
        raise _bad(f"{path} has {size} bytes, expected at most {_LARGEST}: a list of {_FORM}")
    try:
        found: Layout = json.loads(content)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:80]
        raise _bad(f"{path} is not JSON ({reason}); expected a list of {_FORM}") from error
    return found


def _object(given: object, number: int, known: LayoutRecord) -> tuple[int, int, int]:
    where = f"object {number} of layout"
    if not isinstance(given, Mapping) or given.keys() != {"class", "box"}:
        found = ", ".join(map(str, given))[:60] if isinstance(given, Mapping) else str(given)[:60]
        raise _bad(f"{where} has {found!r}, expected {_FORM}")
    label, box = given["class"], given["box"]
    whole = -1 if isinstance(label, bool) or not isinstance(label, numbers.Integral) else operator.index(label)
    if not 0 <= whole < known.tokens - 1:
        raise _bad(f"{where} has the class {str(label)[:40]!r}, expected a whole number, 0 to {known.tokens - 2}")
    if not isinstance(box, Sequence) or len(box) != 4 or not all(map(_is_share, box)):
        raise _bad(f"{where} has the box {str(box)[:60]!r}, expected [left, top, width, height], each from 0 to 1")
    left, top, width, height = map(float, box)
    if width == 0 or height == 0 or left == 1 or top == 1:
        raise _bad(f"{where} has the box {str(box)[:60]!r}, of which nothing lies in the picture; leave the object out")
    # What stands out of the picture is cut off.
    return whole, *_corners((left, top, min(width, 1 - left), min(height, 1 - top)), known)


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _corners(box: tuple[float, float, float, float], known: LayoutRecord) -> tuple[int, int]:
    """The tokens of the first and the last corner of a box."""
    left, top, width, height = box
    side = math.isqrt(known.tokens)
    columns, rows = (
        [round(value * (side - 1)) for value in ends] for ends in ((left, left + width), (top, top + height))
    )
    return rows[0] * side + columns[0], rows[1] * side + columns[1]


def _bad(message: str) -> BadRequest:
    return BadRequest(message, param="layout")
