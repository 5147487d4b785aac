"""A Stable Diffusion 1.x checkpoint of the diffusers layout as one file of the original layout, for programs that read only that."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from ldmrt import original


def write_original_layout(folder: Path, out: Path) -> None:
    """Write the file.

    Args:
        folder: a model in the diffusers layout, of one text encoder.
        out: safetensors.
    """
    save_file({name: tensor.contiguous() for name, tensor in _in_original_layout(folder)}, out)


def _in_original_layout(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint by its original name."""
    unet = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    for name, called in original.unet(unet).items():
        yield f"model.diffusion_model.{called}", unet[name]
    vae = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    for name, called in original.vae(vae).items():
        # Its attention is made of convolutions of one pixel there.
        pixel = ".attn_1." in called and vae[name].dim() == 2
        yield f"first_stage_model.{called}", vae[name][:, :, None, None] if pixel else vae[name]
    for name, tensor in load_file(folder / "text_encoder" / "model.safetensors").items():
        # transformers has left the middle out since its version 5.
        yield f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}", tensor
