"""A narrower network made of a trained one's weights, to be trained on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

GROUPS = 8  # of the norms: as many channels of each group are kept


def kept(wide: int, narrow: int) -> Tensor:
    """Which of a layer's channels are kept: the first of each group; for attention so many of each head."""
    return torch.arange(wide).view(-1, wide // GROUPS)[:, : narrow // GROUPS].flatten()


def narrow(weights: Mapping[str, Tensor], into: Mapping[str, Tensor], widths: Mapping[int, int]) -> dict[str, Tensor]:
    """Weights of a narrower network of the same layers.

    Args:
        weights: the trained network's.
        into: the narrower network's, for its shapes. Inputs beyond the trained network's (channels behind the latents) get zeros.
        widths: the trained network's widths and what becomes of them. Other sizes are multiples of them, or sums of two: of what the
            decoder holds and of what a skip connection brings, which is no wider.
    """
    units = {wide: kept(wide, slim) for wide, slim in widths.items()}

    def indices(wide: int, slim: int) -> Tensor:
        if wide == slim:
            return torch.arange(wide)
        for unit, found in units.items():
            if wide % unit == 0 and wide // unit * len(found) == slim:
                return torch.cat([found + start for start in range(0, wide, unit)])
        first, second = next(
            (a, b) for a in units for b in units if a >= b and a + b == wide and len(units[a]) + len(units[b]) == slim
        )
        return torch.cat([units[first], units[second] + first])

    made = {}
    for name, shape in ((name, tensor.shape) for name, tensor in into.items()):
        tensor = weights[name].float()
        if tensor.dim() > 1 and shape[1] > tensor.shape[1]:
            more = shape[1] - tensor.shape[1]
            tensor = torch.cat([tensor, tensor.new_zeros(tensor.shape[0], more, *tensor.shape[2:])], dim=1)
        for dim in range(min(2, tensor.dim())):
            tensor = tensor.index_select(dim, indices(tensor.shape[dim], shape[dim]))
        # As many inputs fewer would make smaller sums: by their root where they are independent.
        before = weights[name].shape[1] if tensor.dim() > 1 else 1
        made[name] = (
            tensor * (before / tensor.shape[1]) ** 0.5 if tensor.dim() > 1 and tensor.shape[1] < before else tensor
        )
    return made
