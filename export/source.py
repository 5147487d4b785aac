"""What a model is made of: its kind, its configs, and where its weights and tokenizers lie.

Configs are read as JSON, weights as safetensors; nothing is unpickled. A folder in the diffusers layout is opened here; what else people
have is brought to this form in `export.resolve`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from ldmrt.errors import BadRequest, BuildError
from ldmrt.export.values import is_number, is_whole
from ldmrt.lora import Lora, check_scale, fused
from ldmrt.manifest import LayoutRecord
from ldmrt.samplers.registry import default_sampler, resolve
from ldmrt.weights import Entry, WeightFile


@dataclass(frozen=True)
class Kind:
    """A member of the latent diffusion family, as its folder shows it.

    Attributes:
        name: what ldmrt calls it.
        title: what people call it.
        classes: component's folder -> class in model_index.json.
        tokenizers: text encoder's folder -> its tokenizer's folder; empty for a model that reads no text.
        addition_embed_type: what its U-Net takes beside text and timestep, as its config says it.
        guidance_scale: what its makers recommend.
        num_inference_steps: the same.
        upcast_vae: whether its VAE is known to overflow float16.
        inpainting: whether its U-Net takes, beside the latents, a mask and the latents of the picture without what it covers.
        requires_aesthetics_score: whether its U-Net takes an aesthetic score in the place of the target's size.
        masked_pixel: for inpainting, what is encoded under the mask.
        upscaling: whether its U-Net takes, beside the latents, a picture of their size.
        segmented: whether its U-Net takes, beside the latents, what its rescaler makes of a semantic map.
        unscaled: whether its latents are as its first stage makes them, whatever scaling factor that has.
        schedulers: the folders of its noise schedules.
        folders: component -> its folder, where that is called otherwise.
        alternatives: component -> another class that it may have.
    """

    name: str
    title: str
    classes: Mapping[str, str]
    tokenizers: Mapping[str, str]
    addition_embed_type: str | None
    guidance_scale: float
    num_inference_steps: int = 50
    upcast_vae: bool = False
    inpainting: bool = False
    requires_aesthetics_score: bool = False
    masked_pixel: float = 0.0
    upscaling: bool = False
    segmented: bool = False
    unscaled: bool = False
    schedulers: tuple[str, ...] = ("scheduler",)
    folders: Mapping[str, str] = field(default_factory=dict)
    alternatives: Mapping[str, str] = field(default_factory=dict)

    @property
    def time_ids(self) -> int:
        """How many numbers about the picture's size (and its aesthetic score) its U-Net takes, if it takes any."""
        return 5 if self.requires_aesthetics_score else 6

    def joined(self, latents: int) -> int:
        """How many channels its U-Net takes behind those of the latents."""
        return latents + 1 if self.inpainting else 3 if self.upscaling or self.segmented else 0


# What diffusers takes where a model says nothing.
MAX_NOISE_LEVEL = 350
# The noise that an upscaling model's picture is given.
LOW_RES_SCHEDULER = "low_res_scheduler"

# Configs of the original code, of what diffusers has no config for: the table of classes (rows, width, and whether the last row stands for
# none of them), and how many heads the attentions of a `UNet2DModel` have at every level.
CLASS_EMBEDDER, NUM_HEADS = "class_embedder", "_num_heads"
# And what makes a semantic map as small as the latents (stages, classes, channels).
RESCALER = "rescaler"
# And what reads the tokens of a layout, as the config of an `LDMBertModel`.
LAYOUT_ENCODER = "layout_encoder"


def _for_inpainting(kind: Kind, *, inpainting: bool = True) -> Kind:
    """The kind whose U-Net takes a mask and a masked picture besides, or takes none."""
    title = kind.title.removesuffix(_INPAINTING) + (_INPAINTING if inpainting else "")
    return replace(kind, title=title, inpainting=inpainting)


_INPAINTING = " for inpainting"
_XL_IMAGE_TO_IMAGE = "StableDiffusionXLImg2ImgPipeline"
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
    # The refiner. That of a base model has the same name, and both text encoders.
    _XL_IMAGE_TO_IMAGE: Kind(
        name="stable-diffusion-xl-refiner",
        title="Stable Diffusion XL refiner",
        classes={"text_encoder_2": "CLIPTextModelWithProjection", **_DENOISER},
        tokenizers={"text_encoder_2": "tokenizer_2"},
        addition_embed_type="text_time",
        guidance_scale=5.0,
        upcast_vae=True,
    ),
    # Rombach et al. 2022, arXiv 2112.10752: the models of CelebA-HQ, FFHQ and LSUN.
    "LDMPipeline": Kind(
        name="latent-diffusion",
        title="Latent diffusion, unconditional",
        classes={"unet": "UNet2DModel", "vae": "VQModel"},
        tokenizers={},
        addition_embed_type=None,
        guidance_scale=1.0,
        folders={"vae": "vqvae"},
        alternatives={"vae": "AutoencoderKL"},
    ),
}
KINDS["StableDiffusionInpaintPipeline"] = _for_inpainting(KINDS["StableDiffusionPipeline"])
KINDS["StableDiffusionXLInpaintPipeline"] = _for_inpainting(KINDS["StableDiffusionXLPipeline"])
KINDS["LatentConsistencyModelPipeline"] = replace(
    KINDS["StableDiffusionPipeline"], title="Latent Consistency Models", guidance_scale=8.5, num_inference_steps=4
)
KINDS["StableDiffusionUpscalePipeline"] = replace(
    KINDS["StableDiffusionPipeline"],
    title="Stable Diffusion x4 upscaler",
    guidance_scale=9.0,
    upcast_vae=True,
    upscaling=True,
    schedulers=("scheduler", LOW_RES_SCHEDULER),
)
KINDS["LDMSuperResolutionPipeline"] = replace(
    KINDS["LDMPipeline"], title="Latent diffusion for super-resolution", upscaling=True, unscaled=True, alternatives={}
)
KINDS["LDMTextToImagePipeline"] = Kind(
    name="latent-diffusion",
    title="Latent diffusion, text to image",
    classes={"text_encoder": "LDMBertModel", **_DENOISER},
    tokenizers={"text_encoder": "tokenizer"},
    addition_embed_type=None,
    guidance_scale=5.0,
    folders={"text_encoder": "bert", "vae": "vqvae"},
    alternatives={"vae": "VQModel"},
)
# What the original code has and diffusers has no pipeline for: a model of classes, each a token that the U-Net attends to; inpainting without
# text, of pictures that are black under the mask; semantic maps; objects in boxes.
CLASS_CONDITIONAL = replace(
    KINDS["LDMPipeline"],
    title="Latent diffusion, class-conditional",
    classes={"unet": "UNet2DConditionModel", "vae": "VQModel"},
    guidance_scale=3.0,
)
LDM_INPAINTING = replace(
    KINDS["LDMPipeline"], title="Latent diffusion for inpainting", inpainting=True, masked_pixel=-1.0
)
SEMANTIC = replace(KINDS["LDMPipeline"], title="Latent diffusion of semantic maps", segmented=True)
LAYOUTS = replace(CLASS_CONDITIONAL, title="Latent diffusion of layouts", guidance_scale=1.0)
KNOWN_KINDS = ", ".join(KINDS)

# What weight files are called; a ControlNet's as the U-Net's.
STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
# Of a block or a network; with more it would take hours to be made, and no model has them.
_MOST_LAYERS = 1000
# Halves of a model, by how their files are called: taken where there is nothing else.
VARIANTS = ("fp16", "bf16")

# Configs and tokenizers of models that people have as one file, which holds neither. `clip` and `open_clip` are the same vocabulary
# (OpenAI's CLIP, MIT licence), padded with the end token and with `!`.
_KNOWN = Path(__file__).parent / "known"


class Weights(Protocol):
    """Weights of a component under the names that diffusers and transformers give them: a `WeightFile`, or a view of one."""

    @property
    def path(self) -> Path:
        """The file."""

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Dtype and shape of each."""

    def __iter__(self) -> Iterator[str]: ...

    def __getitem__(self, name: str, /) -> torch.Tensor: ...

    def release(self, name: str, /) -> None:
        """Give back the memory that reading a tensor took."""


@dataclass(frozen=True)
class Source:
    """A model, recognised.

    Attributes:
        path: its folder.
        kind: the family member.
        configs: the JSON config of each component and of the noise schedules (`scheduler`, and `low_res_scheduler` if it has one).
        defaults: what the model's maker recommends (optional file `ldmrt-defaults.json`).
        max_noise_level: the last timestep of `low_res_scheduler` that it knows.
        zero_empty_negative: whether an empty negative prompt means embeddings of zeros (`force_zeros_for_empty_prompt`).
        loras: LoRAs that its weights are to be taken with, each with its scale.
        variant: which of several copies of the weights to take where there are several, such as `fp16`.
        title: its name; None for the folder's.
        parts: components whose weights are not the folder's own.
        files: configs that are not the folder's own, by component.
        tokenizers: folders of tokenizers that are not the folder's own, by text encoder.
        controlnets: the folders of ControlNets that it is to be used with, by component (`controlnet.NAME`); their configs are
            among `configs`.
    """

    path: Path
    kind: Kind
    configs: Mapping[str, Mapping[str, Any]]
    defaults: Mapping[str, Any]
    max_noise_level: int = 0
    zero_empty_negative: bool = False
    loras: tuple[tuple[Lora, float], ...] = ()
    variant: str | None = None
    title: str | None = None
    parts: Mapping[str, tuple[Weights, ...]] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)
    tokenizers: Mapping[str, Path] = field(default_factory=dict)
    controlnets: Mapping[str, Path] = field(default_factory=dict)

    @property
    def folders(self) -> tuple[str, ...]:
        """The model's own folders that have weights."""
        return tuple(self.kind.classes)

    def place(self, folder: str) -> Path:
        """Where a folder of the model is, or a ControlNet."""
        return self.controlnets.get(folder, self.path / self.kind.folders.get(folder, folder))

    @property
    def guidance_embedding(self) -> int | None:
        """Width of the embedding of the guidance scale that its U-Net takes in the place of classifier-free guidance, if it does."""
        width: int | None = self.configs["unet"].get("time_cond_proj_dim")
        return width

    @property
    def labels(self) -> int | None:
        """How many labels its U-Net is told one of: classes, or noise levels where it has a `low_res_scheduler`."""
        embedder = self.configs.get(CLASS_EMBEDDER)
        count: int | None = self.configs["unet"].get("num_class_embeds") if embedder is None else embedder["rows"]
        return count

    @property
    def null_class(self) -> int | None:
        """Which of the classes stands for none, if one does."""
        embedder = self.configs.get(CLASS_EMBEDDER)
        return embedder["rows"] - 1 if embedder is not None and embedder["null"] else None

    @property
    def segments(self) -> int | None:
        """How many classes its semantic maps have, if it takes any."""
        rescaler = self.configs.get(RESCALER)
        return None if rescaler is None else int(rescaler["classes"])

    @property
    def layout(self) -> LayoutRecord | None:
        """What its layouts may have, if it takes any: three tokens an object, and two for all of the picture."""
        encoder = self.configs.get(LAYOUT_ENCODER)
        if encoder is None:
            return None
        return LayoutRecord(objects=(encoder["max_position_embeddings"] - 2) // 3, tokens=encoder["vocab_size"])

    @property
    def is_noised(self) -> bool:
        """Whether the picture that it draws larger is given noise, and its labels are the levels of that."""
        return LOW_RES_SCHEDULER in self.kind.schedulers

    @property
    def is_quantized(self) -> bool:
        """Whether its first stage has a codebook."""
        return self.kind.classes["vae"] == "VQModel"

    @property
    def name(self) -> str:
        """What people call it."""
        return self.title or self.path.resolve().name

    @property
    def is_turbo(self) -> bool:
        """Whether it was distilled to few steps without guidance (Sauer et al. 2023, arXiv 2311.17042): its name says so, or its noise
        schedule, which visits the last timestep first though that is not pure noise, with Euler's method.
        """
        scheduler = self.configs["scheduler"]
        by_schedule = (
            str(scheduler.get("_class_name")).startswith("Euler")
            and scheduler.get("timestep_spacing") == "trailing"
            and scheduler.get("prediction_type", "epsilon") == "epsilon"
            and not scheduler.get("rescale_betas_zero_snr")
        )
        return by_schedule or names_turbo(self.name)

    @property
    def guidance_scale(self) -> float:
        """The guidance that it is used with where nothing else is asked for."""
        given = self.defaults.get("guidance_scale")
        return float((0.0 if self.is_turbo else self.kind.guidance_scale) if given is None else given)

    @property
    def num_inference_steps(self) -> int:
        """The steps that it is used with where nothing else is asked for."""
        given = self.defaults.get("num_inference_steps")
        return int((4 if self.is_turbo else self.kind.num_inference_steps) if given is None else given)

    @property
    def sampler(self) -> str:
        """The sampler to use where nothing else is asked for: the maker's recommendation, or the scheduler's of diffusers."""
        given = self.defaults.get("sampler")
        return default_sampler(self.configs["scheduler"]) if given is None else resolve(given).name

    @classmethod
    def open(cls, path: Path, *, variant: str | None = None) -> Source:
        """Recognise a model's folder in the diffusers layout.

        Args:
            path: the folder.
            variant: which of several copies of the weights to take, such as `fp16`; the one without a name if None.

        Raises:
            BuildError: there is no model at `path`, or of a kind that ldmrt does not build.
        """
        if not path.is_dir():
            raise BuildError(f"no such folder: {path}; give the folder of a model in the diffusers layout")
        if not (path / "model_index.json").is_file():
            found = ", ".join(sorted(item.name for item in path.iterdir())[:6]) or "nothing"
            raise BuildError(f"{path} is not a model folder: expected a model_index.json, found {found}")
        index = read_json(path / "model_index.json")
        if not isinstance(index.get("_class_name"), str):
            raise BuildError(
                f"{path / 'model_index.json'} does not name a pipeline (_class_name); copy the model again"
            )
        kind = kind_of(index, path)
        for folder, name in kind.classes.items():
            named = _class_of(index, kind.folders.get(folder, folder))
            if named is not None and named == kind.alternatives.get(folder):
                kind = replace(kind, classes={**kind.classes, folder: named})
            elif named != name:
                raise BuildError(f"{path}: its {folder} is a {named}, expected {name}; known kinds: {KNOWN_KINDS}")
        configs = {
            folder: read_json(path / kind.folders.get(folder, folder) / "config.json") for folder in kind.classes
        }
        configs |= {name: read_json(path / name / "scheduler_config.json") for name in kind.schedulers}
        extra = path / "ldmrt-defaults.json"
        defaults = read_json(extra) if extra.is_file() else {}
        _check_values(path, kind, configs, defaults)
        _check_unet(path, kind, configs)
        for folder in kind.tokenizers.values():
            if not (path / folder).is_dir():
                raise BuildError(f"{path} has no folder {folder}; copy the model again")
        zeros = bool(index.get("force_zeros_for_empty_prompt", False))
        level = _max_noise_level(path, index, configs) if LOW_RES_SCHEDULER in kind.schedulers else 0
        source = cls(path, kind, configs, defaults, level, zeros, variant=variant)
        if variant is not None and not any(_is_variant(file, variant) for file in path.glob("*/*.safetensors")):
            raise BuildError(f"{path} has no variant {variant!r} of its weights; leave out --variant")
        return source

    @classmethod
    def known(cls, name: str, *, inpainting: bool = False) -> Source:
        """The configs and tokenizers of a model that is widely known, without weights.

        Args:
            name: `sd15`, `sd21`, `sdxl` or `sdxl-refiner`.
            inpainting: whether it is the one that was made of it for inpainting.

        Raises:
            BuildError: it is of a kind that ldmrt does not build.
        """
        path = _KNOWN / f"{name}.json"
        configs = read_json(path)
        kind = kind_of({**configs, "_class_name": configs["pipeline"]}, path)
        changes = configs.get("inpainting", {}) if inpainting else {}
        source = cls(
            _KNOWN,
            kind,
            {folder: {**configs[folder], **changes.get(folder, {})} for folder in (*kind.classes, "scheduler")},
            {},
            zero_empty_negative=bool(configs.get("force_zeros_for_empty_prompt", False)),
            title=name,
            files=dict.fromkeys((*kind.classes, "scheduler"), path),
            tokenizers={encoder: _KNOWN / folder for encoder, folder in configs["tokenizers"].items()},
        )
        return source.for_inpainting(inpainting=inpainting)

    def for_inpainting(self, *, inpainting: bool) -> Source:
        """The same model with a U-Net that takes a mask and the masked picture besides, or with one that takes none."""
        latents = int(self.configs["vae"].get("latent_channels", 4))
        unet = {**self.configs["unet"], "in_channels": unet_channels(latents, inpainting=inpainting)}
        return replace(
            self, kind=_for_inpainting(self.kind, inpainting=inpainting), configs={**self.configs, "unet": unet}
        )

    def with_part(
        self, folder: str, weights: Sequence[Weights], config: tuple[Path, Mapping[str, Any]] | None = None
    ) -> Source:
        """The same model with a component from elsewhere.

        Args:
            folder: the component.
            weights: its weights.
            config: its config and the file that it is from; the one that is there if None.

        Raises:
            BuildError: the component does not fit the others.
        """
        source = replace(self, parts={**self.parts, folder: tuple(weights)})
        if config is not None:
            source = replace(
                source, files={**self.files, folder: config[0]}, configs={**self.configs, folder: config[1]}
            )
            _check_values(self.path, self.kind, source.configs, self.defaults)
            _check_unet(self.path, self.kind, source.configs)
        return source

    def with_loras(self, loras: Sequence[tuple[str | Path, float]]) -> Source:
        """The same model with LoRAs fused into its weights.

        Args:
            loras: (file, scale), each added to the ones before.

        Raises:
            BuildError: a file is no LoRA, or one for another architecture, or a scale is not finite.
        """
        shapes = {
            folder: {name: entry.shape for file in self.weights(folder) for name, entry in file.entries.items()}
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

    def config_file(self, folder: str) -> Path:
        """The file that a component's config, or that of the `scheduler`, is from."""
        name = "scheduler_config.json" if folder in self.kind.schedulers else "config.json"
        return self.files.get(folder, self.place(folder) / name)

    def tokenizer_folder(self, encoder: str) -> Path:
        """Where the tokenizer of a text encoder lies."""
        return self.tokenizers.get(encoder, self.path / self.kind.tokenizers[encoder])

    def weights(self, folder: str) -> list[Weights]:
        """A component's weights.

        Raises:
            BuildError: there are none; says so when there are pickles instead.
            BundleError: a file is damaged.
        """
        if folder in self.parts:
            return list(self.parts[folder])
        return [
            WeightFile(path)
            for path in weight_files(self.place(folder), STEMS.get(folder, STEMS["unet"]), self.variant)
        ]


def kind_of(index: Mapping[str, Any], where: Path) -> Kind:
    """The kind of a model, by its model_index.json.

    Raises:
        BuildError: it is none that ldmrt builds.
    """
    pipeline = str(index.get("_class_name"))
    if pipeline not in KINDS:
        raise BuildError(f"{where} is a {pipeline}, which ldmrt does not build yet; known kinds: {KNOWN_KINDS}")
    if pipeline == _XL_IMAGE_TO_IMAGE and _class_of(index, "text_encoder") is not None:
        pipeline = "StableDiffusionXLPipeline"
    return replace(KINDS[pipeline], requires_aesthetics_score=bool(index.get("requires_aesthetics_score", False)))


def _class_of(index: Mapping[str, Any], folder: str) -> Any:
    """The class that a model_index.json names for a component, or None."""
    entry = index.get(folder)
    return entry[-1] if isinstance(entry, list) and entry else entry


def unet_channels(latents: int, *, inpainting: bool) -> int:
    """Channels that a U-Net takes: for inpainting beside the latents those of the masked picture, and the mask."""
    return 2 * latents + 1 if inpainting else latents


def names_turbo(name: str) -> bool:
    """Whether a model's name says that it is one of few steps, as `sd-turbo` and `sd_xl_turbo_1.0_fp16` do."""
    return re.search(r"(?<![a-z])turbo(?![a-z])", name.casefold()) is not None


def weight_files(where: Path, stem: str, variant: str | None = None) -> list[Path]:
    """The safetensors files of a component: one, or several when sharded.

    Args:
        where: its folder.
        stem: how its files are called, but for the variant and the ending.
        variant: the copy to take where there are several; if None, the one without a name, or the only one there is.

    Raises:
        BuildError: there are none; says so when there are pickles instead.
    """
    for infix in ("", *(f".{name}" for name in VARIANTS)) if variant is None else (f".{variant}", ""):
        single = where / f"{stem}{infix}.safetensors"
        if single.is_file():
            return [single]
        shards = where / f"{stem}.safetensors.index{infix}.json"
        if shards.is_file():
            shard_of = read_json(shards).get("weight_map")
            names = list(shard_of.values()) if isinstance(shard_of, dict) else []
            if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
                raise BuildError(f"{shards} does not name its shards; copy the model again")
            return [where / name for name in sorted(set(names))]
    pickles = [item.name for item in sorted(where.iterdir()) if item.suffix in PICKLES] if where.is_dir() else []
    if pickles:
        raise BuildError(
            f"{where} has only {pickles[0]}, a pickle: loading one can run any code, so building never does; take its safetensors "
            f"version, or convert it: ldmrt convert {where / pickles[0]} {where / stem}.safetensors"
        )
    raise BuildError(f"{where} has no weights: expected {stem}.safetensors; copy the model again")


def _is_variant(file: Path, variant: str) -> bool:
    """Whether a weight file, or a shard, is of a variant."""
    return f".{variant}.safetensors" in file.name or f".{variant}-0" in file.name


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
        self.files = source.weights(folder)
        found: dict[str, Weights] = {name: file for file in self.files for name in file}
        self.keys: dict[str, tuple[Weights, str]] = {}
        missing = []
        for name, tensor in module.state_dict().items():
            key = next((alias for alias in _aliases(name) if alias in found), None)
            if key is None:
                missing.append(name)
                continue
            entry: Entry = found[key].entries[key]
            if entry.shape != tuple(tensor.shape):
                raise BuildError(
                    f"{found[key].path}: {key} has the shape {entry.shape}, {source.config_file(folder)} expects {tuple(tensor.shape)}; "
                    "the weights and the config are of different models: copy the model again"
                )
            if not entry.dtype.is_floating_point:
                raise BuildError(
                    f"{found[key].path}: {key} is {str(entry.dtype).removeprefix('torch.')}, expected floating point; "
                    "quantised weights are not built: take the model's float16 or float32 version"
                )
            self.keys[name] = (found[key], key)
        if missing:
            raise BuildError(_list_keys(source.place(folder), "lacks", missing))
        used = {key for _, key in self.keys.values()}
        extra = [name for name in found if name not in used and not name.endswith("position_ids")]
        if extra:
            raise BuildError(_list_keys(source.place(folder), "has, and its config.json does not know,", extra))

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
        if value is None and optional:
            return
        if not (is_whole if what == "a whole number" else is_number)(value):
            raise BuildError(f"{path / where}: {key} is {str(value)[:40]!r}, expected {what}; copy the model again")

    for folder in kind.tokenizers:
        for key in ("max_position_embeddings", "vocab_size", _width_key(kind, folder)):
            check(f"{folder}/config.json", configs[folder], key, "a whole number", optional=False)
    if kind.tokenizers:
        check("unet/config.json", configs["unet"], "cross_attention_dim", "a whole number", optional=False)
    check("unet/config.json", configs["unet"], "sample_size", "a whole number")
    check("unet/config.json", configs["unet"], "time_cond_proj_dim", "a whole number")
    noised = LOW_RES_SCHEDULER in kind.schedulers
    check("unet/config.json", configs["unet"], "num_class_embeds", "a whole number", optional=not noised)
    for key, what in (("latent_channels", "a whole number"), ("scaling_factor", "a number")):
        check("vae/config.json", configs["vae"], key, what, optional=key not in configs["vae"])
    check("vae/config.json", configs["vae"], "shift_factor", "a number")
    for key in ("width", "height", "num_inference_steps"):
        check("ldmrt-defaults.json", defaults, key, "a whole number")
    check("ldmrt-defaults.json", defaults, "guidance_scale", "a number")
    try:
        resolve(str(defaults.get("sampler") or "ddim"))
    except BadRequest as error:
        raise BuildError(f"{path / 'ldmrt-defaults.json'}: {error}") from error
    _check_layers(path, kind, configs)
    channels = configs["vae"].get("block_out_channels")
    if not isinstance(channels, list) or not 1 <= len(channels) <= 8:
        raise BuildError(
            f"{path / 'vae/config.json'}: block_out_channels is {str(channels)[:40]!r}, expected a list; copy the model again"
        )


def _check_layers(path: Path, kind: Kind, configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse networks that are deeper than any."""
    for folder in kind.classes:
        for key, value in configs[folder].items():
            deep = value if isinstance(value, list) else [value]
            if "layers" in key and any(isinstance(one, int | float) and not one <= _MOST_LAYERS for one in deep):
                raise BuildError(
                    f"{path / folder / 'config.json'}: {key} is {str(value)[:40]}, expected {_MOST_LAYERS} at most; copy the model again"
                )


def _width_key(kind: Kind, folder: str) -> str:
    """What a text encoder's config calls the width of its hidden states."""
    return "d_model" if kind.classes[folder] == "LDMBertModel" else "hidden_size"


def _max_noise_level(path: Path, index: Mapping[str, Any], configs: Mapping[str, Mapping[str, Any]]) -> int:
    """The most noise that an upscaling model's picture may be given.

    Raises:
        BuildError: its U-Net, or the schedule, does not know so many levels.
    """
    found = index.get("max_noise_level", MAX_NOISE_LEVEL)
    levels = min(configs["unet"]["num_class_embeds"], configs[LOW_RES_SCHEDULER].get("num_train_timesteps", 1000))
    if not isinstance(found, int) or isinstance(found, bool) or not 0 <= found < levels:
        raise BuildError(
            f"{path / 'model_index.json'}: max_noise_level is {str(found)[:40]!r}, expected 0 to {levels - 1}, which its U-Net and its "
            f"{LOW_RES_SCHEDULER} know; copy the model again"
        )
    return found


def _check_unet(path: Path, kind: Kind, configs: Mapping[str, Mapping[str, Any]]) -> None:
    unet, vae = configs["unet"], configs["vae"]
    latents = vae.get("latent_channels", 4)
    channels = latents + kind.joined(latents)
    if unet.get("in_channels", 4) != channels:
        raise BuildError(
            f"{path}: its U-Net takes {unet.get('in_channels')} channels, expected {channels} of {kind.title}, whose VAE makes "
            f"{latents}; known kinds: {KNOWN_KINDS}"
        )
    expected = {"addition_embed_type": kind.addition_embed_type}
    for key in ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type"):
        if unet.get(key) != expected.get(key):
            raise BuildError(
                f"{path}: its U-Net has {key} = {unet.get(key)!r}, which is not built yet; known kinds: {KNOWN_KINDS}"
            )
    _check_time_ids(path, kind, configs)
    width = unet.get("time_cond_proj_dim")
    if width is not None and width < 4:
        raise BuildError(
            f"{path}: its U-Net takes the guidance scale in {width} numbers, expected 4 or more; copy the model again"
        )
    widths = [int(configs[folder][_width_key(kind, folder)]) for folder in kind.tokenizers]
    if widths and sum(widths) != unet["cross_attention_dim"]:
        raise BuildError(
            f"{path}: its U-Net reads text of width {unet['cross_attention_dim']}, its text encoders make "
            f"{' + '.join(map(str, widths))}; the components are of different models"
        )


def _check_time_ids(path: Path, kind: Kind, configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Check that the U-Net takes as many numbers beside the pooled text as its kind gives it."""
    unet = configs["unet"]
    expected, width = unet.get("projection_class_embeddings_input_dim"), unet.get("addition_time_embed_dim")
    if kind.addition_embed_type is None or not isinstance(expected, int) or not isinstance(width, int):
        return
    pooled = int(configs["text_encoder_2"].get("projection_dim") or 0)
    given = pooled + kind.time_ids * width
    if given != expected:
        raise BuildError(
            f"{path}: its U-Net takes {expected} numbers beside the text, and {kind.title} gives {pooled} + {kind.time_ids} x {width} = {given}; "
            f"requires_aesthetics_score is {kind.requires_aesthetics_score} in its model_index.json, which may be wrong: copy the model again"
        )
