"""Nearest-neighbour upsampling, and the residual sums before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ldmrt.engines.protocol import TensorSpec
from ldmrt.export.passes.fuse_upsample import OPERATOR, fuse_upsample
from ldmrt.export.passes.pattern import Pass
from ldmrt.graph import Dim, Graph, Node, Ref

F64 = torch.float64
ROWS = Dim("rows")
SHAPE, LARGE = (ROWS, 2, 3, 4), (ROWS, 2, 6, 8)
Check = Callable[[Graph], Pass]


def node(name: str, op: str, *args: Any, shape: tuple[Any, ...] = SHAPE, **kwargs: Any) -> Node:
    return Node(name, f"aten.{op}", args, kwargs, shape, F64)


def up(source: str, *args: Any, op: str = "vec", shape: tuple[Any, ...] = LARGE, **kwargs: Any) -> Node:
    return node("up", f"upsample_nearest2d.{op}", Ref(source), *args, shape=shape, **kwargs)


def graph(*nodes: Node, outputs: tuple[str, ...] = ()) -> Graph:
    return Graph(
        name="part",
        inputs=(
            TensorSpec("x", ("rows", 2, 3, 4), F64),
            TensorSpec("y", ("rows", 2, 3, 4), F64),
            TensorSpec("column", ("rows", 2, 3, 1), F64),
            TensorSpec("narrow", ("rows", 2, 3, 4), torch.float32),
            TensorSpec("tall", ("rows", 2, "tokens", 4), F64),
        ),
        weights={},
        constants={},
        nodes=nodes,
        outputs={name: name for name in outputs or (nodes[-1].name,)},
    )


@pytest.fixture
def fused(assert_same: Callable[[Graph, Graph], None]) -> Check:
    """The pass, its result compared with what it was given."""

    def check(part: Graph) -> Pass:
        result = fuse_upsample(part)
        assert_same(part, result.graph)
        return result

    return check


SUM = node("sum", "add.Tensor", Ref("x"), Ref("y"))
TWICE = (None, (2.0, 2.0))


@pytest.mark.parametrize(
    ("layer", "factor"),
    [
        (up("x", *TWICE), 2),
        (up("x", None, scale_factors=(2.0, 2.0)), 2),
        (up("x", (6, 8), None), 2),
        (up("x", (6, 8), op="default"), 2),
        (up("x", (6, 8), 2.0, 2.0, op="default"), 2),
        (up("x", None, (3.0, 3.0), shape=(ROWS, 2, 9, 12)), 3),
        (up("x", (24, 32), None, shape=(ROWS, 2, 24, 32)), 8),
        (up("x", (3, 4), None, shape=SHAPE), 1),
    ],
)
def test_a_whole_number(fused: Check, layer: Node, factor: int) -> None:
    result = fused(graph(layer, node("out", "neg.default", Ref("up"), shape=layer.shape)))
    assert [item.op for item in result.graph.nodes] == [OPERATOR, "aten.neg.default"]
    assert result.graph.nodes[0].args == (Ref("x"), None, None, factor)
    assert (result.found, result.fused) == (1, 1)


def test_with_the_sum_before(fused: Check) -> None:
    result = fused(graph(SUM, up("sum", *TWICE)))
    assert [item.op for item in result.graph.nodes] == [OPERATOR]
    assert result.graph.nodes[0].args == (Ref("x"), Ref("y"), None, 2)


@pytest.mark.parametrize(
    ("nodes", "outputs"),
    [
        ([SUM, up("sum", *TWICE)], ("up", "sum")),
        ([SUM, up("sum", *TWICE), node("out", "neg.default", Ref("sum"))], ("up", "out")),
        ([SUM.replace(args=(Ref("x"), Ref("column"))), up("sum", *TWICE)], ("up",)),
        ([SUM.replace(args=(Ref("narrow"), Ref("x"))), up("sum", *TWICE)], ("up",)),
        ([SUM.replace(kwargs={"alpha": 2}), up("sum", *TWICE)], ("up",)),
        ([SUM.replace(args=(Ref("x"), 1.5)), up("sum", *TWICE)], ("up",)),
    ],
    ids=["an output", "with another reader", "broadcast", "two dtypes", "scaled", "a number"],
)
def test_other_sums_stay(fused: Check, nodes: list[Node], outputs: tuple[str, ...]) -> None:
    result = fused(graph(*nodes, outputs=outputs))
    assert result.graph.nodes[0] == nodes[0]
    assert result.graph.nodes[1].args == (Ref("sum"), None, None, 2)
    assert result.fused == 1


@pytest.mark.parametrize(
    "layer",
    [
        up("x", None, (2.0, 3.0), shape=(ROWS, 2, 6, 12)),
        up("x", None, (1.5, 1.5), shape=(ROWS, 2, 4, 6)),
        up("x", (1, 2), None, shape=(ROWS, 2, 1, 2)),
        up("x", (27, 36), None, shape=(ROWS, 2, 27, 36)),
        up("tall", *TWICE, shape=(ROWS, 2, Dim("tokens", 2), 8)),
    ],
    ids=["two factors", "one and a half", "smaller", "by nine", "a free height"],
)
def test_other_sizes_stay(fused: Check, layer: Node) -> None:
    part = graph(layer)
    result = fused(part)
    assert result.graph.nodes == part.nodes
    assert (result.found, result.fused) == (1, 0)


@pytest.mark.parametrize(
    "layer",
    [
        up("x", None, (3.1, 3.1), shape=(ROWS, 2, 9, 12)),
        up("x", (9, 12), 3.1, 3.1, op="default", shape=(ROWS, 2, 9, 12)),
    ],
    ids=["vec", "default"],
)
def test_a_scale_that_makes_three_times_the_size_by_rounding_stays(fused: Check, layer: Node) -> None:
    """Of 3 and 4 pixels it makes 9 and 12, but not three of each."""
    part = graph(layer)
    assert fused(part).graph.nodes == part.nodes
    x = torch.arange(12.0).reshape(1, 1, 3, 4)
    operator = torch.ops.aten.upsample_nearest2d
    found = operator.vec(x, None, [3.1, 3.1])
    assert found.shape == (1, 1, 9, 12)
    assert not torch.equal(found, operator.vec(x, None, [3.0, 3.0]))


def test_other_ways_to_upsample_are_not_meant(fused: Check) -> None:
    result = fused(graph(node("up", "upsample_bilinear2d.vec", Ref("x"), None, False, (2.0, 2.0), shape=LARGE)))
    assert (result.found, result.fused) == (0, 0)
