"""Residual sums and the layer norms that read them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ldmrt.engines.protocol import TensorSpec
from ldmrt.export.passes.fuse_add_norm import OPERATOR, fuse_add_norm
from ldmrt.graph import Dim, Graph, Node, Ref

F64 = torch.float64
SHAPE = (Dim("rows"), Dim("tokens"), 6)
Same = Callable[[Graph, Graph], None]
NORM = ((6,), Ref("g"), Ref("b"), 1e-3, False)


def node(name: str, op: str, *args: Any, shape: tuple[Any, ...] = SHAPE, **kwargs: Any) -> Node:
    return Node(name, f"aten.{op}", args, kwargs, shape, F64)


def graph(*nodes: Node, outputs: tuple[str, ...] = ()) -> Graph:
    return Graph(
        name="part",
        inputs=(
            TensorSpec("x", ("rows", "tokens", 6), F64),
            TensorSpec("y", ("rows", "tokens", 6), F64),
            TensorSpec("row", ("rows", 1, 6), F64),
            TensorSpec("narrow", ("rows", "tokens", 6), torch.float32),
        ),
        weights={"g": TensorSpec("g", (6,), F64), "b": TensorSpec("b", (6,), F64)},
        constants={},
        nodes=nodes,
        outputs={name: name for name in outputs or (nodes[-1].name,)},
    )


SUM = node("sum", "add.Tensor", Ref("x"), Ref("y"))


def test_a_chain_of_two(assert_same: Same) -> None:
    part = graph(
        SUM,
        node("norm", "layer_norm.default", Ref("sum"), *NORM),
        node("work", "neg.default", Ref("norm")),
        node("sum 2", "add.Tensor", Ref("work"), Ref("sum")),
        node("norm 2", "layer_norm.default", Ref("sum 2"), *NORM),
        outputs=("norm 2", "sum 2"),
    )
    result = fuse_add_norm(part)
    assert [item.op for item in result.graph.nodes] == [
        OPERATOR,
        "python.getitem",
        "python.getitem",
        "aten.neg.default",
        OPERATOR,
        "python.getitem",
        "python.getitem",
    ]
    assert result.graph.nodes[4].args == (Ref("work"), Ref("sum"), Ref("g"), Ref("b"), 1e-3)
    assert (result.found, result.fused) == (2, 2)
    assert_same(part, result.graph)


def test_a_sum_that_only_the_norm_reads(assert_same: Same) -> None:
    part = graph(SUM, node("norm", "layer_norm.default", Ref("sum"), *NORM))
    result = fuse_add_norm(part)
    assert [item.op for item in result.graph.nodes] == [OPERATOR, "python.getitem"]
    assert_same(part, result.graph)


def test_two_norms_of_one_sum(assert_same: Same) -> None:
    """As CLIP has them: the next layer's, and the final one of a hidden state."""
    part = graph(
        SUM,
        node("norm", "layer_norm.default", Ref("sum"), *NORM),
        node("final", "layer_norm.default", Ref("sum"), *NORM[:3]),
        outputs=("norm", "final"),
    )
    result = fuse_add_norm(part)
    assert [item.op for item in result.graph.nodes].count("aten.layer_norm.default") == 1
    assert (result.found, result.fused) == (1, 1)
    assert_same(part, result.graph)


@pytest.mark.parametrize(
    ("total", "norm"),
    [
        (SUM.replace(args=(Ref("x"), Ref("row"))), NORM),
        (SUM.replace(args=(Ref("x"), Ref("narrow"))), NORM),
        (SUM.replace(kwargs={"alpha": 0.5}), NORM),
        (SUM, NORM[:1]),
        (SUM, (*NORM[:2], None)),
    ],
    ids=["broadcast", "two dtypes", "scaled", "without a weight", "without a bias"],
)
def test_what_is_no_residual_sum_stays(assert_same: Same, total: Node, norm: tuple[Any, ...]) -> None:
    part = graph(total, node("norm", "layer_norm.default", Ref("sum"), *norm))
    result = fuse_add_norm(part)
    assert result.graph.nodes == part.nodes
    assert result.fused == 0
    assert_same(part, result.graph)


@pytest.mark.parametrize("position", [1, 2])
def test_a_norm_whose_weights_come_later_than_the_sum_stays(assert_same: Same, position: int) -> None:
    """The sum is read before they are there."""
    part = graph(
        SUM,
        node("early", "neg.default", Ref("sum")),
        node("late", "neg.default", Ref("g"), shape=(6,)),
        node("norm", "layer_norm.default", Ref("sum"), *NORM[:position], Ref("late"), *NORM[position + 1 :]),
        outputs=("early", "norm"),
    )
    result = fuse_add_norm(part)
    assert result.graph.nodes == part.nodes
    assert (result.found, result.fused) == (1, 0)
    assert_same(part, result.graph)


def test_a_norm_over_two_dimensions_stays() -> None:
    inputs = tuple(TensorSpec(name, ("rows", 5, 6), F64) for name in "xy")
    weights = {name: TensorSpec(name, (5, 6), F64) for name in "gb"}
    nodes = tuple(
        item.replace(shape=(Dim("rows"), 5, 6))
        for item in (SUM, node("norm", "layer_norm.default", Ref("sum"), (5, 6), Ref("g"), Ref("b")))
    )
    part = Graph("part", inputs, weights, {}, nodes, {"out": "norm"})
    assert fuse_add_norm(part).graph.nodes == part.nodes
