"""What an operator is configured by: its default for a problem, unless something else has been chosen for it in this process.

Each operator that has more than one way to compute a problem declares an `Operator`, and asks it before every launch. `override`
is how a measurement counts (`ldmrt tune` keeps measurements in a cache of the machine, which a pipeline reads); `recording` says
what was asked, which is how it is known what there is to measure.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

P = TypeVar("P", bound=Hashable)
C = TypeVar("C", bound=Hashable)

# Elements. Pointers are aligned to 16 bytes or not, so that an offset matters only up to this.
_ALIGNMENT = 16


class Form(NamedTuple):
    """What of a tensor decides on speed.

    Attributes:
        shape: its sizes.
        strides: in elements.
        offset: of its first element in the storage, modulo 16.
        dtype: of its elements.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @staticmethod
    def of(tensor: Tensor) -> Form:
        """A tensor's."""
        return Form(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()) % _ALIGNMENT, tensor.dtype)


class Call(NamedTuple):
    """What an operator was asked to compute.

    Attributes:
        operator: its name.
        problem: what it is tuned by.
        arguments: what it was called with, tensors as their `Form`.
    """

    operator: str
    problem: Any
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Operator(Generic[P, C]):
    """An operator with a choice of configurations.

    Attributes:
        name: as in `torch.ops.ldmrt`.
        problem: the type of its problems, a dataclass of whole numbers, truth values and dtypes.
        candidates: the choices worth measuring on an architecture, such as 89; the first is the default.
        source: one of its kernels, `file.function`: in whose source the choices are realised.
        launches: whether a choice is one of our kernels; torch's own need neither Triton nor a cubin.
    """

    name: str
    problem: type[P]
    candidates: Callable[[int, P], Sequence[C]]
    source: str
    launches: Callable[[C], bool] = lambda choice: True

    def choose(self, arch: int, problem: P, arguments: Sequence[Any] | None = None) -> C:
        """What is to compute a problem: what `override` says, else the default.

        Args:
            arch: the compute capability, such as 89.
            problem: what is to be computed.
            arguments: those of the call, in the operator's order, for `recording`; None if the call is another's part.
        """
        if _recording.calls is not None and arguments is not None:
            forms = (Form.of(argument) if isinstance(argument, Tensor) else argument for argument in arguments)
            _recording.calls.append(Call(self.name, problem, tuple(forms)))
        chosen: C | None = _choices.get((self.name, arch, problem))
        return self.candidates(arch, problem)[0] if chosen is None else chosen


class _Recording(threading.local):
    calls: list[Call] | None = None


_recording = _Recording()
_lock = threading.Lock()
_choices: dict[tuple[str, int, Hashable], Any] = {}


def override(operator: str, arch: int, problem: Hashable, choice: Hashable) -> None:
    """From now on, in this process, this computes the problem on GPUs of the architecture. It counts for launches after it.

    Args:
        operator: its name.
        arch: the compute capability, such as 89.
        problem: as the operator asks for it.
        choice: of the operator's kind.
    """
    with _lock:
        _choices[operator, arch, problem] = choice


def clear() -> None:
    """Forget every `override`."""
    with _lock:
        _choices.clear()


@contextmanager
def trying(operator: str, arch: int, problem: Hashable, choice: Hashable) -> Iterator[None]:
    """`override` for as long as the context lasts."""
    key = operator, arch, problem
    with _lock:
        before = _choices.get(key)
        _choices[key] = choice
    try:
        yield
    finally:
        with _lock:
            del _choices[key]
            if before is not None:
                _choices[key] = before


@contextmanager
def recording() -> Iterator[list[Call]]:
    """Collect what operators are asked for in this thread, in order, each as often as it is."""
    before = _recording.calls
    calls: list[Call] = []
    _recording.calls = calls
    try:
        yield calls
    finally:
        _recording.calls = before
