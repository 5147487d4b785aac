"""The weights that engines read, at addresses that stay, and what is made of them once.

Engines of several batch sizes share one `Parameters`, and so do their packed forms: the query, key and value projections of a
layer as one matrix, convolution weights in channels-last order. A change of weights is written in place, into the tensors and into
what was made of them, so that a captured CUDA graph stays valid.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldmrt.engines.protocol import TensorSpec
from ldmrt.errors import EngineMismatch

Load = Callable[[TensorSpec], Tensor | None]
Release = Callable[[TensorSpec], None]
Make = Callable[[Mapping[str, Tensor]], Tensor]
Adjust = Callable[[Tensor], Tensor]
Changed = Callable[["Parameters", Collection[str]], None]


@dataclass(frozen=True)
class _Derived:
    """A tensor made of weights: kept, with what it takes to make it again."""

    value: Tensor
    make: Make
    reads: tuple[TensorSpec, ...]


class Parameters:
    """Weights on one device.

    Attributes:
        device: where they are.
        generation: counts the changes; what was computed from the weights at another generation is stale.

    Args:
        load: gives a weight's tensor by its name, in the dtype asked for, on the device; None if there is none. Called once for
            each weight that engines read as it is, and each time for one that only packed forms are made of.
        device: where the engines run.
        release: gives back the memory behind a tensor that `load` gave, which is then not used again; None if there is none to give.
    """

    def __init__(self, load: Load, device: torch.device, release: Release | None = None) -> None:
        self.device = device
        self.generation = 0
        self._load, self._release = load, release
        self._held: dict[tuple[str, torch.dtype], Tensor] = {}
        self._derived: dict[str, _Derived] = {}
        self._specs: dict[str, TensorSpec] = {}
        self._originals: dict[str, Tensor] = {}
        self._changed: dict[str, Tensor] = {}
        self._adjustments: dict[str, Adjust] = {}
        self._followers: list[Changed] = []

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], device: torch.device) -> Parameters:
        """Over tensors that are in memory, on the device."""
        return cls(lambda spec: tensors.get(spec.name), device)

    def follow(self, changed: Changed) -> None:
        """Have `changed(self, names)` called after each change, and now if there has been one: for who keeps weights of its own."""
        self._followers.append(changed)
        names = self._changed.keys() | self._adjustments.keys()
        if names:
            changed(self, names)

    def declare(self, specs: Mapping[str, TensorSpec]) -> None:
        """Make an engine's weights known, as what `update` may change."""
        self._specs.update(specs)

    def tensor(self, spec: TensorSpec) -> Tensor:
        """A weight, the same tensor each time.

        Raises:
            EngineMismatch: it is missing, or has another shape or dtype than asked for.
        """
        key = spec.name, spec.dtype
        if key not in self._held:
            self._held[key] = self.present(spec)
        return self._held[key]

    def derived(self, key: str, reads: Sequence[TensorSpec], make: Make) -> Tensor:
        """What `make` makes of some weights, once for all that ask with the same key.

        Args:
            key: says what is made of what: equal keys, equal tensors.
            reads: the weights it reads.
            make: from the weights by name to the tensor; called again after a change.

        Raises:
            EngineMismatch: as for `tensor`.
        """
        if key not in self._derived:
            with torch.inference_mode():
                tensors = self._gather(reads)
                value = make(tensors)
            self._derived[key] = _Derived(value, make, tuple(reads))
            self._let_go(value, reads, tensors)
        return self._derived[key].value

    @property
    def nbytes(self) -> int:
        """Bytes of all that is held: weights, and what was made of them; what lies in the same place counts once."""
        found: dict[Any, int] = {}
        for tensor in (*self._held.values(), *(derived.value for derived in self._derived.values())):
            # An opaque tensor has no storage that could be asked for, and shares none.
            place = id(tensor) if tensor.is_mkldnn else (tensor.untyped_storage()._cdata, tensor.storage_offset())
            found[place] = max(found.get(place, 0), tensor.numel() * tensor.element_size())
        return sum(found.values())

    def unload(self) -> None:
        """Let go of everything that is held; no engine may use it any more. The next engine has it made again, with the changes and
        adjustments that were made.
        """
        self._held.clear()
        self._derived.clear()

    @torch.inference_mode()
    def update(self, changes: Mapping[str, Tensor]) -> None:
        """Put other values in the place of some weights.

        Args:
            changes: by name; of any floating dtype, on any device. Other weights keep the values they have.

        Raises:
            EngineMismatch: no engine reads a weight of that name, or it has another shape. Nothing is changed then.
        """
        for name, value in changes.items():
            spec = self._specs.get(name)
            if spec is None:
                raise EngineMismatch(f"there is no weight {name!r} to change: no engine that is loaded reads one")
            if tuple(value.shape) != spec.shape:
                raise EngineMismatch(f"weight {name!r} is {tuple(value.shape)}, expected {spec.shape}")
        self._keep(changes)
        self._changed |= changes
        self._rewrite(set(changes))

    @torch.inference_mode()
    def restore(self) -> None:
        """Take back every `update`: weights have the values they were loaded with, to the bit, and their adjustments."""
        names = set(self._changed)
        self._changed = {}
        self._rewrite(names)

    @torch.inference_mode()
    def adjust(self, adjustments: Mapping[str, Adjust | None]) -> None:
        """Put functions of some weights in their place, as for a LoRA.

        Args:
            adjustments: by name: from the weight, on the device, as it was loaded or as `update` left it, to what engines are to read,
                of the same shape and any floating dtype, rounded once. It replaces the one before; None takes it away, after which
                the weight is as it was, to the bit. A weight that no engine reads may be named.
        """
        self._keep(adjustments)
        for name, adjustment in adjustments.items():
            if adjustment is None:
                self._adjustments.pop(name, None)
            else:
                self._adjustments[name] = adjustment
        self._rewrite(set(adjustments))

    def _keep(self, names: Iterable[str]) -> None:
        """Keep the first values of weights that are about to be written over."""
        for name in names:
            if name in self._specs and name not in self._changed and name not in self._adjustments:
                self._originals[name] = self.present(self._specs[name]).clone()

    def _rewrite(self, names: set[str]) -> None:
        """Write the present values of some weights into all that is held or was made of them."""
        if not names:
            return
        for (name, dtype), held in self._held.items():
            if name in names:
                held.copy_(self._value(TensorSpec(name, tuple(held.shape), dtype)))
        for derived in self._derived.values():
            if any(spec.name in names for spec in derived.reads):
                derived.value.copy_(derived.make(self._gather(derived.reads)))
        for name in names - self._changed.keys() - self._adjustments.keys():
            self._originals.pop(name, None)
        self.generation += 1
        for changed in self._followers:
            changed(self, names)

    def _let_go(self, value: Tensor, reads: Sequence[TensorSpec], tensors: Mapping[str, Tensor]) -> None:
        """Give back the memory of weights that were read to make a value of them, unless something is still in it."""
        if self._release is None or self._changed or self._adjustments:
            return
        for spec in reads:
            held = (spec.name, spec.dtype) in self._held
            if not held and not _shared(value, tensors[spec.name]):
                self._release(spec)

    def _gather(self, reads: Sequence[TensorSpec]) -> dict[str, Tensor]:
        return {spec.name: self.present(spec) for spec in reads}

    def present(self, spec: TensorSpec) -> Tensor:
        """A weight's present value. Unlike that of `tensor` it is not kept for whoever asks again.

        Raises:
            EngineMismatch: as for `tensor`.
        """
        held = self._held.get((spec.name, spec.dtype))
        return self._value(spec) if held is None else held

    def _value(self, spec: TensorSpec) -> Tensor:
        """What a weight is to be."""
        base = self._changed.get(spec.name, self._originals.get(spec.name))
        if base is None:
            base = fitting("weight", spec, self._load(spec))
        adjustment = self._adjustments.get(spec.name)
        value = base.to(self.device)
        return (value if adjustment is None else adjustment(value)).to(spec.dtype)


def _shared(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors may lie in the same memory."""
    if a.is_mkldnn:  # an opaque one has memory of its own
        return False
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def fitting(
    what: str, spec: TensorSpec, tensor: Tensor | None, sizes: dict[str, int] | None = None, *, where: str = ""
) -> Tensor:
    """The tensor, if it is what a graph was made for.

    Args:
        what: `weight`, `input` or `buffer`.
        spec: what is expected.
        tensor: what is there.
        sizes: the sizes of the free dimensions met so far; added to. Without it a free dimension fits any size.
        where: what to say first in an error.

    Raises:
        EngineMismatch: it is missing, or has another shape or dtype.
    """
    where = f"{where}: " if where else ""
    if tensor is None:
        raise EngineMismatch(f"{where}{what} {spec.name!r} is missing")
    fits = tensor.dtype == spec.dtype and tensor.dim() == len(spec.shape)
    if fits:
        for size, asked in zip(tensor.shape, spec.shape, strict=True):
            expected = asked if isinstance(asked, int) else size if sizes is None else sizes.setdefault(asked, size)
            fits = fits and size == expected
    if not fits:
        found = f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
        expected_form = f"{tuple(spec.shape)} {str(spec.dtype).removeprefix('torch.')}"
        raise EngineMismatch(f"{where}{what} {spec.name!r} is {found}, expected {expected_form}")
    return tensor
