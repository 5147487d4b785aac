"""One operator as the suite knows it: the sizes it is called at, what it is compared with and what its work is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpu_suite.oracles import Body, Verdict

Size = tuple[int, ...]
EPS = 1e-5


@dataclass(frozen=True)
class Operator:
    """One operator.

    Attributes:
        name: as in a graph.
        body: the operator; it picks what computes it.
        also: other bodies that must be right wherever kernels can be launched.
        sizes: by a name that says where they come from; what they mean is up to `arguments`.
        timed: the names of those that are timed.
        tiny: sizes for the dry run.
        arguments: makes the arguments of a size.
        check: compares a body with the oracle.
        rivals: what torch has for the same arguments, by name.
        work: (floating-point operations, bytes) that a call needs at least, of its arguments.
    """

    name: str
    body: Body
    also: Mapping[str, Body]
    sizes: Mapping[str, Size]
    timed: tuple[str, ...]
    tiny: Mapping[str, Size]
    arguments: Callable[[Size, torch.dtype, torch.device], list[Any]]
    check: Callable[[Body, list[Any]], Verdict]
    rivals: Mapping[str, Body]
    work: Callable[[list[Any]], tuple[int, int]]


def random(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    """Normal numbers, the same for a seed and device; of no value on the meta device."""
    if device.type == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device).to(dtype)


def nbytes(*tensors: Tensor | None) -> int:
    """Bytes of those that are there."""
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors if tensor is not None)
