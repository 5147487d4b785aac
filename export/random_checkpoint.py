"""A checkpoint of a real architecture with random weights: real size, real speed, no download, and pictures that mean nothing.

The weights are the modules' own initialisation; the tokenizer is the built-in model's, whose ids every CLIP vocabulary has.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ldmrt.opening import builtin_bundle

ARCHITECTURES = Path(__file__).parent / "known"
CLASSES: dict[str, Any] = {
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
}


def write_checkpoint(name: str, out: Path, *, dtype: torch.dtype, seed: int = 0) -> None:
    """Write the checkpoint in the diffusers layout, whole or not at all.

    Args:
        name: an architecture: a file in export/known.
        out: the folder, which must not be there.
        dtype: how to store the weights.
        seed: of the weights.
    """
    configs = _configs(name)
    texts = [folder for folder in CLASSES if folder.startswith("text") and folder in configs]
    index: dict[str, Any] = {
        "_class_name": configs["pipeline"],
        "feature_extractor": [None, None],
        "scheduler": ["diffusers", configs["scheduler"]["_class_name"]],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if configs["pipeline"] == "StableDiffusionPipeline":
        index |= {"requires_safety_checker": False, "safety_checker": [None, None]}
    else:
        index |= {
            "force_zeros_for_empty_prompt": configs["force_zeros_for_empty_prompt"],
            "image_encoder": [None, None],
        }
    with _whole(out) as unfinished:
        _write(unfinished, configs, index, texts, dtype=dtype, seed=seed)


def write_controlnet(name: str, out: Path, *, dtype: torch.dtype, seed: int = 0) -> None:
    """Write a ControlNet for an architecture, whole or not at all. What a real one begins its training with as zeros is random, too, so
    that it has a say in the picture.

    Args:
        name: the architecture.
        out: the folder, which must not be there.
        dtype: how to store the weights.
        seed: of the weights.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(_configs(name)["unet"])
    torch.manual_seed(seed)
    module = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
    for parameter in module.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    with _whole(out) as unfinished:
        module.save_config(unfinished)
        _write_weights(module, unfinished / "diffusion_pytorch_model.safetensors", dtype)


def _configs(name: str) -> dict[str, Any]:
    configs: dict[str, Any] = json.loads((ARCHITECTURES / f"{name}.json").read_text())
    return configs


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `out` at the end, or nothing."""
    unfinished = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write(
    out: Path, configs: dict[str, Any], index: dict[str, Any], texts: list[str], *, dtype: torch.dtype, seed: int
) -> None:
    for folder in texts:
        tokenizer = folder.replace("text_encoder", "tokenizer")
        index |= {folder: ["transformers", CLASSES[folder].__name__], tokenizer: ["transformers", "CLIPTokenizer"]}
        shutil.copytree(builtin_bundle() / "tokenizer", out / tokenizer)
        file = out / tokenizer / "tokenizer_config.json"
        tokens = configs[folder]["max_position_embeddings"]
        file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": tokens}, indent=1))
    (out / "model_index.json").write_text(json.dumps(index, indent=1))
    (out / "scheduler").mkdir()
    (out / "scheduler" / "scheduler_config.json").write_text(json.dumps(configs["scheduler"], indent=1))
    for folder in (*texts, "unet", "vae"):
        torch.manual_seed(seed)
        (out / folder).mkdir()
        if folder in texts:
            module = CLASSES[folder](CLIPTextConfig(**configs[folder]))
            module.config.save_pretrained(out / folder)
        else:
            module = CLASSES[folder].from_config(configs[folder])
            module.save_config(out / folder)
        name = "model" if folder in texts else "diffusion_pytorch_model"
        _write_weights(module, out / folder / f"{name}.safetensors", dtype)


def _write_weights(module: torch.nn.Module, path: Path, dtype: torch.dtype) -> None:
    """In one file, and without a word: diffusers' and transformers' own writers say a lot."""
    state = {name: tensor.to(dtype).contiguous() for name, tensor in module.state_dict().items()}
    save_file(state, path, metadata={"format": "pt"})
    path.chmod(0o644)
