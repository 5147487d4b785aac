"""ldmrt: a compiled inference runtime for latent diffusion models.

import ldmrt
pipe = ldmrt.Pipeline.from_bundle()                     # the built-in model
pipe("a red circle on a white background").images[0].save("circle.png")
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from ldmrt.errors import (
    BadRequest,
    BuildError,
    BundleError,
    Cancelled,
    DeadlineExceeded,
    EngineMismatch,
    LdmrtError,
    NumericalError,
    Overloaded,
    Quarantined,
    Unavailable,
)

if TYPE_CHECKING:
    from ldmrt.bundle import Bundle
    from ldmrt.companions import companion
    from ldmrt.export.build import build_engines
    from ldmrt.pipeline import Pipeline, Result

__version__ = "0.1.0"

logging.getLogger("ldmrt").addHandler(logging.NullHandler())  # what is logged is shown where the application says so

# What is heavy is imported when it is first used; `build_engines` needs the packages of `ldmrt[export]`.
_LAZY = {
    "Bundle": "ldmrt.bundle",
    "Pipeline": "ldmrt.pipeline",
    "Result": "ldmrt.pipeline",
    "build_engines": "ldmrt.export.build",
    "companion": "ldmrt.companions",
}

__all__ = [
    "BadRequest",
    "BuildError",
    "Bundle",
    "BundleError",
    "Cancelled",
    "DeadlineExceeded",
    "EngineMismatch",
    "LdmrtError",
    "NumericalError",
    "Overloaded",
    "Pipeline",
    "Quarantined",
    "Result",
    "Unavailable",
    "build_engines",
    "companion",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'ldmrt' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
