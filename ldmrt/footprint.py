"""How much memory an engine needs, told without running it: its operators are called on the meta device, where tensors have a size
and no contents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ldmrt.graph import Graph
from ldmrt.kernels import launch
from ldmrt.parameters import Parameters
from ldmrt.rehearsal import rehearse


@dataclass(frozen=True)
class Footprint:
    """What a run of an engine needs besides weights and inputs.

    Attributes:
        activations: the most bytes that are in use at one time, outputs included.
        outputs: bytes of the outputs.
    """

    activations: int
    outputs: int


def footprint(graph: Graph, sizes: Mapping[str, int], parameters: Parameters, device: torch.device) -> Footprint:
    """Count what a run of a graph's torch engine needs. What libraries take inside an operator is not seen.

    Args:
        graph: the engine's graph.
        sizes: of the free dimensions by name.
        parameters: on the meta device (`ldmrt.rehearsal.weightless`); its `nbytes` grows by the weights that the engine reads.
        device: where the engine is to run.
    """
    memory = _Memory()
    with launch.recording(launch.architecture(device)):
        made = rehearse(graph, sizes, parameters, memory)
    return Footprint(memory.most, sum({_key(tensor): tensor.nbytes for tensor in made.values()}.values()))


class _Memory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that operators make, as long as something refers to them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}  # type: ignore[no-untyped-call]
        given = {_key(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)}
        for tensor in tree_leaves(result):
            # A view of a weight or an input is nothing new.
            if isinstance(tensor, torch.Tensor) and _key(tensor) not in given:
                storage = tensor.untyped_storage()
                self._alive[_key(tensor)] = StorageWeakRef(storage), storage.nbytes()  # type: ignore[no-untyped-call]
        self.most = max(self.most, sum(nbytes for _, nbytes in self._alive.values()))
        return result


def _key(tensor: torch.Tensor) -> int:
    """What tells one storage from another on the meta device, where none has an address."""
    return int(tensor.untyped_storage()._cdata)
