"""How each kind of model is taken apart: its components, their inputs, and inputs to try them on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch

from ldmrt.components import CLASS_LABELS, CONTROLLED_STEP, LAYOUT, SEGMENTATION, parts
from ldmrt.engines.protocol import TensorSpec
from ldmrt.errors import BuildError
from ldmrt.export.component import (
    DOWN_RESIDUALS,
    MID_RESIDUAL,
    TIMESTEP_COND,
    BertTextEncoder,
    Component,
    ControlNet,
    Decoder,
    Encoder,
    PenultimateTextEncoder,
    QuantizedDecoder,
    QuantizedEncoder,
    Rescaler,
    TextEncoder,
    UNet,
    UNetWithoutText,
)
from ldmrt.export.passes.hoist import Kind
from ldmrt.export.source import CLASS_EMBEDDER, LAYOUT_ENCODER, NUM_HEADS, RESCALER, Checkpoint, Source
from ldmrt.export.verify import noise, sample_picture
from ldmrt.guidance import embedding
from ldmrt.network import LOW_RES, MASKED, sizes
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


def downscale(source: Source) -> int:
    """Pixels per latent cell, each way."""
    return int(2 ** (len(source.configs["vae"]["block_out_channels"]) - 1))


def scaling(source: Source) -> tuple[float, float]:
    """Factor and shift of the latents: denoised are (encoded - shift) * factor."""
    vae = source.configs["vae"]
    if source.kind.unscaled:
        return 1.0, 0.0
    return float(vae.get("scaling_factor", 0.18215)), float(vae.get("shift_factor") or 0.0)


def tokens(source: Source) -> int:
    """Length of a prompt in one window, which text encoders take and a network of fixed shapes is made for."""
    return int(source.configs[next(iter(source.kind.tokenizers))]["max_position_embeddings"])


def components(source: Source, sizes: Sequence[tuple[int, int]], decoder_tile: int | None = None) -> Iterator[Plan]:
    """The components of a model, each with the size it is made for and the inputs to try it on: `random` and `real` ones, which it is
    verified on, and `extreme` ones for `export.audit`. With `decoder_tile` a decoder of that size, each way, comes last.
    """
    for folder in source.kind.tokenizers:
        yield None, text_encoder(source, folder), partial(_text_trials, source, folder)
    for size in sizes:
        yield size, unet(source, size), partial(_unet_trials, source, size)
        if source.controlnets:
            yield size, controlled_unet(source, size), partial(_controlled_trials, source, size)
        for folder in source.controlnets:
            yield size, controlnet(source, folder, size), partial(_controlnet_trials, source, size)
        encoded = cache(partial(_encoded_picture, source, size))
        yield size, decoder(source, size), partial(_decoder_trials, source, size, encoded)
        yield size, encoder(source, size), partial(_encoder_trials, size, encoded)
    if decoder_tile is not None:
        tile = decoder_tile, decoder_tile
        encoded = cache(partial(_encoded_picture, source, tile))
        yield tile, decoder(source, tile), partial(_decoder_trials, source, tile, encoded)


def text_encoder(source: Source, folder: str) -> Component:
    """A text encoder: `input_ids` to `hidden_states`, and `text_embeds` where the denoiser wants them."""
    module = instantiate(source, folder)
    pooled = folder == "text_encoder_2"
    wrapper: torch.nn.Module
    if source.kind.classes[folder] == "LDMBertModel":
        wrapper = BertTextEncoder(module)
    elif source.kind.addition_embed_type is None:
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
    inputs, kinds = _unet_inputs(source, size)
    wrapper = UNetWithoutText if source.kind.classes["unet"] == "UNet2DModel" else UNet
    module = wrapper(instantiate(source, "unet"), [spec.name for spec in inputs])
    return Component("unet", "unet", module, inputs, ("model_output",), kinds)


def controlled_unet(source: Source, size: tuple[int, int]) -> Component:
    """The denoising network with the residuals of ControlNets added to its skip connections and its middle."""
    inputs, kinds = _unet_inputs(source, size)
    residuals = _residuals(source, next(iter(source.controlnets)), size)
    inputs += residuals
    wrapper = UNet(instantiate(source, "unet"), [spec.name for spec in inputs])
    kinds |= {spec.name: "step" for spec in residuals}
    return Component("controlled_unet", "unet", wrapper, inputs, ("model_output",), kinds, parts(CONTROLLED_STEP))


def controlnet(source: Source, folder: str, size: tuple[int, int]) -> Component:
    """A ControlNet. Its picture is the request's; how much of it is added is told anew at every step."""
    inputs, kinds = _controlnet_inputs(source, size)
    wrapper = ControlNet(instantiate(source, folder), [spec.name for spec in inputs])
    outputs = tuple(spec.name for spec in _residuals(source, folder, size))
    return Component(folder, folder, wrapper, inputs, outputs, kinds, parts(f"{folder}.step"))


def _unet_inputs(source: Source, size: tuple[int, int]) -> tuple[tuple[TensorSpec, ...], dict[str, Kind]]:
    """What the U-Net takes, and the class of each."""
    inputs, kinds = _denoising_inputs(source, size)
    channels, height, width = _latent_shape(source, size)
    if source.kind.upscaling:
        inputs += (TensorSpec(LOW_RES, ("rows", 3, height, width), F32),)
        kinds |= {LOW_RES: "request"}
    if source.segments is not None:
        inputs += (TensorSpec(SEGMENTATION, ("rows", 1, size[1], size[0]), torch.int64),)
        kinds |= {SEGMENTATION: "request"}
    if source.layout is not None:
        inputs += (TensorSpec(LAYOUT, ("rows", 3 * source.layout.objects + 2), torch.int64),)
        kinds |= {LAYOUT: "request"}
    if source.labels is not None:
        inputs += (TensorSpec(CLASS_LABELS, ("rows",), torch.int64),)
        kinds |= {CLASS_LABELS: "request"}
    if source.kind.inpainting:
        inputs += tuple(
            TensorSpec(name, ("rows", count, height, width), F32)
            for name, count in zip(MASKED, (1, channels), strict=True)
        )
        kinds |= dict.fromkeys(MASKED, "request")
    if source.guidance_embedding is not None:
        inputs += (TensorSpec(TIMESTEP_COND, ("rows", source.guidance_embedding), F32),)
        kinds |= {TIMESTEP_COND: "request"}
    return inputs, kinds


def _denoising_inputs(source: Source, size: tuple[int, int]) -> tuple[tuple[TensorSpec, ...], dict[str, Kind]]:
    """What the U-Net and its ControlNets both take, and the class of each."""
    channels, height, width = _latent_shape(source, size)
    inputs = [
        TensorSpec("latents", ("rows", channels, height, width), F32),
        TensorSpec("timesteps", ("rows",), F32),
    ]
    kinds: dict[str, Kind] = {"latents": "step", "timesteps": "schedule"}
    if source.kind.tokenizers:
        width_of_text = int(source.configs["unet"]["cross_attention_dim"])
        inputs += [TensorSpec("encoder_hidden_states", ("rows", "tokens", width_of_text), F32)]
        kinds |= {"encoder_hidden_states": "request"}
    if source.kind.addition_embed_type is not None:
        pooled = int(source.configs["text_encoder_2"]["projection_dim"])
        ids = source.kind.time_ids
        inputs += [TensorSpec("text_embeds", ("rows", pooled), F32), TensorSpec("time_ids", ("rows", ids), F32)]
        kinds |= {"text_embeds": "request", "time_ids": "request"}
    return tuple(inputs), kinds


def _controlnet_inputs(source: Source, size: tuple[int, int]) -> tuple[tuple[TensorSpec, ...], dict[str, Kind]]:
    """What a ControlNet takes, and the class of each."""
    inputs, kinds = _denoising_inputs(source, size)
    inputs += (
        TensorSpec("controlnet_cond", ("rows", 3, size[1], size[0]), F32),
        TensorSpec("conditioning_scale", ("rows",), F32),
    )
    return inputs, {**kinds, "controlnet_cond": "request", "conditioning_scale": "schedule"}


def _residuals(source: Source, folder: str, size: tuple[int, int]) -> tuple[TensorSpec, ...]:
    """What a ControlNet makes: run on the meta device, where it says its shapes and computes nothing."""
    specs, _ = _controlnet_inputs(source, size)
    wrapper = ControlNet(instantiate(source, folder), [spec.name for spec in specs])
    examples = [torch.empty(sizes(s, rows=2, tokens=tokens(source)), device="meta") for s in specs]
    with torch.inference_mode():
        made = wrapper(*examples)
    names = [*(f"{DOWN_RESIDUALS}.{number}" for number in range(len(made) - 1)), MID_RESIDUAL]
    return tuple(TensorSpec(name, ("rows", *tensor.shape[1:]), F32) for name, tensor in zip(names, made, strict=True))


def decoder(source: Source, size: tuple[int, int]) -> Component:
    """The first stage's decoder."""
    factor, shift = scaling(source)
    inputs = (TensorSpec("latents", ("rows", *_latent_shape(source, size)), F32),)
    module = instantiate(source, "vae")
    wrapper = QuantizedDecoder(module, factor) if source.is_quantized else Decoder(module, factor, shift)
    return Component("decoder", "vae", wrapper, inputs, ("image",))


def encoder(source: Source, size: tuple[int, int]) -> Component:
    """The first stage's encoder."""
    inputs = (TensorSpec("image", ("rows", 3, size[1], size[0]), F32),)
    outputs = ("latent_mean", "latent_logvar")
    wrapper = QuantizedEncoder if source.is_quantized else Encoder
    return Component("encoder", "vae", wrapper(instantiate(source, "vae")), inputs, outputs)


def _latent_shape(source: Source, size: tuple[int, int]) -> tuple[int, int, int]:
    factor = downscale(source)
    return int(source.configs["vae"].get("latent_channels", 4)), size[1] // factor, size[0] // factor


# ---------------------------------------------------------------------------------------------------- trials


def _prompt_ids(source: Source, folder: str, prompts: Sequence[str]) -> torch.Tensor:
    length = int(source.configs[folder]["max_position_embeddings"])
    tokenizer = Tokenizer.from_folder(source.tokenizer_folder(folder), model_max_length=length)
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


def _denoising_trials(source: Source, size: tuple[int, int]) -> list[Trial]:
    shape, steps = _latent_shape(source, size), torch.tensor([999.0, 261.0])
    states, pooled = [], None
    for folder in source.kind.tokenizers:
        original = _original(source, text_encoder(source, folder))
        with torch.inference_mode():
            found, *more = original(_prompt_ids(source, folder, (*PROMPTS, *EXTREME_PROMPTS)))
        states.append(found[0])
        pooled = more[0] if more else pooled
    random = {"latents": noise(2, 2, *shape), "timesteps": steps}
    real = {"latents": noise(4, 2, *shape), "timesteps": steps.flip(0)}
    # A sampler scales what it feeds to the variance of the training noise, whatever the noise level; its ends are the first and
    # the last timestep.
    extreme = {"latents": OVERSHOOT * noise(8, 2, *shape), "timesteps": torch.tensor([999.0, 0.0])}
    if states:
        text, extreme_text = torch.cat(states, dim=-1).chunk(2)
        random |= {"encoder_hidden_states": noise(3, *text.shape)}
        real |= {"encoder_hidden_states": text}
        extreme |= {"encoder_hidden_states": extreme_text}
    if pooled is not None:
        pooled, extreme_pooled = pooled.chunk(2)
        ids = torch.tensor([[size[1], size[0], 0, 0, size[1], size[0]]] * 2, dtype=F32)
        if source.kind.requires_aesthetics_score:
            ids = torch.tensor([[size[1], size[0], 0, 0, score] for score in (6.0, 2.5)], dtype=F32)
        random |= {"text_embeds": noise(7, *pooled.shape), "time_ids": ids.flip(0)}
        real |= {"text_embeds": pooled, "time_ids": ids}
        extreme |= {"text_embeds": extreme_pooled, "time_ids": ids}
    return [Trial("random", random), Trial("real", real), Trial("extreme", extreme)]


def _unet_trials(source: Source, size: tuple[int, int]) -> list[Trial]:
    return [
        Trial(t.kind, {**t.inputs, **_unets_own(source, size, number)})
        for number, t in enumerate(_denoising_trials(source, size))
    ]


def _unets_own(source: Source, size: tuple[int, int], seed: int) -> dict[str, torch.Tensor]:
    """What the U-Nets of some models take, and ControlNets do not, for two rows: a small picture; a semantic map; a layout, and one of nothing; a class or
    noise level; half of a picture to be edited, and some latents; a weak and a strong guidance.
    """
    found: dict[str, torch.Tensor] = {}
    channels, height, width = _latent_shape(source, size)
    if source.kind.upscaling:
        found[LOW_RES] = noise(40 + seed, 2, 3, height, width).clamp(-1, 1)
    if source.segments is not None:
        cells = torch.arange(2 * size[0] * size[1]).reshape(2, 1, size[1], size[0]) // 7
        found[SEGMENTATION] = (cells + seed) % source.segments
    if source.layout is not None:
        several = torch.arange(3 * source.layout.objects + 2) * 7 + seed
        found[LAYOUT] = torch.stack([several, torch.full_like(several, -1)]) % source.layout.tokens
    if source.labels is not None:
        found[CLASS_LABELS] = torch.tensor([seed % source.labels, source.labels - 1])
    if source.kind.inpainting:
        mask = torch.zeros(2, 1, height, width)
        mask[0, :, : (height + 1) // 2] = mask[1, :, :, : (width + 1) // 2] = 1
        found |= {"mask": mask, "masked_image_latents": noise(30 + seed, 2, channels, height, width)}
    if source.guidance_embedding is not None:
        weights = [embedding(scale, source.guidance_embedding) for scale in (1.5, 10.0)]
        found[TIMESTEP_COND] = torch.stack(weights)
    return found


def _controlnet_trials(source: Source, size: tuple[int, int]) -> list[Trial]:
    """As the U-Net's, with a picture for each row, and more of it for the one than for the other."""
    shape, scales = (2, 3, size[1], size[0]), torch.tensor([1.0, 0.4])
    pictures = {
        "random": noise(11, *shape).sigmoid(),
        "real": sample_picture(*size).mul(0.5).add(0.5).expand(shape),
        "extreme": noise(12, *shape).sign().clamp(min=0),
    }
    return [
        Trial(t.kind, {**t.inputs, "controlnet_cond": pictures[t.kind], "conditioning_scale": scales})
        for t in _denoising_trials(source, size)
    ]


def _controlled_trials(source: Source, size: tuple[int, int]) -> list[Trial]:
    """As the U-Net's, with the residuals that the first of its ControlNets makes; instead of random ones noise."""
    folder = next(iter(source.controlnets))
    component = controlnet(source, folder, size)
    original = _original(source, component)
    found = []
    for number, trial in enumerate(_controlnet_trials(source, size)):
        with torch.inference_mode():
            made = original(*trial.inputs.values())
        if trial.kind == "random":
            made = [noise(20 + number, *tensor.shape) for tensor in made]
        inputs = {name: t for name, t in trial.inputs.items() if name not in ("controlnet_cond", "conditioning_scale")}
        inputs |= _unets_own(source, size, number)
        found.append(Trial(trial.kind, inputs | dict(zip(component.outputs, made, strict=True))))
    return found


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
    config: dict[str, Any] = dict(source.configs[folder])
    try:
        with torch.device("meta"):
            if folder in source.kind.tokenizers:
                module = _text_encoder(source.kind.classes[folder], config)
            else:
                module = _network(source.kind.classes.get(folder, "ControlNetModel"), config)
                if folder == "unet" and CLASS_EMBEDDER in source.configs:
                    table = source.configs[CLASS_EMBEDDER]
                    module.add_module(CLASS_EMBEDDER, torch.nn.Embedding(table["rows"], table["width"]))
                if folder == "unet" and LAYOUT_ENCODER in source.configs:
                    module.add_module(
                        LAYOUT_ENCODER, _text_encoder("LDMBertModel", dict(source.configs[LAYOUT_ENCODER]))
                    )
                if folder == "unet" and RESCALER in source.configs:
                    module.add_module(RESCALER, Rescaler(**source.configs[RESCALER]))
    except Exception as error:  # whatever a constructor makes of values that nobody has checked
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise BuildError(
            f"{source.config_file(folder)} does not describe a model ({reason}); copy the model again"
        ) from error
    return module.eval()


def _text_encoder(name: str, config: dict[str, Any]) -> torch.nn.Module:
    if name == "LDMBertModel":
        from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

        bert: torch.nn.Module = LDMBertModel(LDMBertConfig(**config))
        return bert
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    classes: dict[str, Any] = {
        "CLIPTextModel": CLIPTextModel,
        "CLIPTextModelWithProjection": CLIPTextModelWithProjection,
    }
    module: torch.nn.Module = classes[name](CLIPTextConfig(**config))
    return module


def _network(name: str, config: dict[str, Any]) -> torch.nn.Module:
    import diffusers
    from diffusers.models.attention_processor import Attention

    made: Any = getattr(diffusers, name)
    # diffusers would leave out what it does not know, and the network would be another one.
    heads = config.pop(NUM_HEADS, None)
    known = inspect.signature(made.__init__).parameters
    unknown = [key for key, value in config.items() if key not in known and key[:1] != "_" and value is not None]
    if unknown:
        raise ValueError(f"{name} does not know {', '.join(unknown[:3])}: update diffusers")
    module: torch.nn.Module = made.from_config(config)
    for part in module.modules():
        if heads is not None and isinstance(part, Attention):
            part.heads = heads
    return module


def reference(component: Component, checkpoint: Checkpoint) -> torch.nn.Module:
    """The component's wrapper around the original module, which computes in float32.

    A weight is in memory only while its layer runs: those of a whole network in float32 may not fit beside a build.
    """
    component.module.float()  # on the meta device, where weights are until they are read; some networks cast to what they see there
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
