"""A Triton kernel compiled for one kind of arguments, as a value: what to compile, and the key under which it is found."""

from __future__ import annotations

import ast
import hashlib
import importlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

Constant = int | float | bool | str
Argument = Tensor | int | float

TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
    torch.uint8: "*u8",
}

_PACKAGE = "ldmrt.kernels.gpu"
_KERNEL = re.compile(r"[a-z][a-z0-9_]*\.[a-z_][a-z0-9_]*", re.ASCII)


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

    def key(self, source: str | None = None) -> str:
        """A hash of the fields and of the kernel's source, so that what an edited kernel needs is not found in its old form.

        Args:
            source: the source's hash; None takes that of the installed one.
        """
        fields = {**asdict(self), "source": source or source_hash(self.kernel)}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:32]


def source_hash(kernel: str) -> str:
    """The hash of a kernel's file in kernels/gpu and of the files there that it imports. Triton is not needed for it.

    Raises:
        ValueError: there is no such file.
    """
    if _KERNEL.fullmatch(kernel) is None:
        raise ValueError(f"kernel {kernel[:80]!r} is not a name like file.function")
    return _hash(kernel.split(".", maxsplit=1)[0])


def function(kernel: str) -> Any:
    """The kernel itself, `@triton.jit`; this imports triton."""
    file, name = kernel.split(".")
    return getattr(importlib.import_module(f"{_PACKAGE}.{file}"), name)


@cache
def _hash(file: str) -> str:
    sources: dict[str, str] = {}
    missing = [file]
    while missing:
        name = missing.pop()
        if name in sources:
            continue
        path = files("ldmrt.kernels") / "gpu" / f"{name}.py"
        if not path.is_file():
            raise ValueError(f"there is no kernels/gpu/{name}.py in this version of ldmrt")
        sources[name] = path.read_text(encoding="utf-8")
        missing += _imported(sources[name])
    return hashlib.sha256(json.dumps(sources, sort_keys=True).encode()).hexdigest()


def _imported(source: str) -> Iterator[str]:
    """The files of kernels/gpu that a file there imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == _PACKAGE:
            modules = [f"{_PACKAGE}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        else:
            continue
        yield from (name.removeprefix(f"{_PACKAGE}.") for name in modules if name.startswith(f"{_PACKAGE}."))


def _type(argument: Argument) -> str:
    if isinstance(argument, Tensor):
        return TYPES[argument.dtype]
    return "fp32" if isinstance(argument, float) else "i32" if -(2**31) <= argument < 2**31 else "i64"


def _aligned(argument: Argument) -> bool:
    if isinstance(argument, Tensor):
        # A meta tensor has no address, but its storage is taken to be aligned, as every allocator's is.
        meta = argument.device.type == "meta"
        return (argument.storage_offset() * argument.itemsize if meta else argument.data_ptr()) % 16 == 0
    return isinstance(argument, int) and argument % 16 == 0
