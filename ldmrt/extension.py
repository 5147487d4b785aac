"""How far a picture is continued: what `ldmrt.outpainting` is asked for, known without torch."""

from __future__ import annotations

from typing import NamedTuple


class Extension(NamedTuple):
    """By how many pixels a picture is extended."""

    left: int = 0
    right: int = 0
    top: int = 0
    bottom: int = 0
