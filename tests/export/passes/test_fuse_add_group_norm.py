"""Residual sums and joined skip connections, and the group norms that read them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ldmrt.engines.protocol import TensorSpec
from ldmrt.export.passes.fuse_add_group_norm import OPERATOR, fuse_add_group_norm
from ldmrt.export.passes.pattern import Pass
from ldmrt.graph import Dim, Graph, Node, Ref

F64 = torch.float64
ROWS = Dim("rows")
SHAPE, JOINED = (ROWS, 4, 5, 3), (ROWS, 6, 5, 3)
GROUPS, EPS = 2, 1e-3
BOTH = ["python.getitem"] * 2
Check = Callable[[Graph], Pass]


def node(name: str, op: str, *args: Any, shape: tuple[Any, ...] = SHAPE, **kwargs: Any) -> Node:
    return Node(name, op if op.startswith("ldmrt.") else f"aten.{op}", args, kwargs, shape, F64)


def norm(name: str, source: str, *rest: Any, silu: bool = True, shape: tuple[Any, ...] = SHAPE) -> Node:
    """A group norm with the weights that fit its channels."""
    weights = (Ref(f"g{shape[1]}"), Ref(f"b{shape[1]}"))
    return node(name, "ldmrt.group_norm_silu.default", Ref(source), *weights, GROUPS, EPS, silu, *rest, shape=shape)


def graph(*nodes: Node, outputs: tuple[str, ...] = ()) -> Graph:
    sizes = {"g4": 4, "b4": 4, "g6": 6, "b6": 6, "g8": 8, "b8": 8}
    return Graph(
        name="part",
        inputs=(
            TensorSpec("x", ("rows", 4, 5, 3), F64),
            TensorSpec("y", ("rows", 4, 5, 3), F64),
            TensorSpec("skip", ("rows", 2, 5, 3), F64),
            TensorSpec("t", ("rows", 4), F64),
            TensorSpec("column", ("rows", 4, 5, 1), F64),
            TensorSpec("narrow", ("rows", 4, 5, 3), torch.float32),
            TensorSpec("narrow skip", ("rows", 2, 5, 3), torch.float32),
        ),
        weights={name: TensorSpec(name, (size,), F64) for name, size in sizes.items()},
        constants={},
        nodes=nodes,
        outputs={name: name for name in outputs or (nodes[-1].name,)},
    )


@pytest.fixture
def fused(assert_same: Callable[[Graph, Graph], None]) -> Check:
    """The pass, its result compared with what it was given."""

    def check(part: Graph) -> Pass:
        result = fuse_add_group_norm(part)
        assert_same(part, result.graph)
        return result

    return check


def ops(part: Graph) -> list[str]:
    return [item.op for item in part.nodes]


def first(part: Graph) -> tuple[Any, ...]:
    """The arguments of the first fused operator."""
    found: tuple[Any, ...] = next(item for item in part.nodes if item.op == OPERATOR).args
    return found


SUM = node("sum", "add.Tensor", Ref("x"), Ref("y"))
CAT = node("cat", "cat.default", (Ref("sum"), Ref("skip")), 1, shape=JOINED)


def test_the_way_down(fused: Check) -> None:
    """Two residual blocks: each sum is normed, and added to what comes of that."""
    result = fused(
        graph(
            SUM,
            norm("norm", "sum"),
            node("work", "neg.default", Ref("norm")),
            node("sum 2", "add.Tensor", Ref("sum"), Ref("work")),
            norm("norm 2", "sum 2", silu=False),
            outputs=("norm 2", "sum 2"),
        )
    )
    assert ops(result.graph) == [OPERATOR, *BOTH, "aten.neg.default", OPERATOR, *BOTH]
    assert first(result.graph) == (Ref("x"), Ref("y"), None, Ref("g4"), Ref("b4"), GROUPS, EPS, True)
    assert result.graph.nodes[4].args == (
        *(Ref("sum"), Ref("work"), None),
        *(Ref("g4"), Ref("b4"), GROUPS, EPS, False),
    )
    assert (result.found, result.fused) == (2, 2)


def test_the_way_up(fused: Check) -> None:
    """A sum, a skip connection behind it; the norm and the shortcut read both."""
    result = fused(
        graph(
            SUM,
            CAT,
            norm("norm", "cat", shape=JOINED),
            node("shortcut", "neg.default", Ref("cat"), shape=JOINED),
            node("out", "add.Tensor", Ref("norm"), Ref("shortcut"), shape=JOINED),
        )
    )
    assert ops(result.graph) == [OPERATOR, *BOTH, "aten.neg.default", "aten.add.Tensor"]
    assert first(result.graph)[:3] == (Ref("x"), Ref("y"), Ref("skip"))
    assert [item.name for item in result.graph.nodes[1:3]] == ["cat", "norm"]
    assert [item.shape for item in result.graph.nodes[1:3]] == [JOINED, JOINED]
    assert (result.found, result.fused) == (1, 1)


@pytest.mark.parametrize("outputs", [("norm",), ("norm", "sum"), ("norm", "cat")])
def test_what_is_an_output_is_made(fused: Check, outputs: tuple[str, ...]) -> None:
    result = fused(graph(SUM, CAT, norm("norm", "cat", shape=JOINED), outputs=outputs))
    stays = "sum" in outputs
    assert ("aten.add.Tensor" in ops(result.graph)) is stays
    assert first(result.graph)[:3] == ((Ref("sum"), None, Ref("skip")) if stays else (Ref("x"), Ref("y"), Ref("skip")))


def test_a_sum_that_something_else_reads_is_joined_as_it_is(fused: Check) -> None:
    result = fused(
        graph(
            SUM, CAT, norm("norm", "cat", shape=JOINED), node("out", "neg.default", Ref("sum")), outputs=("norm", "out")
        )
    )
    assert ops(result.graph) == ["aten.add.Tensor", OPERATOR, "python.getitem", "aten.neg.default"]
    assert first(result.graph)[:3] == (Ref("sum"), None, Ref("skip"))


@pytest.mark.parametrize(
    ("parts", "dim", "taken"),
    [
        (("x", "skip"), 1, ("x", None, "skip")),
        (("x", "skip"), -3, ("x", None, "skip")),
        (("skip", "x"), 1, ("skip", None, "x")),
        (("skip", "sum"), 1, ("skip", None, "sum")),
    ],
    ids=["no sum", "counted from the end", "the wider one behind", "a sum behind"],
)
def test_other_joints(fused: Check, parts: tuple[str, str], dim: int, taken: tuple[str | None, ...]) -> None:
    cat = node("cat", "cat.default", tuple(map(Ref, parts)), dim, shape=JOINED)
    result = fused(graph(SUM, cat, norm("norm", "cat", shape=JOINED)))
    assert first(result.graph)[:3] == tuple(None if name is None else Ref(name) for name in taken)
    assert ("aten.add.Tensor" in ops(result.graph)) is ("sum" in parts)


def test_a_sum_joined_with_itself(fused: Check) -> None:
    shape = (ROWS, 8, 5, 3)
    cat = node("cat", "cat.default", (Ref("sum"), Ref("sum")), 1, shape=shape)
    result = fused(graph(SUM, cat, norm("norm", "cat", shape=shape)))
    assert first(result.graph)[:3] == (Ref("sum"), None, Ref("sum"))


def test_a_value_added_to_itself(fused: Check) -> None:
    result = fused(graph(SUM.replace(args=(Ref("x"), Ref("x"))), norm("norm", "sum")))
    assert first(result.graph)[:3] == (Ref("x"), Ref("x"), None)


def test_a_joint_of_a_sum_that_is_none_of_pictures(fused: Check) -> None:
    """The sum stays, and what it is joined with is taken in."""
    result = fused(graph(SUM.replace(args=(Ref("x"), Ref("column"))), CAT, norm("norm", "cat", shape=JOINED)))
    assert ops(result.graph) == ["aten.add.Tensor", OPERATOR, "python.getitem"]


def test_two_norms_of_one_sum(fused: Check) -> None:
    result = fused(graph(SUM, norm("norm", "sum"), norm("other", "sum", silu=False), outputs=("norm", "other", "sum")))
    assert ops(result.graph) == [OPERATOR, *BOTH, "ldmrt.group_norm_silu.default"]
    assert result.graph.nodes[3].args[0] == Ref("sum")
    assert (result.found, result.fused) == (2, 1)


def test_three_dimensions(fused: Check) -> None:
    shape = (ROWS, 4, 15)
    flat = [node(f"flat {name}", "flatten.using_ints", Ref(name), 2, shape=shape) for name in "xy"]
    total = node("sum", "add.Tensor", Ref("flat x"), Ref("flat y"), shape=shape)
    result = fused(graph(*flat, total, norm("norm", "sum", shape=shape)))
    assert result.fused == 1


@pytest.mark.parametrize(
    "total",
    [
        SUM.replace(args=(Ref("x"), Ref("column"))),
        SUM.replace(args=(Ref("column"), Ref("x"))),
        SUM.replace(args=(Ref("x"), Ref("narrow"))),
        SUM.replace(kwargs={"alpha": 2}),
        SUM.replace(args=(Ref("x"), 1.5)),
    ],
    ids=["broadcast", "broadcast to the second", "two dtypes", "scaled", "a number"],
)
def test_what_is_no_residual_sum_stays(fused: Check, total: Node) -> None:
    part = graph(total, norm("norm", "sum"))
    result = fused(part)
    assert result.graph.nodes == part.nodes
    assert (result.found, result.fused) == (1, 0)


@pytest.mark.parametrize(
    ("parts", "dims", "shape"),
    [
        (("x", "skip", "skip"), (1,), (ROWS, 8, 5, 3)),
        (("x",), (1,), SHAPE),
        (("x", "y"), (2,), (ROWS, 4, 10, 3)),
        (("x", "y"), (-1,), (ROWS, 4, 5, 6)),
        (("x", "y"), (), (Dim("rows", 2), 4, 5, 3)),
        (("x", "narrow skip"), (1,), JOINED),
    ],
    ids=["three", "one", "by height", "by width", "by rows", "two dtypes"],
)
def test_what_is_joined_otherwise_stays(
    fused: Check, parts: tuple[str, ...], dims: tuple[int, ...], shape: tuple[Any, ...]
) -> None:
    part = graph(
        node("cat", "cat.default", tuple(map(Ref, parts)), *dims, shape=shape), norm("norm", "cat", shape=shape)
    )
    result = fused(part)
    assert result.graph.nodes == part.nodes
    assert (result.found, result.fused) == (1, 0)


def test_a_norm_with_a_shift_of_its_own_stays(fused: Check) -> None:
    part = graph(SUM, norm("norm", "sum", Ref("t")))
    result = fused(part)
    assert result.graph.nodes == part.nodes
    assert (result.found, result.fused) == (0, 0)


@pytest.mark.parametrize("position", [1, 2])
def test_a_norm_whose_weights_come_later_than_the_sum_stays(fused: Check, position: int) -> None:
    """The sum is read before they are there."""
    own = norm("norm", "sum")
    args = (*own.args[:position], Ref("late"), *own.args[position + 1 :])
    part = graph(
        SUM,
        node("early", "neg.default", Ref("sum")),
        node("late", "neg.default", Ref("g4"), shape=(4,)),
        own.replace(args=args),
        node("out", "add.Tensor", Ref("early"), Ref("norm")),
    )
    result = fused(part)
    assert result.graph.nodes == part.nodes
    assert (result.found, result.fused) == (1, 0)
