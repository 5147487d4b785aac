"""Channels last, on graphs of a few nodes, with the strides that torch gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ldmrt.engines.protocol import TensorSpec
from ldmrt.export.passes.fuse_upsample import fuse_upsample
from ldmrt.export.passes.layout import layout
from ldmrt.export.passes.pointwise import pointwise
from ldmrt.graph import Dim, Graph, Node, Ref, from_json, to_json

F64 = torch.float64
ROWS = Dim("rows")
PICTURE = (ROWS, 4, 6, 5)
NORM = (Ref("g"), None, 2, 1e-3, True)
# Operators that read and make pictures.
PICTURES = (
    "aten.conv2d.default",
    "ldmrt.conv2d.default",
    "ldmrt.add_group_norm_silu.default",
    "ldmrt.add_upsample.default",
)
LAST = {"memory_format": torch.channels_last}
Same = Callable[[Graph, Graph], None]
Interpret = Callable[..., dict[str, torch.Tensor]]


def node(name: str, op: str, *args: Any, shape: tuple[Any, ...] = PICTURE, **kwargs: Any) -> Node:
    return Node(name, op if op.startswith(("ldmrt.", "python.")) else f"aten.{op}", args, kwargs, shape, F64)


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
            "g8": TensorSpec("g8", (8,), F64),
            "eights": TensorSpec("eights", (8, 8, 1, 1), F64),
            "filter": TensorSpec("filter", (8, 8, 3, 3), F64),
        },
        constants={},
        nodes=nodes,
        outputs={"out": nodes[-1].name},
    )


def ops(part: Graph) -> list[str]:
    return [item.op.removeprefix("aten.").removeprefix("ldmrt.").partition(".")[0] for item in part.nodes]


def moved(interpret: Interpret, part: Graph) -> list[str]:
    """Names of the nodes whose value is a copy of what they read; all that reads pictures is seen to be channels last."""
    copies = []

    def watch(call: Node, arguments: list[Any], value: Any) -> None:
        if call.op in PICTURES:
            for item in (*arguments, *(value if isinstance(value, tuple) else (value,))):
                if isinstance(item, torch.Tensor) and item.dim() == 4:
                    assert item.is_contiguous(memory_format=torch.channels_last), call
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


def test_convolutions_of_our_own(assert_same: Same, interpret: Interpret) -> None:
    part = graph(
        node("c", "ldmrt.conv2d.default", Ref("x"), Ref("w"), 1, 1),
        node("out", "ldmrt.conv2d.default", Ref("c"), Ref("pixel"), 1, 0),
    )
    laid = layout(part)
    assert ops(laid) == ["contiguous", "contiguous", "conv2d", "conv2d"]
    assert moved(interpret, laid) == ["x.channels_last", "w.channels_last"]
    assert_same(part, laid)


def both(name: str, *args: Any, shape: tuple[Any, ...] = PICTURE) -> list[Node]:
    """A group norm of what it puts together: `NAME.total` and `NAME`."""
    return [
        node(f"{name}.both", "ldmrt.add_group_norm_silu.default", *args, shape=()),
        node(f"{name}.total", "python.getitem", Ref(f"{name}.both"), 0, shape=shape),
        node(name, "python.getitem", Ref(f"{name}.both"), 1, shape=shape),
    ]


def test_norms_of_what_they_put_together(assert_same: Same, interpret: Interpret) -> None:
    """All that they read is in order, and both of their results are known to be."""
    wide = (ROWS, 8, 6, 5)
    part = graph(
        conv("c", "x"),
        *both("sum", Ref("y"), Ref("c"), None, *NORM, Ref("g")),
        *both("joined", Ref("sum.total"), Ref("sum"), Ref("y"), Ref("g8"), None, *NORM[2:], shape=wide),
        node("c2", "conv2d.default", Ref("joined"), Ref("filter"), None, (1, 1), (1, 1), shape=wide),
        node("out", "add.Tensor", Ref("c2"), Ref("joined.total"), shape=wide),
    )
    laid = layout(part)
    put = [item.name for item in laid.nodes if item.op == "aten.contiguous.default"]
    assert put == [f"{name}.channels_last" for name in ("x", "w", "y", "filter")]
    assert moved(interpret, laid) == put
    assert_same(part, laid)


def test_norms_of_what_is_no_picture_in_order_stay(assert_same: Same) -> None:
    """Nothing says that the order of what comes in should be another; nor have three dimensions that order."""
    flat = (ROWS, 4, 30)
    part = graph(
        *both("first", Ref("x"), Ref("y"), None, *NORM),
        conv("c", "first"),
        node("flat", "flatten.using_ints", Ref("c"), 2, shape=flat),
        *both("second", Ref("flat"), None, None, *NORM, shape=flat),
        node("out", "neg.default", Ref("second"), shape=flat),
    )
    laid = layout(part)
    assert [item.op for item in laid.nodes].count("aten.contiguous.default") == 2  # for the convolution
    kept = {item.name: item for item in laid.nodes}
    assert all(kept[name] == item for item in part.nodes if (name := item.name).endswith(".both"))
    assert_same(part, laid)


def test_upsampling_gives_a_picture_in_order(assert_same: Same, interpret: Interpret) -> None:
    """Of whatever it reads; here, before any convolution."""
    part = graph(
        node("up", "ldmrt.add_upsample.default", Ref("x"), Ref("y"), Ref("g"), 1),
        conv("c", "up"),
        node("large", "ldmrt.add_upsample.default", Ref("c"), None, None, 2, shape=(ROWS, 4, 12, 10)),
        node("out", "conv2d.default", Ref("large"), Ref("w"), None, (2, 2), (1, 1)),
    )
    laid = layout(part)
    assert len(laid.nodes) == len(part.nodes) + 3
    assert moved(interpret, laid) == ["x.channels_last", "y.channels_last", "w.channels_last"]
    assert_same(part, laid)


def test_linear_layers_of_pixels_copy_nothing(assert_same: Same, interpret: Interpret) -> None:
    """A convolution of one pixel between two others."""
    wide = (ROWS, 8, 6, 5)
    part = graph(
        node("c", "cat.default", (Ref("x"), Ref("y")), 1, shape=wide),
        node("first", "conv2d.default", Ref("c"), Ref("filter"), None, (1, 1), (1, 1), shape=wide),
        node("turn", "conv2d.default", Ref("first"), Ref("eights"), Ref("g8"), shape=wide),
        node("sum", "ldmrt.add_upsample.default", Ref("turn"), Ref("first"), None, 1, shape=wide),
        node("out", "conv2d.default", Ref("sum"), Ref("filter"), None, (1, 1), (1, 1), shape=wide),
    )
    laid = layout(pointwise(part).graph)
    assert ops(laid).count("linear") == 1
    assert moved(interpret, laid) == ["c.channels_last", "filter.channels_last"]
    assert_same(part, laid)


def test_a_view_of_a_picture_made_of_pixels(assert_same: Same) -> None:
    """What was one convolution, and an upsampling alone, leave their elements in another order than a view asks for."""
    wide, flat = (ROWS, 8, 6, 5), (ROWS, 240)
    pixel = graph(
        node("c", "cat.default", (Ref("x"), Ref("y")), 1, shape=wide),
        node("turn", "conv2d.default", Ref("c"), Ref("eights"), shape=wide),
        node("out", "view.default", Ref("turn"), flat, shape=flat),
    )
    assert_same(pixel, layout(pointwise(pixel).graph))
    up = graph(
        node("up", "upsample_nearest2d.vec", Ref("x"), None, (2.0, 2.0), shape=(ROWS, 4, 12, 10)),
        node("out", "view.default", Ref("up"), (ROWS, 480), shape=(ROWS, 480)),
    )
    assert_same(up, layout(fuse_upsample(up).graph))


def test_a_graph_without_pictures_stays() -> None:
    part = graph(node("flat", "view.default", Ref("x"), (ROWS, 120), shape=(ROWS, 120)))
    assert layout(part) is part
