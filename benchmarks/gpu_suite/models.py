"""Models of real architectures with random weights made on the device: compiled as a bundle's are, without a bundle."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmrt.capture import Recorder
from ldmrt.denoise import Denoiser
from ldmrt.engines.captured import CapturedEngine
from ldmrt.engines.protocol import Engine, TensorSpec
from ldmrt.engines.torch import TorchEngine
from ldmrt.export import architectures
from ldmrt.export.compile import compile_component
from ldmrt.export.component import PREFIX, Component
from ldmrt.export.source import KINDS, Source
from ldmrt.graph import Graph, specialize
from ldmrt.parameters import Parameters
from ldmrt.samplers.ddim import ddim
from ldmrt.samplers.table import SamplerTable
from ldmrt.schedule import NoiseSchedule

ARCHITECTURES = Path(__file__).parents[2] / "export" / "known"

TOKENS = 77
GUIDANCE = 7.5

_SIZES = {"sd15": 512, "sd21": 768, "sdxl": 1024}
_STEPS = {"sd15": 50, "sd21": 50, "sdxl": 20}

# What makes the real configs small, for the dry run.
_TINY_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_TINY_UNET = {
    "block_out_channels": [32, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 4,
    "cross_attention_dim": 32,
}
_TINY_VAE = {
    "block_out_channels": [16, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
_TINY: dict[str, dict[str, dict[str, Any]]] = {
    "sd15": {"text_encoder": _TINY_TEXT, "unet": _TINY_UNET, "vae": _TINY_VAE},
    "sdxl": {
        "text_encoder": _TINY_TEXT,
        "text_encoder_2": _TINY_TEXT | {"projection_dim": 32},
        "unet": _TINY_UNET
        | {
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
            "cross_attention_dim": 64,
            "attention_head_dim": [2, 4],
            "transformer_layers_per_block": [1, 2],
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 32 + 6 * 8,
        },
        "vae": _TINY_VAE,
    },
}
_TINY_LATENTS, _TINY_STEPS = 16, 3


class Model:
    """A model's graphs, weights and engines.

    Args:
        name: an architecture: a file in export/known.
        tiny: shrink it, for the dry run.
        dtype: the precision of all components.
        device: where it runs.
    """

    def __init__(self, name: str, *, tiny: bool, dtype: torch.dtype, device: torch.device) -> None:
        configs = json.loads((ARCHITECTURES / f"{name}.json").read_text(encoding="utf-8"))
        if tiny:
            configs = {key: _shrunk(value, _TINY[name].get(key)) for key, value in configs.items()}
        self.name, self.dtype, self.device, self.configs = name, dtype, device, configs
        self.source = Source(Path(name), KINDS[configs["pipeline"]], configs, {})
        factor = architectures.downscale(self.source)
        self.side = _TINY_LATENTS * factor if tiny else _SIZES[name]
        self.steps = _TINY_STEPS if tiny else _STEPS[name]
        self.latent_shape = (int(configs["vae"].get("latent_channels", 4)), self.side // factor, self.side // factor)
        self._parameters: dict[str, Parameters] = {}

    @property
    def is_xl(self) -> bool:
        """Whether its U-Net also takes pooled text and the picture's size."""
        return self.source.kind.addition_embed_type is not None

    @cached_property
    def table(self) -> SamplerTable:
        """DDIM, without noise."""
        return ddim(NoiseSchedule.from_config(self.configs["scheduler"]), self.steps)

    # ------------------------------------------------------------------------------------------------ graphs

    def component(self, folder: str) -> Component:
        """The U-Net or the decoder."""
        make = {"unet": architectures.unet, "vae": architectures.decoder}[folder]
        return make(self.source, (self.side, self.side))

    @property
    def pooled(self) -> int:
        """Width of the pooled text embedding."""
        return int(self.configs["text_encoder_2"]["projection_dim"])

    @cached_property
    def unet(self) -> dict[str, Graph]:
        """`context`, `schedule` and `step`, their rows free."""
        compiled = compile_component(self.component("unet"), self.dtype, fused=True)
        return {graph.name: graph for graph in compiled.graphs}

    @cached_property
    def decoder_graph(self) -> Graph:
        """The decoder, its rows free."""
        return compile_component(self.component("vae"), self.dtype, fused=True).graphs[0]

    @cached_property
    def text_graphs(self) -> dict[str, Graph]:
        """The text encoders by folder; none without transformers."""
        if importlib.util.find_spec("transformers") is None:
            return {}
        components = [architectures.text_encoder(self.source, folder) for folder in self.source.kind.tokenizers]
        return {c.folder: compile_component(c, self.dtype, fused=True).graphs[0] for c in components}

    # ------------------------------------------------------------------------------------------------ weights

    def weight(self, folder: str, spec: TensorSpec) -> Tensor:
        """A random weight, the same each time: drawn in float32 from a seed made of its name, scaled so that activations keep
        their size, and rounded to the model's precision; converted from there, if another dtype is asked for.
        """
        shape = tuple(int(size) for size in spec.shape)
        if spec.name.endswith("position_ids"):
            return torch.arange(shape[-1], device=self.device).reshape(shape).to(spec.dtype)
        if self.device.type == "meta":
            return torch.empty(shape, dtype=spec.dtype, device="meta")
        digest = hashlib.sha256(f"{folder}/{spec.name}".encode()).digest()
        generator = torch.Generator(self.device).manual_seed(int.from_bytes(digest[:6]))
        drawn = torch.randn(shape, generator=generator, device=self.device)
        if len(shape) > 1:
            drawn /= math.sqrt(math.prod(shape[1:]))
        else:
            drawn = 0.1 * drawn + (0.0 if spec.name.endswith("bias") else 1.0)
        return drawn.to(self.dtype).to(spec.dtype)

    def parameters(self, folder: str) -> Parameters:
        """A component's weights, shared by its engines."""
        if folder not in self._parameters:
            self._parameters[folder] = Parameters(lambda spec: self.weight(folder, spec), self.device)
        return self._parameters[folder]

    def sharing(self, other: Model) -> Model:
        """This one, over the weights of another, whose picture may have another size."""
        for folder in self.source.folders:
            self._parameters[folder] = other.parameters(folder)
        return self

    def forget_weights(self) -> None:
        """Let go of them; engines made from now on read them anew."""
        self._parameters.clear()

    def original(self, folder: str, dtype: torch.dtype) -> Any:
        """The module as diffusers has it, with the same weights."""
        module = architectures.instantiate(self.source, folder).to(dtype)
        state = {
            name: self.weight(folder, TensorSpec(PREFIX + name, tuple(tensor.shape), dtype))
            for name, tensor in module.state_dict().items()
        }
        module.load_state_dict(state, strict=True, assign=True)
        return module.requires_grad_(requires_grad=False).eval()

    # ------------------------------------------------------------------------------------------------ engines

    def engine(self, part: str, rows: int | None = None) -> TorchEngine:
        """A new engine of `context`, `schedule`, `step`, `decoder` or a text encoder, over the weights that are there."""
        if part == "decoder":
            graph, folder = self.decoder_graph, "vae"
        elif part in ("context", "schedule", "step"):
            graph, folder = self.unet[part], "unet"
        else:
            graph, folder = self.text_graphs[part], part
        if rows is not None:
            graph = specialize(graph, {"rows": rows})
        return TorchEngine(graph, self.parameters(folder), self.device)

    def captured(self, part: str, recorder: Recorder | None, rows: int | None = None) -> Engine:
        """An engine that replays a CUDA graph, if there is a recorder."""
        engine = self.engine(part, rows)
        return engine if recorder is None else CapturedEngine(engine, recorder)

    def denoiser(self, batch: int, recorder: Recorder | None, *, whole: bool = False) -> Denoiser:
        """A batch with guidance, two rows an image, every slot empty; `whole` captures the loop, not the step."""
        return Denoiser(
            self.captured("context", recorder),
            self.captured("schedule", recorder),
            self.engine("step", 2 * batch),
            rows=2 * batch,
            tokens=TOKENS,
            evaluations=self.steps,
            device=self.device,
            recorder=recorder,
            whole=whole,
        )

    # ------------------------------------------------------------------------------------------------ inputs

    def noise(self, *shape: int, seed: int) -> Tensor:
        """Standard normal float32 on the device, drawn on the CPU."""
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device)

    def conditioning(self, seed: int) -> dict[str, Tensor]:
        """The U-Net's request inputs for one image, random."""
        found = {
            "encoder_hidden_states": self.noise(TOKENS, int(self.configs["unet"]["cross_attention_dim"]), seed=seed)
        }
        if self.is_xl:
            found["text_embeds"] = self.noise(self.pooled, seed=seed + 1)
            sizes = [self.side, self.side, 0, 0, self.side, self.side]
            found["time_ids"] = torch.tensor(sizes, dtype=torch.float32, device=self.device)
        return found

    def admit(self, denoiser: Denoiser) -> None:
        """Fill every row: new images with guidance."""
        for slot in range(denoiser.rows // 2):
            denoiser.release(slot)
            denoiser.admit(
                slot,
                latents=self.noise(*self.latent_shape, seed=100 + slot),
                table=self.table,
                guidance_scale=GUIDANCE,
                cond=self.conditioning(10 * slot),
                uncond=self.conditioning(10 * slot + 5),
            )


def _shrunk(config: Any, changes: dict[str, Any] | None) -> Any:
    return config if changes is None else {**config, **changes}
