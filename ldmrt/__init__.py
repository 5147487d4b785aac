"""ldmrt: a compiled inference runtime for latent diffusion models."""

from __future__ import annotations

__version__ = "0.1.0"
