"""A model's components as modules with named tensor inputs and outputs, ready to be captured.

Each wrapper fixes what the runtime does not vary (no dictionaries, no optional arguments) and names the rest in the field's
terms. `Component.kinds` gives the class of each input of a denoising network, for `export.passes.hoist`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ldmrt.engines.protocol import TensorSpec
from ldmrt.export.passes.hoist import Kind

PREFIX = "module."  # every wrapper holds the original module under this name


@dataclass(frozen=True)
class Component:
    """One thing to compile.

    Attributes:
        name: `text_encoder` (and `text_encoder_2`), `unet`, `decoder` or `encoder`.
        folder: the subfolder of the model that its weights come from.
        module: the wrapper.
        inputs: its inputs; string dimensions are free.
        outputs: names of its outputs.
        kinds: for a denoising network, the class of each input.
    """

    name: str
    folder: str
    module: torch.nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    kinds: Mapping[str, Kind] = field(default_factory=dict)

    @property
    def original(self) -> torch.nn.Module:
        """The module inside the wrapper, of diffusers or transformers."""
        return self.module.get_submodule("module")


class TextEncoder(torch.nn.Module):
    """CLIP text encoder of Stable Diffusion: token ids to the hidden states of every layer, each behind the final layer norm.

    `forward(input_ids (rows, tokens) int64) -> (layers, rows, tokens, width)`; index k is what `clip_skip=k` asks for, index 0
    the last layer.
    """

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See the class."""
        states = self.module(input_ids, output_hidden_states=True).hidden_states[1:]
        text_model = getattr(self.module, "text_model", self.module)
        return (torch.stack([text_model.final_layer_norm(state) for state in reversed(states)]),)


class PenultimateTextEncoder(torch.nn.Module):
    """CLIP text encoder as Stable Diffusion XL uses it: hidden states without the final layer norm, from the last but one.

    `forward(input_ids (rows, tokens) int64) -> (layers, rows, tokens, width)`; index k is what `clip_skip=k` asks for, index 0
    the last layer but one. With `pooled` also the projected embedding of the end token, (rows, projection).
    """

    def __init__(self, module: Any, *, pooled: bool) -> None:
        super().__init__()
        self.module = module
        self.pooled = pooled

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See the class."""
        result = self.module(input_ids, output_hidden_states=True)
        states = torch.stack(list(reversed(result.hidden_states[:-1])))
        return (states, result.text_embeds) if self.pooled else (states,)


class UNet(torch.nn.Module):
    """The denoising U-Net.

    `forward(latents (rows, C, h, w), timesteps (rows,), encoder_hidden_states (rows, tokens, width)) -> (rows, C, h, w)`, the
    prediction in the model's own terms (epsilon or v).
    """

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(
        self, latents: torch.Tensor, timesteps: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """See the class."""
        return (self.module(latents, timesteps, encoder_hidden_states, return_dict=False)[0],)


class UNetTextTime(UNet):
    """The denoising U-Net of Stable Diffusion XL, which also takes the pooled text embedding `text_embeds` (rows, projection)
    and `time_ids` (rows, 6): original height and width, top and left of the crop, target height and width.
    """

    def forward(  # type: ignore[override]
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        text_embeds: torch.Tensor,
        time_ids: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """See the class."""
        extra = {"text_embeds": text_embeds, "time_ids": time_ids}
        return (self.module(latents, timesteps, encoder_hidden_states, added_cond_kwargs=extra, return_dict=False)[0],)


class Decoder(torch.nn.Module):
    """The first stage's decoder: scaled latents (rows, C, h, w) to images (rows, 3, H, W) in [-1, 1] (not clamped)."""

    def __init__(self, module: Any, scaling_factor: float, shift: float) -> None:
        super().__init__()
        self.module = module
        self.scaling_factor = scaling_factor
        self.shift = shift

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor]:
        """See the class."""
        latents = latents / self.scaling_factor
        if self.shift:
            latents = latents + self.shift
        return (self.module.decode(latents, return_dict=False)[0],)


class Encoder(torch.nn.Module):
    """The first stage's encoder: images (rows, 3, H, W) in [-1, 1] to the posterior's mean and log variance, unscaled."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See the class."""
        posterior = self.module.encode(image, return_dict=False)[0]
        return posterior.mean, posterior.logvar
