"""What a request for an upscaling model brings: a small picture, and how much noise it is given."""

from __future__ import annotations

import numbers
from dataclasses import dataclass

import torch

from ldmrt.components import CLASS_LABELS
from ldmrt.conditioning import Picture, rgb
from ldmrt.errors import BadRequest
from ldmrt.manifest import ModelRecord
from ldmrt.network import LOW_RES
from ldmrt.schedule import NoiseSchedule


@dataclass(frozen=True, eq=False)
class Upscaling:
    """A picture to be drawn larger.

    Attributes:
        picture: (3, h, w) float32 in [-1, 1], a pixel for each latent cell.
        schedule: the noise schedule by which it is given noise; None for a model that takes it as it is.
        noise_level: a timestep of the schedule.
    """

    picture: torch.Tensor
    schedule: NoiseSchedule | None
    noise_level: int

    @property
    def noised_channels(self) -> int:
        """The channels of the picture that noise is added to; 0 for none."""
        return 0 if self.schedule is None else self.picture.shape[0]

    def conditionings(
        self, count: int, noise: torch.Tensor | None, device: torch.device
    ) -> list[dict[str, torch.Tensor]]:
        """The U-Net's inputs for each image: `low_res_image` (3, h, w), and the noise level as `class_labels`, an int64.

        Noise is added as in training (Ho et al. 2021, arXiv 2106.15282, section 4.2): sqrt(a) x + sqrt(1 - a) noise.

        Args:
            count: images.
            noise: (images, 3, h, w) float32, standard normal, for `noised_channels`.
            device: where the engines run.
        """
        if self.schedule is None or noise is None:
            return [{LOW_RES: self.picture.to(device)}] * count
        share = float(self.schedule.alphas_cumprod[self.noise_level])
        noised = share**0.5 * self.picture + (1 - share) ** 0.5 * noise
        level = torch.tensor(self.noise_level, device=device)
        return [{LOW_RES: one, CLASS_LABELS: level} for one in noised.to(device)]


def resolve(
    model: ModelRecord, size: tuple[int, int], image: Picture | torch.Tensor | None, noise_level: int | None
) -> Upscaling | None:
    """The picture of a request and its noise level, or None for a model that draws none larger.

    Args:
        model: what it takes.
        size: (width, height) in pixels of what is drawn.
        image: the picture; it is resized to a pixel for each latent cell.
        noise_level: how much noise it is given; None for the model's default.

    Raises:
        BadRequest: the model needs a picture, or has no use for a noise level, or knows no such level.
    """
    record = model.upscaling
    if noise_level is not None and (record is None or record.schedule is None):
        raise BadRequest(
            f"noise_level was given, and {model.name} gives its picture no noise; leave it out", param="noise_level"
        )
    if record is None:
        return None
    width, height = size[0] // model.downscale, size[1] // model.downscale
    if image is None:
        raise BadRequest(
            f"image is missing: {model.name} draws a small picture larger; give one of {width}x{height} pixels",
            param="image",
        )
    if isinstance(image, torch.Tensor):
        raise BadRequest(
            f"image is a tensor of latents, and {model.name} draws a picture larger, expected a PIL image or an array of uint8",
            param="image",
        )
    level = record.noise_level if noise_level is None else noise_level
    if isinstance(level, bool) or not isinstance(level, numbers.Integral) or not 0 <= level <= record.max_noise_level:
        raise BadRequest(
            f"noise_level is {level!r}, expected a whole number, 0 to {record.max_noise_level}", param="noise_level"
        )
    schedule = None if record.schedule is None else NoiseSchedule.from_dict(record.schedule)
    return Upscaling(rgb(image, (width, height), param="image") * 2 - 1, schedule, int(level))
