"""What to measure: a bundle, a model of which one is built first, or an architecture with random weights."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ldmrt.bench.building import build_apart
from ldmrt.bench.report import Build
from ldmrt.bundle import Bundle
from ldmrt.errors import BuildError
from ldmrt.manifest import MANIFEST
from ldmrt.opening import builtin_bundle

OnProgress = Callable[[str, int, int], None]

# At the end of an architecture's name: with a ControlNet.
CONTROLLED = "-controlnet"


@dataclass(frozen=True)
class Wish:
    """What a bundle must have engines for.

    Attributes:
        sizes: width and height in pixels; empty for the model's.
        batches: images at a time; empty for 1.
        dtype: precision; None for the best one here.
        engine: kind; None for torch.
    """

    sizes: Sequence[tuple[int, int]] = ()
    batches: Sequence[int] = ()
    dtype: str | None = None
    engine: str | None = None


@dataclass(frozen=True)
class Subject:
    """A bundle, the folder of the model that it was built from, if that is known, its building, if it was built now, and the folder of the
    ControlNet that is to steer it, if one is.
    """

    bundle: Path
    model: Path | None
    build: Build | None = None
    controlnet: Path | None = None


def subject(
    folder: Path | None,
    arch: str | None,
    cache: Path,
    wish: Wish,
    on_progress: OnProgress = lambda what, done, total: None,
) -> Subject:
    """What a folder or the name of an architecture stands for.

    Args:
        folder: a bundle, or a model in the diffusers layout; None for an architecture.
        arch: `shapes`, or one of `ldmrt.export.random_checkpoint`, after whose name may stand `-controlnet`; None for `shapes`, the built-in
            model.
        cache: where random weights and the bundles of models are kept, by their paths. What is there already is not made again.
        wish: what to build, if anything is.
        on_progress: called with (what is being done, steps done, steps in all).

    Raises:
        BuildError: the model cannot be built.
        BundleError: the folder is neither.
    """
    if folder is not None:
        is_model = (folder / "model_index.json").is_file()
        if (folder / MANIFEST).is_file() or not is_model:  # what is neither is refused by who opens it
            return Subject(folder, folder if is_model else None)
        return _built(folder, cache, wish, on_progress)
    if arch in (None, "shapes"):
        builtin = builtin_bundle()
        return Subject(builtin, builtin) if _has(builtin, wish) else _built(builtin, cache, wish, on_progress)
    name = str(arch).removesuffix(CONTROLLED)
    model, controlnet = cache / "bench" / name, cache / "bench" / str(arch)
    for each in dict.fromkeys((model, controlnet)):
        if not each.is_dir():
            on_progress(f"random weights of {each.name}", 0, 1)
            _random_weights(name, each, controlnet=each != model)
    return _built(model, cache, wish, on_progress, None if controlnet == model else controlnet)


def _has(bundle: Path, wish: Wish) -> bool:
    """Whether a bundle has all engines that are wished for."""
    steps = [record for record in Bundle.open(bundle).manifest.engines if record.component == "step"]
    return all(
        any(
            record.kind == (wish.engine or record.kind)
            and record.dtype == (wish.dtype or record.dtype)
            and (size is None or record.size == size)
            and (batch is None or record.rows == 2 * batch)
            for record in steps
        )
        for size in wish.sizes or (None,)
        for batch in wish.batches or (None,)
    )


def _random_weights(arch: str, out: Path, *, controlnet: bool) -> None:
    try:
        from ldmrt.export.random_checkpoint import write_checkpoint, write_controlnet
    except ImportError as error:
        raise BuildError(f"--arch {arch} needs {error.name}: pip install 'ldmrt[export]'") from error
    (write_controlnet if controlnet else write_checkpoint)(arch, out, dtype=torch.float16)


def _built(model: Path, cache: Path, wish: Wish, on_progress: OnProgress, controlnet: Path | None = None) -> Subject:
    named = (controlnet or model).resolve()
    bundle = cache / "bench" / f"{named.name}-{hashlib.sha256(str(named).encode()).hexdigest()[:16]}"
    bundle.parent.mkdir(parents=True, exist_ok=True)
    there = {record.key for record in Bundle.open(bundle).manifest.engines} if (bundle / MANIFEST).is_file() else set()
    # The best precision of a GPU, which the builder, who needs none, does not ask for by itself.
    best = "float16" if torch.cuda.is_available() else "auto"
    start = time.perf_counter()
    options = {
        "engine": wish.engine or "auto",
        "sizes": wish.sizes or None,
        "batch_sizes": tuple(wish.batches) or (1,),
        "dtype": wish.dtype or best,
        "controlnets": [] if controlnet is None else [str(controlnet)],
    }
    peak = build_apart(model, bundle, options, on_progress)
    seconds = time.perf_counter() - start
    engines = Bundle.open(bundle).manifest.engines
    new = [record for record in engines if record.key not in there]
    build = Build(seconds=seconds, engines=len(new), reused=len(engines) - len(new), peak_resident_bytes=peak)
    return Subject(bundle, model, build, controlnet)
