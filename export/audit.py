"""What the values of a component reach, and so which of them float16 does not hold.

The graph is run node by node on inputs that people give and on such as they hardly ever give: in float32, or in bfloat16 where the
CPU multiplies that, several times as fast; its range is the same, and its rounding nothing beside the margin. What counts is what a
node stores. The sums inside an operator are taken in float32 by the kernels of ldmrt and by the compilers for GPUs, whatever
they read and write. One value lies between: an attention that is not fused writes down its scores, so they are audited with it.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import torch

from ldmrt.engines.torch import call
from ldmrt.errors import BuildError
from ldmrt.export.options import has_native_bfloat16
from ldmrt.export.passes.pattern import argument
from ldmrt.export.passes.widen import in_dtype
from ldmrt.graph import Graph, Node, specialize
from ldmrt.verify import Trial

LARGEST: Final = torch.finfo(torch.float16).max
# The audit sees a few inputs of all that there are; what comes within a factor of two of the end is not trusted to stay there.
MARGIN: Final = 2.0

_ATTENTION = "aten.scaled_dot_product_attention.default"

Load = Callable[[str], torch.Tensor]


def audit(graph: Graph, load: Load, trials: Sequence[Trial]) -> dict[str, float]:
    """The largest finite magnitude of every float16 value that depends on an input or a weight.

    What depends on neither, such as a mask, was made for the precision by the model itself. Of an operator that gives a
    list, the tensors in it are audited.

    Args:
        graph: the component, in float16. Its dimensions may be free.
        load: a weight in float32, by its name in the graph. Each is in memory only while a node reads it.
        trials: the inputs, in float32.

    Raises:
        BuildError: float16 does not hold a weight.
    """
    # In step with each other, so that every weight is loaded once for all trials.
    dtype = torch.bfloat16 if has_native_bfloat16() else torch.float32
    runs = [_Run(graph, trial, dtype) for trial in trials]
    last = {name: node.name for node in graph.nodes for name in node.refs()}
    given = {spec.name for spec in graph.inputs} | set(graph.weights)
    found: dict[str, float] = {}
    for number, node in enumerate(graph.nodes):
        reads = set(node.refs())
        weights = {
            name: _channels_last(_checked(graph, name, load(name)).to(dtype)) for name in reads if name in graph.weights
        }
        largest = [run.step(number, weights) for run in runs]
        if reads & given:
            given.add(node.name)
            if node.dtype == torch.float16:
                found[node.name] = max(largest)
        for run in runs:
            run.forget(name for name in (*reads, node.name) if last.get(name, node.name) == node.name)
    return found


def too_large(ranges: Mapping[str, float]) -> dict[str, float]:
    """The values that go beyond the end of float16, or come too near to it."""
    return {name: value for name, value in ranges.items() if value > LARGEST / MARGIN}


class _Run:
    """A graph in another precision than float16, and the values that one trial has made so far."""

    def __init__(self, graph: Graph, trial: Trial, dtype: torch.dtype) -> None:
        sizes = {
            size: real
            for spec in graph.inputs
            for size, real in zip(spec.shape, trial.inputs[spec.name].shape, strict=True)
            if isinstance(size, str)
        }
        self.nodes = tuple(in_dtype(node, dtype) for node in specialize(graph, sizes).nodes)
        half = {spec.name for spec in graph.inputs if spec.dtype == torch.float16}
        half |= {name for name, tensor in graph.constants.items() if tensor.dtype == torch.float16}
        given = {**trial.inputs, **graph.constants}
        self.values: dict[str, Any] = {
            name: _channels_last(t.to(dtype) if name in half else t) for name, t in given.items()
        }

    def step(self, number: int, weights: Mapping[str, torch.Tensor]) -> float:
        """Call the next node. Returns the largest finite magnitude of what it makes; 0 if that is no tensor of floats."""
        node, values = self.nodes[number], ChainMap(dict(weights), self.values)
        if node.op == "aten.view.default":
            # A view asks for an order in memory, which `layout` is still to settle.
            node = node.replace(op="aten.reshape.default")
        with torch.inference_mode():
            result = self.values[node.name] = call(node, values)
            if not isinstance(result, torch.Tensor) or not result.is_floating_point():
                return 0.0
            largest = _largest(result)
            return max(largest, _largest_score(node, values)) if node.op == _ATTENTION else largest

    def forget(self, names: Iterable[str]) -> None:
        """Give up values that no later node reads."""
        for name in names:
            self.values.pop(name, None)


def _channels_last(tensor: torch.Tensor) -> torch.Tensor:
    """With the channels last, as convolutions are quickest and as they hand it on."""
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def _extent(tensor: torch.Tensor) -> float:
    """The largest magnitude; infinity and NaN count."""
    flat = (tensor.permute(0, 2, 3, 1) if tensor.dim() == 4 else tensor).reshape(-1)  # no copy of what lies in order
    low, high = torch.aminmax(flat) if len(flat) else (flat.new_zeros(()),) * 2
    return max(-float(low), float(high))


def _largest(tensor: torch.Tensor) -> float:
    """The largest finite magnitude; 0 if there is none."""
    largest = _extent(tensor)
    return largest if math.isfinite(largest) else _extent(tensor.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))


def _largest_score(node: Node, values: Mapping[str, torch.Tensor]) -> float:
    """What no score of an attention exceeds: the longest query times the longest key, scaled."""
    query, key = (values[ref.name] for ref in node.args[:2])
    scale = argument(node, 6, "scale")
    longest = query.norm(dim=-1).max() * key.norm(dim=-1).max()
    return float(longest * (query.shape[-1] ** -0.5 if scale is None else scale))


def _checked(graph: Graph, name: str, weight: torch.Tensor) -> torch.Tensor:
    largest = _extent(weight)
    if not largest <= LARGEST:  # NaN is not, either
        raise BuildError(
            f"{graph.name}: the weight {name} reaches {largest:.3g}, float16 holds at most {LARGEST:.0f}: "
            "build with --dtype bfloat16 or float32, or copy the model again if it is damaged"
        )
    return weight
