"""Which of a sampler's steps are made: all, the last ones for a picture that is there, or those of one of several models."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ldmrt.errors import BadRequest
from ldmrt.samplers.table import Float64


@dataclass(frozen=True, kw_only=True)
class Span:
    """A part of the steps, counted and rounded as diffusers does.

    Attributes:
        strength: the share of the steps that are made, the last ones, rounded down (Meng et al. 2021, arXiv 2108.01073, as t_0 there).
        denoising_start: the share of the training timesteps, from the noisy end, that are left to another model.
        denoising_end: the share after which another model takes over.
    """

    strength: float = 1.0
    denoising_start: float = 0.0
    denoising_end: float = 1.0

    def steps(self, timesteps: Float64, train_steps: int) -> tuple[int, int]:
        """The first step that is made, and the one behind the last.

        Args:
            timesteps: (steps,), at which the steps begin, from noisy to clean.
            train_steps: training timesteps.

        Raises:
            BadRequest: there is no step among them.
        """
        count = len(timesteps)
        begin = max(count - int(count * self.strength), before(self.denoising_start, timesteps, train_steps))
        end = before(self.denoising_end, timesteps, train_steps)
        if begin >= end:
            param, found = (
                ("strength", f"strength {self.strength:g}")
                if self == Span(strength=self.strength)
                else ("denoising_end", f"the part from {self.denoising_start:g} to {self.denoising_end:g}")
            )
            raise BadRequest(f"{found} of {count} steps is no step at all; ask for more of them", param=param)
        return begin, end


WHOLE = Span()


def before(share: float, timesteps: Float64, train_steps: int) -> int:
    """How many steps begin in the first share of the training timesteps, from the noisy end."""
    if not 0 < share < 1:
        return len(timesteps) if share else 0
    return int(np.count_nonzero(timesteps >= round(train_steps - share * train_steps)))
