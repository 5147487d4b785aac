"""The gate of a feed-forward layer, in the forms it is traced in, and what only looks like it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ldmrt.engines.protocol import TensorSpec
from ldmrt.export.passes.fuse_geglu import OPERATOR, fuse_geglu
from ldmrt.graph import Dim, Graph, Node, Ref

F64 = torch.float64
SHAPE = (Dim("rows"), Dim("tokens"), 6)
LARGE = 9223372036854775807
Same = Callable[[Graph, Graph], None]


def node(name: str, op: str, *args: Any, shape: tuple[Any, ...] = SHAPE, **kwargs: Any) -> Node:
    return Node(name, op if op.startswith("python.") else f"aten.{op}", args, kwargs, shape, F64)


def graph(*nodes: Node) -> Graph:
    inputs = (TensorSpec("x", ("rows", "tokens", 12), F64), TensorSpec("y", ("rows", "tokens", 12), F64))
    return Graph("part", inputs, {}, {}, nodes, {"out": nodes[-1].name})


def chunked(source: str = "x", first: int = 0, second: int = 1, dim: int = -1, parts: int = 2) -> tuple[Node, ...]:
    return (
        node("both", "chunk.default", Ref(source), parts, dim, shape=()),
        node("a", "python.getitem", Ref("both"), first),
        node("b", "python.getitem", Ref("both"), second),
    )


def sliced(*first: Any, second: tuple[Any, ...] = (2, 6, LARGE), source: str = "x") -> tuple[Node, ...]:
    return (
        node("a", "slice.Tensor", Ref("x"), *first),
        node("b", "slice.Tensor", Ref(source), *second),
    )


GELU = node("gelu", "gelu.default", Ref("b"))
MUL = node("out", "mul.Tensor", Ref("a"), Ref("gelu"))


@pytest.mark.parametrize(
    "nodes",
    [
        (*chunked(), GELU, MUL),
        (*chunked(dim=2), GELU, MUL),
        (*chunked(), GELU, MUL.replace(args=MUL.args[::-1])),
        (*chunked(), GELU.replace(kwargs={"approximate": "none"}), MUL),
        (*sliced(2, 0, 6), GELU, MUL),
        (*sliced(-1, None, 6, second=(-1, 6, None)), GELU, MUL),
    ],
    ids=["chunk", "from the front", "swapped", "by name", "slices", "open slices"],
)
def test_a_gate(assert_same: Same, nodes: tuple[Node, ...]) -> None:
    part = graph(*nodes)
    result = fuse_geglu(part)
    assert [(item.op, item.args) for item in result.graph.nodes] == [(OPERATOR, (Ref("x"),))]
    assert (result.found, result.fused) == (1, 1)
    assert_same(part, result.graph)


@pytest.mark.parametrize(
    "nodes",
    [
        (*chunked(), GELU.replace(kwargs={"approximate": "tanh"}), MUL),
        (*chunked(first=1, second=0), GELU, MUL),
        (*chunked(second=0), GELU, MUL),
        (*sliced(2, 0, 6, source="y"), GELU, MUL),
        (*sliced(2, 0, LARGE, 2), GELU, MUL),
        (*sliced(2, 0, 6, second=(2, 3, 9)), GELU, MUL),
    ],
    ids=["tanh", "halves the other way", "one half", "of two tensors", "every second", "overlapping"],
)
def test_what_is_no_gate_stays(assert_same: Same, nodes: tuple[Node, ...]) -> None:
    part = graph(*nodes)
    result = fuse_geglu(part)
    assert result.graph == part
    assert (result.found, result.fused) == (1, 0)
    assert_same(part, result.graph)


def test_other_products_are_not_counted() -> None:
    part = graph(
        *chunked(),
        node("quick", "sigmoid.default", Ref("b")),
        node("gate", "mul.Tensor", Ref("b"), Ref("quick")),
        node("gelu", "gelu.default", Ref("gate")),
        node("twice", "mul.Tensor", Ref("gelu"), 2.0),
        node("out", "mul.Tensor", Ref("a"), Ref("gelu")),
    )
    result = fuse_geglu(part)
    assert (result.found, result.fused) == (0, 0)


def test_parts_of_another_dimension_stay() -> None:
    part = Graph(
        "part",
        (TensorSpec("x", ("rows", 6, 6), F64),),
        {},
        {},
        tuple(item.replace(shape=(Dim("rows"), 3, 6)) if item.shape else item for item in (*chunked(dim=1), GELU, MUL)),
        {"out": "out"},
    )
    assert fuse_geglu(part).graph == part
