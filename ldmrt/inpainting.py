"""What a request for an inpainting model brings: the picture, and the mask of what is to be drawn anew."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ldmrt.bundle import ModelRecord
from ldmrt.conditioning import Picture, encode, mask, rgb
from ldmrt.engines.protocol import Engine
from ldmrt.errors import BadRequest


@dataclass(frozen=True, eq=False)
class Inpainting:
    """A picture to be drawn into.

    Attributes:
        picture: (3, H, W) float32 in [-1, 1].
        mask: (1, H, W) float32, 1 for what is drawn anew, 0 for what stays.
    """

    picture: torch.Tensor
    mask: torch.Tensor

    def conditionings(
        self, encoder: Engine, model: ModelRecord, noise: torch.Tensor, device: torch.device
    ) -> list[dict[str, torch.Tensor]]:
        """The U-Net's inputs for each image: `mask` (1, h, w), and `masked_image_latents` (C, h, w).

        Args:
            encoder: the VAE's.
            model: has the latents' scaling and size.
            noise: (images, C, h, w) float32, standard normal, of what the encoder draws.
            device: where the engines run.
        """
        seen = self.picture * (1 - self.mask) + model.masked_pixel * self.mask
        latents = encode(encoder, model, seen, noise, device)
        # As diffusers takes it: the pixel at the corner of each cell.
        cells = self.mask[:, :: model.downscale, :: model.downscale].to(device)
        return [{"mask": cells, "masked_image_latents": one} for one in latents]


def resolve(
    model: ModelRecord, size: tuple[int, int], image: Picture | None, mask_image: Picture | None
) -> Inpainting | None:
    """The picture and the mask of a request, or None for a model that takes none.

    Raises:
        BadRequest: the model needs them and they are not there, or it has no use for them.
    """
    given = {name: value for name, value in (("image", image), ("mask_image", mask_image)) if value is not None}
    if not model.inpainting:
        if given:
            name = next(iter(given))
            raise BadRequest(
                f"{name} was given, and {model.name} is no inpainting model, which alone takes one", param=name
            )
        return None
    if image is None or mask_image is None:
        missing = "image" if image is None else "mask_image"
        raise BadRequest(
            f"{missing} is missing: {model.name} is an inpainting model, give image and mask_image", param=missing
        )
    return Inpainting(rgb(image, size, param="image") * 2 - 1, mask(mask_image, size, param="mask_image"))
