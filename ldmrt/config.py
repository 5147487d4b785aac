"""What the environment may set, but for LDMRT_NATIVE, which the kernels read themselves. A command line flag wins over it."""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ldmrt.errors import BadRequest

# A thread of GNU OpenMP, which torch brings, spins for about a millisecond while it waits for another, by default. On a machine with other
# work that is the time in which the other would have run: benchmarks/busy_cores.py.
THREADS: Final = {"GOMP_SPINCOUNT": "1000"}


@dataclass(frozen=True)
class Config:
    """The settings of a process.

    Attributes:
        cache: the folder for what can be made again. LDMRT_CACHE; by default `ldmrt` in $XDG_CACHE_HOME or ~/.cache.
        device: "cpu", "cuda", "cuda:N", or "auto" for a GPU where there is one. LDMRT_DEVICE.
        threads: CPU threads for the model, 0 for torch's own choice. LDMRT_THREADS.
    """

    cache: Path
    device: str = "auto"
    threads: int = 0


def share_cores(environ: MutableMapping[str, str]) -> None:
    """Let waiting threads make way for others, unless the user has said how they shall wait. Takes effect if torch is not loaded yet."""
    if not environ.keys() & {"OMP_WAIT_POLICY", *THREADS}:
        environ.update(THREADS)


def from_env(environ: Mapping[str, str]) -> Config:
    """Read the settings from `os.environ` or its like; a variable that is empty counts as not set.

    Raises:
        BadRequest: a value cannot be understood; the variable is named.
    """
    return Config(
        cache=cache_folder(environ),
        device=parse_device(environ.get("LDMRT_DEVICE") or "auto", param="LDMRT_DEVICE"),
        threads=_count(environ, "LDMRT_THREADS"),
    )


def parse_device(text: str, *, param: str = "device") -> str:
    """Check the name of a device, and return it in lower case.

    Raises:
        BadRequest: it is not auto, cpu, cuda or cuda:N.
    """
    device = text.strip().lower()
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device, re.ASCII):
        raise BadRequest(f"{param} is {text!r}, expected auto, cpu, cuda or cuda:N", param=param)
    return device


def cache_folder(environ: Mapping[str, str]) -> Path:
    """`Config.cache`, whatever else the environment says.

    Raises:
        RuntimeError: the environment names no folder, and there is no home.
    """
    if own := environ.get("LDMRT_CACHE"):
        return Path(own).expanduser().absolute()
    base = Path(environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # the XDG specification: a relative path is invalid, and to be ignored
        base = Path(environ.get("HOME") or Path.home()) / ".cache"
    return base / "ldmrt"


def _count(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name) or "0"
    if not (text.isascii() and text.isdigit()):
        raise BadRequest(f"{name} is {text!r}, expected a whole number, 0 or more", param=name)
    return int(text)
