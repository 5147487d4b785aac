"""Channels last, on graphs of a few nodes, with the strides that torch gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ldmrt.engines.protocol import TensorSpec
from ldmrt.export.passes.layout import layout
from ldmrt.graph import Dim, Graph, Node, Ref, from_json, to_json

F64 = torch.float64
ROWS = Dim("rows")
PICTURE = (ROWS, 4, 6, 5)
LAST = {"memory_format": torch.channels_last}
Same = Callable[[Graph, Graph], None]
Interpret = Callable[..., dict[str, torch.Tensor]]


def node(name: str, op: str, *args: Any, shape: tuple[Any, ...] = PICTURE, **kwargs: Any) -> Node:
    return Node(name, op if op.startswith("ldmrt.") else f"aten.{op}", args, kwargs, shape, F64)


def conv(name: str, source: str, weight: str = "w") -> Node:
    padding = ((1, 1), (1, 1)) if weight == "w" else ()
    return node(name, "conv2d.default", Ref(source), Ref(weight), None, *padding)


def graph(*nodes: Node) -> Graph:
    return Graph(
        name="part",
        inputs=(
            TensorSpec("x", ("rows", 4, 6, 5), F64),
            TensorSpec("y", ("rows", 4, 6, 5), F64),
            TensorSpec("t", ("rows", 4, 1, 1), F64),
        ),
        weights={
            "w": TensorSpec("w", (4, 4, 3, 3), F64),
            "pixel": TensorSpec("pixel", (4, 4, 1, 1), F64),
            "g": TensorSpec("g", (4,), F64),
        },
        constants={},
        nodes=nodes,
        outputs={"out": nodes[-1].name},
    )


def ops(part: Graph) -> list[str]:
    return [item.op.removeprefix("aten.").partition(".")[0] for item in part.nodes]


def moved(interpret: Interpret, part: Graph) -> list[str]:
    """Names of the nodes whose value is a copy of what they read; every convolution is seen to be channels last."""
    copies = []

    def watch(call: Node, arguments: list[Any], value: Any) -> None:
        if call.op == "aten.conv2d.default":
            assert all(item.is_contiguous(memory_format=torch.channels_last) for item in (*arguments[:2], value)), call
        moves = call.op in ("aten.contiguous.default", "aten.reshape.default")
        if moves and value.data_ptr() != arguments[0].data_ptr():
            copies.append(call.name)

    def random(spec: TensorSpec) -> torch.Tensor:
        return torch.rand([3 if isinstance(size, str) else size for size in spec.shape], dtype=spec.dtype)

    inputs = {spec.name: random(spec) for spec in part.inputs}
    interpret(from_json(to_json(part), {}), inputs, {name: random(spec) for name, spec in part.weights.items()}, watch)
    return copies


def test_two_convolutions(assert_same: Same, interpret: Interpret) -> None:
    part = graph(conv("c", "x"), node("s", "silu.default", Ref("c")), conv("out", "s"))
    laid = layout(part)
    assert ops(laid) == ["contiguous", "contiguous", "conv2d", "silu", "conv2d"]
    assert [(item.args, item.kwargs) for item in laid.nodes[:2]] == [((Ref("x"),), LAST), ((Ref("w"),), LAST)]
    assert moved(interpret, laid) == ["x.channels_last", "w.channels_last"]
    assert_same(part, laid)


def test_a_weight_of_one_pixel_is_in_order(assert_same: Same, interpret: Interpret) -> None:
    part = graph(conv("c", "x", "pixel"), conv("out", "c", "pixel"))
    laid = layout(part)
    assert ops(laid) == ["contiguous", "conv2d", "conv2d"]
    assert moved(interpret, laid) == ["x.channels_last"]
    assert_same(part, laid)


def test_attention_between_pixels_copies_nothing(assert_same: Same, interpret: Interpret) -> None:
    pixels = (ROWS, 6, 5, 4)
    part = graph(
        conv("c", "x"),
        node("norm", "ldmrt.group_norm_silu.default", Ref("c"), Ref("g"), None, 2, 1e-3, False),
        node("by pixel", "permute.default", Ref("norm"), (0, 2, 3, 1), shape=pixels),
        node("flat", "reshape.default", Ref("by pixel"), (ROWS, 30, 4), shape=(ROWS, 30, 4)),
        node("work", "neg.default", Ref("flat"), shape=(ROWS, 30, 4)),
        node("wide", "reshape.default", Ref("work"), (ROWS, 6, 5, 4), shape=pixels),
        node("back", "permute.default", Ref("wide"), (0, 3, 1, 2)),
        node("copy", "contiguous.default", Ref("back")),
        node("sum", "add.Tensor", Ref("copy"), Ref("c")),
        conv("out", "sum"),
    )
    laid = layout(part)
    assert len(laid.nodes) == len(part.nodes) + 2
    assert next(item for item in laid.nodes if item.name == "copy").kwargs == LAST
    assert moved(interpret, laid) == ["x.channels_last", "w.channels_last"]
    assert_same(part, laid)


def test_the_attention_of_the_vae(assert_same: Same, interpret: Interpret) -> None:
    flat, turned = (ROWS, 4, 30), (ROWS, 30, 4)
    part = graph(
        conv("c", "x"),
        node("flat", "view.default", Ref("c"), flat, shape=flat),
        node("there", "transpose.int", Ref("flat"), 1, 2, shape=turned),
        node("and back", "transpose.int", Ref("there"), -1, -2, shape=flat),
        node("norm", "ldmrt.group_norm_silu.default", Ref("and back"), Ref("g"), None, 2, 1e-3, False, shape=flat),
        node("turned", "transpose.int", Ref("norm"), 1, 2, shape=turned),
        node("work", "neg.default", Ref("turned"), shape=turned),
        node("again", "transpose.int", Ref("work"), -1, -2, shape=flat),
        node("wide", "reshape.default", Ref("again"), PICTURE),
        node("sum", "add.Tensor", Ref("wide"), Ref("c")),
        conv("out", "sum"),
    )
    laid = layout(part)
    assert ops(laid).count("transpose") == 2
    assert "view" not in ops(laid)
    assert moved(interpret, laid) == ["x.channels_last", "w.channels_last"]
    assert_same(part, laid)


def test_transposes_that_undo_each_other(assert_same: Same) -> None:
    turned = (ROWS, 4, 5, 6)
    turns = [
        node(f"t{number + 1}", "transpose.int", Ref(f"t{number}" if number else "x"), 2, axis, shape=shape)
        for number, (axis, shape) in enumerate([(3, turned), (-1, PICTURE), (3, turned), (3, PICTURE)])
    ]
    part = graph(*turns, conv("c", "t4"), node("t5", "transpose.int", Ref("c"), 1, 0, shape=(4, ROWS, 6, 5)))
    part = graph(*part.nodes, node("out", "transpose.int", Ref("t5"), 1, 2, shape=(4, 6, ROWS, 5)))
    laid = layout(part)
    assert ops(laid) == ["contiguous", "contiguous", "conv2d", "transpose", "transpose"]
    assert_same(part, laid)


def test_pictures_that_meet_are_put_in_one_order(assert_same: Same, interpret: Interpret) -> None:
    wide = (ROWS, 8, 6, 5)
    part = graph(
        conv("c", "x"),
        node("scaled", "mul.Tensor", Ref("c"), Ref("t")),
        node("sum", "add.Tensor", Ref("y"), Ref("scaled")),
        node("cat", "cat.default", (Ref("y"), Ref("sum")), 1, shape=wide),
        node("half", "slice.Tensor", Ref("cat"), 1, 2, 6),
        node("work", "neg.default", Ref("half")),
        conv("out", "work"),
    )
    laid = layout(part)
    # `t` is one number a channel, and is left alone; `y` is put in order once.
    assert [item.name for item in laid.nodes if item.op == "aten.contiguous.default"] == [
        "x.channels_last",
        "w.channels_last",
        "y.channels_last",
        "work.channels_last",
    ]
    assert {"x.channels_last", "w.channels_last", "y.channels_last"} <= set(moved(interpret, laid))
    assert_same(part, laid)


def test_sizes_that_change(assert_same: Same, interpret: Interpret) -> None:
    large = (ROWS, 4, 12, 10)
    part = graph(
        conv("c", "x"),
        node("up", "upsample_nearest2d.vec", Ref("c"), None, (2.0, 2.0), shape=large),
        node("pad", "pad.default", Ref("up"), (0, 1, 0, 1), "constant", 0.0, shape=(ROWS, 4, 13, 11)),
        node("out", "conv2d.default", Ref("pad"), Ref("w"), None, (2, 2), shape=(ROWS, 4, 6, 5)),
    )
    laid = layout(part)
    assert len(laid.nodes) == len(part.nodes) + 2
    assert moved(interpret, laid) == ["x.channels_last", "w.channels_last"]
    assert_same(part, laid)


def test_a_graph_without_convolutions_stays() -> None:
    part = graph(node("flat", "view.default", Ref("x"), (ROWS, 120), shape=(ROWS, 120)))
    assert layout(part) is part
