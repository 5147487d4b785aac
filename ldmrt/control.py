"""What ControlNets are to do for a request (Zhang et al. 2023, arXiv 2302.05543): checked, and complete."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ldmrt.conditioning import Picture, rgb
from ldmrt.errors import BadRequest

Numbers = float | Sequence[float]


@dataclass(frozen=True, eq=False)
class Control:
    """One ControlNet's part in a request.

    Attributes:
        name: the ControlNet's.
        picture: (3, H, W) float32 in [0, 1].
        scale: what its residuals are multiplied by.
        start: the share of the steps after which it begins, 0 to 1.
        end: the share of the steps after which it ends.
    """

    name: str
    picture: torch.Tensor
    scale: float
    start: float
    end: float

    def scales(self, evaluations: int) -> torch.Tensor:
        """(evaluations,) float32: the scale at each evaluation of the model, 0 where it lies outside of start to end even in part."""
        inside = [self.start <= i / evaluations and (i + 1) / evaluations <= self.end for i in range(evaluations)]
        return self.scale * torch.tensor(inside, dtype=torch.float32)

    def conditioning(self, evaluations: int, device: torch.device) -> dict[str, torch.Tensor]:
        """The inputs of the ControlNet that are not the U-Net's too, for one image."""
        scales = self.scales(evaluations)
        return {"controlnet_cond": self.picture.to(device), "conditioning_scale": scales.to(device)}


def resolve(
    known: Sequence[str],
    size: tuple[int, int],
    *,
    pictures: Picture | Sequence[Picture | None] | None,
    scale: Numbers = 1.0,
    start: Numbers = 0.0,
    end: Numbers = 1.0,
) -> tuple[Control, ...]:
    """The ControlNets that a request uses.

    Args:
        known: the names of the bundle's ControlNets, in order.
        size: (width, height) in pixels.
        pictures: one for each ControlNet, None for one that is not used; a picture alone where there is one ControlNet.
        scale: one for all, or one for each.
        start: the same.
        end: the same.

    Raises:
        BadRequest: the bundle has no ControlNet, or the pictures are not as many, or a number is out of range.
    """
    if pictures is None:
        return ()
    if not known:
        raise BadRequest(
            "a control image was given, and this bundle has no ControlNet; to add one: "
            "ldmrt build-engines MODEL --out DIR --controlnet PATH",
            param="control_image",
        )
    given = list(pictures) if isinstance(pictures, Sequence) else [pictures]
    if len(given) != len(known):
        raise BadRequest(
            f"there are {len(given)} control images, expected {len(known)}, one for each ControlNet of the bundle: {', '.join(known)}",
            param="control_image",
        )
    scales, starts, ends = (
        _each(name, values, len(known))
        for name, values in (("controlnet_scale", scale), ("control_start", start), ("control_end", end))
    )
    for begin, stop in zip(starts, ends, strict=True):
        if not 0 <= begin < stop <= 1:
            raise BadRequest(
                f"a ControlNet is to be used from {begin:g} to {stop:g} of the steps, expected 0 <= start < end <= 1",
                param="control_start",
            )
    return tuple(
        Control(name, rgb(picture, size, param="control_image"), weight, begin, stop)
        for name, picture, weight, begin, stop in zip(known, given, scales, starts, ends, strict=True)
        if picture is not None
    )


def _each(name: str, values: Numbers, count: int) -> list[float]:
    """A number for each ControlNet.

    Raises:
        BadRequest: there are fewer or more, or one is no finite number.
    """
    listed = list(values) if isinstance(values, Sequence) else [values] * count
    if len(listed) != count:
        raise BadRequest(
            f"there are {len(listed)} values of {name} for {count} ControlNets, expected one for each", param=name
        )
    for value in listed:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
            raise BadRequest(f"{name} is {value!r}, expected a number", param=name)
    return [float(value) for value in listed]
