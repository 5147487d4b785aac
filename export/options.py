"""What to build: asked for, checked, filled in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ldmrt.engines.tensorrt import LIBRARIES, Library, gpu_at_hand, gpu_here
from ldmrt.errors import BuildError
from ldmrt.export.architectures import downscale
from ldmrt.export.cubins import TARGETS, architecture
from ldmrt.export.source import Source

ENGINES = ("auto", "torch", "onnxruntime", *LIBRARIES)
DTYPES = ("auto", "float32", "bfloat16", "float16")

# With guidance an image takes two rows, and modules are traced for at most 63.
_LARGEST_BATCH = 31
_LARGEST_SIDE = 8192


@dataclass(frozen=True)
class Options:
    """What to build, with nothing left open.

    Attributes:
        engine: the engine kind.
        dtype: the precision.
        sizes: (width, height) in pixels.
        batch_sizes: images per call, in order.
        targets: GPU architectures to compile for, such as `sm_89`.
        optimization_level: how long TensorRT searches for fast kernels, 0 to 5; its own default if None.
        workspace: the most memory in bytes that a layer of a TensorRT plan may use besides its tensors; no limit if None.
        refit: whether the weights of a TensorRT plan can be changed.
        weight_streaming: whether a TensorRT plan can leave weights in the host's memory.
        decoder_tile: side in pixels of a square decoder for tiles of larger pictures, or None.
        plugins: whether kernels of ours are layers of a TensorRT plan.
    """

    engine: str
    dtype: str
    sizes: tuple[tuple[int, int], ...]
    batch_sizes: tuple[int, ...]
    targets: tuple[str, ...] = ()
    optimization_level: int | None = None
    workspace: int | None = None
    refit: bool = False
    weight_streaming: bool = False
    decoder_tile: int | None = None
    plugins: bool = False

    @property
    def is_tensorrt(self) -> bool:
        """Whether the engines are TensorRT plans, of either library: of fixed shapes, and with a copy of the weights."""
        return self.engine in LIBRARIES

    @property
    def kernel_targets(self) -> tuple[str, ...]:
        """The targets that our own kernels are compiled for."""
        return tuple(target for target in self.targets if not self.is_tensorrt or target in TARGETS)

    @property
    def for_absent_gpus(self) -> bool:
        """Whether plans are for other GPUs than the one at hand, and cannot run here."""
        return self.is_tensorrt and gpu_at_hand() not in self.targets

    @classmethod
    def resolve(
        cls,
        source: Source,
        *,
        engine: str,
        sizes: Sequence[tuple[int, int]] | None,
        batch_sizes: Sequence[int],
        dtype: str,
        targets: Sequence[str] = (),
        optimization_level: int | None = None,
        workspace: int | None = None,
        refit: bool = False,
        weight_streaming: bool = False,
        decoder_tile: int | None = None,
        plugins: bool = False,
    ) -> Options:
        """Check what was asked and fill in what was not.

        Raises:
            BuildError: a value cannot be used.
            EngineMismatch: the engine's library is not installed.
        """
        if engine not in ENGINES:
            raise BuildError(f"engine {engine!r} is not known; choose one of {', '.join(ENGINES)}")
        if dtype not in DTYPES:
            raise BuildError(f"dtype {dtype!r} is not known; choose one of {', '.join(DTYPES)}")
        engine = "torch" if engine == "auto" else engine
        targets = tuple(targets)
        if engine in LIBRARIES:
            targets = _plan_targets(LIBRARIES[engine], targets)
        else:
            targets = sorted(set(targets), key=architecture)
        _check_plan_options(engine, optimization_level, workspace, refit=refit, weight_streaming=weight_streaming)
        if refit:
            _check_refit(targets)
        if plugins:
            _check_plugins(engine, targets)
        dtype = _precision(engine, dtype, targets)
        if sizes is None:
            side = int(source.configs["unet"].get("sample_size") or 64) * downscale(source)
            sizes = [(int(source.defaults.get("width", side)), int(source.defaults.get("height", side)))]
        if not sizes:
            raise BuildError("there are no sizes, expected at least one, such as (512, 512)")
        step = downscale(source)
        for width, height in sizes:
            if width < step or height < step or width % step or height % step:
                near = f"{max(1, round(width / step)) * step}x{max(1, round(height / step)) * step}"
                raise BuildError(
                    f"size {width}x{height} is not a multiple of {step} pixels each way; use {near}, the nearest"
                )
            if max(width, height) > _LARGEST_SIDE:
                raise BuildError(f"size {width}x{height} is too large, expected at most {_LARGEST_SIDE} each way")
        _check_tile(decoder_tile, step, sizes)
        if not batch_sizes or not all(1 <= batch <= _LARGEST_BATCH for batch in batch_sizes):
            raise BuildError(f"batch sizes are {list(batch_sizes)}, expected at least one, from 1 to {_LARGEST_BATCH}")
        return cls(
            engine,
            dtype,
            tuple(dict.fromkeys(sizes)),
            tuple(sorted(set(batch_sizes))),
            tuple(targets),
            optimization_level,
            workspace,
            refit,
            weight_streaming,
            decoder_tile,
            plugins,
        )


def _check_tile(tile: int | None, step: int, sizes: Sequence[tuple[int, int]]) -> None:
    """Check that a decoder for tiles has whole latents, and is smaller than a picture."""
    if tile is None:
        return
    if tile < step or tile % step:
        raise BuildError(
            f"decoder tile is {tile} pixels, expected a multiple of {step}; use {max(1, round(tile / step)) * step}"
        )
    if not any(tile <= min(size) and tile < max(size) for size in sizes):
        shown = ", ".join(f"{width}x{height}" for width, height in sizes)
        raise BuildError(f"decoder tile is {tile} pixels, and no size is larger ({shown}); use a smaller tile")


def _check_plan_options(
    engine: str, optimization_level: int | None, workspace: int | None, *, refit: bool, weight_streaming: bool
) -> None:
    """Check what only TensorRT takes."""
    if engine not in LIBRARIES and ((optimization_level, workspace) != (None, None) or refit or weight_streaming):
        raise BuildError(
            f"optimization level, workspace, refit and weight streaming are TensorRT's, engine {engine} has none of them; "
            f"use --engine {' or '.join(LIBRARIES)}"
        )
    if optimization_level is not None and not 0 <= optimization_level <= 5:
        raise BuildError(f"optimization level is {optimization_level}, expected 0 to 5")
    if workspace is not None and workspace < 1 << 20:
        raise BuildError(f"workspace is {workspace} bytes, expected at least {1 << 20} (1 MiB)")


def _check_refit(targets: Sequence[str]) -> None:
    """Check that a plan whose weights can be changed can be built: the library compiles its kernels on the GPU."""
    here = gpu_at_hand()
    if list(targets) != [here]:
        raise BuildError(
            f"plans whose weights can be changed are built on their GPU, for that one alone; asked for is {', '.join(targets)}, "
            f"and {gpu_here(here)}: build there, or leave --refit out"
        )


def _check_plugins(engine: str, targets: Sequence[str]) -> None:
    """Check that plans can hold kernels of ours, and that those are compiled for their GPUs.

    Raises:
        BuildError: the engine kind has no plans, or a GPU is not one that kernels are compiled for.
        EngineMismatch: the library takes no plugins.
    """
    if engine not in LIBRARIES:
        able = ", ".join(library.kind for library in LIBRARIES.values() if library.plugins)
        raise BuildError(f"plugins are layers of TensorRT plans, engine {engine} has none; use --engine {able}")
    LIBRARIES[engine].load_plugins()
    for target in targets:
        architecture(target)


def _plan_targets(library: Library, targets: Sequence[str]) -> list[str]:
    """The GPUs that plans are built for: those asked for, or the one at hand.

    Raises:
        BuildError: the library does not build for one of them.
        EngineMismatch: the library is not installed.
    """
    library.load()
    here = gpu_at_hand()
    possible = library.targets or ((here,) if here else ())
    if not possible:
        raise BuildError(
            f"engine {library.kind} builds only for the GPU at hand, and there is none here; build on the GPU's machine, "
            "or use --engine tensorrt-rtx --target sm_89"
        )
    if not targets and here not in possible:
        raise BuildError(
            f"engine {library.kind}: {gpu_here(here)}; say what to build for: --target {' or --target '.join(possible)}"
        )
    for target in targets:
        if target not in possible:
            raise BuildError(
                f"engine {library.kind} does not build for target {target!r}{'' if library.targets else ' here'}; "
                f"choose among {', '.join(possible)}"
            )
    return [target for target in possible if target in (targets or (here,))]


def _precision(engine: str, dtype: str, targets: Sequence[str]) -> str:
    """The precision to build in.

    Raises:
        BuildError: the engine kind does not have it, or no GPU runs the engine kind.
    """
    if engine == "onnxruntime":
        if dtype not in ("auto", "float32"):
            raise BuildError(
                f"engine onnxruntime runs on the CPU in float32 only, {dtype} was asked for; use --dtype float32"
            )
        if targets:
            raise BuildError(f"engine onnxruntime runs on the CPU, not on {targets[0]}; use --engine torch")
        return "float32"
    if engine in LIBRARIES and dtype == "bfloat16" and gpu_at_hand() not in targets:
        raise BuildError(
            f"engine {engine} in bfloat16 cannot be tried here: ONNX Runtime, which stands in for an absent GPU, has no bfloat16 convolution; "
            "use --dtype float16 or float32, or build on the GPU's machine"
        )
    if dtype != "auto":
        return dtype
    if targets:
        return "float16"  # guidance amplifies bfloat16's rounding
    return "bfloat16" if has_native_bfloat16() else "float32"


def has_native_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX)."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
