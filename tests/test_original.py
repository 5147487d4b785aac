"""The original names lead back, by the conversion of diffusers, to the names that they were made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ldmrt import original

KNOWN = Path(__file__).parents[1] / "export" / "known"


def meta(name: str, folder: str) -> tuple[Any, dict[str, Any]]:
    from diffusers import AutoencoderKL, UNet2DConditionModel

    config = json.loads((KNOWN / f"{name}.json").read_text())[folder]
    classes: dict[str, Any] = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}
    with torch.device("meta"):
        module = classes[folder].from_config(config)
    return module.state_dict(), dict(module.config)


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl", "sdxl-refiner"])
def test_every_weight_of_the_real_unets(name: str) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    weights, config = meta(name, "unet")
    names = original.unet(weights)
    file = {f"model.diffusion_model.{names[name]}": tensor for name, tensor in weights.items()}
    assert len(file) == len(weights)
    found = convert_ldm_unet_checkpoint(file, config)
    assert set(found) == set(weights)
    assert all(found[name] is tensor for name, tensor in weights.items())


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_every_weight_of_the_real_vaes(name: str) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    weights, config = meta(name, "vae")
    names = original.vae(weights)
    convolutions = {
        name: t[:, :, None, None] if "attn_1" in names[name] and t.dim() == 2 else t for name, t in weights.items()
    }
    assert sum(convolutions[name] is not weights[name] for name in weights) == 8
    file = {f"first_stage_model.{names[name]}": tensor for name, tensor in convolutions.items()}
    assert len(file) == len(weights)
    found = convert_ldm_vae_checkpoint(dict(file), config)
    assert set(found) == set(weights)
    for key, tensor in convolutions.items():
        assert found[key] is tensor or found[key]._base is tensor._base


def test_open_clip() -> None:
    """Weights as OpenCLIP has them, each a number of its own, come out of diffusers' conversion as we find them."""
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    width = 8
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=width,
        vocab_size=11,
    )
    model = CLIPTextModelWithProjection(config)
    pieces = {name: original.open_clip(name) for name in model.state_dict()}
    shapes = {"in_proj_weight": (3 * width, width), "in_proj_bias": (3 * width,)}
    file = {}
    for name, piece in pieces.items():
        shape = shapes.get(piece.name.rpartition(".")[2], tuple(model.state_dict()[name].shape))
        file[f"cond_stage_model.model.{piece.name}"] = torch.randn(shape)
    found = convert_open_clip_checkpoint(model, dict(file))
    prefix = "text_model." if any(name.startswith("text_model.") for name in found) else ""
    for name, piece in pieces.items():
        if piece.transposed:
            continue  # diffusers takes this one for XL's second encoder alone
        tensor = file[f"cond_stage_model.model.{piece.name}"]
        tensor = tensor if piece.third is None else tensor.chunk(3)[piece.third]
        assert torch.equal(found[prefix + name.removeprefix("text_model.")], tensor), name


def test_what_is_not_known_keeps_its_name() -> None:
    assert original.unet(["mid_block.odd.weight"]) == {"mid_block.odd.weight": "mid_block.odd.weight"}
    assert original.vae(["odd.bias"]) == {"odd.bias": "odd.bias"}
    assert original.open_clip("odd.bias").name == "odd.bias"
