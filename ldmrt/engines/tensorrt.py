"""TensorRT and TensorRT for RTX: one interface, two libraries.

What differs between them is in the table `LIBRARIES`; who uses a library asks the table, never for its name.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch

from ldmrt.engines.gpu import Gpu
from ldmrt.errors import EngineMismatch

# The library's names of the dtypes that tensors of a plan may have.
DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

_log = logging.getLogger("ldmrt.tensorrt")

# What the library calls information is for those who look for a fault in it.
_LEVELS = {
    "INTERNAL_ERROR": logging.ERROR,
    "ERROR": logging.ERROR,
    "WARNING": logging.WARNING,
    "INFO": logging.DEBUG,
    "VERBOSE": logging.DEBUG - 5,
}


@dataclass(frozen=True)
class Library:
    """One of the two libraries.

    Attributes:
        kind: the engine kind that it runs.
        modules: names under which it is imported, the first that is there counts.
        extra: what `pip install 'ldmrt[...]'` brings it.
        least: the oldest version that is known to work, (major, minor).
        targets: the architectures it builds for whatever GPU is there, or None if it builds for the GPU at hand alone.
        compiles_at_run_time: whether a plan is finished on the GPU that runs it, and what was compiled there is worth keeping (its
            runtime cache). Such a library also captures CUDA graphs by itself, and knows which plans cannot be captured.
        plugins: whether a plan can hold kernels of others, made ahead of time.
    """

    kind: str
    modules: tuple[str, ...]
    extra: str
    least: tuple[int, int]
    targets: tuple[str, ...] | None
    compiles_at_run_time: bool
    plugins: bool = False

    def load(self) -> ModuleType:
        """Import the library.

        Raises:
            EngineMismatch: it is not installed, cannot be loaded, or is too old; says how to get it.
        """
        install = f"pip install 'ldmrt[{self.extra}]'"
        found = [name for name in self.modules if importlib.util.find_spec(name) is not None]
        if not found:
            raise EngineMismatch(f"engine {self.kind} needs {self.modules[0]}, which is not installed: {install}")
        try:
            module = importlib.import_module(found[0])
        except (ImportError, OSError, RuntimeError) as error:
            reason = str(error).strip().splitlines()
            raise EngineMismatch(
                f"engine {self.kind}: {found[0]} cannot be loaded ({reason[0][:160] if reason else type(error).__name__}); "
                f"install it again: {install}"
            ) from error
        version = str(module.__version__)
        if tuple(int(part) for part in version.split(".")[:2]) < self.least:
            least = ".".join(map(str, self.least))
            raise EngineMismatch(
                f"engine {self.kind} needs {found[0]} {least} or later, {version} is installed: {install}"
            )
        return module

    def load_plugins(self) -> ModuleType:
        """Import the library's module for kernels of others.

        Raises:
            EngineMismatch: the library has none, cannot be used here, or was installed without it.
        """
        if not self.plugins:
            able = ", ".join(library.kind for library in LIBRARIES.values() if library.plugins)
            raise EngineMismatch(f"engine {self.kind} takes no plugins; use --engine {able}, or leave --plugins out")
        self.load()
        try:
            return importlib.import_module(f"{self.modules[0]}.plugin")
        except ImportError as error:
            raise EngineMismatch(
                f"engine {self.kind}: {self.modules[0]}.plugin cannot be loaded ({' '.join(str(error).split())[:160]}); "
                f"install it again: pip install 'ldmrt[{self.extra}]', or leave --plugins out"
            ) from error

    @property
    def rebuild(self) -> str:
        """What cures a plan that does not fit."""
        return f"build it again with `ldmrt build-engines MODEL --out DIR --engine {self.kind}`"


# TensorRT for RTX finishes a plan on the GPU that runs it, so it needs none to build one. It has none of the
# data centre's (sm_90, sm_100), and for Turing's (sm_75) its builder fails on networks as large as a U-Net.
LIBRARIES = {
    library.kind: library
    for library in (
        Library("tensorrt", ("tensorrt",), "tensorrt", (10, 13), None, compiles_at_run_time=False, plugins=True),
        Library(
            "tensorrt-rtx",
            ("tensorrt_rtx_bindings", "tensorrt_rtx"),
            "tensorrt-rtx",
            (1, 4),
            ("sm_80", "sm_86", "sm_89", "sm_120", "sm_121"),
            compiles_at_run_time=True,
        ),
    )
}


@cache
def log(library: Library) -> Any:
    """The one `ILogger` of a library in this process. It logs to `ldmrt.tensorrt`, and keeps the first error for `first_error`.

    Raises:
        EngineMismatch: the library cannot be used here.
    """

    class Log(library.load().ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self._first = ""

        def log(self, severity: Any, msg: str) -> None:
            level = _LEVELS[severity.name]
            if level >= logging.ERROR:
                self._first = self._first or " ".join(msg.split())[:300]
            _log.log(level, "%s", msg)

        def first_error(self) -> str:
            """The first error since this was last asked, or nothing; those behind it are its consequences."""
            first, self._first = self._first, ""
            return first

    return Log()


@cache
def runtime(library: Library) -> Any:
    """The one `Runtime` of a library in this process.

    Raises:
        EngineMismatch: the library cannot be used here.
    """
    return library.load().Runtime(log(library))


def check(
    label: str, library: Library, targets: Sequence[str], versions: Mapping[str, str], architecture: str | None
) -> None:
    """Check that a plan can run here, before it is read.

    Args:
        label: how to call it in a message.
        library: what runs it.
        targets: the GPU architectures that it was built for, such as `sm_89`.
        versions: of the libraries that made it.
        architecture: of the GPU that is to run it, or None for a CPU.

    Raises:
        EngineMismatch: there is no GPU or another one, or another version of the library, or none.
    """
    built_for = ", ".join(targets)
    if architecture is None:
        raise EngineMismatch(f"{label} was built for GPUs ({built_for}), the device is a CPU: use --engine torch")
    if architecture not in targets:
        possible = library.targets is None or architecture in library.targets
        cure = f"{library.rebuild[:-1]} --target {architecture}`" if possible else "use --engine torch"
        raise EngineMismatch(f"{label} was built for {built_for}, {gpu_here(architecture)}: {cure}")
    found, built = str(library.load().__version__), versions.get(library.kind, "unknown")
    if found != built:
        raise EngineMismatch(
            f"{label} was built with {library.kind} {built}, {found} is installed, and a plan runs with its own version alone: "
            f"{library.rebuild}, or install {built}"
        )


def gpu_at_hand() -> str | None:
    """The architecture of the GPU here, such as `sm_89`, or None."""
    return Gpu(torch.device("cuda")).architecture if torch.cuda.is_available() else None


def gpu_here(architecture: str | None) -> str:
    """How to say which GPU is here, in a message."""
    return f"the GPU here is {architecture}" if architecture else "there is no GPU here"
