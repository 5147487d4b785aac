"""Models on the Hugging Face Hub. The network is used for an id that the user gave, and for nothing else.

What is fetched stands in huggingface_hub's own cache, which `HF_HOME` moves; `HF_HUB_OFFLINE=1` takes what is there, `HF_TOKEN` opens
gated models.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldmrt.errors import BuildError
from ldmrt.export.source import PICKLES, STEMS, VARIANTS, Source, kind_of, read_json

_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def is_id(model: str | Path) -> bool:
    """Whether this is an id on the Hub: `owner/name`, and no path that exists nor a file's name."""
    text = str(model)
    return bool(_ID.fullmatch(text)) and not Path(text).exists() and not text.endswith((".safetensors", *PICKLES))


def fetch(model: str, *, revision: str | None = None, variant: str | None = None) -> Source:
    """A model in the diffusers layout from the Hub: its configs, tokenizers and safetensors, and of these one copy.

    Args:
        model: its id.
        revision: branch, tag or commit; the main branch if None.
        variant: which copy of the weights, such as `fp16`; the one without a name if None, or the only one there is.

    Raises:
        BuildError: the Hub cannot be reached, the model is not there or may not be read, or is none that ldmrt builds.
    """
    index = _fetch(model, revision, []) / "model_index.json"
    if not index.is_file():
        raise BuildError(
            f"{model} on the Hub has no model_index.json: it is not in the diffusers layout; if it is one .safetensors file, fetch that and "
            "give its path"
        )
    kind = kind_of(read_json(index), Path(model))
    stems = {kind.folders.get(folder, folder): STEMS[folder] for folder in kind.classes}
    folders = (*stems, *kind.tokenizers.values(), *kind.schedulers)
    small = [f"{folder}/*.{ending}" for folder in folders for ending in ("json", "txt")]
    _fetch(model, revision, [*small, "ldmrt-defaults.json"])
    path = _fetch_weights(model, revision, variant, stems)
    return replace(Source.open(path, variant=variant), title=model)


def fetch_vae(model: str, *, variant: str | None = None) -> Path:
    """The folder of a VAE from the Hub, or of a model whose VAE is to be taken.

    Raises:
        BuildError: see `fetch`; or it has no VAE.
    """
    path = _fetch(model, None, ["vae/config.json"])
    folder = "vae/" if (path / "vae" / "config.json").is_file() else ""
    return _fetch_weights(model, None, variant, {folder.rstrip("/"): STEMS["vae"]}) / folder


def _fetch_weights(model: str, revision: str | None, variant: str | None, stems: dict[str, str]) -> Path:
    """Fetch one copy of the weights of each component.

    Args:
        model: its id.
        revision: see `fetch`.
        variant: see `fetch`.
        stems: how the files are called, by folder.
    """
    path = Path()
    order = ("", *(f".{name}" for name in VARIANTS)) if variant is None else (f".{variant}", "")
    for infix in order:
        wanted = [f"{folder}/{stem}{infix}".lstrip("/") for folder, stem in stems.items()]
        path = _fetch(model, revision, [f"{name}{end}.safetensors" for name in wanted for end in ("", "-*-of-*")])
        stems = {folder: stem for folder, stem in stems.items() if not _has(path / folder, f"{stem}{infix}")}
        if not stems:
            return path
    folder = next(iter(stems)) or "vae"
    raise BuildError(
        f"{model} on the Hub has no safetensors weights of its {folder}; name another --revision, or fetch its files and convert them: "
        "ldmrt convert FILE FILE.safetensors"
    )


def _has(folder: Path, stem: str) -> bool:
    return (folder / f"{stem}.safetensors").is_file() or any(folder.glob(f"{stem}-*-of-*.safetensors"))


def _fetch(model: str, revision: str | None, patterns: Iterable[str]) -> Path:
    """Fetch the files of a model that fit patterns, beside its index, where they are not in the cache. Returns the folder of all that was
    fetched of it.

    Raises:
        BuildError: the Hub cannot be reached, the model is not there, or may not be read.
    """
    try:
        import huggingface_hub
        from huggingface_hub.errors import (
            GatedRepoError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError as error:
        raise BuildError("models on the Hub need huggingface_hub: pip install 'ldmrt[export]'") from error
    where = f"no such folder: {model}; and as an id on the Hub"
    try:
        folder = huggingface_hub.snapshot_download(
            model,
            revision=revision,
            allow_patterns=[*patterns, "model_index.json", "config.json"],
            tqdm_class=_quiet(),
        )
    except GatedRepoError as error:
        raise BuildError(
            f"{model} on the Hub is gated: accept its terms on its page, and set HF_TOKEN to a token of your account"
        ) from error
    except RevisionNotFoundError as error:
        raise BuildError(f"{model} on the Hub has no revision {revision!r}; leave out --revision") from error
    except RepositoryNotFoundError as error:
        raise BuildError(f"{where} it is not there, or private: check the name, or set HF_TOKEN") from error
    except LocalEntryNotFoundError as error:
        offline = huggingface_hub.constants.HF_HUB_OFFLINE
        raise BuildError(
            f"{where} it is not in the cache, and HF_HUB_OFFLINE is set: unset it, or give a folder"
            if offline
            else f"{where} it cannot be fetched: the Hub cannot be reached; go online, or give a folder"
        ) from error
    except Exception as error:  # errors of whichever HTTP library it uses among them
        reason = " ".join(str(error).split())[:200]
        raise BuildError(f"{model} cannot be fetched from the Hub ({reason}); try again, or give a folder") from error
    return Path(folder)


def _quiet() -> Any:
    """A progress bar that shows nothing: the build has one of its own."""
    from tqdm.auto import tqdm

    class Quiet(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

    return Quiet
