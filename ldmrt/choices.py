"""The kernels that were fastest on this machine's GPU (`ldmrt tune`), in its cache folder: never in a bundle, which may travel.

There is one file for each kind of GPU. It says on what it was measured, and counts only there: with another driver, torch,
Triton or kernel source, other choices may be the fastest. What is not a candidate of this version is not taken from it, so that no file
can make a kernel of its own.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.metadata
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ldmrt.config import cache_folder
from ldmrt.files import replacing
from ldmrt.kernels import (
    add_group_norm,
    convolution,
    cuda_driver,
    geglu,
    group_norm,
    launch,
    layer_norm,
    linear_geglu,
    tuning,
    upsample,
)
from ldmrt.kernels.configurations import ATTENTION
from ldmrt.kernels.variant import source_hash

FORMAT = 1
OPERATORS: dict[str, tuning.Operator[Any, Any]] = {
    operator.name: operator
    for operator in (
        ATTENTION,
        add_group_norm.OPERATOR,
        convolution.OPERATOR,
        geglu.OPERATOR,
        group_norm.OPERATOR,
        layer_norm.OPERATOR,
        linear_geglu.OPERATOR,
        upsample.OPERATOR,
    )
}

_LARGEST = 16 << 20  # bytes of a file that is read: hundreds of times what a bundle has
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
_SIZES = range(1, 1 << 31)

_log = logging.getLogger(__name__)


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class Machine(_Record):
    """What a measurement holds for.

    Attributes:
        gpu: the GPU's name.
        capability: its compute capability, such as 89.
        driver: the driver's version.
        torch: torch's.
        triton: Triton's; None where kernels cannot be compiled, and only those in bundles and torch's own were measured.
        kernels: by operator, the hash of the kernels' source.
    """

    gpu: str
    capability: int
    driver: str
    torch: str
    triton: str | None
    kernels: dict[str, str]


class Entry(_Record):
    """What was found for a problem.

    Attributes:
        operator: the operator's name.
        problem: the fields of its problem.
        choice: the fields of what is to compute it.
        default_us: microseconds of the default; None if it cannot be launched.
        us: microseconds of the choice.
    """

    operator: str
    problem: dict[str, bool | int | str]
    choice: dict[str, Any]
    default_us: Annotated[float, Field(ge=0)] | None
    us: float = Field(ge=0)


class _File(_Record):
    format: int
    machine: Machine
    entries: tuple[Entry, ...]


def folder(environ: Mapping[str, str]) -> Path:
    """Where the files lie.

    Raises:
        RuntimeError: the environment names no cache, and there is no home folder.
    """
    return cache_folder(environ) / "kernels"


def file(place: Path, machine: Machine) -> Path:
    """The file of a kind of GPU in the folder."""
    return place / f"{re.sub('[^a-z0-9]+', '-', machine.gpu.lower()).strip('-') or 'gpu'}.json"


def machine_with(device: torch.device) -> Machine:
    """The machine, with one of its CUDA devices."""
    compiles = launch.choose(os.environ).triton
    return Machine(
        gpu=torch.cuda.get_device_name(device),
        capability=launch.architecture(device),
        driver=_driver_version(),
        torch=torch.__version__,
        triton=_triton_version() if compiles else None,
        kernels={name: source_hash(operator.source) for name, operator in OPERATORS.items()},
    )


def apply(device: torch.device) -> None:
    """Let what was measured on a CUDA device count in this process, if anything was; warn of a file that cannot be used.

    Choices hold for an architecture. Where a process uses different GPUs of one, those of the device applied last count for all.
    """
    if launch.choose(os.environ).why_not is None:
        try:
            place = folder(os.environ)
        except RuntimeError:
            return
        load(place, machine_with(device))


def load(place: Path, machine: Machine) -> int:
    """`apply` the file of a machine in a folder. Returns how many choices it has."""
    path = file(place, machine)
    try:
        entries = read(path, machine)
        found = [_decoded(entry, machine.capability) for entry in entries]
    except FileNotFoundError:
        return 0
    except (OSError, ValueError) as error:
        _log.warning("%s is not used, %s: run `ldmrt tune` again, or remove it", path, " ".join(str(error).split()))
        return 0
    for operator, problem, choice in found:
        tuning.override(operator, machine.capability, problem, choice)
    return len(found)


def keep(place: Path, machine: Machine, entries: Iterable[Entry]) -> Path:
    """Put choices into the file of a machine; those that it has for other problems stay, if they still count.

    Returns:
        The file.

    Raises:
        OSError: it cannot be written.
    """
    path = file(place, machine)
    try:
        there = read(path, machine)
    except (OSError, ValueError):
        there = []
    merged = {_problem_key(entry): entry for entry in (*there, *entries)}
    content = _File(format=FORMAT, machine=machine, entries=tuple(merged[key] for key in sorted(merged)))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as out:
        out.write((json.dumps(content.model_dump(mode="json"), indent=1) + "\n").encode())
    return path


def read(path: Path, machine: Machine) -> list[Entry]:
    """The entries of a file.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be read.
        ValueError: it is damaged, or of another machine.
    """
    if path.exists() and not path.is_file():
        raise ValueError("it is not a regular file")
    if path.stat().st_size > _LARGEST:
        raise ValueError(f"it has {path.stat().st_size} bytes, expected at most {_LARGEST}")
    try:
        found = _File.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"it is damaged ({'.'.join(map(str, first['loc']))}: {first['msg'][:120]})") from None
    if found.format != FORMAT:
        raise ValueError(f"it has format {found.format}, expected {FORMAT}")
    for field in Machine.model_fields:
        was, now = getattr(found.machine, field), getattr(machine, field)
        if was != now:
            names = "other sources" if field == "kernels" else f"{field} {was}, and this is {now}"
            raise ValueError(f"it was measured with {names}")
    return list(found.entries)


def entry(operator: str, problem: Any, choice: Any, default_seconds: float | None, seconds: float) -> Entry:
    """What is kept of a measurement."""
    return Entry(
        operator=operator,
        problem=encoded(problem),
        choice=encoded(choice),
        default_us=None if default_seconds is None else round(1e6 * default_seconds, 3),
        us=round(1e6 * seconds, 3),
    )


def encoded(value: Any) -> Any:
    """A problem or a choice in terms of JSON."""
    if dataclasses.is_dataclass(value):
        return {field.name: encoded(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if hasattr(value, "_asdict"):
        return {name: encoded(item) for name, item in value._asdict().items()}
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def _decoded(entry: Entry, arch: int) -> tuple[str, Any, Any]:
    """The operator's name, the problem and the choice.

    Raises:
        ValueError: this version has no such operator, or no such problem or candidate of it.
    """
    operator = OPERATORS.get(entry.operator)
    if operator is None:
        raise ValueError(f"there is no operator {entry.operator[:80]!r}")
    problem = _problem(operator.problem, entry.problem)
    try:
        candidates = operator.candidates(arch, problem)
    except (ValueError, ArithmeticError) as error:
        raise ValueError(f"{operator.name} has no problem {entry.problem}: {error}") from None
    for choice in candidates:
        if encoded(choice) == entry.choice:
            return operator.name, problem, choice
    raise ValueError(f"{operator.name} has no choice {str(entry.choice)[:160]} for {entry.problem}")


def _problem(kind: type[Any], fields: Mapping[str, bool | int | str]) -> Any:
    hints = get_type_hints(kind)
    if fields.keys() != hints.keys():
        raise ValueError(f"a problem has the fields {sorted(fields)[:8]}, expected {sorted(hints)}")
    values: dict[str, Any] = {}
    for name, hint in hints.items():
        value = fields[name]
        if hint is torch.dtype and isinstance(value, str) and value in _DTYPES:
            values[name] = _DTYPES[value]
        elif (hint is bool and isinstance(value, bool)) or (hint is int and type(value) is int and value in _SIZES):
            values[name] = value
        else:
            raise ValueError(f"a problem's {name} is {str(value)[:80]!r}, expected a {hint}")
    return kind(**values)


def _problem_key(entry: Entry) -> tuple[str, str]:
    return entry.operator, json.dumps(entry.problem, sort_keys=True)


def _driver_version() -> str:
    """The release of NVIDIA's driver where the system tells it, else the CUDA version that it has."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    release = re.search(r"\b\d+\.\d+(\.\d+)?\b", text)
    if release is not None:
        return release[0]
    version = ctypes.c_int()
    try:
        cuda_driver.driver().call("cuDriverGetVersion", ctypes.byref(version))
    except cuda_driver.CudaError:
        return "unknown"
    return f"CUDA {version.value // 1000}.{version.value % 1000 // 10}"


def _triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # some builds of it have another name
        return "unknown"
