"""ControlNets: folders beside the model that its U-Net can be steered by (Zhang et al. 2023, arXiv 2302.05543)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldmrt.components import CONTROLNET_NAME, controlnet
from ldmrt.errors import BuildError
from ldmrt.export.source import Source, read_json

# What a ControlNet has in common with the U-Net that it steers, and what each means by a key that its config leaves out.
_COMMON: dict[str, Any] = {
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 1280,
    "addition_embed_type": None,
    "class_embed_type": None,
    "encoder_hid_dim_type": None,
}


def with_controlnets(source: Source, paths: Sequence[str | Path]) -> Source:
    """The same model with ControlNets.

    Args:
        source: the model.
        paths: folders of ControlNets, each with a config.json and safetensors; a ControlNet is called like its folder.

    Raises:
        BuildError: there is no ControlNet at a path, or one for another architecture, or two of one name.
    """
    found: dict[str, Path] = {}
    configs: dict[str, Mapping[str, Any]] = {}
    for path in map(Path, paths):
        name = path.resolve().name
        folder = controlnet(name)
        if re.fullmatch(CONTROLNET_NAME, name) is None:
            raise BuildError(
                f"{path}: a ControlNet is called like its folder, expected letters, digits, '.', '_' and '-'; rename it"
            )
        if folder in found:
            raise BuildError(f"{path} and {found[folder]} are both called {name}; rename one of the folders")
        configs[folder] = _checked(source, path)
        found[folder] = path
    return replace(source, controlnets=found, configs={**source.configs, **configs})


def _checked(source: Source, path: Path) -> Mapping[str, Any]:
    """A ControlNet's config.

    Raises:
        BuildError: it is none that the model's U-Net can be steered by.
    """
    if not (path / "config.json").is_file():
        raise BuildError(
            f"{path} is no ControlNet: expected a folder with a config.json and diffusion_pytorch_model.safetensors"
        )
    config, unet = read_json(path / "config.json"), source.configs["unet"]
    name = config.get("_class_name")
    if name != "ControlNetModel":
        raise BuildError(f"{path} is a {name}, expected a ControlNetModel")
    latents = source.configs["vae"].get("latent_channels", 4)
    known = {key: (config.get(key, default), unet.get(key, default)) for key, default in _COMMON.items()}
    known |= {"in_channels": (config.get("in_channels", 4), latents)}
    for key, (found, expected) in known.items():
        if found != expected:
            raise BuildError(
                f"{path} is a ControlNet for another architecture than {source.name} ({source.kind.name}): its {key} is {found}, "
                f"the model's {expected}"
            )
    if config.get("conditioning_channels", 3) != 3:
        raise BuildError(f"{path} takes pictures of {config['conditioning_channels']} channels, expected 3 (RGB)")
    if config.get("global_pool_conditions"):
        raise BuildError(
            f"{path} pools its residuals (global_pool_conditions) for use in guess mode, which ldmrt does not have"
        )
    return config
