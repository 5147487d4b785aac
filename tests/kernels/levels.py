"""The C++ bodies at each instruction set that this processor has."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest

from ldmrt.kernels import native


def at_levels(body: Callable[..., Any]) -> list[Any]:
    """Parameters: the body with each instruction set forced, in the order of `native.LEVELS`."""
    return [pytest.param(_at(body, level), id=f"native-{name}") for level, name in enumerate(native.LEVELS)]


def _at(body: Callable[..., Any], level: int) -> Callable[..., Any]:
    @wraps(body)
    def run(*arguments: Any, **options: Any) -> Any:
        library = native.library()
        if library is None:
            pytest.skip(str(native.why_not()))
        highest = int(library.ldmrt_highest_level())
        if not library.ldmrt_use_level(level):
            pytest.skip(f"this processor has no {native.LEVELS[level]}")
        try:
            return body(*arguments, **options)
        finally:
            assert library.ldmrt_use_level(highest)

    return run
