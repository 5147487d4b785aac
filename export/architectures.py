"""How each kind of model is taken apart: its components, their inputs, and inputs to try them on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ldmrt.engines.protocol import TensorSpec
from ldmrt.errors import BuildError
from ldmrt.export.component import Component, Decoder, Encoder, TextEncoder, UNet
from ldmrt.export.source import Checkpoint, Source
from ldmrt.export.verify import Trial, noise, sample_picture
from ldmrt.tokenizer import Tokenizer

# What text encoders are tried on: prompts as people write them, of different lengths.
PROMPTS = (
    "a red circle left of a small blue square on a white background",
    "a photograph of an astronaut riding a horse, highly detailed, 35mm",
)

FOLDERS = ("text_encoder", "unet", "vae")

Plan = tuple[tuple[int, int] | None, Component, Callable[[], list[Trial]]]


def downscale(source: Source) -> int:
    """Pixels per latent cell, each way."""
    return int(2 ** (len(source.configs["vae"]["block_out_channels"]) - 1))


def components(source: Source, sizes: Sequence[tuple[int, int]]) -> Iterator[Plan]:
    """The components of a Stable Diffusion model, each with the size it is made for and the inputs to verify it on."""
    text, unet, vae = (source.configs[name] for name in ("text_encoder", "unet", "vae"))
    tokens, vocabulary = int(text["max_position_embeddings"]), int(text["vocab_size"])
    width = int(unet["cross_attention_dim"])
    channels, scaling = int(vae.get("latent_channels", 4)), float(vae.get("scaling_factor", 0.18215))
    factor = downscale(source)
    f32 = torch.float32

    def prompt_ids() -> torch.Tensor:
        tokenizer = Tokenizer.from_folder(source.path / "tokenizer")
        return torch.cat([torch.from_numpy(tokenizer.windows(prompt, 1).ids) for prompt in PROMPTS])

    def random_ids() -> torch.Tensor:
        return torch.randint(0, vocabulary, (2, tokens), generator=torch.Generator("cpu").manual_seed(1))

    yield (
        None,
        Component(
            "text_encoder",
            "text_encoder",
            TextEncoder(instantiate(source, "text_encoder")),
            (TensorSpec("input_ids", ("rows", tokens), torch.int64),),
            ("hidden_states",),
        ),
        lambda: [Trial("random", {"input_ids": random_ids()}), Trial("real", {"input_ids": prompt_ids()})],
    )

    def embeddings() -> torch.Tensor:
        module = instantiate(source, "text_encoder")
        encoder = reference(
            Component("text_encoder", "text_encoder", TextEncoder(module), (), ()),
            Checkpoint(source, "text_encoder", module),
        )
        with torch.inference_mode():
            return encoder(prompt_ids())[0][0]  # type: ignore[no-any-return]

    for size in sizes:
        w, h = size[0] // factor, size[1] // factor

        def denoiser_trials(w: int = w, h: int = h) -> list[Trial]:
            steps = torch.tensor([999.0, 261.0])
            text = embeddings()
            random = {
                "latents": noise(2, 2, channels, h, w),
                "timesteps": steps,
                "encoder_hidden_states": noise(3, *text.shape),
            }
            real = {"latents": noise(4, 2, channels, h, w), "timesteps": steps.flip(0), "encoder_hidden_states": text}
            return [Trial("random", random), Trial("real", real)]

        yield (
            size,
            Component(
                "unet",
                "unet",
                UNet(instantiate(source, "unet")),
                (
                    TensorSpec("latents", ("rows", channels, h, w), f32),
                    TensorSpec("timesteps", ("rows",), f32),
                    TensorSpec("encoder_hidden_states", ("rows", "tokens", width), f32),
                ),
                ("model_output",),
                {"latents": "step", "timesteps": "schedule", "encoder_hidden_states": "request"},
            ),
            denoiser_trials,
        )

        def decoder_trials(w: int = w, h: int = h, size: tuple[int, int] = size) -> list[Trial]:
            module = instantiate(source, "vae")
            encoder = reference(Component("encoder", "vae", Encoder(module), (), ()), Checkpoint(source, "vae", module))
            with torch.inference_mode():
                mean = encoder(sample_picture(*size))[0]
            # What a sampler hands over has unit variance: that is what the scaling factor is for. It holds for weights that were
            # never trained only if it is seen to.
            return [
                Trial("random", {"latents": noise(5, 1, channels, h, w)}),
                Trial("real", {"latents": mean / mean.std()}),
            ]

        yield (
            size,
            Component(
                "decoder",
                "vae",
                Decoder(instantiate(source, "vae"), scaling, float(vae.get("shift_factor") or 0.0)),
                (TensorSpec("latents", ("rows", channels, h, w), f32),),
                ("image",),
            ),
            decoder_trials,
        )

        def encoder_trials(size: tuple[int, int] = size) -> list[Trial]:
            shape = (1, 3, size[1], size[0])
            return [
                Trial("random", {"image": noise(6, *shape).clamp(-1, 1)}),
                Trial("real", {"image": sample_picture(*size)}),
            ]

        yield (
            size,
            Component(
                "encoder",
                "vae",
                Encoder(instantiate(source, "vae")),
                (TensorSpec("image", ("rows", 3, size[1], size[0]), f32),),
                ("latent_mean", "latent_logvar"),
            ),
            encoder_trials,
        )


def instantiate(source: Source, folder: str) -> torch.nn.Module:
    """A component's original module on the meta device, in eval mode: shapes, no weights."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    config: dict[str, Any] = dict(source.configs[folder])
    try:
        with torch.device("meta"):
            if folder == "text_encoder":
                module: torch.nn.Module = CLIPTextModel(CLIPTextConfig(**config))
            else:
                module = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[folder].from_config(config)
    except Exception as error:  # whatever a constructor makes of values that nobody has checked
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise BuildError(
            f"{source.path / folder / 'config.json'} does not describe a model ({reason}); copy the model again"
        ) from error
    return module.eval()


def reference(component: Component, checkpoint: Checkpoint) -> torch.nn.Module:
    """The component's wrapper around the original module, its weights loaded in float32."""
    module = component.original
    module.load_state_dict({name: checkpoint.load(name).float() for name in checkpoint.keys}, strict=True, assign=True)
    for name, buffer in list(module.named_buffers()):
        if buffer.is_meta and name.endswith("position_ids"):
            owner = module.get_submodule(name.rpartition(".")[0])
            owner.register_buffer(
                "position_ids", torch.arange(buffer.shape[-1]).reshape(buffer.shape), persistent=False
            )
    return component.module
