"""Finds and loads the native library, `libldmrt_cpu.so`, which holds the operators' C++ bodies for the CPU.

The library is optional: without it each operator runs its plain-torch reference. `why_not()` says what keeps it away. It has most
bodies several times, for different instruction sets, and uses the best one that the processor has; LDMRT_CPU_LEVEL names another. LDMRT_NATIVE=0 leaves the library
alone, and a full path there loads another build of it.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from functools import cache
from importlib.resources import as_file, files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, NamedTuple

import torch  # also brings the OpenMP runtime that the library then shares, with torch.set_num_threads
from torch import Tensor

FILE_NAME = "libldmrt_cpu.so"
ABI_VERSION = 4  # ldmrt_abi_version() in kernels/cpu/dispatch.cpp

# The numbers of `enum class Element` in kernels/cpu/dispatch.h.
ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# The instruction sets, in the order of `enum Level` in kernels/cpu/dispatch.cpp.
LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")
LEVEL_VARIABLE = "LDMRT_CPU_LEVEL"

_pointer, _int32, _int64, _float = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float
# What the bodies take, as in kernels/cpu/dispatch.cpp.
_ARGUMENTS: dict[str, list[Any]] = {
    "ldmrt_group_norm": [*[_pointer] * 8, _int32, *[_int64] * 6, _float, _int32, _int32],
    "ldmrt_layer_norm": [*[_pointer] * 7, _int32, _int64, _int64, _float],
    "ldmrt_geglu": [*[_pointer] * 3, _int32, _int64, _int64],
    "ldmrt_upsample": [*[_pointer] * 4, _int32, *[_int64] * 5],
    "ldmrt_attention": [*[_pointer] * 4, _int32, *[_int64] * 11, _float],
    "ldmrt_pack": [*[_pointer] * 2, *[_int64] * 2],
    "ldmrt_linear": [*[_pointer] * 4, *[_int64] * 4, _int32],
    "ldmrt_conv2d": [*[_pointer] * 3, *[_int64] * 8],
    "ldmrt_winograd_pack": [*[_pointer] * 2, *[_int64] * 3],
    "ldmrt_winograd": [*[_pointer] * 3, *[_int64] * 6],
    "ldmrt_sampler_step": [*[_pointer] * 5, _int32, *[_pointer] * 6, *[_int64] * 2],
}

VARIABLE = "LDMRT_NATIVE"
_ON = {"", "1", "true", "yes", "on"}
_OFF = {"0", "false", "no", "off"}


class Native(NamedTuple):
    """The outcome of looking for the library: exactly one of the two is None."""

    library: ctypes.CDLL | None
    why_not: str | None


def find(environ: Mapping[str, str], folder: Traversable) -> Native:
    """Load the library from `folder`, unless `environ` forbids it."""
    value = environ.get(VARIABLE, "").strip()
    if value.lower() in _OFF:
        return Native(None, f"{VARIABLE}={environ[VARIABLE]} switches it off")
    if Path(value).is_absolute():
        found = _open(value)
    elif value.lower() not in _ON:
        return Native(
            None,
            f"{VARIABLE}={environ[VARIABLE]!r} is neither 1, 0 nor a full path; unset it to use the native library",
        )
    else:
        resource = folder.joinpath(FILE_NAME)
        if not resource.is_file():
            return Native(None, f"{FILE_NAME} was not built; install ldmrt again on a machine with a C++ compiler")
        with as_file(resource) as path:
            found = _open(str(path))
    level = environ.get(LEVEL_VARIABLE, "").strip().lower()
    if found.library is None or not level:
        return found
    if level not in LEVELS:
        return Native(None, f"{LEVEL_VARIABLE}={environ[LEVEL_VARIABLE]!r} is none of {', '.join(LEVELS)}")
    if not found.library.ldmrt_use_level(LEVELS.index(level)):
        return Native(None, f"{LEVEL_VARIABLE}={level} asks for instructions that this processor has not; unset it")
    return found


def _open(path: str) -> Native:
    try:
        library = ctypes.CDLL(path)
        found = int(library.ldmrt_abi_version())
    except (OSError, AttributeError) as error:
        return Native(None, f"{path} cannot be loaded ({error}); install ldmrt again")
    if found != ABI_VERSION:
        return Native(None, f"{path} has ABI version {found}, expected {ABI_VERSION}; install ldmrt again")
    return Native(library, None)


@cache
def _native() -> Native:
    return find(os.environ, files("ldmrt.kernels"))


def library() -> ctypes.CDLL | None:
    """The loaded library, or None. Looked for once in a process."""
    return _native().library


def serves(x: Tensor) -> bool:
    """Whether a body of the library can compute on a tensor: it is on the CPU, of a dtype that the library knows."""
    return x.device.type == "cpu" and x.dtype in ELEMENTS and library() is not None


def takes_packed() -> bool:
    """Whether linear layers and convolutions of packed weights can be computed here (kernels/linear.py)."""
    found = library()
    return found is not None and bool(found.ldmrt_takes_packed())


def takes_winograd() -> bool:
    """Whether the bodies of this processor are wide enough for kernels/winograd.py to be ahead of oneDNN."""
    found = library()
    return found is not None and bool(found.ldmrt_takes_winograd())


def run(name: str, *arguments: Tensor | float | None) -> None:
    """Call a body. Nothing is checked here: tensors must lie as the body takes them, and on the CPU.

    Args:
        name: the symbol.
        arguments: tensors, as pointers; None for a null pointer; numbers.
    """
    _function(name)(*[each.data_ptr() if isinstance(each, Tensor) else each for each in arguments])


@cache
def _function(name: str) -> Any:
    function = getattr(library(), name)
    function.restype, function.argtypes = None, _ARGUMENTS[name]
    return function


def vector(values: Tensor | None) -> Tensor | None:
    """A vector in float32, side by side in memory, as the bodies take weights and biases."""
    if values is None or (values.dtype == torch.float32 and values.is_contiguous()):
        return values
    return values.float().contiguous()


def available() -> bool:
    return library() is not None


def why_not() -> str | None:
    """Why the native library is not used, or None when it is."""
    return _native().why_not
