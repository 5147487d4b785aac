"""How a Triton kernel is launched: `run` is the one way, whoever compiled it.

The operators (kernels/attention.py and its neighbours) decide on a grid, arguments and constants; their Triton bodies lie in
kernels/gpu/, which alone imports triton, and only when a kernel is to be compiled in this process. `run` then does one of three
things, by where the tensors are:

* on a GPU it launches: a cubin that a bundle brought (`register`), or what Triton compiles in this process. Either is loaded
  and launched by kernels/cuda_driver.py; Triton's own launcher would need a C compiler;
* on the meta device it records what it would have launched (`recording`), which is how the kernels of a graph are known
  without a GPU;
* on the CPU it runs in Triton's interpreter, if TRITON_INTERPRET=1: for tests.

The variable LDMRT_KERNELS, read once, chooses among the ways on a GPU: `auto` (a cubin, else Triton), `cubin`, `triton`, or
`reference`, the operators in plain torch. LDMRT_PDL=0 launches no kernel before the one before it has ended.
"""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldmrt.kernels import aot, cuda_driver
from ldmrt.kernels.variant import Argument, Constant, Variant, function

__all__ = [
    "Argument",
    "Choice",
    "Constant",
    "Launch",
    "Variant",
    "architecture",
    "choose",
    "describe",
    "ready",
    "recording",
    "register",
    "run",
    "tracing",
]

# The architecture whose configurations are used where there is no GPU to ask, as in the interpreter.
DEFAULT_ARCH = 90

# The first architecture with programmatic dependent launch.
_DEPENDENT = 90

VARIABLE = "LDMRT_KERNELS"
OVERLAP = "LDMRT_PDL"  # 0: kernels are launched one after the other all the same, to see what it is worth
_CHOICES = ("auto", "cubin", "triton", "reference")


class Launch(NamedTuple):
    """What `run` was asked for on the meta device: the variant, programs along one to three axes, and the arguments."""

    variant: Variant
    grid: tuple[int, ...]
    arguments: tuple[Argument, ...]


class Choice(NamedTuple):
    """Which ways to a kernel are open; `why_not` says what closes both, or is None."""

    cubins: bool
    triton: bool
    why_not: str | None


def choose(environ: Mapping[str, str]) -> Choice:
    """The ways that the environment leaves open, of those that are there."""
    value = environ.get(VARIABLE, "").strip().lower() or "auto"
    if value not in _CHOICES:
        return Choice(
            cubins=False, triton=False, why_not=f"{VARIABLE}={environ[VARIABLE]!r} is none of {', '.join(_CHOICES)}"
        )
    if value == "reference":
        return Choice(cubins=False, triton=False, why_not=f"{VARIABLE}={environ[VARIABLE]} switches them off")
    installed = importlib.util.find_spec("triton") is not None
    if value == "triton" and not installed:
        return Choice(cubins=False, triton=False, why_not=f"{VARIABLE}=triton, and Triton is not installed")
    return Choice(cubins=value in {"auto", "cubin"}, triton=value != "cubin" and installed, why_not=None)


@cache
def _choice() -> Choice:
    return choose(os.environ)


class _Store:
    """The cubins of this process, and the kernels that have been launched, loaded."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cubins: dict[str, dict[int, aot.Cubin]] = {}
        self._arches: frozenset[int] = frozenset()
        # By what is quickly told of a launch: the same always leads to the same variant.
        self.loaded: dict[tuple[Any, ...], cuda_driver.Kernel] = {}

    def add(self, cubins: Sequence[aot.Cubin]) -> None:
        with self._lock:
            for cubin in cubins:
                self._cubins.setdefault(cubin.key, {})[cubin.arch] = cubin
            self._arches |= {cubin.arch for cubin in cubins}

    def serves(self, arch: int) -> bool:
        """Whether there is anything for a device of an architecture."""
        return any(aot.runs_on(compiled, arch) for compiled in self._arches)

    def count(self, arch: int) -> int:
        """How many variants there are for a device of an architecture."""
        with self._lock:
            return sum(any(aot.runs_on(compiled, arch) for compiled in found) for found in self._cubins.values())

    def find(self, variant: Variant, arch: int) -> aot.Cubin | None:
        """The cubin for a device of an architecture: of those that it runs, the one compiled for the latest."""
        with self._lock:
            found = self._cubins.get(variant.key(), {})
            nearest = max((compiled for compiled in found if aot.runs_on(compiled, arch)), default=None)
            return None if nearest is None else found[nearest]


_store = _Store()


class _Recording(threading.local):
    arch: int = DEFAULT_ARCH
    variants: dict[Variant, None] | None = None
    launches: list[Launch] | None = None


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


@contextmanager
def tracing(arch: int) -> Iterator[list[Launch]]:
    """`recording` that collects whole launches, in order, each as often as it is made. The tensors are kept."""
    before, _recording.launches = _recording.launches, []
    try:
        with recording(arch):
            yield _recording.launches
    finally:
        _recording.launches = before


def architecture(device: torch.device) -> int:
    """The compute capability to choose a configuration for: 89 for 8.9."""
    if device.type == "cuda":
        return _capability(device.index if device.index is not None else torch.cuda.current_device())
    return _recording.arch


def register(folder: Path) -> int:
    """Add the cubins of a folder to those of this process.

    Returns:
        How many variants there are.

    Raises:
        ValueError: the folder is damaged, or not of this version; nothing is added.
        OSError: a file cannot be read.
    """
    cubins = aot.read(folder)
    _store.add(cubins)
    return len({cubin.key for cubin in cubins})


def ready(device: torch.device) -> bool:
    """Whether kernels can be launched on a device; else an operator computes its reference. Asked before every `run`."""
    if device.type == "meta":
        return _recording.variants is not None
    if device.type != "cuda":
        return False
    choice = _choice()
    return choice.triton or (choice.cubins and _store.serves(architecture(device)))


def describe(device: torch.device) -> str:
    """What computes the operators on a device, in one line."""
    choice = _choice()
    if device.type != "cuda":
        return f"plain torch or C++: kernels are for a GPU, and this is {device}"
    if choice.why_not is not None:
        return f"plain torch: {choice.why_not}"
    arch = architecture(device)
    count = _store.count(arch) if choice.cubins else 0
    if count == 0 and not choice.triton:
        return f"plain torch: no kernel compiled for sm_{arch} is registered, and Triton is not installed or not to be used"
    ways = [f"{count} compiled kernels for sm_{arch}"] * (count > 0) + ["Triton in this process"] * choice.triton
    return ", else ".join(ways)


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

    The first launch of a variant on a device loads it, and may compile it: neither can be done while a CUDA graph is being
    captured, so run once before.

    Args:
        kernel: `file.function` in kernels/gpu.
        grid: programs along one to three axes.
        arguments: the arguments that are not constants, in the kernel's order; tensors are on one device. A pointer that
            the constants say is not used is given any tensor.
        constants: the constexpr arguments, which stand last in the kernel.
        num_warps: warps of a program.
        num_stages: stages of software pipelining.
        fp_fusion: whether a product and a sum may become one fused operation, rounded once.

    Raises:
        RuntimeError: on a GPU, no cubin fits and Triton is not to be had; or the driver refuses the launch.
    """
    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    interpreted = device.type not in ("meta", "cuda")
    constants = {**constants, "DEPENDENT": not interpreted and dependent(architecture(device))}
    if device.type == "meta":
        if _recording.variants is not None:
            variant = Variant.of(kernel, arguments, constants, num_warps, num_stages, fp_fusion=fp_fusion)
            _recording.variants[variant] = None
            if _recording.launches is not None:
                _recording.launches.append(Launch(variant, grid, tuple(arguments)))
        return
    if interpreted:
        function(kernel)[grid](*arguments, **constants, num_warps=num_warps)
        return
    _on_gpu(device, kernel, grid, arguments, constants, num_warps, num_stages, fp_fusion=fp_fusion)


def _on_gpu(
    device: torch.device,
    kernel: str,
    grid: tuple[int, ...],
    arguments: Sequence[Argument],
    constants: Mapping[str, Constant],
    num_warps: int,
    num_stages: int,
    *,
    fp_fusion: bool,
) -> None:
    if 0 in grid:
        return
    if device.index == torch.cuda.current_device():
        _launch(device, kernel, grid, arguments, constants, num_warps, num_stages, fp_fusion=fp_fusion)
    else:
        with torch.cuda.device(device):
            _launch(device, kernel, grid, arguments, constants, num_warps, num_stages, fp_fusion=fp_fusion)


def _launch(
    device: torch.device,
    kernel: str,
    grid: tuple[int, ...],
    arguments: Sequence[Argument],
    constants: Mapping[str, Constant],
    num_warps: int,
    num_stages: int,
    *,
    fp_fusion: bool,
) -> None:
    """`_on_gpu`, on the current one."""
    values, kinds = _values_and_kinds(arguments)
    key = (kernel, device.index, num_warps, num_stages, fp_fusion, *constants.items(), *kinds)
    loaded = _store.loaded.get(key)
    if loaded is None:
        variant = Variant.of(kernel, arguments, constants, num_warps, num_stages, fp_fusion=fp_fusion)
        loaded = _store.loaded[key] = _load(variant, device)
    cuda_driver.driver().ensure_context(device.index)
    x, y, z = (*grid, 1, 1)[:3]
    loaded.launch((x, y, z), values, torch.cuda.current_stream(device).cuda_stream)


def _values_and_kinds(arguments: Sequence[Argument]) -> tuple[list[int | float], list[Any]]:
    """What the kernel is given; and what decides on the variant, told more quickly than by making one."""
    values: list[int | float] = []
    kinds: list[Any] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            address = argument.data_ptr()
            values.append(address)
            kinds.append((argument.dtype, address % 16 == 0))
        else:
            values.append(argument)
            kinds.append(None if isinstance(argument, float) else (-(2**31) <= argument < 2**31, argument % 16 == 0))
    return values, kinds


def _load(variant: Variant, device: torch.device) -> cuda_driver.Kernel:
    arch, choice = architecture(device), _choice()
    cubin = _store.find(variant, arch) if choice.cubins else None
    if cubin is None and choice.triton:
        cubin = aot.compile_variant(variant, arch)
    if cubin is None:
        raise RuntimeError(
            f"no kernel is compiled for {variant.kernel} {variant.types} {dict(variant.constants)} on sm_{arch}, and Triton is "
            f"not installed or {VARIABLE} excludes it: build the bundle for this GPU, install ldmrt[triton], or set "
            f"{VARIABLE}=reference"
        )
    driver = cuda_driver.driver()
    driver.ensure_context(device.index)
    return cuda_driver.Kernel(
        driver,
        cubin.code,
        cubin.symbol,
        variant.types,
        cubin.hidden,
        cubin.threads,
        cubin.shared,
        dependent=bool(dict(variant.constants).get("DEPENDENT")) and os.environ.get(OVERLAP) != "0",
    )


def dependent(arch: int) -> bool:
    """Whether kernels for an architecture may be put on the GPU before the one before them has ended (kernels/gpu/dependent.py)."""
    return arch >= _DEPENDENT


@cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return major * 10 + minor
