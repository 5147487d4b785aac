"""TensorRT and TensorRT for RTX: one interface, two libraries.

What differs between them is in the table `LIBRARIES`; who uses a library asks the table, never for its name.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from types import ModuleType

import torch

from ldmrt.errors import EngineMismatch


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
            runtime cache).
    """

    kind: str
    modules: tuple[str, ...]
    extra: str
    least: tuple[int, int]
    targets: tuple[str, ...] | None
    compiles_at_run_time: bool

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


# TensorRT for RTX finishes a plan on the GPU that runs it, so it needs none to build one. It has none of the
# data centre's (sm_90, sm_100), and for Turing's (sm_75) its builder fails on networks as large as a U-Net.
LIBRARIES = {
    library.kind: library
    for library in (
        Library("tensorrt", ("tensorrt",), "tensorrt", (10, 13), None, compiles_at_run_time=False),
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


def gpu_at_hand() -> str | None:
    """The architecture of the GPU here, such as `sm_89`, or None."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"
