"""Group norms: what is taken in, what must stay, and the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ldmrt.engines.protocol import TensorSpec
from ldmrt.export.passes.fuse_norm import OPERATOR, fuse_norm
from ldmrt.export.passes.pattern import Pass
from ldmrt.graph import Dim, Graph, Node, Ref

F64 = torch.float64
ROWS = Dim("rows")
SHAPE = (ROWS, 6, 4, 3)
NORM = (2, Ref("g"), Ref("b"), 1e-3, False)


def node(name: str, op: str, *args: Any, shape: tuple[Any, ...] = SHAPE, **kwargs: Any) -> Node:
    return Node(name, f"aten.{op}", args, kwargs, shape, F64)


def graph(*nodes: Node, outputs: tuple[str, ...] = ()) -> Graph:
    return Graph(
        name="part",
        inputs=(
            TensorSpec("x", ("rows", 6, 4, 3), F64),
            TensorSpec("y", ("rows", 6, 4, 3), F64),
            TensorSpec("t", ("rows", 6), F64),
        ),
        weights={"g": TensorSpec("g", (6,), F64), "b": TensorSpec("b", (6,), F64)},
        constants={},
        nodes=nodes,
        outputs={name: name for name in outputs or (nodes[-1].name,)},
    )


@pytest.fixture
def fused(assert_same: Callable[[Graph, Graph], None]) -> Callable[[Graph], Pass]:
    """The pass, its result compared with what it was given."""

    def check(part: Graph) -> Pass:
        result = fuse_norm(part)
        assert_same(part, result.graph)
        return result

    return check


Check = Callable[[Graph], Pass]


def time() -> list[Node]:
    return [
        node("t3", "unsqueeze.default", Ref("t"), 2, shape=(ROWS, 6, 1)),
        node("t4", "unsqueeze.default", Ref("t3"), 3, shape=(ROWS, 6, 1, 1)),
    ]


def ops(part: Graph) -> list[str]:
    return [item.op for item in part.nodes]


@pytest.mark.parametrize("swapped", [False, True])
def test_a_residual_block(fused: Check, swapped: bool) -> None:
    pair = (Ref("t4"), Ref("x2")) if swapped else (Ref("x2"), Ref("t4"))
    result = fused(
        graph(
            node("x2", "neg.default", Ref("x")),
            *time(),
            node("sum", "add.Tensor", *pair),
            node("norm", "group_norm.default", Ref("sum"), *NORM),
            node("silu", "silu.default", Ref("norm")),
            node("out", "neg.default", Ref("silu")),
        )
    )
    assert ops(result.graph) == ["aten.neg.default", OPERATOR, "aten.neg.default"]
    assert result.graph.nodes[1].args == (Ref("x2"), Ref("g"), Ref("b"), 2, 1e-3, True, Ref("t"))
    assert (result.found, result.fused) == (1, 1)


def test_a_norm_alone(fused: Check) -> None:
    result = fused(graph(node("norm", "group_norm.default", Ref("x"), 3)))
    assert result.graph.nodes[0].args == (Ref("x"), None, None, 3, 1e-5, False)


def test_a_norm_that_something_else_reads_keeps_its_silu(fused: Check) -> None:
    norm = node("norm", "group_norm.default", Ref("x"), *NORM)
    silu = node("silu", "silu.default", Ref("norm"))
    for part in (
        graph(norm, silu, node("out", "add.Tensor", Ref("norm"), Ref("silu"))),
        graph(norm, silu, outputs=("norm", "silu")),
    ):
        result = fused(part)
        assert ops(result.graph)[:2] == [OPERATOR, "aten.silu.default"]
        assert result.graph.nodes[0].args[-1] is False


def test_a_sum_that_something_else_reads_stays(fused: Check) -> None:
    nodes = [
        *time(),
        node("sum", "add.Tensor", Ref("x"), Ref("t4")),
        node("norm", "group_norm.default", Ref("sum"), *NORM),
    ]
    for part in (
        graph(*nodes, node("out", "add.Tensor", Ref("sum"), Ref("norm"))),
        graph(*nodes, outputs=("norm", "sum")),
    ):
        result = fused(part)
        assert "aten.add.Tensor" in ops(result.graph)
        assert next(item for item in result.graph.nodes if item.op == OPERATOR).args[0] == Ref("sum")


@pytest.mark.parametrize(
    "total",
    [
        node("sum", "add.Tensor", Ref("x"), Ref("y")),
        node("sum", "add.Tensor", Ref("x"), Ref("t4"), alpha=2),
        node("sum", "add.Tensor", Ref("x"), 1.5),
        node("sum", "add.Tensor", Ref("x"), Ref("column")),
        node("sum", "add.Tensor", Ref("x"), Ref("turned")),
    ],
    ids=["a residual", "scaled", "a number", "by pixel", "not a view in order"],
)
def test_other_sums_stay(fused: Check, total: Node) -> None:
    part = graph(
        *time(),
        node("column", "slice.Tensor", Ref("y"), 3, 0, 1, shape=(ROWS, 6, 4, 1)),
        node("mean", "mean.dim", Ref("y"), (2, 3), True, shape=(ROWS, 6, 1, 1)),
        node("turned", "neg.default", Ref("mean"), shape=(ROWS, 6, 1, 1)),
        total,
        node("norm", "group_norm.default", Ref("sum"), *NORM),
        node("silu", "silu.default", Ref("norm")),
    )
    result = fused(part)
    assert ops(result.graph)[-2:] == ["aten.add.Tensor", OPERATOR]


def test_scale_and_shift_by_time_keep_the_silu_apart(fused: Check) -> None:
    result = fused(
        graph(
            *time(),
            node("norm", "group_norm.default", Ref("x"), *NORM),
            node("scaled", "mul.Tensor", Ref("norm"), Ref("t4")),
            node("silu", "silu.default", Ref("scaled")),
        )
    )
    assert ops(result.graph)[-3:] == [OPERATOR, "aten.mul.Tensor", "aten.silu.default"]


def test_a_cast_keeps_the_silu_apart(fused: Check) -> None:
    cast = node("cast", "to.dtype", Ref("norm"), torch.float32)
    silu = node("silu", "silu.default", Ref("cast"))
    part = graph(
        node("norm", "group_norm.default", Ref("x"), *NORM),
        cast.replace(dtype=torch.float32),
        silu.replace(dtype=torch.float32),
    )
    assert ops(fused(part).graph) == [OPERATOR, "aten.to.dtype", "aten.silu.default"]


def test_three_dimensions(fused: Check) -> None:
    """As the attention of diffusers' VAE has it."""
    flat = (ROWS, 6, 12)
    result = fused(
        graph(
            node("flat", "view.default", Ref("x"), flat, shape=flat),
            node("norm", "group_norm.default", Ref("flat"), *NORM, shape=flat),
        )
    )
    assert ops(result.graph) == ["aten.view.default", OPERATOR]
