"""Gates and the linear layers that they alone read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ldmrt.engines.protocol import TensorSpec
from ldmrt.export.passes.fuse_linear_geglu import OPERATOR, fuse_linear_geglu
from ldmrt.graph import Dim, Graph, Node, Ref

F64 = torch.float64
WIDE, HALF = (Dim("rows"), Dim("tokens"), 6), (Dim("rows"), Dim("tokens"), 3)
Same = Callable[[Graph, Graph], None]


def node(name: str, op: str, *args: Any, shape: tuple[Any, ...] = HALF) -> Node:
    return Node(name, op if op.startswith("ldmrt.") else f"aten.{op}", args, {}, shape, F64)


def linear(*rest: Any) -> Node:
    return node("wide", "linear.default", Ref("x"), Ref("w"), *rest, shape=WIDE)


def gate(name: str = "gate", *rest: Any) -> Node:
    return node(name, "ldmrt.geglu.default", Ref("wide"), *rest)


def graph(*nodes: Node, outputs: tuple[str, ...] = ("gate",)) -> Graph:
    return Graph(
        name="part",
        inputs=(TensorSpec("x", ("rows", "tokens", 4), F64), TensorSpec("y", ("rows", "tokens", 6), F64)),
        weights={"w": TensorSpec("w", (6, 4), F64), "b": TensorSpec("b", (6,), F64)},
        constants={},
        nodes=nodes,
        outputs={name: name for name in outputs},
    )


@pytest.mark.parametrize("bias", [(), (None,), (Ref("b"),)])
def test_a_layer_and_its_gate(assert_same: Same, bias: tuple[Any, ...]) -> None:
    part = graph(linear(), gate("gate", *bias))
    result = fuse_linear_geglu(part)
    assert [item.op for item in result.graph.nodes] == [OPERATOR]
    assert result.graph.nodes[0].args == (Ref("x"), Ref("w"), *(item for item in bias if item is not None))
    assert (result.found, result.fused) == (1, 1)
    assert_same(part, result.graph)


@pytest.mark.parametrize(
    ("nodes", "outputs"),
    [
        ([linear(), gate()], ("gate", "wide")),
        ([linear(), gate(), node("other", "neg.default", Ref("wide"), shape=WIDE)], ("gate", "other")),
        ([linear(Ref("b")), gate()], ("gate",)),
        ([node("wide", "neg.default", Ref("y"), shape=WIDE), gate()], ("gate",)),
    ],
    ids=["an output", "another reader", "a bias of its own", "no layer"],
)
def test_others_stay(assert_same: Same, nodes: list[Node], outputs: tuple[str, ...]) -> None:
    part = graph(*nodes, outputs=outputs)
    result = fuse_linear_geglu(part)
    assert result.graph.nodes == part.nodes
    assert (result.found, result.fused) == (1, 0)
    assert_same(part, result.graph)
