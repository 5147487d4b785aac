"""What the original code of latent diffusion (CompVis) says of a model, as configs of diffusers: its YAML file, or what is known of its own.

Rombach et al. 2022, arXiv 2112.10752. Its files: https://github.com/CompVis/latent-diffusion (configs, models).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldmrt.errors import BuildError
from ldmrt.export.source import (
    CLASS_CONDITIONAL,
    CLASS_EMBEDDER,
    KINDS,
    LAYOUT_ENCODER,
    LAYOUTS,
    LDM_INPAINTING,
    NUM_HEADS,
    RESCALER,
    SEMANTIC,
    Kind,
    Source,
    read_json,
)
from ldmrt.export.values import is_number, is_whole
from ldmrt.tokenizer import Tokenizer
from ldmrt.weights import WeightFile

NETWORK = "model.diffusion_model."
_KNOWN = Path(__file__).parent / "known" / "latent-diffusion.json"
# A config is some kilobytes.
_LARGEST = 1 << 20
# Classes that the original code's table has where a config names none; only a table that it names has a last row for none of them.
_CLASSES = 1000
_PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
# What a U-Net of the original code may be asked for that networks of diffusers do not have.
_FIXED = {"dims": 2, "conv_resample": True, "num_classes": None, "n_embed": None, "use_new_attention_order": False}


def known() -> str:
    """What the known models are called."""
    return ", ".join(read_json(_KNOWN))


def recognise(file: WeightFile, tokenizer: Path | None = None) -> Source | None:
    """The configs of a known model, by its file's U-Net: its channels, and the width of what it attends to. None if it is none of them.

    Args:
        file: its weights.
        tokenizer: see `source`.

    Raises:
        BuildError: see `source`.
    """
    first = file.entries.get(f"{NETWORK}input_blocks.0.0.weight")
    if first is None or len(first.shape) != 4:
        return None
    key = next((name for name in file if name.startswith(NETWORK) and name.endswith("attn2.to_k.weight")), None)
    found = (first.shape[1], first.shape[0], file.entries[key].shape[-1] if key else None)
    for params in read_json(_KNOWN).values():
        unet = params["unet_config"]["params"]
        if found == (unet["in_channels"], unet["model_channels"], unet.get("context_dim")):
            return source(params, _KNOWN, file, tokenizer)
    return None


def read(path: Path) -> dict[str, Any]:
    """The parameters of the model in a YAML file (`model.params`), read as plain data.

    Raises:
        BuildError: the file is missing, or is none of the original code.
    """
    import yaml

    try:
        if path.stat().st_size > _LARGEST:
            raise BuildError(
                f"{path} has {path.stat().st_size} bytes, expected the YAML file of a model, of a few thousand"
            )
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BuildError(f"cannot read {path}: {error.strerror or error}; give the model's YAML file") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:120]
        raise BuildError(f"{path} is not YAML ({reason}); copy it again") from error
    params = _inner(data, "model", "params")
    if not isinstance(params, dict):
        raise BuildError(
            f"{path} has no model.params: it is no config of the original code; give the model's YAML file"
        )
    return params


def source(params: Mapping[str, Any], where: Path, file: WeightFile, tokenizer: Path | None = None) -> Source:
    """A model's kind and configs, without its weights.

    Args:
        params: the parameters of its `LatentDiffusion`.
        where: the file that they are from.
        file: its weights, which hold the scaling factor of some.
        tokenizer: the folder of BERT's vocabulary, for a model that reads text.

    Raises:
        BuildError: the model is of a kind that ldmrt does not build, or a value is missing or of another type.
        BundleError: there is no tokenizer, or it is damaged.
    """
    read = _Reader(where)
    unet = read.mapping(params, "unet_config", "params")
    stage = read.mapping(params, "first_stage_config", "params")
    quantized = _target(params, "first_stage_config").startswith("VQModel")
    if not quantized and _target(params, "first_stage_config") != "AutoencoderKL":
        raise read.unknown("first_stage_config", _target(params, "first_stage_config"))
    kind, conditions = _kind(params, read)
    spatial = bool(unet.get("use_spatial_transformer"))
    if spatial != (kind.classes["unet"] == "UNet2DConditionModel"):
        raise read.unknown("unet_config", f"a U-Net {'with' if spatial else 'without'} cross-attention")
    for name, value in _FIXED.items():
        if unet.get(name, value) != value:
            raise read.unknown("unet_config", f"{name} = {unet[name]}")
    configs = {
        "unet": _text_unet(unet, read) if spatial else _plain_unet(unet, read),
        "vae": _first_stage(stage, read, quantized=quantized) | {"scaling_factor": _scale(params, file, read)},
        "scheduler": _schedule(params, read),
        **conditions,
    }
    latents = configs["vae"]["latent_channels"]
    if configs["unet"]["in_channels"] != latents + kind.joined(latents):
        raise read.unknown(
            "unet_config", f"a U-Net of {configs['unet']['in_channels']} channels over {latents} latent ones"
        )
    classes = {**kind.classes, "vae": "VQModel" if quantized else "AutoencoderKL"}
    if kind.tokenizers and tokenizer is None:
        raise BuildError(
            f"{file.path} reads text with BERT, whose vocabulary neither it nor ldmrt has: give the folder that has the vocab.txt of "
            "bert-base-uncased, --tokenizer DIR, or the same model in the diffusers layout, --base DIR"
        )
    tokenizers = {folder: tokenizer for folder in kind.tokenizers if tokenizer is not None}
    for folder in tokenizers.values():
        Tokenizer.from_folder(folder)
    return Source(
        where.parent,
        replace(kind, classes=classes),
        configs,
        {},
        files=dict.fromkeys((*classes, *kind.schedulers), where),
        tokenizers=tokenizers,
    )


def _kind(params: Mapping[str, Any], read: _Reader) -> tuple[Kind, dict[str, dict[str, Any]]]:
    """The kind of a model, by what it is told besides the latents, and the configs of that."""
    condition, target = params.get("cond_stage_config"), _target(params, "cond_stage_config")
    if condition is None or condition == "__is_unconditional__":
        return KINDS["LDMPipeline"], {}
    if target == "ClassEmbedder":
        inner = read.mapping(params, "cond_stage_config", "params")
        rows, width = read.whole(inner, "n_classes", _CLASSES), read.whole(inner, "embed_dim")
        return CLASS_CONDITIONAL, {CLASS_EMBEDDER: {"rows": rows, "width": width, "null": "n_classes" in inner}}
    if target == "SpatialRescaler" and params.get("concat_mode") and params.get("cond_stage_key") == "segmentation":
        return SEMANTIC, {RESCALER: _rescaler(params, read)}
    if target == "BERTEmbedder":
        inner = read.mapping(params, "cond_stage_config", "params")
        if inner.get("use_tokenizer", True):
            return KINDS["LDMTextToImagePipeline"], {"text_encoder": _bert(inner, read)}
        if params.get("cond_stage_key") == "coordinates_bbox":
            return LAYOUTS, {LAYOUT_ENCODER: _layout_encoder(inner, read)}
    if target == "Identity" and params.get("concat_mode") and params.get("cond_stage_key", "LR_image") == "LR_image":
        return replace(KINDS["LDMSuperResolutionPipeline"], unscaled=False), {}
    if (
        condition == "__is_first_stage__"
        and params.get("cond_stage_key") == "masked_image"
        and params.get("concat_mode")
    ):
        return LDM_INPAINTING, {}
    raise read.unknown("cond_stage_config", target or str(condition)[:40])


def _rescaler(params: Mapping[str, Any], read: _Reader) -> dict[str, Any]:
    inner = read.mapping(params, "cond_stage_config", "params")
    stages, channels = read.whole(inner, "n_stages", 1), read.whole(inner, "out_channels")
    levels = read.wholes(read.mapping(params, "first_stage_config", "params", "ddconfig"), "ch_mult")
    plain = (inner.get("method", "bilinear"), inner.get("multiplier", 0.5), inner.get("bias", False))
    if (stages, channels) != (len(levels) - 1, 3) or plain != ("bilinear", 0.5, False):
        raise read.unknown("cond_stage_config", f"a SpatialRescaler of {dict(inner)}"[:120])
    return {"stages": stages, "classes": read.whole(inner, "in_channels", 3), "channels": channels}


def _bert(params: Mapping[str, Any], read: _Reader) -> dict[str, Any]:
    width = read.whole(params, "n_embed")
    return {
        "vocab_size": read.whole(params, "vocab_size", 30522),
        "max_position_embeddings": read.whole(params, "max_seq_len", 77),
        "d_model": width,
        "encoder_layers": read.whole(params, "n_layer"),
        "encoder_ffn_dim": 4 * width,
        "encoder_attention_heads": 8,
        "head_dim": 64,
    }


def _layout_encoder(params: Mapping[str, Any], read: _Reader) -> dict[str, Any]:
    config = _bert(params, read)
    length, known = config["max_position_embeddings"], config["vocab_size"]
    if length < 5 or length % 3 != 2 or known < 4:
        raise read.unknown("cond_stage_config", f"{length} of {known} tokens, and an object has three, the picture two")
    return config


def _blocks(unet: Mapping[str, Any], read: _Reader) -> tuple[list[int], list[bool]]:
    """The channels of each level of a U-Net, and whether it attends."""
    width, resolutions = read.whole(unet, "model_channels"), read.wholes(unet, "attention_resolutions")
    channels = [width * factor for factor in read.wholes(unet, "channel_mult", (1, 2, 4, 8))]
    return channels, [2**level in resolutions for level in range(len(channels))]


def _any_unet(unet: Mapping[str, Any], read: _Reader) -> dict[str, Any]:
    return {
        "sample_size": read.whole(unet, "image_size"),
        "in_channels": read.whole(unet, "in_channels"),
        "out_channels": read.whole(unet, "out_channels"),
        "block_out_channels": _blocks(unet, read)[0],
        "layers_per_block": read.whole(unet, "num_res_blocks"),
    }


def _text_unet(unet: Mapping[str, Any], read: _Reader) -> dict[str, Any]:
    """A U-Net with cross-attention, a `UNet2DConditionModel`."""
    channels, attends = _blocks(unet, read)
    if unet.get("resblock_updown") or unet.get("use_scale_shift_norm"):
        raise read.unknown("unet_config", "cross-attention with resblock_updown or use_scale_shift_norm")
    size = unet.get("num_head_channels", -1)
    return {
        **_any_unet(unet, read),
        "down_block_types": ["CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)],
        # In diffusers' configs this is the number of heads.
        "attention_head_dim": read.whole(unet, "num_heads")
        if size == -1
        else [count // read.whole(unet, "num_head_channels") for count in channels],
        "cross_attention_dim": read.whole(unet, "context_dim"),
        "transformer_layers_per_block": read.whole(unet, "transformer_depth", 1),
        "use_linear_projection": bool(unet.get("use_linear_in_transformer")),
    }


def _plain_unet(unet: Mapping[str, Any], read: _Reader) -> dict[str, Any]:
    """A U-Net without cross-attention, a `UNet2DModel`."""
    _, attends = _blocks(unet, read)
    residual = bool(unet.get("resblock_updown"))
    down, up = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if residual else ("DownBlock2D", "UpBlock2D")
    heads = unet.get("num_head_channels", -1) == -1
    return {
        **_any_unet(unet, read),
        "down_block_types": ["AttnDownBlock2D" if attend else down for attend in attends],
        "up_block_types": ["AttnUpBlock2D" if attend else up for attend in reversed(attends)],
        "downsample_type": "resnet" if residual else "conv",
        "upsample_type": "resnet" if residual else "conv",
        "resnet_time_scale_shift": "scale_shift" if unet.get("use_scale_shift_norm") else "default",
        "attn_norm_num_groups": 32,
        **({NUM_HEADS: read.whole(unet, "num_heads")} if heads else {}),
        "attention_head_dim": 32 if heads else read.whole(unet, "num_head_channels"),
    }


def _first_stage(stage: Mapping[str, Any], read: _Reader, *, quantized: bool) -> dict[str, Any]:
    """A `VQModel`, or an `AutoencoderKL`."""
    inner = read.mapping(stage, "ddconfig")
    factors, size = read.wholes(inner, "ch_mult"), read.whole(inner, "resolution")
    latents, attending = read.whole(inner, "z_channels"), read.wholes(inner, "attn_resolutions")
    if read.whole(stage, "embed_dim") != latents:
        raise read.unknown("first_stage_config", f"embed_dim = {stage['embed_dim']} beside z_channels = {latents}")
    attends = [size // 2**level in attending for level in range(len(factors))]
    common = {
        "sample_size": size,
        "in_channels": read.whole(inner, "in_channels"),
        "out_channels": read.whole(inner, "out_ch"),
        "block_out_channels": [read.whole(inner, "ch") * factor for factor in factors],
        "layers_per_block": read.whole(inner, "num_res_blocks"),
        "latent_channels": latents,
        "down_block_types": ["AttnDownEncoderBlock2D" if attend else "DownEncoderBlock2D" for attend in attends],
        "up_block_types": ["AttnUpDecoderBlock2D" if attend else "UpDecoderBlock2D" for attend in reversed(attends)],
        "mid_block_add_attention": inner.get("attn_type") != "none",
    }
    return common | ({"num_vq_embeddings": read.whole(stage, "n_embed")} if quantized else {})


def _scale(params: Mapping[str, Any], file: WeightFile, read: _Reader) -> float:
    """What encoded pictures are multiplied by: stated, or found in training and kept among the weights."""
    if params.get("scale_by_std"):
        if "scale_factor" not in file:
            raise BuildError(
                f"{file.path} has no scale_factor, which was found in training; convert the checkpoint again with ldmrt convert"
            )
        params = {"scale_factor": float(file["scale_factor"].float().mean())}
    factor = read.number(params, "scale_factor", 1.0)
    if factor <= 0:
        raise BuildError(f"{file.path}: its scale_factor is {factor:g}, expected a number above 0; copy it again")
    return factor


def _schedule(params: Mapping[str, Any], read: _Reader) -> dict[str, Any]:
    """The noise schedule, its timesteps picked as the original code's DDIM does: 1, 1 + n, 1 + 2 n, ..."""
    prediction = params.get("parameterization", "eps")
    if params.get("beta_schedule", "linear") != "linear" or prediction not in _PREDICTIONS:
        raise read.unknown("beta_schedule and parameterization", f"{params.get('beta_schedule')}, {prediction}")
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": read.whole(params, "timesteps", 1000),
        # Linear in the square root, which diffusers calls otherwise.
        "beta_schedule": "scaled_linear",
        "beta_start": read.number(params, "linear_start", 1e-4),
        "beta_end": read.number(params, "linear_end", 2e-2),
        "prediction_type": _PREDICTIONS[prediction],
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }


def _inner(data: Any, *keys: str) -> Any:
    for key in keys:
        data = data.get(key) if isinstance(data, Mapping) else None
    return data


def _target(params: Mapping[str, Any], key: str) -> str:
    """The name of the class that a part of a model is made of."""
    return str(_inner(params, key, "target") or "").rpartition(".")[2]


class _Reader:
    """Values of a config, checked.

    Args:
        where: the file, for messages.
    """

    def __init__(self, where: Path) -> None:
        self._where = where

    def unknown(self, what: str, found: str) -> BuildError:
        """What to raise for a part that ldmrt does not build."""
        return BuildError(
            f"{self._where}: {what} has {found!r}, which is not built yet; known are latent diffusion without text, by class, with BERT, for "
            f"super-resolution, inpainting, semantic maps and layouts, and of its own configs {known()}"
        )

    def mapping(self, values: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
        """A mapping inside mappings."""
        found = _inner(values, *keys)
        if not isinstance(found, Mapping):
            raise self._wrong(".".join(keys), found, "a mapping")
        return found

    def whole(self, values: Mapping[str, Any], key: str, default: int | None = None) -> int:
        """A whole number above 0."""
        value = values.get(key, default)
        if not is_whole(value):
            raise self._wrong(key, value, "a whole number, 1 or more")
        return int(value)

    def wholes(self, values: Mapping[str, Any], key: str, default: Sequence[int] | None = None) -> list[int]:
        """Several of them."""
        value = values.get(key, default)
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise self._wrong(key, value, "a list of whole numbers")
        return [self.whole({key: one}, key) for one in value]

    def number(self, values: Mapping[str, Any], key: str, default: float) -> float:
        """A number."""
        value = values.get(key, default)
        if not is_number(value):
            raise self._wrong(key, value, "a number")
        return float(value)

    def _wrong(self, key: str, value: object, expected: str) -> BuildError:
        return BuildError(f"{self._where}: {key} is {str(value)[:40]!r}, expected {expected}; copy the file again")
