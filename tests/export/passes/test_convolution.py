"""Convolutions that are given over to an operator of ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ldmrt.engines.protocol import TensorSpec
from ldmrt.export.passes.convolution import OPERATOR, convolution
from ldmrt.graph import Dim, Graph, Node, Ref

F64 = torch.float64
ROWS = Dim("rows")
Same = Callable[[Graph, Graph], None]


def conv(source: str, weight: str, *rest: Any, shape: tuple[Any, ...], **kwargs: Any) -> Node:
    return Node("out", "aten.conv2d.default", (Ref(source), Ref(weight), *rest), kwargs, shape, F64)


def graph(*nodes: Node) -> Graph:
    weights = {"w": (3, 4, 3, 3), "pixel": (3, 4, 1, 1), "flat": (3, 4, 1, 3), "halves": (4, 2, 3, 3), "b": (3,)}
    return Graph(
        name="part",
        inputs=(TensorSpec("x", ("rows", 4, 6, 5), F64), TensorSpec("one", (4, 6, 5), F64)),
        weights={name: TensorSpec(name, shape, F64) for name, shape in weights.items()},
        constants={},
        nodes=nodes,
        outputs={"out": "out"},
    )


@pytest.mark.parametrize(
    ("layer", "stride", "padding"),
    [
        (conv("x", "w", None, (1, 1), (1, 1), shape=(ROWS, 3, 6, 5)), 1, 1),
        (conv("x", "w", None, (2, 2), (1, 1), (1, 1), 1, shape=(ROWS, 3, 3, 3)), 2, 1),
        (conv("x", "w", shape=(ROWS, 3, 4, 3)), 1, 0),
        (conv("x", "w", padding=(2, 2), stride=(2, 2), shape=(ROWS, 3, 4, 4)), 2, 2),
        (conv("x", "pixel", None, shape=(ROWS, 3, 6, 5)), 1, 0),
    ],
    ids=["as most are", "a stride", "nothing given", "by name", "of one pixel"],
)
def test_without_a_bias(assert_same: Same, layer: Node, stride: int, padding: int) -> None:
    part = graph(layer)
    result = convolution(part)
    assert result.graph.nodes[0].op == OPERATOR
    assert result.graph.nodes[0].args == (*layer.args[:2], stride, padding)
    assert (result.found, result.fused) == (1, 1)
    assert_same(part, result.graph)


@pytest.mark.parametrize(
    ("layer", "found"),
    [
        (conv("x", "w", Ref("b"), shape=(ROWS, 3, 4, 3)), 0),
        (conv("x", "w", bias=Ref("b"), shape=(ROWS, 3, 4, 3)), 0),
        (conv("x", "flat", shape=(ROWS, 3, 6, 3)), 1),
        (conv("x", "w", None, (1, 2), shape=(ROWS, 3, 4, 2)), 1),
        (conv("x", "w", None, (1, 1), (0, 1), shape=(ROWS, 3, 4, 5)), 1),
        (conv("x", "w", None, (1, 1), (0, 0), (2, 2), shape=(ROWS, 3, 2, 1)), 1),
        (conv("x", "halves", None, (1, 1), (0, 0), (1, 1), 2, shape=(ROWS, 4, 4, 3)), 1),
        (conv("one", "w", shape=(3, 4, 3)), 1),
    ],
    ids=["a bias", "a bias by name", "not square", "two strides", "two paddings", "dilated", "groups", "no rows"],
)
def test_others_stay(assert_same: Same, layer: Node, found: int) -> None:
    part = graph(layer)
    result = convolution(part)
    assert result.graph.nodes == part.nodes
    assert (result.found, result.fused) == (found, 0)
    assert_same(part, result.graph)
