"""What a pipeline is opened with: which bundle, on which device, on which engine kind."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import torch

from ldmrt.bundle import Bundle
from ldmrt.config import parse_device
from ldmrt.errors import BadRequest, EngineMismatch
from ldmrt.loader import kinds_of

T = TypeVar("T")


def builtin_bundle() -> Path:
    """The folder of the built-in shapes model, which is a diffusers model and a bundle at once."""
    return Path(__file__).parent / "builtin" / "shapes"


def device_of(device: str | torch.device | None) -> torch.device:
    """The device to run on.

    Raises:
        BadRequest: it is not one that ldmrt runs on, or it is not there.
    """
    name = parse_device("auto" if device is None else str(device))
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = torch.device(name)
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise BadRequest(
            f"device {name!r} was asked for, and torch {torch.__version__} sees {torch.cuda.device_count()} GPUs here; use cpu",
            param="device",
        )
    return found


def first_that_loads(load: Callable[[str | None], T], bundle: Bundle, engine: str | None) -> T:
    """What opens on the engine kind that was asked for, or on one that may take its place; says so.

    Args:
        load: opens it on an engine kind, and fails where that cannot run.
        bundle: has the kinds.
        engine: the one that was asked for; None for the first there is.

    Raises:
        EngineMismatch: none of them can run here; the last one's.
    """
    kinds = kinds_of(bundle)
    order = kinds if engine is None else [engine, *kinds[kinds.index(engine) + 1 if engine in kinds else 0 :]]
    for kind, following in pairwise([*order, None]):
        try:
            return load(kind)
        except EngineMismatch as error:
            if following is None:
                raise
            # Of whoever opens a pipeline, with `Pipeline.from_bundle`.
            warnings.warn(f"{following} runs instead of {kind}, which cannot: {error}", stacklevel=3)
    return load(engine)  # there is none, and this says so
