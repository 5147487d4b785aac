"""A graph run without its weights and without a GPU: on the meta device, where every operator is called and nothing is computed."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ldmrt.engines.protocol import TensorSpec
from ldmrt.engines.torch import TorchEngine
from ldmrt.graph import Graph
from ldmrt.parameters import Parameters

_META = torch.device("meta")


def weightless() -> Parameters:
    """Weights without contents."""
    return Parameters(lambda spec: _empty(spec, {}), _META)


def rehearse(
    graph: Graph,
    sizes: Mapping[str, int],
    parameters: Parameters | None = None,
    watching: AbstractContextManager[object] | None = None,
) -> dict[str, torch.Tensor]:
    """Call the operators of a graph's torch engine in order, on tensors without contents.

    Args:
        graph: the engine's graph.
        sizes: of the free dimensions by name.
        parameters: `weightless`, for engines that share their weights; None for some of its own.
        watching: what is to see the calls of a run.

    Returns:
        The outputs.
    """
    with torch.inference_mode(), _Convolutions():  # type: ignore[no-untyped-call]
        engine = TorchEngine(graph, parameters or weightless(), _META)
        inputs = {spec.name: _empty(spec, sizes) for spec in graph.inputs}
        with watching or nullcontext():
            return engine.run(inputs)


class _Convolutions(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Convolutions give channels-last pictures for channels-last pictures, as cuDNN's do; torch's own on meta do not."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.convolution.default, torch.ops.aten.conv2d.default):
            picture = args[0]
            if picture.dim() == 4 and picture.is_contiguous(memory_format=torch.channels_last):
                return torch.empty_like(result, memory_format=torch.channels_last)
        return result


def _empty(spec: TensorSpec, sizes: Mapping[str, int]) -> torch.Tensor:
    shape = [sizes[size] if isinstance(size, str) else size for size in spec.shape]
    return torch.empty(shape, dtype=spec.dtype, device=_META)
