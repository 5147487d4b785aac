"""Running a graph with plain torch in the place of the fused operators: the oracle of the passes, and independent of kernels/."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from ldmrt.engines.protocol import TensorSpec
from ldmrt.graph import Argument, Dim, Graph, Node, Ref, substitute
from ldmrt.operators import resolve

Watch = Callable[[Node, list[Any], Any], None]


def group_norm_silu(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    shift: torch.Tensor | None = None,
    x_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    total = x if shift is None else x + shift.reshape(*shift.shape, *[1] * (x.dim() - 2))
    total = total if x_bias is None else total + channels(x_bias, x)
    normed = F.group_norm(total, groups, weight, bias, eps)
    # In the order that x has in memory, whatever group_norm makes of three dimensions.
    return torch.empty_like(x).copy_(F.silu(normed) if silu else normed)


def add_group_norm_silu(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    joined: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    x_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x if residual is None else x + residual
    total = total if x_bias is None else total + channels(x_bias, x)
    total = total.clone() if joined is None else torch.cat([total, joined], 1)
    if not x.is_contiguous():
        # Both results in x's order.
        total = total.movedim(1, -1).contiguous().movedim(-1, 1)
    return total, group_norm_silu(total, weight, bias, groups, eps, silu)


def add_upsample(
    x: torch.Tensor, residual: torch.Tensor | None, x_bias: torch.Tensor | None, factor: int
) -> torch.Tensor:
    total = x if residual is None else x + residual
    total = total if x_bias is None else total + channels(x_bias, x)
    large = total.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    return large.contiguous(memory_format=torch.channels_last)


def channels(vector: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """One number a channel, as x has its channels."""
    return vector.reshape(-1, *[1] * (x.dim() - 2))


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    heads: int,
    scale: float,
    causal: bool = False,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    q, k, v = (x.reshape(*x.shape[:2], heads, -1).transpose(1, 2) for x in (query, key, value))
    scores = scale * (q @ k.transpose(-1, -2))
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def geglu(x: torch.Tensor, x_bias: torch.Tensor | None = None) -> torch.Tensor:
    value, gate = (x if x_bias is None else x + x_bias).tensor_split(2, dim=-1)
    return value * gate * 0.5 * (1 + torch.erf(gate / 2**0.5))


def linear_geglu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return geglu(x @ weight.T, bias)


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    x_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x.clone() if residual is None else x + residual
    total = total if x_bias is None else total + x_bias
    return total, F.layer_norm(total, total.shape[-1:], weight, bias, eps)


def conv2d(x: torch.Tensor, weight: torch.Tensor, stride: int, padding: int) -> torch.Tensor:
    return F.conv2d(x, weight, None, (stride, stride), (padding, padding))


OPERATORS: dict[str, Callable[..., Any]] = {
    "ldmrt.add_group_norm_silu.default": add_group_norm_silu,
    "ldmrt.add_layer_norm.default": add_layer_norm,
    "ldmrt.add_upsample.default": add_upsample,
    "ldmrt.attention.default": attention,
    "ldmrt.conv2d.default": conv2d,
    "ldmrt.geglu.default": geglu,
    "ldmrt.group_norm_silu.default": group_norm_silu,
    "ldmrt.linear_geglu.default": linear_geglu,
    "python.getitem": operator.getitem,
}


@pytest.fixture(scope="session")
def interpret() -> Callable[..., dict[str, torch.Tensor]]:
    """`interpret(graph, inputs, weights, watch=None)` -> outputs; `watch(node, arguments, value)` sees every call."""
    return run


@pytest.fixture(scope="session")
def assert_same() -> Callable[[Graph, Graph], None]:
    """`assert_same(before, after)`: the two graphs, in float64, agree on random numbers."""
    return compare


def compare(before: Graph, after: Graph) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = {"rows": 3, "tokens": 5}

    def random(spec: TensorSpec) -> torch.Tensor:
        shape = [sizes[size] if isinstance(size, str) else size for size in spec.shape]
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(spec.dtype)

    inputs = {spec.name: random(spec) for spec in before.inputs}
    weights = {name: random(spec) for name, spec in before.weights.items()}
    found, expected = run(after, inputs, weights), run(before, inputs, weights)
    assert list(found) == list(expected)
    for name in expected:
        # float64 keeps 15 digits; the two differ in the order of a few sums.
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-12)


def run(
    graph: Graph,
    inputs: Mapping[str, torch.Tensor],
    weights: Mapping[str, torch.Tensor],
    watch: Watch | None = None,
) -> dict[str, torch.Tensor]:
    values: dict[str, Any] = {name: weights[name] for name in graph.weights} | dict(graph.constants)
    sizes: dict[str, int] = {}
    for spec in graph.inputs:
        values[spec.name] = inputs[spec.name]
        sizes |= {
            size: real for size, real in zip(spec.shape, inputs[spec.name].shape, strict=True) if isinstance(size, str)
        }

    def load(argument: Ref | Dim) -> Argument:
        return values[argument.name] if isinstance(argument, Ref) else argument.factor * sizes[argument.name]

    with torch.inference_mode():
        for node in graph.nodes:
            args = [_listed(substitute(argument, load)) for argument in node.args]
            kwargs = {key: _listed(substitute(argument, load)) for key, argument in node.kwargs.items()}
            function = OPERATORS.get(node.op) or resolve(node.op)
            values[node.name] = function(*args, **kwargs)
            if isinstance(values[node.name], torch.Tensor):
                shape = substitute(node.shape, load)
                assert tuple(values[node.name].shape) == shape, f"{node.name} is declared {shape}"
                assert values[node.name].dtype == node.dtype, f"{node.name} is declared {node.dtype}"
            if watch is not None:
                watch(node, args, values[node.name])
    return {name: values[value] for name, value in graph.outputs.items()}


def _listed(argument: Argument) -> Argument:
    return list(argument) if isinstance(argument, tuple) else argument
