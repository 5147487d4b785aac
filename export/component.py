"""A model's components as modules with named tensor inputs and outputs, ready to be captured.

Each wrapper fixes what the runtime does not vary (no dictionaries, no optional arguments) and names the rest in the field's
terms. `Component.kinds` gives the class of each input of a denoising network, for `export.passes.hoist`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ldmrt.components import CLASS_LABELS, LAYOUT, SEGMENTATION, STEP, parts
from ldmrt.engines.protocol import TensorSpec
from ldmrt.export.passes.hoist import Kind
from ldmrt.network import JOINED

PREFIX = "module."  # every wrapper holds the original module under this name
UNET_INPUTS = ("latents", "timesteps", "encoder_hidden_states")
ADDED = ("text_embeds", "time_ids")  # what Stable Diffusion XL's networks take besides
TIMESTEP_COND = "timestep_cond"  # what models distilled with guidance do
DOWN_RESIDUALS, MID_RESIDUAL = "down_residuals", "mid_residual"


@dataclass(frozen=True)
class Component:
    """One thing to compile.

    Attributes:
        name: `text_encoder` (and `text_encoder_2`), `unet`, `controlled_unet` (which reads the residuals of ControlNets),
            `controlnet.NAME`, `decoder` or `encoder`.
        folder: the subfolder of the model that its weights come from, or the name of a ControlNet.
        module: the wrapper.
        inputs: its inputs; string dimensions are free.
        outputs: names of its outputs.
        kinds: for a denoising network, the class of each input.
        parts: for a denoising network, what the graphs that it is cut into are called.
    """

    name: str
    folder: str
    module: torch.nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    parts: tuple[str, str, str] = parts(STEP)

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


class BertTextEncoder(torch.nn.Module):
    """The text encoder of latent diffusion: token ids to the last hidden states, the only ones there are.

    `forward(input_ids (rows, tokens) int64) -> (1, rows, tokens, width)`.
    """

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See the class."""
        return (self.module(input_ids, return_dict=False)[0][None],)


class UNet(torch.nn.Module):
    """The denoising U-Net: `forward(*inputs) -> (rows, C, h, w)`, the prediction in the model's own terms (epsilon or v).

    Args:
        module: diffusers' U-Net.
        names: what `forward` is given, in order. Always `latents` (rows, C, h, w), `timesteps` (rows,) and
            `encoder_hidden_states` (rows, tokens, width), or where the module has a table of classes (`class_embedder`) their
            numbers `class_labels` (rows,) int64 instead, or where it has a `layout_encoder` the tokens `layout` (rows, tokens) int64; with Stable Diffusion XL also the pooled text embedding `text_embeds`
            (rows, projection) and `time_ids` (rows, 6): original height and width, top and left of the crop, target height and
            width; for inpainting `mask` (rows, 1, h, w) and `masked_image_latents` (rows, C, h, w), and for upscaling
            `low_res_image` (rows, 3, h, w), which are joined to the latents, and with a noise level that as `class_labels`; with
            the guidance scale embedded `timestep_cond` (rows, width); and the residuals of ControlNets, `down_residuals.I` and `mid_residual`.
    """

    def __init__(self, module: Any, names: Sequence[str] = UNET_INPUTS) -> None:
        super().__init__()
        self.module = module
        self.names = tuple(names)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See the class."""
        given = dict(zip(self.names, inputs, strict=True))
        labels = given.get(CLASS_LABELS)
        states = given.get("encoder_hidden_states")
        if LAYOUT in given:
            states = self.module.layout_encoder(given[LAYOUT], return_dict=False)[0]
        elif states is None:
            # One token (Rombach et al. 2022, arXiv 2112.10752, section 4.3.1).
            states, labels = self.module.class_embedder(labels)[:, None], None
        residuals = [tensor for name, tensor in given.items() if name.startswith(f"{DOWN_RESIDUALS}.")]
        result = self.module(
            _joined(given),
            given["timesteps"],
            states,
            class_labels=labels,
            timestep_cond=given.get(TIMESTEP_COND),
            added_cond_kwargs={name: given[name] for name in ADDED if name in given},
            down_block_additional_residuals=residuals or None,
            mid_block_additional_residual=given.get(MID_RESIDUAL),
            return_dict=False,
        )
        return (result[0],)


class ControlNet(torch.nn.Module):
    """A ControlNet (Zhang et al. 2023, arXiv 2302.05543): `forward(*inputs)` gives what is to be added to the U-Net's skip
    connections, from the first to the last, and to the result of its middle.

    Args:
        module: diffusers' ControlNet.
        names: what `forward` is given, in order: what the U-Net is (see there), then the picture `controlnet_cond`
            (rows, 3, H, W) in [0, 1], and `conditioning_scale` (rows,), a factor for all of its results.
    """

    def __init__(self, module: Any, names: Sequence[str]) -> None:
        super().__init__()
        self.module = module
        self.names = tuple(names)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See the class."""
        given = dict(zip(self.names, inputs, strict=True))
        down, mid = self.module(
            given["latents"],
            given["timesteps"],
            given["encoder_hidden_states"],
            given["controlnet_cond"],
            conditioning_scale=given["conditioning_scale"][:, None, None, None],
            added_cond_kwargs={name: given[name] for name in ADDED if name in given},
            return_dict=False,
        )
        return (*down, mid)


class Rescaler(torch.nn.Module):
    """A semantic map as channels beside the latents: `forward(labels (rows, 1, H, W) int64) -> (rows, channels, h, w)`.

    Halved `stages` times with bilinear weights, which are those of the mean of two pixels each way; then a linear map of each pixel.
    """

    def __init__(self, stages: int, classes: int, channels: int) -> None:
        super().__init__()
        self.stages, self.classes = stages, classes
        self.channel_mapper = torch.nn.Conv2d(classes, channels, 1, bias=False)

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        """See the class."""
        classes = torch.arange(self.classes, device=labels.device)[None, :, None, None]
        found = (labels == classes).to(self.channel_mapper.weight.dtype)
        for _ in range(self.stages):
            found = torch.nn.functional.avg_pool2d(found, 2)
        made: torch.Tensor = self.channel_mapper(found)
        return made


class UNetWithoutText(torch.nn.Module):
    """The denoising U-Net of a model that reads no text: `forward(*inputs) -> (rows, C, h, w)`.

    Args:
        module: diffusers' `UNet2DModel`.
        names: what `forward` is given, in order: `latents` (rows, C, h, w), `timesteps` (rows,), and for some models
            `low_res_image` (rows, 3, h, w), or `mask` (rows, 1, h, w) and `masked_image_latents` (rows, C, h, w), which are joined to the
            latents, the mask last and as -1 and 1; or the numbers of classes, `class_labels` (rows,) int64, or of a class for each pixel,
            `segmentation` (rows, 1, H, W) int64, which the module's `rescaler` makes as small as the latents.
    """

    def __init__(self, module: Any, names: Sequence[str]) -> None:
        super().__init__()
        self.module = module
        self.names = tuple(names)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See the class."""
        given = dict(zip(self.names, inputs, strict=True))
        if "mask" in given:
            given["mask"] = given.pop("mask") * 2 - 1
        if SEGMENTATION in given:
            given[SEGMENTATION] = self.module.rescaler(given[SEGMENTATION])
        labels = given.get(CLASS_LABELS)
        return (self.module(_joined(given), given["timesteps"], class_labels=labels, return_dict=False)[0],)


def _joined(given: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The latents, and behind their channels what a model takes beside them, in the order in which it is given."""
    joined = [tensor for name, tensor in given.items() if name in ("latents", *JOINED, SEGMENTATION)]
    return torch.cat(joined, dim=1) if len(joined) > 1 else joined[0]


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


class QuantizedDecoder(torch.nn.Module):
    """The decoder of a first stage with a codebook: scaled latents (rows, C, h, w) to images (rows, 3, H, W) in [-1, 1] (not clamped).

    Each latent vector becomes the code nearest to it (van den Oord et al. 2017, arXiv 1711.00937, eq. 2); of |z - e|^2 = |z|^2 - 2 z e + |e|^2 the
    first term is the same for all codes.
    """

    def __init__(self, module: Any, scaling_factor: float) -> None:
        super().__init__()
        self.module = module
        self.scaling_factor = scaling_factor

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor]:
        """See the class."""
        # Looked up, not read: a layer may have its weights only while it runs.
        table = self.module.quantize.embedding
        codes = table(torch.arange(table.num_embeddings, device=latents.device))
        vectors = (latents / self.scaling_factor).permute(0, 2, 3, 1)
        nearness = vectors @ codes.t() - 0.5 * (codes * codes).sum(dim=1)
        quantized = table(nearness.argmax(dim=-1)).permute(0, 3, 1, 2)
        module = self.module
        spatial = quantized if module.config.norm_type == "spatial" else None
        return (module.decoder(module.post_quant_conv(quantized), spatial),)


class QuantizedEncoder(torch.nn.Module):
    """The encoder of a first stage with a codebook: images (rows, 3, H, W) in [-1, 1] to latents before quantisation, unscaled. There is
    no posterior: the log variance is the least that `AutoencoderKL` gives.
    """

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See the class."""
        latents = self.module.encode(image, return_dict=False)[0]
        return latents, torch.full_like(latents, -30.0)
