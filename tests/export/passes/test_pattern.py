"""The questions that the fusing passes ask."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ldmrt.engines.protocol import TensorSpec
from ldmrt.export.passes.pattern import Index, addends, argument, replaced
from ldmrt.graph import Dim, Graph, Node, Ref

F32 = torch.float32
SHAPE = (Dim("rows"), 4)


def node(name: str, op: str, *args: Any, **kwargs: Any) -> Node:
    return Node(name, f"aten.{op}", args, kwargs, SHAPE, F32)


GRAPH = Graph(
    name="part",
    inputs=(TensorSpec("x", ("rows", 4), F32),),
    weights={"w": TensorSpec("w", (4,), torch.float16)},
    constants={"c": torch.arange(4)},
    nodes=(
        node("a", "neg.default", Ref("x")),
        node("b", "add.Tensor", Ref("a"), Ref("w"), alpha=1),
        node("c2", "mul.Tensor", Ref("b"), Ref("b")),
        node("d", "neg.default", Ref("c2")),
    ),
    outputs={"out": "d", "c2": "c2"},
)


def test_makers_and_readers() -> None:
    index = Index(GRAPH)
    _, b, c2, d = GRAPH.nodes
    assert index.maker(Ref("b")) is b
    assert index.maker(Ref("b"), "aten.neg.default", "aten.add.Tensor") is b
    assert index.maker(Ref("b"), "aten.neg.default") is None
    assert index.maker(Ref("x")) is None
    assert index.maker(1.0) is None
    assert index.readers(b) == [c2, c2]
    assert index.readers(d) == []


def test_the_sole_reader() -> None:
    index = Index(GRAPH)
    a, b, c2, d = GRAPH.nodes
    assert index.sole_reader(a) is b
    assert index.sole_reader(a, "aten.neg.default") is None
    assert index.sole_reader(b) is None  # read twice
    assert index.sole_reader(c2) is None  # an output
    assert index.sole_reader(d) is None


def test_shapes_and_dtypes_of_all_kinds_of_values() -> None:
    index = Index(GRAPH)
    assert [index.shape(Ref(name)) for name in ("x", "w", "c", "b")] == [SHAPE, (4,), (4,), SHAPE]
    assert [index.dtype(Ref(name)) for name in ("x", "w", "c", "b")] == [F32, torch.float16, torch.int64, F32]
    assert index.shape(2) is None


def test_fresh_names() -> None:
    index = Index(GRAPH)
    assert [index.fresh(name) for name in ("new", "new", "x", "w", "c", "a")] == [
        "new",
        "new.2",
        "x.2",
        "w.2",
        "c.2",
        "a.2",
    ]


def test_nodes_in_the_place_of_others() -> None:
    b = GRAPH.nodes[1]
    new = replaced(GRAPH, {"a": (), "b": (node("half", "neg.default", Ref("x")), b.replace(args=(Ref("half"), 1.0)))})
    assert [item.name for item in new.nodes] == ["half", "b", "c2", "d"]
    assert not new.weights
    assert new.outputs == GRAPH.outputs


def test_arguments_by_position_and_by_name() -> None:
    part = node("n", "op", 1, 2, third=3)
    assert [argument(part, number, name, 9) for number, name in enumerate(("first", "second", "third", "fourth"))] == [
        1,
        2,
        3,
        9,
    ]


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (node("s", "add.Tensor", Ref("x"), Ref("a")), (Ref("x"), Ref("a"))),
        (node("s", "add.Tensor", Ref("x"), Ref("a"), alpha=1), (Ref("x"), Ref("a"))),
        (node("s", "add.Tensor", Ref("x"), Ref("a"), alpha=2), None),
        (node("s", "add.Tensor", Ref("x"), 2), None),
        (node("s", "sub.Tensor", Ref("x"), Ref("a")), None),
    ],
)
def test_addends(part: Node, expected: tuple[Ref, Ref] | None) -> None:
    assert addends(part) == expected
