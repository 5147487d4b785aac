"""What a request for an inpainting model brings: the picture, and the mask of what is to be drawn anew."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ldmrt.conditioning import Encode, Picture, mask, rgb
from ldmrt.errors import BadRequest
from ldmrt.manifest import ModelRecord


@dataclass(frozen=True, eq=False)
class Inpainting:
    """A picture to be drawn into.

    Attributes:
        picture: (3, H, W) float32 in [-1, 1].
        mask: (1, H, W) float32, 1 for what is drawn anew, 0 for what stays.
        masked_pixel: what the model is shown in the place of a pixel under the mask.
    """

    picture: torch.Tensor
    mask: torch.Tensor
    masked_pixel: float

    def conditionings(self, downscale: int, noise: torch.Tensor, encode: Encode) -> list[dict[str, torch.Tensor]]:
        """The U-Net's inputs for each image: `mask` (1, h, w), and `masked_image_latents` (C, h, w).

        Args:
            downscale: pixels per latent cell, each way.
            noise: (images, C, h, w) float32, standard normal, of what the encoder draws.
            encode: from a picture and the noise of its encoding to latents.
        """
        latents = encode(self.picture * (1 - self.mask) + self.masked_pixel * self.mask, noise)
        # As diffusers takes it: the pixel at the corner of each cell.
        cells = self.mask[:, ::downscale, ::downscale].to(latents.device)
        return [{"mask": cells, "masked_image_latents": one} for one in latents]


def resolve(
    model: ModelRecord,
    size: tuple[int, int],
    image: Picture | torch.Tensor | None,
    mask_image: Picture | None,
) -> Inpainting | None:
    """The picture and the mask of a request, or None for a model that is shown no mask (`ldmrt.blending` is for those).

    Raises:
        BadRequest: the model needs them and they are not there, or they are latents.
    """
    if not model.inpainting:
        return None
    if isinstance(image, torch.Tensor):
        raise BadRequest(
            f"image is a tensor of latents, and {model.name} masks a picture, expected a PIL image or an array of uint8",
            param="image",
        )
    if image is None or mask_image is None:
        missing = "image" if image is None else "mask_image"
        raise BadRequest(
            f"{missing} is missing: {model.name} is an inpainting model, give image and mask_image", param=missing
        )
    picture = rgb(image, size, param="image") * 2 - 1
    return Inpainting(picture, mask(mask_image, size, param="mask_image"), model.masked_pixel)
