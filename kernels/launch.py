"""How a Triton kernel is launched: `run` is the one way, whoever compiled it.

The operators (kernels/attention.py and its neighbours) decide on a grid, arguments and constants; their Triton bodies lie in
kernels/gpu/, which alone imports triton, and only when a kernel is to be compiled in this process. `run` then does one of three
things, by where the tensors are:

* on a GPU it launches, with Triton's own compiler in this process;
* on the meta device it records what it would have launched (`recording`), which is how the kernels of a graph are known
  without a GPU;
* on the CPU it runs in Triton's interpreter, if TRITON_INTERPRET=1: for tests.
"""

from __future__ import annotations

import importlib
import importlib.util
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

Constant = int | float | bool | str
Argument = Tensor | int | float

# The architecture whose configurations are used where there is no GPU to ask, as in the interpreter.
DEFAULT_ARCH = 90

_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
    torch.uint8: "*u8",
}


@dataclass(frozen=True, slots=True)
class Variant:
    """One kernel, compiled for one kind of arguments.

    Attributes:
        kernel: `file.function` in kernels/gpu, such as `group_norm.normalize`.
        types: Triton's types of the arguments that are not constants, in order: `*fp16`, `i32`, `fp32`.
        aligned: for each of them, whether it is a multiple of 16 (a pointer: of 16 bytes).
        constants: the constexpr arguments by name, sorted.
        num_warps: warps of a program.
        num_stages: stages of software pipelining.
        fp_fusion: whether a product and a sum may become one fused operation, rounded once.
    """

    kernel: str
    types: tuple[str, ...]
    aligned: tuple[bool, ...]
    constants: tuple[tuple[str, Constant], ...]
    num_warps: int
    num_stages: int
    fp_fusion: bool = True

    @staticmethod
    def of(
        kernel: str,
        arguments: Sequence[Argument],
        constants: Mapping[str, Constant],
        num_warps: int,
        num_stages: int,
        *,
        fp_fusion: bool = True,
    ) -> Variant:
        """The variant that a launch needs."""
        return Variant(
            kernel=kernel,
            types=tuple(map(_type, arguments)),
            aligned=tuple(map(_aligned, arguments)),
            constants=tuple(sorted(constants.items())),
            num_warps=num_warps,
            num_stages=num_stages,
            fp_fusion=fp_fusion,
        )


class _Recording(threading.local):
    arch: int = DEFAULT_ARCH
    variants: dict[Variant, None] | None = None


_recording = _Recording()


@contextmanager
def recording(arch: int) -> Iterator[dict[Variant, None]]:
    """Collect the variants that launches on meta tensors would need on an architecture, such as 89, in order, each once."""
    before = _recording.arch, _recording.variants
    variants: dict[Variant, None] = {}
    _recording.arch, _recording.variants = arch, variants
    try:
        yield variants
    finally:
        _recording.arch, _recording.variants = before


def architecture(device: torch.device) -> int:
    """The compute capability to choose a configuration for: 89 for 8.9."""
    if device.type == "cuda":
        return _capability(device.index if device.index is not None else torch.cuda.current_device())
    return _recording.arch


def ready(device: torch.device) -> bool:
    """Whether kernels can be launched on a device; else an operator computes its reference. Asked before every `run`."""
    if device.type == "meta":
        return _recording.variants is not None
    return device.type == "cuda" and _has_triton()


def run(
    kernel: str,
    grid: tuple[int, ...],
    arguments: Sequence[Argument],
    constants: Mapping[str, Constant],
    *,
    num_warps: int,
    num_stages: int = 2,
    fp_fusion: bool = True,
) -> None:
    """Launch a kernel on the current stream.

    Args:
        kernel: `file.function` in kernels/gpu.
        grid: programs along one to three axes.
        arguments: the arguments that are not constants, in the kernel's order; tensors are on one device. A pointer that
            the constants say is not used is given any tensor.
        constants: the constexpr arguments, which stand last in the kernel.
        num_warps: warps of a program.
        num_stages: stages of software pipelining.
        fp_fusion: whether a product and a sum may become one fused operation, rounded once.
    """
    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    if device.type == "meta":
        if _recording.variants is not None:
            variant = Variant.of(kernel, arguments, constants, num_warps, num_stages, fp_fusion=fp_fusion)
            _recording.variants[variant] = None
        return
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": fp_fusion}
    _function(kernel)[grid](*arguments, **constants, **options)


def _type(argument: Argument) -> str:
    if isinstance(argument, Tensor):
        return _TYPES[argument.dtype]
    return "fp32" if isinstance(argument, float) else "i32" if -(2**31) <= argument < 2**31 else "i64"


def _aligned(argument: Argument) -> bool:
    if isinstance(argument, Tensor):
        # A meta tensor has no address, but its storage is taken to be aligned, as every allocator's is.
        meta = argument.device.type == "meta"
        return (argument.storage_offset() * argument.itemsize if meta else argument.data_ptr()) % 16 == 0
    return isinstance(argument, int) and argument % 16 == 0


@cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return major * 10 + minor


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _function(kernel: str) -> Any:
    file, function = kernel.split(".")
    return getattr(importlib.import_module(f"ldmrt.kernels.gpu.{file}"), function)
