"""Finds and loads the native library, `libldmrt_cpu.so`, which holds the operators' C++ bodies for the CPU.

The library is optional: without it each operator runs its plain-torch reference. `why_not()` says what keeps it away.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from functools import cache
from importlib.resources import as_file, files
from importlib.resources.abc import Traversable
from typing import NamedTuple

import torch  # also brings the OpenMP runtime that the library then shares, with torch.set_num_threads

FILE_NAME = "libldmrt_cpu.so"
ABI_VERSION = 1  # ldmrt_abi_version() in kernels/cpu/dispatch.cpp

# The numbers of `enum class Element` in kernels/cpu/dispatch.h.
ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

VARIABLE = "LDMRT_NATIVE"
_ON = {"", "1", "true", "yes", "on"}
_OFF = {"0", "false", "no", "off"}


class Native(NamedTuple):
    """The outcome of looking for the library: exactly one of the two is None."""

    library: ctypes.CDLL | None
    why_not: str | None


def find(environ: Mapping[str, str], folder: Traversable) -> Native:
    """Load the library from `folder`, unless `environ` forbids it."""
    value = environ.get(VARIABLE, "").strip().lower()
    if value in _OFF:
        return Native(None, f"{VARIABLE}={environ[VARIABLE]} switches it off")
    if value not in _ON:
        return Native(None, f"{VARIABLE}={environ[VARIABLE]!r} is neither 1 nor 0; unset it to use the native library")
    resource = folder.joinpath(FILE_NAME)
    if not resource.is_file():
        return Native(None, f"{FILE_NAME} was not built; install ldmrt again on a machine with a C++ compiler")
    with as_file(resource) as path:
        return _open(str(path))


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


def available() -> bool:
    return library() is not None


def why_not() -> str | None:
    """Why the native library is not used, or None when it is."""
    return _native().why_not
