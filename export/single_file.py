"""Checkpoints that are one safetensors file in the original layout (CompVis, Stability AI): their weights as diffusers names them.

Such a file has neither configs nor tokenizers. They come from the base model, from the YAML file of the original code
(`export.original_config`), or from `export/known`, by what the tensors show. Nothing is copied: a weight is looked up in the mapped file
when it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ldmrt import original
from ldmrt.errors import BuildError
from ldmrt.export import original_config
from ldmrt.export.architectures import instantiate
from ldmrt.export.source import CLASS_EMBEDDER, LAYOUT_ENCODER, PICKLES, RESCALER, Source, names_turbo, unet_channels
from ldmrt.original import Piece
from ldmrt.weights import Entry, WeightFile

# What is no part of the original code's U-Net, and of ours is one.
_ATTACHED = (CLASS_EMBEDDER, LAYOUT_ENCODER, RESCALER)

Names = Callable[[torch.nn.Module], dict[str, Piece]]


def _unet(module: torch.nn.Module) -> dict[str, Piece]:
    heads = {
        path: int(part.heads) for path, part in module.named_modules() if getattr(part, "group_norm", None) is not None
    }
    names = [name for name in module.state_dict() if name.partition(".")[0] not in _ATTACHED]
    return original.unet_pieces(names, heads)


def _attached(name: str, called: str) -> Names:
    return lambda _unet: {name: Piece(called)}


def _layout_encoder(unet: torch.nn.Module) -> dict[str, Piece]:
    return {f"{LAYOUT_ENCODER}.{name}": piece for name, piece in _bert(unet.get_submodule(LAYOUT_ENCODER)).items()}


def _vae(module: torch.nn.Module) -> dict[str, Piece]:
    return {name: Piece(called) for name, called in original.vae(module.state_dict()).items()}


def _bert(module: torch.nn.Module) -> dict[str, Piece]:
    return {name: Piece(original.bert(name)) for name in module.state_dict()}


def _clip(module: torch.nn.Module) -> dict[str, Piece]:
    """Transformers' own names; since its version 5 they lack the prefix."""
    return {name: Piece(f"text_model.{name.removeprefix('text_model.')}") for name in module.state_dict()}


def _open_clip(module: torch.nn.Module) -> dict[str, Piece]:
    return {name: original.open_clip(name) for name in module.state_dict()}


# Where a component's weights may stand in a file: their prefix, a name that shows it, and how diffusers' names become the original ones.
_PLACES: dict[str, tuple[tuple[str, str, Names], ...]] = {
    "unet": (
        ("model.diffusion_model.", "input_blocks.0.0.weight", _unet),
        ("", "input_blocks.0.0.weight", _unet),
    ),
    "vae": (
        ("first_stage_model.", "decoder.conv_in.weight", _vae),
        ("", "decoder.mid.block_1.conv1.weight", _vae),
    ),
    "text_encoder": (
        ("cond_stage_model.transformer.", "text_model.final_layer_norm.weight", _clip),
        ("conditioner.embedders.0.transformer.", "text_model.final_layer_norm.weight", _clip),
        ("cond_stage_model.model.", "ln_final.weight", _open_clip),
        ("cond_stage_model.transformer.", "token_emb.weight", _bert),
    ),
    CLASS_EMBEDDER: (
        ("cond_stage_model.", "embedding.weight", _attached(f"{CLASS_EMBEDDER}.weight", "embedding.weight")),
    ),
    LAYOUT_ENCODER: (("cond_stage_model.transformer.", "token_emb.weight", _layout_encoder),),
    RESCALER: (
        (
            "cond_stage_model.",
            "channel_mapper.weight",
            _attached(f"{RESCALER}.channel_mapper.weight", "channel_mapper.weight"),
        ),
    ),
    "text_encoder_2": (
        ("conditioner.embedders.1.model.", "ln_final.weight", _open_clip),
        ("conditioner.embedders.0.model.", "ln_final.weight", _open_clip),
    ),
}
# What a file may hold of a component that its module does not use: buffers, the discriminator that a first stage was trained with,
# OpenCLIP's scale and projection, and its last layer, where Stable Diffusion 2 reads the last but one.
_UNUSED = ("position_ids", "logit_scale", "text_projection", "text_projection.weight")
_UNUSED_PREFIXES = ("loss.", "model_ema.", "transformer.resblocks.")

# By the width of the text that the U-Net reads, and whether it takes an embedding beside it.
_WIDTHS = {(768, False): "sd15", (1024, False): "sd21", (2048, True): "sdxl", (1280, True): "sdxl-refiner"}
_KNOWN = "Stable Diffusion 1.x, 2.x and XL base, for inpainting or not, and XL refiner"


class OriginalWeights(Mapping[str, torch.Tensor]):
    """Weights of one component in a file of the original layout, under the names of diffusers and transformers.

    Attributes:
        path: the file.
        entries: dtype and shape of each; the bytes are those of the whole tensor that it is a part of.
    """

    def __init__(
        self, file: WeightFile, prefix: str, pieces: Mapping[str, Piece], shapes: Mapping[str, torch.Size]
    ) -> None:
        """Find a component's weights in a file.

        Args:
            file: the file.
            prefix: of the component's names in it.
            pieces: where each weight is.
            shapes: the shapes that the component's module has.

        Raises:
            BuildError: weights are missing, or there are others.
        """
        self.path = file.path
        self._file, self._pieces = file, {name: replace(p, name=prefix + p.name) for name, p in pieces.items()}
        missing = [piece.name for piece in self._pieces.values() if piece.name not in file.entries]
        if missing:
            raise BuildError(
                f"{file.path} lacks {_listed(missing)}; it is cut or of another kind of model: copy it again, or give the model "
                "that it goes with as --base"
            )
        used = {piece.name for piece in self._pieces.values()}
        extra = [
            name
            for name in file
            if name.startswith(prefix) and name not in used and not _is_unused(name.removeprefix(prefix))
        ]
        if prefix and extra:
            raise BuildError(
                f"{file.path} has, and this kind of model does not know, {_listed(extra)}; give the model that it goes with as --base"
            )
        self.entries = {
            name: _entry(file.entries[piece.name], piece, shapes[name]) for name, piece in self._pieces.items()
        }

    def __getitem__(self, name: str) -> torch.Tensor:
        piece = self._pieces[name]
        return piece.of(self._file[piece.name]).reshape(self.entries[name].shape)

    def release(self, name: str) -> None:
        """Give back the memory that reading a tensor took."""
        self._file.release(self._pieces[name].name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def _entry(found: Entry, piece: Piece, expected: torch.Size) -> Entry:
    """A weight's dtype and shape, where the file has `found` and the module expects a shape."""
    shape, nbytes = found.shape, found.nbytes
    if piece.third is not None:
        shape, nbytes = (shape[0] // 3, *shape[1:]), nbytes // 3
    if piece.transposed:
        shape = shape[::-1]
    # A convolution of one pixel is a linear layer.
    if len(shape) > len(expected) == 2 and all(size == 1 for size in shape[2:]):
        shape = shape[:2]
    return Entry(found.dtype, shape, found.offset, nbytes)


def _is_unused(name: str) -> bool:
    return name.startswith(_UNUSED_PREFIXES) or name.endswith(_UNUSED)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def open_single_file(
    path: Path, base: Source | None, *, config: Path | None = None, tokenizer: Path | None = None
) -> Source:
    """A model that is one file, or a U-Net that is one and the rest from a base model.

    Args:
        path: the file, in the original layout, or a U-Net alone in diffusers'.
        base: what gives the configs, the tokenizers, and the components that the file does not hold; None to take configs and tokenizers
            by what the file shows.
        config: a YAML file of the original code of latent diffusion, which says what the file is.
        tokenizer: the folder of the tokenizer of a model of that code which reads text.

    Raises:
        BuildError: it is no model, it is of a kind that ldmrt does not build, or there is no base and components are missing.
        BundleError: the file is damaged.
    """
    file = open_file(path)
    if base is None:
        base = _described(file, config, tokenizer)
        missing = [folder for folder in base.folders if _place(file, folder) is None]
        if missing:
            raise BuildError(
                f"{path} has no {' and no '.join(missing)}; give the model that has the rest: --base DIR (or an id on the Hub)"
            )
    source = _with_channels(replace(base, title=path.stem), file)
    held = [folder for folder in source.folders if _place(file, folder) is not None]
    if not held and "conv_in.weight" in file and "time_embedding.linear_1.weight" in file:
        return source.with_part("unet", [file])
    if not held:
        raise BuildError(_unknown(file))
    for folder in held:
        attached = [part for part in _ATTACHED if folder == "unet" and part in source.configs]
        source = source.with_part(folder, [component(file, part, source) for part in (folder, *attached)])
    return source


def _described(file: WeightFile, config: Path | None, tokenizer: Path | None) -> Source:
    """The configs of a file's model: as its own config says, or as is known of models like it.

    Raises:
        BuildError: see `open_single_file`.
    """
    if config is not None:
        found: Source | None = original_config.source(original_config.read(config), config, file, tokenizer)
    else:
        found = original_config.recognise(file, tokenizer)
    if found is None:
        name, inpainting = recognise(file)
        found = _with_schedule(Source.known(name, inpainting=inpainting), file)
    if tokenizer is not None and tokenizer not in found.tokenizers.values():
        raise BuildError(f"{file.path} takes no --tokenizer: it reads no text with BERT; leave it out")
    return found


def open_vae(path: Path, source: Source) -> Source:
    """A model with the first stage of a file, in either layout, or of a whole model in the original one.

    Raises:
        BuildError: the file holds no first stage, or one of another kind.
        BundleError: it is damaged.
    """
    file = open_file(path)
    if _place(file, "vae") is not None:
        return source.with_part("vae", [component(file, "vae", source)])
    if "decoder.mid_block.resnets.0.conv1.weight" not in file:
        raise BuildError(
            f"{path} holds no VAE: it has no decoder.conv_in.weight; give the file or folder of an AutoencoderKL"
        )
    return source.with_part("vae", [file])


def open_file(path: Path) -> WeightFile:
    """Open a checkpoint's file.

    Raises:
        BuildError: its name is that of a pickle.
        BundleError: it is damaged, or a pickle under another name.
    """
    if path.suffix in PICKLES:
        target = path.with_suffix(".safetensors")
        raise BuildError(
            f"{path} is a pickle: loading one can run any code, so building never does; convert it first: ldmrt convert {path} {target}"
        )
    return WeightFile(path)


def component(file: WeightFile, folder: str, source: Source) -> OriginalWeights:
    """A component's weights in a file that holds them.

    Raises:
        BuildError: they are not those of the source's module.
    """
    place = _place(file, folder)
    if place is None:
        raise BuildError(_unknown(file))
    prefix, _, names = place
    module = instantiate(source, "unet" if folder in _ATTACHED else folder)
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    return OriginalWeights(file, prefix, names(module), shapes)


def recognise(file: WeightFile) -> tuple[str, bool]:
    """Which known model a file is of, and whether it is for inpainting, by its U-Net: see `Source.known`.

    Raises:
        BuildError: it is none.
    """
    place = _place(file, "unet")
    if place is None:
        raise BuildError(_unknown(file))
    prefix = place[0]
    key = next((name for name in file if name.startswith(prefix) and name.endswith("attn2.to_k.weight")), None)
    width = file.entries[key].shape[-1] if key else 0
    name = _WIDTHS.get((width, f"{prefix}label_emb.0.0.weight" in file))
    channels = next(iter(file.entries[f"{prefix}input_blocks.0.0.weight"].shape[1:2]), 0)
    inpainting = channels == unet_channels(4, inpainting=True)
    if name is None or channels != unet_channels(4, inpainting=inpainting):
        raise BuildError(
            f"{file.path} has a U-Net that takes {channels or 'no'} channels and text of width {width}, which is none of "
            f"{_KNOWN}, and of latent diffusion {original_config.known()}; give the model that it goes with as --base, or its YAML file as "
            "--config"
        )
    return name, inpainting


def _with_channels(source: Source, file: WeightFile) -> Source:
    """A model for inpainting where the U-Net in a file is for that, whatever the base model is, and none where it is not."""
    place = _place(file, "unet")
    entry = file.entries.get(f"{place[0]}input_blocks.0.0.weight" if place else "conv_in.weight")
    latents = int(source.configs["vae"].get("latent_channels", 4))
    for inpainting in (False, True):
        if entry is not None and entry.shape[1:2] == (unet_channels(latents, inpainting=inpainting),):
            return source.for_inpainting(inpainting=inpainting)
    return source


def _place(file: WeightFile, folder: str) -> tuple[str, str, Names] | None:
    """Where a file holds a component: the entry of `_PLACES`."""
    return next((place for place in _PLACES.get(folder, ()) if place[0] + place[1] in file), None)


def _unknown(file: WeightFile) -> str:
    some = ", ".join(list(file)[:3]) or "no tensor"
    return (
        f"{file.path} is no model in the original layout: it has {some}, expected model.diffusion_model.input_blocks.0.0.weight; "
        f"known are {_KNOWN}"
    )


def _with_schedule(source: Source, file: WeightFile) -> Source:
    """With the noise schedule as the file states it: by its metadata (Stability AI's modelspec), by empty tensors of these names, or by its
    own name.
    """
    stated = file.metadata.get("modelspec.prediction_type", "v" if "v_pred" in file else "")
    changes: dict[str, Any] = {}
    if stated.startswith("v"):
        changes["prediction_type"] = "v_prediction"
    elif stated == "epsilon":
        changes["prediction_type"] = "epsilon"
    if names_turbo(file.path.stem):
        changes["timestep_spacing"] = "trailing"  # few steps begin at the last timestep
    if "ztsnr" in file:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler = {**source.configs["scheduler"], **changes}
    return replace(source, configs={**source.configs, "scheduler": scheduler})
