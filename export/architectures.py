"""How each kind of model is taken apart: its components, their inputs, and inputs to try them on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch

from ldmrt.engines.protocol import TensorSpec
from ldmrt.errors import BuildError
from ldmrt.export.component import (
    Component,
    Decoder,
    Encoder,
    PenultimateTextEncoder,
    TextEncoder,
    UNet,
    UNetTextTime,
)
from ldmrt.export.passes.hoist import Kind
from ldmrt.export.source import Checkpoint, Source
from ldmrt.export.verify import noise, sample_picture
from ldmrt.tokenizer import Tokenizer
from ldmrt.verify import Trial

# What text encoders are tried on: prompts as people write them, of different lengths.
PROMPTS = (
    "a red circle left of a small blue square on a white background",
    "a photograph of an astronaut riding a horse, highly detailed, 35mm",
)

# The shortest prompt there is, and one that fills the window.
EXTREME_PROMPTS = ("", ", ".join(PROMPTS * 8))
# How much wider than the noise it was trained on a network's latents are taken to grow: strong guidance overshoots.
OVERSHOOT = 2.0

Trials = Callable[[], list[Trial]]
Encoded = Callable[[], dict[str, torch.Tensor]]
Plan = tuple[tuple[int, int] | None, Component, Trials]

F32 = torch.float32
TIME_IDS = 6


def downscale(source: Source) -> int:
    """Pixels per latent cell, each way."""
    return int(2 ** (len(source.configs["vae"]["block_out_channels"]) - 1))


def tokens(source: Source) -> int:
    """Length of a prompt in one window, which text encoders take and a network of fixed shapes is made for."""
    return int(source.configs[next(iter(source.kind.tokenizers))]["max_position_embeddings"])


def components(source: Source, sizes: Sequence[tuple[int, int]]) -> Iterator[Plan]:
    """The components of a model, each with the size it is made for and the inputs to try it on: `random` and `real` ones, which it is
    verified on, and `extreme` ones for `export.audit`.
    """
    for folder in source.kind.tokenizers:
        yield None, text_encoder(source, folder), partial(_text_trials, source, folder)
    for size in sizes:
        yield size, unet(source, size), partial(_unet_trials, source, size)
        encoded = cache(partial(_encoded_picture, source, size))
        yield size, decoder(source, size), partial(_decoder_trials, source, size, encoded)
        yield size, encoder(source, size), partial(_encoder_trials, size, encoded)


def text_encoder(source: Source, folder: str) -> Component:
    """A text encoder: `input_ids` to `hidden_states`, and `text_embeds` where the denoiser wants them."""
    module = instantiate(source, folder)
    pooled = folder == "text_encoder_2"
    wrapper: torch.nn.Module
    if source.kind.addition_embed_type is None:
        wrapper = TextEncoder(module)
    else:
        wrapper = PenultimateTextEncoder(module, pooled=pooled)
    length = int(source.configs[folder]["max_position_embeddings"])
    inputs = (TensorSpec("input_ids", ("rows", length), torch.int64),)
    return Component(
        folder, folder, wrapper, inputs, ("hidden_states", "text_embeds") if pooled else ("hidden_states",)
    )


def unet(source: Source, size: tuple[int, int]) -> Component:
    """The denoising network."""
    channels, height, width = _latent_shape(source, size)
    text = int(source.configs["unet"]["cross_attention_dim"])
    inputs = [
        TensorSpec("latents", ("rows", channels, height, width), F32),
        TensorSpec("timesteps", ("rows",), F32),
        TensorSpec("encoder_hidden_states", ("rows", "tokens", text), F32),
    ]
    kinds: dict[str, Kind] = {"latents": "step", "timesteps": "schedule", "encoder_hidden_states": "request"}
    wrapper = UNet(instantiate(source, "unet"))
    if source.kind.addition_embed_type is not None:
        wrapper = UNetTextTime(wrapper.module)
        pooled = int(source.configs["text_encoder_2"]["projection_dim"])
        inputs += [TensorSpec("text_embeds", ("rows", pooled), F32), TensorSpec("time_ids", ("rows", TIME_IDS), F32)]
        kinds |= {"text_embeds": "request", "time_ids": "request"}
    return Component("unet", "unet", wrapper, tuple(inputs), ("model_output",), kinds)


def decoder(source: Source, size: tuple[int, int]) -> Component:
    """The first stage's decoder."""
    vae = source.configs["vae"]
    scaling, shift = float(vae.get("scaling_factor", 0.18215)), float(vae.get("shift_factor") or 0.0)
    inputs = (TensorSpec("latents", ("rows", *_latent_shape(source, size)), F32),)
    return Component("decoder", "vae", Decoder(instantiate(source, "vae"), scaling, shift), inputs, ("image",))


def encoder(source: Source, size: tuple[int, int]) -> Component:
    """The first stage's encoder."""
    inputs = (TensorSpec("image", ("rows", 3, size[1], size[0]), F32),)
    outputs = ("latent_mean", "latent_logvar")
    return Component("encoder", "vae", Encoder(instantiate(source, "vae")), inputs, outputs)


def _latent_shape(source: Source, size: tuple[int, int]) -> tuple[int, int, int]:
    factor = downscale(source)
    return int(source.configs["vae"].get("latent_channels", 4)), size[1] // factor, size[0] // factor


# ---------------------------------------------------------------------------------------------------- trials


def _prompt_ids(source: Source, folder: str, prompts: Sequence[str]) -> torch.Tensor:
    tokenizer = Tokenizer.from_folder(source.path / source.kind.tokenizers[folder])
    return torch.cat([torch.from_numpy(tokenizer.windows(prompt, 1).ids) for prompt in prompts])


def _text_trials(source: Source, folder: str) -> list[Trial]:
    vocabulary, ids = int(source.configs[folder]["vocab_size"]), _prompt_ids(source, folder, PROMPTS)
    generator = torch.Generator("cpu").manual_seed(1)
    random = torch.randint(0, vocabulary, tuple(ids.shape), generator=generator)
    extreme = _prompt_ids(source, folder, EXTREME_PROMPTS)
    return [
        Trial("random", {"input_ids": random}),
        Trial("real", {"input_ids": ids}),
        Trial("extreme", {"input_ids": extreme}),
    ]


def _unet_trials(source: Source, size: tuple[int, int]) -> list[Trial]:
    shape, steps = _latent_shape(source, size), torch.tensor([999.0, 261.0])
    states, pooled = [], None
    for folder in source.kind.tokenizers:
        original = _original(source, text_encoder(source, folder))
        with torch.inference_mode():
            found, *more = original(_prompt_ids(source, folder, (*PROMPTS, *EXTREME_PROMPTS)))
        states.append(found[0])
        pooled = more[0] if more else pooled
    text, extreme_text = torch.cat(states, dim=-1).chunk(2)
    random = {"latents": noise(2, 2, *shape), "timesteps": steps, "encoder_hidden_states": noise(3, *text.shape)}
    real = {"latents": noise(4, 2, *shape), "timesteps": steps.flip(0), "encoder_hidden_states": text}
    # A sampler scales what it feeds to the variance of the training noise, whatever the noise level; its ends are the first and
    # the last timestep.
    extreme = {
        "latents": OVERSHOOT * noise(8, 2, *shape),
        "timesteps": torch.tensor([999.0, 0.0]),
        "encoder_hidden_states": extreme_text,
    }
    if pooled is not None:
        pooled, extreme_pooled = pooled.chunk(2)
        ids = torch.tensor([[size[1], size[0], 0, 0, size[1], size[0]]] * 2, dtype=F32)
        random |= {"text_embeds": noise(7, *pooled.shape), "time_ids": ids.flip(0)}
        real |= {"text_embeds": pooled, "time_ids": ids}
        extreme |= {"text_embeds": extreme_pooled, "time_ids": ids}
    return [Trial("random", random), Trial("real", real), Trial("extreme", extreme)]


def _encoded_picture(source: Source, size: tuple[int, int]) -> dict[str, torch.Tensor]:
    """What the original encoder makes of the sample picture."""
    component = encoder(source, size)
    with torch.inference_mode():
        found = _original(source, component)(sample_picture(*size))
    return dict(zip(component.outputs, found, strict=True))


def _decoder_trials(source: Source, size: tuple[int, int], encoded: Encoded) -> list[Trial]:
    mean = encoded()["latent_mean"]
    # What a sampler hands over has unit variance: that is what the scaling factor is for. It holds for weights that were
    # never trained only if it is seen to; a single latent is its own mean.
    spread = mean.std() if mean.numel() > 1 else torch.tensor(1.0)
    shape = (1, *_latent_shape(source, size))
    return [
        Trial("random", {"latents": noise(5, *shape)}),
        Trial("real", {"latents": mean / spread}),
        Trial("extreme", {"latents": OVERSHOOT * noise(9, *shape)}),
    ]


def _encoder_trials(size: tuple[int, int], encoded: Encoded) -> list[Trial]:
    shape = (1, 3, size[1], size[0])
    # All pixels at an end of their range: no picture has more contrast.
    return [
        Trial("random", {"image": noise(6, *shape).clamp(-1, 1)}),
        Trial("real", {"image": sample_picture(*size)}, encoded()),
        Trial("extreme", {"image": noise(10, *shape).sign()}),
    ]


# ---------------------------------------------------------------------------------------------------- modules


def _original(source: Source, component: Component) -> torch.nn.Module:
    return reference(component, Checkpoint(source, component.folder, component.original))


def instantiate(source: Source, folder: str) -> torch.nn.Module:
    """A component's original module on the meta device, in eval mode: shapes, no weights."""
    make = _text_encoder if folder in source.kind.tokenizers else _network
    config: dict[str, Any] = dict(source.configs[folder])
    try:
        with torch.device("meta"):
            module = make(folder, config)
    except Exception as error:  # whatever a constructor makes of values that nobody has checked
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise BuildError(
            f"{source.path / folder / 'config.json'} does not describe a model ({reason}); copy the model again"
        ) from error
    return module.eval()


def _text_encoder(folder: str, config: dict[str, Any]) -> torch.nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    classes: dict[str, Any] = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    module: torch.nn.Module = classes[folder](CLIPTextConfig(**config))
    return module


def _network(folder: str, config: dict[str, Any]) -> torch.nn.Module:
    from diffusers import AutoencoderKL, UNet2DConditionModel

    classes: dict[str, Any] = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}
    module: torch.nn.Module = classes[folder].from_config(config)
    return module


def reference(component: Component, checkpoint: Checkpoint) -> torch.nn.Module:
    """The component's wrapper around the original module, which computes in float32.

    A weight is in memory only while its layer runs: those of a whole network in float32 may not fit beside a build.
    """
    module = component.original
    for path, layer in module.named_modules():
        prefix = f"{path}." if path else ""
        own = [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]
        names = {name: prefix + name for name, _ in own if prefix + name in checkpoint.keys}
        if names:
            layer.register_forward_pre_hook(partial(_fill, checkpoint, names))
            layer.register_forward_hook(partial(_empty, list(names)))
    for name, buffer in list(module.named_buffers()):
        if buffer.is_meta and name.endswith("position_ids"):
            owner = module.get_submodule(name.rpartition(".")[0])
            owner.register_buffer(
                "position_ids", torch.arange(buffer.shape[-1]).reshape(buffer.shape), persistent=False
            )
    return component.module


def _fill(checkpoint: Checkpoint, names: Mapping[str, str], layer: torch.nn.Module, _inputs: Any) -> None:
    for name, full in names.items():
        _place(layer, name, checkpoint.read(full, F32))


def _empty(names: Sequence[str], layer: torch.nn.Module, _inputs: Any, _outputs: Any) -> None:
    for name in names:
        _place(layer, name, layer.get_parameter(name).to("meta"))


def _place(layer: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    setattr(layer, name, torch.nn.Parameter(tensor, requires_grad=False))
