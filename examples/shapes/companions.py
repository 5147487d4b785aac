"""The networks of the shapes model's companions, all of standard classes."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import ControlNetModel, UNet2DConditionModel, UNet2DModel, VQModel
from peft import LoraConfig
from safetensors.torch import save_file

import architecture

INPAINTING_WIDTHS = (64, 80, 96)
RANK = 6
# What the LoRA changes: an outline is a matter of convolutions rather than of attention.
_CHANGED = ("conv1", "conv2", "to_q", "to_k", "to_v", "to_out.0")


def build_first_stage() -> VQModel:
    """The first stage of the upscaler: (N, 3, 128, 128) pictures in [-1, 1] to (N, 3, 32, 32) latents, each one of 4096 codes."""
    return VQModel(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=3,
        num_vq_embeddings=4096,
        norm_num_groups=8,
        sample_size=128,
        mid_block_add_attention=False,
    )


def build_upscaler() -> UNet2DModel:
    """The denoiser of (N, 3, 32, 32) latents, given a picture of that size behind them."""
    return UNet2DModel(
        sample_size=32,
        in_channels=6,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(32, 56, 80),
        down_block_types=("DownBlock2D",) * 3,
        up_block_types=("UpBlock2D",) * 3,
        add_attention=False,
        norm_num_groups=8,
    )


def build_inpainting() -> UNet2DConditionModel:
    """The denoiser of (N, 4, 16, 16) latents, given the mask (1 channel) and the masked picture's latents (4) behind them."""
    config = {
        **architecture.build_unet().config,
        "in_channels": 2 * architecture.LATENT_CHANNELS + 1,
        "block_out_channels": INPAINTING_WIDTHS,
    }
    unet: UNet2DConditionModel = UNet2DConditionModel.from_config(config)
    return unet


def build_controlnet() -> ControlNetModel:
    """What steers the shapes model by (N, 3, 128, 128) pictures of edges; without attention, since edges say where, not what."""
    unet = architecture.build_unet().config
    return ControlNetModel(
        in_channels=architecture.LATENT_CHANNELS,
        down_block_types=("DownBlock2D",) * 3,
        mid_block_type="UNetMidBlock2D",
        block_out_channels=unet["block_out_channels"],
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=architecture.TEXT_WIDTH,
        attention_head_dim=4,
        conditioning_embedding_out_channels=(8, 16, 32, 48),
    )


def with_lora(base: Path, rank: int) -> UNet2DConditionModel:
    """The shapes model's U-Net with a LoRA that changes nothing yet, which alone is to be trained."""
    unet: UNet2DConditionModel = UNet2DConditionModel.from_pretrained(base / "unet", torch_dtype=torch.float32)
    unet.requires_grad_(requires_grad=False)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(_CHANGED)))
    return unet


def save_upscaler(folder: Path, stage: VQModel, unet: UNet2DModel) -> None:
    """Write the upscaler as a diffusers pipeline folder with float16 weights."""
    architecture.save_model(folder / "vqvae", stage)
    architecture.save_model(folder / "unet", unet)
    architecture.build_scheduler("v_prediction").save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "LDMSuperResolutionPipeline",
        "_diffusers_version": "0.30.0",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
        "vqvae": ["diffusers", "VQModel"],
    }
    architecture.write_json(folder / "model_index.json", index)
    architecture.write_json(folder / "ldmrt-defaults.json", {"num_inference_steps": 4})


def save_lora(path: Path, unet: UNet2DConditionModel) -> None:
    """Write what `with_lora` has learnt in diffusers' format, in float16."""
    weights = {
        f"unet.{name.replace('.default', '')}": value.half().contiguous()
        for name, value in unet.state_dict().items()
        if ".lora_" in name
    }
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(0o644)
