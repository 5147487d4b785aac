"""From what the user names to a model: a folder, a file, or an id on the Hub; with a base, with another VAE."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from ldmrt.errors import BuildError
from ldmrt.export import hub
from ldmrt.export.single_file import open_single_file, open_vae
from ldmrt.export.source import STEMS, Source, read_json, unet_channels, weight_files
from ldmrt.weights import WeightFile

_VARIANT = re.compile(r"[A-Za-z0-9_]{1,32}")


def resolve(
    model: str | Path,
    *,
    base: str | Path | None = None,
    vae: str | Path | None = None,
    variant: str | None = None,
    revision: str | None = None,
    config: Path | None = None,
    tokenizer: Path | None = None,
) -> Source:
    """Open a model.

    Args:
        model: a folder in the diffusers layout, a safetensors file in the original one, or an id on the Hub (`owner/name`). Only if it is
            an id, and there is no such path, is the network used.
        base: a model of any of these forms, which has what the file does not; or the folder of a U-Net.
        vae: the VAE to take instead of the model's own: a folder (a VAE's or a model's), a file in either layout, or an id on the Hub.
        variant: which copy of the weights to take where there are several, such as `fp16`.
        revision: branch, tag or commit of an id on the Hub.
        config: for a file of the original code of latent diffusion, its YAML file, where the model is not a known one.
        tokenizer: for such a file, the folder of the tokenizer of a model that reads text.

    Raises:
        BuildError: it cannot be opened; says what was found, and the cure.
        BundleError: a file is damaged.
    """
    if variant is not None and not _VARIANT.fullmatch(variant):
        raise BuildError(f"variant is {variant!r}, expected a name such as fp16")
    fetched = hub.is_id(model)
    if revision is not None and not fetched:
        raise BuildError(f"{model} is no id on the Hub, and has no revision {revision!r}; leave out --revision")
    path = Path(model)
    given = next(
        (name for name, value in (("--config", config), ("--tokenizer", tokenizer)) if value is not None), None
    )
    if given is not None and (base is not None or not path.is_file()):
        what = "has a base model, which says that" if path.is_file() else "is no file"
        raise BuildError(
            f"{model} {what}, and {given} is for a file alone, in the layout of the original code; leave it out"
        )
    if path.is_file():
        base_model = None if base is None else resolve(base, variant=variant)
        source = open_single_file(path, base_model, config=config, tokenizer=tokenizer)
    elif base is not None:
        if fetched or (path / "model_index.json").is_file():
            raise BuildError(
                f"{model} is a whole model, and takes no --base; leave it out, or give the file of a U-Net"
            )
        source = _with_unet(resolve(base, variant=variant), path, variant)
    elif fetched:
        source = hub.fetch(str(model), revision=revision, variant=variant)
    else:
        source = Source.open(path, variant=variant)
    return source if vae is None else _with_vae(source, vae, variant)


def _with_unet(base: Source, folder: Path, variant: str | None) -> Source:
    """A model with the U-Net of a folder; one for inpainting where that U-Net is, whatever the base model is."""
    config = folder / "config.json"
    if not config.is_file():
        raise BuildError(f"{folder} is no U-Net: expected a folder with a config.json and {STEMS['unet']}.safetensors")
    unet, expected = read_json(config), base.kind.classes["unet"]
    if unet.get("_class_name") != expected:
        raise BuildError(f"{config} is of {unet.get('_class_name')}, expected {expected}, as {base.name} has")
    latents = int(base.configs["vae"].get("latent_channels", 4))
    source = replace(base, title=folder.resolve().name)
    source = source.for_inpainting(inpainting=unet.get("in_channels") == unet_channels(latents, inpainting=True))
    weights = [WeightFile(file) for file in weight_files(folder, STEMS["unet"], variant)]
    return source.with_part("unet", weights, (config, unet))


def _with_vae(source: Source, vae: str | Path, variant: str | None) -> Source:
    path = hub.fetch_vae(str(vae), variant=variant) if hub.is_id(vae) else Path(vae)
    if path.is_file():
        return open_vae(path, source)
    folder = path / "vae" if (path / "vae" / "config.json").is_file() else path
    if not folder.is_dir():
        raise BuildError(f"no such VAE: {vae}; give a folder in the diffusers layout, or a safetensors file")
    config = folder / "config.json"
    weights = [WeightFile(file) for file in weight_files(folder, STEMS["vae"], variant)]
    return source.with_part("vae", weights, (config, read_json(config)))
