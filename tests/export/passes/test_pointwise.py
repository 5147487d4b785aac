"""Convolutions of single pixels: linear layers over the channels, and no turning to and fro between two of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ldmrt.engines.protocol import TensorSpec
from ldmrt.export.passes.pattern import Pass
from ldmrt.export.passes.pointwise import pointwise
from ldmrt.graph import Dim, Graph, Node, Ref

F64 = torch.float64
ROWS = Dim("rows")
PICTURE, WIDE = (ROWS, 8, 4, 3), (ROWS, 16, 4, 3)
PIXELS, LINES = (ROWS, 4, 3, 16), (ROWS, 12, 16)
TO_PIXELS, TO_PICTURE = (0, 2, 3, 1), (0, 3, 1, 2)
PLAIN = ((1, 1), (0, 0), (1, 1), 1)
Check = Callable[[Graph], Pass]


def node(name: str, op: str, *args: Any, shape: tuple[Any, ...] = WIDE, **kwargs: Any) -> Node:
    return Node(name, f"aten.{op}", args, kwargs, shape, F64)


def conv(
    name: str, source: str, weight: str = "wide", *rest: Any, shape: tuple[Any, ...] = WIDE, **kwargs: Any
) -> Node:
    return node(name, "conv2d.default", Ref(source), Ref(weight), *rest, shape=shape, **kwargs)


def graph(*nodes: Node, outputs: tuple[str, ...] = ()) -> Graph:
    weights = {
        "wide": (16, 8, 1, 1),
        "square": (16, 16, 1, 1),
        "odd": (12, 8, 1, 1),
        "from odd": (8, 12, 1, 1),
        "halves": (16, 4, 1, 1),
        "filter": (16, 8, 3, 3),
        "bias": (16,),
    }
    return Graph(
        name="part",
        inputs=(
            TensorSpec("x", ("rows", 8, 4, 3), F64),
            TensorSpec("p", ("rows", 4, 3, 16), F64),
            TensorSpec("odd x", ("rows", 12, 4, 3), F64),
            TensorSpec("one", (8, 4, 3), F64),
            TensorSpec("tall", ("rows", 8, "tokens", 3), F64),
        ),
        weights={name: TensorSpec(name, shape, F64) for name, shape in weights.items()},
        constants={},
        nodes=nodes,
        outputs={name: name for name in outputs or (nodes[-1].name,)},
    )


@pytest.fixture
def fused(assert_same: Callable[[Graph, Graph], None]) -> Check:
    """The pass, its result compared with what it was given."""

    def check(part: Graph) -> Pass:
        result = pointwise(part)
        assert_same(part, result.graph)
        return result

    return check


def ops(part: Graph) -> list[str]:
    return [item.op.removeprefix("aten.").partition(".")[0] for item in part.nodes]


@pytest.mark.parametrize(
    ("rest", "by_name"),
    [
        ((), {}),
        ((None, *PLAIN), {}),
        ((Ref("bias"), *PLAIN), {}),
        ((Ref("bias"),), {"stride": (1, 1)}),
        ((), {"bias": Ref("bias")}),
    ],
)
def test_one_layer(fused: Check, rest: tuple[Any, ...], by_name: dict[str, Any]) -> None:
    result = fused(graph(conv("c", "x", "wide", *rest, **by_name), node("out", "neg.default", Ref("c"))))
    assert ops(result.graph) == ["permute", "reshape", "reshape", "linear", "reshape", "permute", "neg"]
    linear = result.graph.nodes[3]
    assert len(linear.args) == 2 + (Ref("bias") in (*rest, *by_name.values()))
    assert linear.shape == LINES
    assert (result.found, result.fused) == (1, 1)


def test_the_result_keeps_its_name(fused: Check) -> None:
    """As an output, and for all that read it."""
    result = fused(graph(conv("c", "x"), node("out", "add.Tensor", Ref("c"), Ref("c")), outputs=("c", "out")))
    assert result.graph.outputs == {"c": "c", "out": "out"}


def test_a_transformer_between_two(fused: Check) -> None:
    """As SD1.5 has it: pixels come out of the one and go into the other, and none is turned in between."""
    result = fused(
        graph(
            conv("in", "x"),
            node("pixels", "permute.default", Ref("in"), TO_PIXELS, shape=PIXELS),
            node("lines", "reshape.default", Ref("pixels"), LINES, shape=LINES),
            node("work", "neg.default", Ref("lines"), shape=LINES),
            node("square again", "view.default", Ref("work"), PIXELS, shape=PIXELS),
            node("picture", "permute.default", Ref("square again"), TO_PICTURE),
            node("copy", "contiguous.default", Ref("picture")),
            conv("out", "copy", "square", Ref("bias")),
        )
    )
    assert ops(result.graph) == [
        *("permute", "reshape", "reshape", "linear"),
        "neg",
        *("reshape", "linear", "reshape", "permute"),
    ]
    assert result.graph.nodes[4].args == (Ref("in.linear"),)
    assert result.graph.nodes[6].args[0] == Ref("work")
    assert (result.found, result.fused) == (2, 2)


def test_a_picture_that_something_else_reads_is_still_made(fused: Check) -> None:
    result = fused(
        graph(
            node("picture", "permute.default", Ref("p"), TO_PICTURE),
            node("copy", "contiguous.default", Ref("picture")),
            conv("c", "copy", "square"),
            node("out", "add.Tensor", Ref("copy"), Ref("c")),
        )
    )
    assert ops(result.graph)[:2] == ["permute", "contiguous"]
    assert "neg" not in ops(result.graph)
    assert next(item for item in result.graph.nodes if item.name == "c.pixels").args[0] == Ref("p")


def test_other_turns_and_shapes_stay(fused: Check) -> None:
    """What undoes nothing: the other order, another shape in the end, something done in between."""
    turned = (ROWS, 3, 16, 4)
    part = graph(
        node("picture", "permute.default", Ref("p"), TO_PICTURE),
        node("again", "permute.default", Ref("picture"), TO_PICTURE, shape=turned),
        node("flat", "reshape.default", Ref("again"), (ROWS, 48, 4), shape=(ROWS, 48, 4)),
        node("other", "reshape.default", Ref("flat"), (ROWS, 4, 48), shape=(ROWS, 4, 48)),
        node("work", "neg.default", Ref("picture")),
        node("back", "permute.default", Ref("work"), TO_PIXELS, shape=PIXELS),
        node("mirror", "permute.default", Ref("p"), (0, 3, 2, 1), shape=(ROWS, 16, 3, 4)),
        node("not back", "permute.default", Ref("mirror"), TO_PIXELS, shape=(ROWS, 3, 4, 16)),
        outputs=("other", "back", "not back"),
    )
    assert fused(part).graph.nodes == part.nodes


def test_a_weight_that_is_computed(fused: Check) -> None:
    part = graph(node("w", "neg.default", Ref("wide"), shape=(16, 8, 1, 1)), conv("out", "x", "w"))
    result = fused(part)
    assert ops(result.graph)[0] == "neg"
    assert result.fused == 1


@pytest.mark.parametrize(
    "layer",
    [
        conv("out", "x", "wide", None, (2, 2), shape=(ROWS, 16, 2, 2)),
        conv("out", "x", "wide", None, (1, 1), (1, 1), shape=(ROWS, 16, 6, 5)),
        conv("out", "x", "wide", padding=(0, 1), shape=(ROWS, 16, 4, 5)),
        conv("out", "x", "halves", None, *PLAIN[:3], 2),
        conv("out", "x", "odd", shape=(ROWS, 12, 4, 3)),
        conv("out", "odd x", "from odd", shape=(ROWS, 8, 4, 3)),
        conv("out", "one", shape=(16, 4, 3)),
        conv("out", "tall", shape=(ROWS, 16, Dim("tokens"), 3)),
    ],
    ids=["a stride", "padding", "padding by name", "groups", "odd out", "odd in", "no rows", "a free height"],
)
def test_other_convolutions_of_a_pixel_stay(fused: Check, layer: Node) -> None:
    part = graph(layer)
    result = fused(part)
    assert result.graph.nodes == part.nodes
    assert (result.found, result.fused) == (1, 0)


def test_convolutions_of_more_pixels_are_not_meant(fused: Check) -> None:
    result = fused(graph(conv("out", "x", "filter", None, (1, 1), (1, 1))))
    assert ops(result.graph) == ["conv2d"]
    assert (result.found, result.fused) == (0, 0)
