"""Which noise levels the denoiser is trained on the most, and how much each counts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Emphasis:
    """Which noise levels are trained on the most.

    Attributes:
        power: How much the weight of a time step grows with its noise; see `noise_weights`.
        start: Half of the time steps are drawn from here on, the others from all.
    """

    power: float
    start: int


LAYOUT = Emphasis(power=0.9, start=600)
DETAIL = Emphasis(power=0.6, start=300)


def noise_weights(alphas: Tensor, power: float) -> Tensor:
    """Weight of the squared noise error for each time step, from the cumulative alphas (1000,).

    Capped signal-to-noise weighting, raised at high noise, where the layout, the colours and
    the relation are decided and where an error in the noise is a large error in the picture.
    """
    snr = alphas / (1 - alphas)
    return snr.clamp(max=5) / snr * alphas.pow(-power)
