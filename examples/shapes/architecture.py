"""The shapes model's networks, all of standard classes, and how they are written to a folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.modeling_utils import ModelMixin
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

import tokenizer as shapes_tokenizer

TOKENS = 20
TEXT_WIDTH = 128
LATENT_CHANNELS = 4
LATENT_SIDE = 16


def build_vae() -> AutoencoderKL:
    """The autoencoder: (N, 3, 128, 128) pictures in [-1, 1] to (N, 4, 16, 16) latents."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 96),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=128,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def build_text_encoder() -> CLIPTextModel:
    """The text encoder: (N, 20) token ids to (N, 20, 128) hidden states."""
    vocabulary = shapes_tokenizer.build_vocabulary()
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=vocabulary[shapes_tokenizer.START],
            eos_token_id=vocabulary[shapes_tokenizer.END],
            pad_token_id=vocabulary[shapes_tokenizer.END],
        )
    )


def build_unet() -> UNet2DConditionModel:
    """The denoiser of (N, 4, 16, 16) latents given (N, 20, 128) hidden states."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIDE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 128, 160),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
    )


@torch.no_grad()
def start_from_identity(unet: UNet2DConditionModel) -> None:
    """Make an untrained denoiser return its latents, which are nearly all noise at first.

    The noise it predicts at high noise levels is its input but for a small part, and that part
    is what it has to learn.  The input is led to the last layers as pairs (x, -x), of which
    SiLU(x) - SiLU(-x) = x restores it, along the outermost skip connection.
    """
    channels = unet.config.out_channels
    lane = 2 * channels
    signs = [(i % channels, 1.0 if i < channels else -1.0) for i in range(lane)]
    last = unet.up_blocks[-1].resnets[-1]
    unet.conv_in.weight[:lane] = 0
    unet.conv_in.bias[:lane] = 0
    last.conv2.weight[:lane] = 0
    last.conv2.bias[:lane] = 0
    last.conv_shortcut.weight[:lane] = 0
    last.conv_shortcut.bias[:lane] = 0
    unet.conv_out.weight.zero_()
    unet.conv_out.bias.zero_()
    before = last.conv_shortcut.in_channels - unet.conv_in.out_channels
    for index, (channel, sign) in enumerate(signs):
        unet.conv_in.weight[index, channel, 1, 1] = sign
        last.conv_shortcut.weight[index, before + index] = 1
        unet.conv_out.weight[channel, index, 1, 1] = sign


def build_scheduler(prediction_type: str = "epsilon") -> DDIMScheduler:
    """The sampler's settings, and the noise levels trained on."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
        timestep_spacing="trailing",
    )


def parameters(model: nn.Module) -> int:
    """The number of a model's parameters."""
    return sum(weight.numel() for weight in model.parameters())


def save_pipeline(folder: Path, vae: AutoencoderKL, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
    """Write a diffusers pipeline folder with float16 weights, replacing what it held.

    Args:
        folder: The pipeline's folder.
        vae: The autoencoder, its scaling factor set.
        text_encoder: The text encoder.
        unet: The denoiser.
    """
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    for name, model in (("vae", vae), ("text_encoder", text_encoder), ("unet", unet)):
        save_model(fresh / name, model)
    build_scheduler().save_pretrained(fresh / "scheduler")
    shapes_tokenizer.save_tokenizer(fresh / "tokenizer", TOKENS)
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.30.0",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    write_json(fresh / "model_index.json", index)
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def save_model(folder: Path, model: ModelMixin | CLIPTextModel) -> None:
    """Write a model's configuration and its weights as float16."""
    folder.mkdir(parents=True, exist_ok=True)
    is_text = isinstance(model, CLIPTextModel)
    if is_text:
        model.config.save_pretrained(folder)
    else:
        model.save_config(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key in ("_name_or_path", "transformers_version"):
        config.pop(key, None)
    if is_text:
        config["architectures"] = ["CLIPTextModel"]
        config["dtype"] = "float32"  # what to compute in, as for the other models
    write_json(path, config)
    weights: dict[str, Tensor] = {
        key: value.detach().half().contiguous() if value.is_floating_point() else value
        for key, value in model.state_dict().items()
    }
    file = folder / ("model.safetensors" if is_text else "diffusion_pytorch_model.safetensors")
    save_file(weights, file, metadata={"format": "pt"})
    file.chmod(0o644)


def write_json(path: Path, value: object) -> None:
    """Write a value as JSON, its keys in order."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
