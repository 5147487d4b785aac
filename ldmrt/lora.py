"""LoRA (Hu et al. 2021, arXiv 2106.09685): files of low-rank changes to a model's weights, and the weights with them.

A change is `scale * alpha / rank * up @ down`. The same change has many names: diffusers and peft write a module's path with dots,
kohya with underscores, and for Stable Diffusion XL with the block numbers of the original code. Here every weight of the model
lists what it may be called, and a file's keys are looked up in that.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmrt import original
from ldmrt.errors import BadRequest, BundleError
from ldmrt.weights import WeightFile

Shapes = Mapping[str, tuple[int, ...]]

# A key is the component, the module's path, and what of the module it is.
_COMPONENTS = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "unet.": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "": "unet",  # diffusers' save_lora_adapter writes a U-Net alone without a prefix
}
_PARTS = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_mid.weight": "mid",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".alpha": "alpha",
}
# Other kinds of change, by what their keys hold.
_OTHERS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    ".diff": "full weights",
    "lora_B.bias": "biases",
}


@dataclass(frozen=True)
class Layer:
    """The change of one weight.

    Attributes:
        down: (rank, in), or (rank, in, kh, kw) for a convolution.
        up: (out, rank), or (out, rank, 1, 1).
        mid: (rank, rank, kh, kw), a convolution between the two (LoCon), whose `down` is then of single pixels; None without.
        scale: alpha / rank.
    """

    down: Tensor
    up: Tensor
    mid: Tensor | None
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight that it changes; sizes of 1 at its end may be left out."""
        kernel = self.down.shape[2:] if self.mid is None else self.mid.shape[2:]
        return self.up.shape[0], self.down.shape[1], *kernel

    def on(self, device: torch.device) -> Layer:
        """On a device, in float32."""

        def place(part: Tensor) -> Tensor:  # a copy: the file may change, and must not change the model
            return part.to(device, torch.float32, copy=True)

        return Layer(place(self.down), place(self.up), None if self.mid is None else place(self.mid), self.scale)

    def add_to(self, weight: Tensor, scale: float) -> None:
        """Add `scale` times the change to a weight, float32 and contiguous, in place."""
        down = self.down
        if self.mid is not None:
            down = torch.einsum("rskl,si->rikl", self.mid, down.flatten(1))
        weight.flatten(1).addmm_(self.up.flatten(1), down.flatten(1), alpha=scale * self.scale)


def fused(weight: Tensor, changes: Iterable[tuple[Layer, float]]) -> Tensor:
    """A weight with changes, each times its scale, summed in float32.

    Args:
        weight: of any floating dtype; it stays as it is.
        changes: on the weight's device, in float32.

    Returns:
        float32, of the weight's shape.
    """
    changed = weight.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    for layer, scale in changes:
        layer.add_to(changed, scale)
    return changed


def check_scale(scale: float) -> None:
    """Refuse a scale that is not a finite number.

    Raises:
        BadRequest: it is not.
    """
    if not math.isfinite(scale):
        raise BadRequest(f"scale is {scale}, expected a finite number, such as 1", param="scale")


@dataclass(frozen=True)
class Lora:
    """A LoRA that fits a model.

    Attributes:
        path: its file.
        layers: component (`unet`, `text_encoder`, `text_encoder_2`) -> name of the weight in the component's file -> its change.
    """

    path: Path
    layers: Mapping[str, Mapping[str, Layer]]

    @classmethod
    def read(cls, path: Path, shapes: Mapping[str, Shapes]) -> Lora:
        """Read a LoRA in the formats of diffusers, peft or kohya (LoCon included).

        Args:
            path: a safetensors file.
            shapes: the model's weights: component -> name -> shape.

        Raises:
            BadRequest: there is no such file, it is damaged or a pickle, it is not a LoRA, or it is one for another architecture.
        """
        if path.suffix != ".safetensors":
            raise BadRequest(
                f"{path} is not a .safetensors file: other LoRA files are pickles, which can run any code, so ldmrt reads none; "
                "ask its author for safetensors, or save it again with safetensors.torch.save_file",
                param="path",
            )
        if not path.is_file():
            raise BadRequest(f"no such LoRA: {path}; give the path of a .safetensors file", param="path")
        try:
            file = WeightFile(path)
        except BundleError as error:
            raise BadRequest(str(error), param="path") from error
        return cls(path, _match(file, shapes))


@dataclass
class _Draft:
    """What a file has of one weight's change, by what it is: `down`, `up`, `mid`, `alpha`; each with its key."""

    module: str
    prefix: str
    keys: dict[str, str] = field(default_factory=dict)


def _match(file: WeightFile, shapes: Mapping[str, Shapes]) -> dict[str, dict[str, Layer]]:
    """The changes in a file, by the names of the weights.

    Raises:
        BadRequest: keys are of no LoRA, or of one for another model.
    """
    names = {component: _called(weights) for component, weights in shapes.items()}
    drafts: dict[tuple[str, str], _Draft] = {}
    misfits = []
    for key in file:
        prefix, module, part = _split(file.path, key)
        component = _COMPONENTS[prefix]
        weight = names.get(component, {}).get(_flat(module))
        if weight is None:
            misfits.append(f"{key} is of no layer of this model")
            continue
        draft = drafts.setdefault((component, weight), _Draft(module, prefix))
        if part in draft.keys:
            raise BadRequest(
                f"{file.path} changes {weight} twice, by {draft.keys[part]} and {key}; save it again with one of them",
                param="path",
            )
        draft.keys[part] = key
    layers: dict[str, dict[str, Layer]] = {}
    metadata = _adapter_metadata(file)
    for (component, weight), draft in drafts.items():
        layer = _layer(file, draft, metadata)
        expected = shapes[component][weight]
        if _bare(layer.shape) != _bare(expected):
            misfits.append(f"{draft.keys['down']} is for a weight of {layer.shape}, expected {expected}")
        layers.setdefault(component, {})[weight] = layer
    if misfits:
        more = f" (and {len(misfits) - 1} more of its {len(file)} keys do not fit)" if len(misfits) > 1 else ""
        raise BadRequest(
            f"{file.path} is a LoRA for another architecture: {misfits[0]}{more}; use one that was made for this kind of model",
            param="path",
        )
    if not layers:
        raise BadRequest(f"{file.path} is empty, expected the keys of a LoRA", param="path")
    return layers


def _split(path: Path, key: str) -> tuple[str, str, str]:
    """A key's prefix, module and part."""
    suffix = next((suffix for suffix in _PARTS if key.endswith(suffix)), None)
    other = next((kind for mark, kind in _OTHERS.items() if mark in key), None)
    if suffix is None or other is not None:
        found = f"which is {other}" if other else "which is no part of a LoRA"
        raise BadRequest(
            f"{path} has the key {key!r}, {found}; only LoRA and LoCon are supported: use a LoRA, or fuse the file into the model "
            "with the tool that made it",
            param="path",
        )
    prefix = next(prefix for prefix in _COMPONENTS if key.startswith(prefix))
    return prefix, key[len(prefix) : -len(suffix)], _PARTS[suffix]


def _layer(file: WeightFile, draft: _Draft, metadata: Mapping[str, Any]) -> Layer:
    """One weight's change, its parts checked against each other.

    Raises:
        BadRequest: a part is missing, or they do not fit together.
    """
    for part in ("down", "up"):
        if part not in draft.keys:
            some = next(iter(draft.keys.values()))
            raise BadRequest(f"{file.path} has {some} without its {part} matrix; copy it again", param="path")
    down, up = file[draft.keys["down"]], file[draft.keys["up"]]
    mid = file[draft.keys["mid"]] if "mid" in draft.keys else None
    rank = down.shape[0] if down.dim() else 0
    fits = up.dim() >= 2 and up.shape[1] == rank > 0 and not any(size != 1 for size in up.shape[2:])
    fits = fits and down.dim() in (2, 4)
    fits = fits and all(part.is_floating_point() for part in (down, up, mid) if part is not None)
    if mid is not None:
        fits = fits and mid.shape[:2] == (rank, rank) and mid.dim() == 4 and down[0, :1].numel() == 1
    if not fits:
        raise BadRequest(
            f"{file.path}: {draft.keys['down']} is {tuple(down.shape)} and {draft.keys['up']} is {tuple(up.shape)}, "
            "expected (rank, in, ...) and (out, rank); copy it again",
            param="path",
        )
    return Layer(down, up, mid, _scale(file, draft, metadata, rank))


def _scale(file: WeightFile, draft: _Draft, metadata: Mapping[str, Any], rank: int) -> float:
    """The ratio alpha / rank: alpha as a tensor (kohya), or in the metadata (peft); 1 where the file says nothing."""
    where = draft.prefix if draft.prefix.endswith(".") else ""
    config = {key.removeprefix(where): value for key, value in metadata.items() if key.startswith(where)}
    root = math.sqrt(rank) if config.get("use_rslora") else rank
    if "alpha" in draft.keys:
        tensor = file[draft.keys["alpha"]]
        alpha = tensor.item() if tensor.numel() == 1 else None
        root = rank
    else:
        alpha = config.get("lora_alpha", root)
        patterns = config.get("alpha_pattern") or {}
        for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
            path = pattern.removeprefix("^")
            if draft.module == path or (path == pattern and draft.module.endswith(f".{path}")):
                alpha = value
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) < 1e9:
        raise BadRequest(
            f"{file.path}: the alpha of {draft.keys['down']} is {str(alpha)[:40]}, expected a number; copy it again",
            param="path",
        )
    return alpha / root


def _adapter_metadata(file: WeightFile) -> dict[str, Any]:
    """The configuration of peft, as diffusers writes it into the header; empty without.

    Raises:
        BadRequest: it is damaged.
    """
    try:
        metadata = json.loads(file.metadata.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict):
        raise BadRequest(f"{file.path}: its lora_adapter_metadata is not a JSON object; copy it again", param="path")
    return metadata


# ---------------------------------------------------------------------------------------------------- names


def _flat(module: str) -> str:
    """A module's path with everything in it that tells the formats apart made alike."""
    name = module.replace(".processor", "").replace(".", "_")
    return name.removeprefix("text_model_")


def _called(shapes: Shapes) -> dict[str, str]:
    """The names of a component's weights, by what a LoRA may call their modules."""
    originals = original.unet(shapes)
    names: dict[str, str] = {}
    for name, shape in shapes.items():
        if name.endswith(".weight") and len(shape) >= 2:
            for flat in (_flat(called.removesuffix(".weight")) for called in (name, originals[name])):
                # Before peft, diffusers called the projections of every attention to_q, to_k, to_v and to_out.
                for alias in (
                    flat,
                    re.sub(r"_(q|k|v|out)_proj$", r"_to_\1", flat),
                    re.sub(r"_to_out_0$", "_to_out", flat),
                ):
                    names[alias] = name
    return names


def _bare(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without the sizes of 1 at its end that tell a convolution of single pixels from a linear layer."""
    return shape[:2] if all(size == 1 for size in shape[2:]) else shape
