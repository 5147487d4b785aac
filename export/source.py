"""Where a model comes from: a folder in the diffusers layout.

Configs are read as JSON, weights as safetensors; nothing is unpickled and nothing is fetched.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ldmrt.errors import BadRequest, BuildError
from ldmrt.lora import Lora, check_scale, fused
from ldmrt.weights import Entry, WeightFile


@dataclass(frozen=True)
class Kind:
    """A member of the latent diffusion family, as its folder shows it.

    Attributes:
        name: what ldmrt calls it.
        title: what people call it.
        classes: component's folder -> class in model_index.json.
        tokenizers: text encoder's folder -> its tokenizer's folder.
        addition_embed_type: what its U-Net takes beside text and timestep, as its config says it.
        guidance_scale: what its makers recommend.
        upcast_vae: whether its VAE is known to overflow float16.
    """

    name: str
    title: str
    classes: Mapping[str, str]
    tokenizers: Mapping[str, str]
    addition_embed_type: str | None
    guidance_scale: float
    upcast_vae: bool = False


_DENOISER = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}

# By the pipeline's class in model_index.json.
KINDS = {
    "StableDiffusionPipeline": Kind(
        name="stable-diffusion",
        title="Stable Diffusion 1.x and 2.x",
        classes={"text_encoder": "CLIPTextModel", **_DENOISER},
        tokenizers={"text_encoder": "tokenizer"},
        addition_embed_type=None,
        guidance_scale=7.5,
    ),
    "StableDiffusionXLPipeline": Kind(
        name="stable-diffusion-xl",
        title="Stable Diffusion XL base",
        classes={"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection", **_DENOISER},
        tokenizers={"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"},
        addition_embed_type="text_time",
        guidance_scale=5.0,
        upcast_vae=True,
    ),
}
KNOWN_KINDS = "; ".join(f"{kind.title} ({name}: {', '.join(kind.classes.values())})" for name, kind in KINDS.items())

_STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
_PICKLES = (".bin", ".ckpt", ".pt", ".pth")


@dataclass(frozen=True)
class Source:
    """A model folder, recognised.

    Attributes:
        path: the folder.
        kind: the family member.
        configs: the JSON config of each component and of the noise schedule (`scheduler`).
        defaults: what the model's maker recommends (optional file `ldmrt-defaults.json`).
        zero_empty_negative: whether an empty negative prompt means embeddings of zeros (`force_zeros_for_empty_prompt`).
        loras: LoRAs that its weights are to be taken with, each with its scale.
    """

    path: Path
    kind: Kind
    configs: Mapping[str, Mapping[str, Any]]
    defaults: Mapping[str, Any]
    zero_empty_negative: bool = False
    loras: tuple[tuple[Lora, float], ...] = ()

    @property
    def folders(self) -> tuple[str, ...]:
        """The folders that have weights."""
        return tuple(self.kind.classes)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().name

    @classmethod
    def open(cls, path: Path) -> Source:
        """Recognise a model.

        Raises:
            BuildError: there is no model at `path`, or of a kind that ldmrt does not build.
        """
        if not path.exists():
            raise BuildError(f"no such folder: {path}; give the folder of a model in the diffusers layout")
        if path.is_file():
            raise BuildError(
                f"{path} is a file; give the folder of a model in the diffusers layout (with a model_index.json)"
            )
        if not (path / "model_index.json").is_file():
            found = ", ".join(sorted(item.name for item in path.iterdir())[:6]) or "nothing"
            raise BuildError(f"{path} is not a model folder: expected a model_index.json, found {found}")
        index = read_json(path / "model_index.json")
        pipeline = index.get("_class_name")
        if not isinstance(pipeline, str):
            raise BuildError(
                f"{path / 'model_index.json'} does not name a pipeline (_class_name); copy the model again"
            )
        kind = KINDS.get(pipeline)
        if kind is None:
            raise BuildError(f"{path} is a {pipeline}, which ldmrt does not build yet; known kinds: {KNOWN_KINDS}")
        for folder, name in kind.classes.items():
            entry = index.get(folder)
            named = entry[-1] if isinstance(entry, list) and entry else entry
            if named != name:
                raise BuildError(f"{path}: its {folder} is a {named}, expected {name}; known kinds: {KNOWN_KINDS}")
        configs = {folder: read_json(path / folder / "config.json") for folder in kind.classes}
        configs["scheduler"] = read_json(path / "scheduler" / "scheduler_config.json")
        extra = path / "ldmrt-defaults.json"
        defaults = read_json(extra) if extra.is_file() else {}
        _check_values(path, kind, configs, defaults)
        _check_unet(path, kind, configs)
        for folder in kind.tokenizers.values():
            if not (path / folder).is_dir():
                raise BuildError(f"{path} has no folder {folder}; copy the model again")
        return cls(path, kind, configs, defaults, bool(index.get("force_zeros_for_empty_prompt", False)))

    def with_loras(self, loras: Sequence[tuple[str | Path, float]]) -> Source:
        """The same model with LoRAs fused into its weights.

        Args:
            loras: (file, scale), each added to the ones before.

        Raises:
            BuildError: a file is no LoRA, or one for another architecture, or a scale is not finite.
        """
        shapes = {
            folder: {
                name: entry.shape
                for path in self.weight_files(folder)
                for name, entry in WeightFile(path).entries.items()
            }
            for folder in ("unet", *self.kind.tokenizers)
        }
        read = []
        try:
            for path, scale in loras:
                check_scale(scale)
                read.append((Lora.read(Path(path), shapes), scale))
        except BadRequest as error:
            raise BuildError(str(error)) from error
        return replace(self, loras=tuple(read))

    def weight_files(self, folder: str) -> list[Path]:
        """The safetensors files of a component: one, or several when sharded.

        Raises:
            BuildError: there are none; says so when there are pickles instead.
        """
        where, stem = self.path / folder, _STEMS[folder]
        for variant in ("", ".fp16"):
            single = where / f"{stem}{variant}.safetensors"
            if single.is_file():
                return [single]
            shards = where / f"{stem}.safetensors.index{variant}.json"
            if shards.is_file():
                shard_of = read_json(shards).get("weight_map")
                names = list(shard_of.values()) if isinstance(shard_of, dict) else []
                if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
                    raise BuildError(f"{shards} does not name its shards; copy the model again")
                return [where / name for name in sorted(set(names))]
        pickles = [item.name for item in sorted(where.iterdir()) if item.suffix in _PICKLES] if where.is_dir() else []
        if pickles:
            raise BuildError(
                f"{where} has only {pickles[0]}, a pickle: loading one can run any code, so ldmrt never does; save the model again "
                "with diffusers' save_pretrained(safe_serialization=True), or take its safetensors version"
            )
        raise BuildError(f"{where} has no weights: expected {stem}.safetensors; copy the model again")


class Checkpoint:
    """The weights of one component, under the names that its module uses.

    Attributes:
        files: the files.
        keys: module's name -> (file, name in the file).
    """

    def __init__(self, source: Source, folder: str, module: torch.nn.Module) -> None:
        """Match the files with the module.

        Raises:
            BuildError: a tensor is missing, or there is one too many, or one has the wrong shape.
            BundleError: a file is damaged.
        """
        self._changes = [(lora.layers.get(folder, {}), scale) for lora, scale in source.loras]
        self.files = [WeightFile(path) for path in source.weight_files(folder)]
        found: dict[str, WeightFile] = {name: file for file in self.files for name in file}
        self.keys: dict[str, tuple[WeightFile, str]] = {}
        missing = []
        for name, tensor in module.state_dict().items():
            key = next((alias for alias in _aliases(name) if alias in found), None)
            if key is None:
                missing.append(name)
                continue
            entry: Entry = found[key].entries[key]
            if entry.shape != tuple(tensor.shape):
                raise BuildError(
                    f"{found[key].path}: {key} has the shape {entry.shape}, the config.json beside it expects {tuple(tensor.shape)}; "
                    "the weights and the config are of different models: copy the model again"
                )
            self.keys[name] = (found[key], key)
        if missing:
            raise BuildError(_list_keys(source.path / folder, "lacks", missing))
        used = {key for _, key in self.keys.values()}
        extra = [name for name in found if name not in used and not name.endswith("position_ids")]
        if extra:
            raise BuildError(_list_keys(source.path / folder, "has, and its config.json does not know,", extra))

    def load(self, name: str) -> torch.Tensor:
        """A tensor by the module's name, in the file's dtype; in float32 where a LoRA changes it."""
        file, key = self.keys[name]
        changes = [(layers[key].on(torch.device("cpu")), scale) for layers, scale in self._changes if key in layers]
        return fused(file[key], changes) if changes else file[key]

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """A tensor by the module's name, in a dtype. If that is not the file's, the memory of what was read is given back."""
        loaded = self.load(name)
        made = loaded.to(dtype)
        if made is not loaded:
            file, key = self.keys[name]
            file.release(key)
        return made

    @property
    def fused(self) -> bool:
        """Whether LoRAs change any of it."""
        return any(layers for layers, _ in self._changes)

    def dtype(self) -> torch.dtype:
        """The dtype that most of the weights are stored in."""
        sizes: dict[torch.dtype, int] = {}
        for file, key in self.keys.values():
            entry = file.entries[key]
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
        return max(sizes, key=lambda dtype: sizes[dtype])


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        BuildError: the file is missing or is not one.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BuildError(f"cannot read {path}: {error.strerror or error}; copy the model again") from error
    except (ValueError, RecursionError) as error:
        raise BuildError(f"{path} is not JSON ({error}); copy the model again") from error
    if not isinstance(data, dict):
        raise BuildError(f"{path} holds a {type(data).__name__}, expected an object; copy the model again")
    return data


def _aliases(name: str) -> list[str]:
    """Names that a module's tensor has had in files: transformers moved its prefix, diffusers renamed the VAE's attention."""
    names = [name, f"text_model.{name}", name.removeprefix("text_model.")]
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        if f".attentions.0.{new}." in name:
            names.append(name.replace(f".{new}.", f".{old}."))
    return names


def _list_keys(where: Path, verb: str, names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{where} {verb} {', '.join(names[:3])}{more}; the weights and the config are of different models, or the copy is incomplete: copy the model again"


def _check_values(
    path: Path, kind: Kind, configs: Mapping[str, Mapping[str, Any]], defaults: Mapping[str, Any]
) -> None:
    """Refuse values of another type than the build computes with."""

    def check(where: str, values: Mapping[str, Any], key: str, what: str, *, optional: bool = True) -> None:
        value = values.get(key)
        whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
        number = whole or (isinstance(value, float) and math.isfinite(value))
        if value is None and optional:
            return
        if not (whole if what == "a whole number" else number):
            raise BuildError(f"{path / where}: {key} is {str(value)[:40]!r}, expected {what}; copy the model again")

    for folder in kind.tokenizers:
        for key in ("max_position_embeddings", "vocab_size", "hidden_size"):
            check(f"{folder}/config.json", configs[folder], key, "a whole number", optional=False)
    check("unet/config.json", configs["unet"], "cross_attention_dim", "a whole number", optional=False)
    check("unet/config.json", configs["unet"], "sample_size", "a whole number")
    check("vae/config.json", configs["vae"], "latent_channels", "a whole number")
    check("vae/config.json", configs["vae"], "scaling_factor", "a number")
    check("vae/config.json", configs["vae"], "shift_factor", "a number")
    for key in ("width", "height", "num_inference_steps"):
        check("ldmrt-defaults.json", defaults, key, "a whole number")
    check("ldmrt-defaults.json", defaults, "guidance_scale", "a number")
    channels = configs["vae"].get("block_out_channels")
    if not isinstance(channels, list) or not 1 <= len(channels) <= 8:
        raise BuildError(
            f"{path / 'vae/config.json'}: block_out_channels is {str(channels)[:40]!r}, expected a list; copy the model again"
        )


def _check_unet(path: Path, kind: Kind, configs: Mapping[str, Mapping[str, Any]]) -> None:
    unet, vae = configs["unet"], configs["vae"]
    latents = vae.get("latent_channels", 4)
    if unet.get("in_channels", 4) != latents:
        raise BuildError(
            f"{path}: its U-Net takes {unet.get('in_channels')} channels and its VAE makes {latents}; "
            f"inpainting and other concatenating models are not built yet; known kinds: {KNOWN_KINDS}"
        )
    expected = {"addition_embed_type": kind.addition_embed_type}
    for key in ("addition_embed_type", "class_embed_type", "time_cond_proj_dim", "encoder_hid_dim_type"):
        if unet.get(key) != expected.get(key):
            raise BuildError(
                f"{path}: its U-Net has {key} = {unet.get(key)!r}, which is not built yet; known kinds: {KNOWN_KINDS}"
            )
    widths = [int(configs[folder]["hidden_size"]) for folder in kind.tokenizers]
    if sum(widths) != unet["cross_attention_dim"]:
        raise BuildError(
            f"{path}: its U-Net reads text of width {unet['cross_attention_dim']}, its text encoders make "
            f"{' + '.join(map(str, widths))}; the components are of different models"
        )
