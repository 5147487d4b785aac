"""Biases that the operator behind a layer adds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ldmrt.engines.protocol import TensorSpec
from ldmrt.export.passes.pattern import Pass
from ldmrt.export.passes.push_bias import push_bias
from ldmrt.graph import Dim, Graph, Node, Ref

F64 = torch.float64
ROWS = Dim("rows")
PICTURE, PIXELS, LINES = (ROWS, 4, 3, 5), (ROWS, 3, 5, 4), (ROWS, 15, 4)
TO_PICTURE = (0, 3, 1, 2)
NORM = (Ref("g"), Ref("b"), 2, 1e-3, True)
GROUP_NORM, ADD_GROUP_NORM = "ldmrt.group_norm_silu.default", "ldmrt.add_group_norm_silu.default"
ADD_LAYER_NORM, ADD_UPSAMPLE = "ldmrt.add_layer_norm.default", "ldmrt.add_upsample.default"
LAYER_NORM = ((4,), Ref("g"), Ref("b"), 1e-3)
Check = Callable[[Graph], Pass]


def node(name: str, op: str, *args: Any, shape: tuple[Any, ...] = PICTURE, **kwargs: Any) -> Node:
    return Node(name, op if op.startswith(("ldmrt.", "python.")) else f"aten.{op}", args, kwargs, shape, F64)


def conv(name: str, source: str = "x", bias: str | None = "first") -> Node:
    return node(name, "conv2d.default", Ref(source), Ref("w"), None if bias is None else Ref(bias), (1, 1), (1, 1))


def linear(name: str, source: str = "p", bias: str | None = "first") -> Node:
    rest = () if bias is None else (Ref(bias),)
    return node(name, "linear.default", Ref(source), Ref("m"), *rest, shape=LINES)


def picture(name: str, source: str, *, copy: bool = False) -> list[Node]:
    """A picture of the pixels that a linear layer has made."""
    turned = f"{name}.turned" if copy else name
    return [
        node(f"{name}.lines", "reshape.default", Ref(source), PIXELS, shape=PIXELS),
        node(turned, "permute.default", Ref(f"{name}.lines"), TO_PICTURE),
        *([node(name, "contiguous.default", Ref(turned))] if copy else []),
    ]


def pair(name: str, op: str, *args: Any, shape: tuple[Any, ...] = PICTURE) -> list[Node]:
    """An operator of two results, `NAME.total` and `NAME`."""
    return [
        node(f"{name}.both", op, *args, shape=()),
        node(f"{name}.total", "python.getitem", Ref(f"{name}.both"), 0, shape=shape),
        node(name, "python.getitem", Ref(f"{name}.both"), 1, shape=shape),
    ]


def graph(*nodes: Node, outputs: tuple[str, ...] = ()) -> Graph:
    weights = {
        "w": (4, 4, 3, 3),
        "m": (4, 4),
        "wide": (8, 4),
        "wide bias": (8,),
        **dict.fromkeys(("first", "second", "g", "b"), (4,)),
        "w5": (5, 4, 3, 3),
        "bias5": (5,),
        "m3": (3, 4),
        "bias3": (3,),
    }
    return Graph(
        name="part",
        inputs=(
            TensorSpec("x", ("rows", 4, 3, 5), F64),
            TensorSpec("y", ("rows", 4, 3, 5), F64),
            TensorSpec("t", ("rows", 4), F64),
            TensorSpec("p", ("rows", 15, 4), F64),
            TensorSpec("q", ("rows", 15, 4), F64),
            TensorSpec("one", (4, 3, 5), F64),
        ),
        weights={name: TensorSpec(name, shape, F64) for name, shape in weights.items()},
        constants={},
        nodes=nodes,
        outputs={name: name for name in outputs or (nodes[-1].name,)},
    )


@pytest.fixture
def pushed(assert_same: Callable[[Graph, Graph], None]) -> Check:
    """The pass, its result compared with what it was given."""

    def check(part: Graph) -> Pass:
        result = push_bias(part)
        assert_same(part, result.graph)
        return result

    return check


@pytest.fixture
def kept(pushed: Check) -> Callable[..., None]:
    """The pass leaves a graph as it is."""

    def check(part: Graph, *, found: int = 1) -> None:
        result = pushed(part)
        assert result.graph.nodes == part.nodes
        assert (result.found, result.fused) == (found, 0)

    return check


def ops(part: Graph) -> list[str]:
    return [item.op for item in part.nodes]


def made(part: Graph, name: str) -> Node:
    return next(item for item in part.nodes if item.name == name)


# ---------------------------------------------------------------------------------------------------- convolutions


def test_a_convolution_and_its_norm(pushed: Check) -> None:
    result = pushed(graph(conv("c"), node("norm", GROUP_NORM, Ref("c"), *NORM)))
    layer, norm = result.graph.nodes
    assert layer.args == (Ref("x"), Ref("w"), None, (1, 1), (1, 1))
    assert norm.args == (Ref("c"), *NORM, None, Ref("first"))
    assert (result.found, result.fused) == (1, 1)


def test_beside_the_shift_by_time(pushed: Check) -> None:
    result = pushed(graph(conv("c"), node("norm", GROUP_NORM, Ref("c"), *NORM, Ref("t"))))
    assert result.graph.nodes[1].args == (Ref("c"), *NORM, Ref("t"), Ref("first"))


def test_a_bias_given_by_name(pushed: Check) -> None:
    layer = node("c", "conv2d.default", Ref("x"), Ref("w"), bias=Ref("first"), padding=(1, 1))
    result = pushed(graph(layer, node("norm", GROUP_NORM, Ref("c"), *NORM)))
    assert result.graph.nodes[0].args == (Ref("x"), Ref("w"), None)
    assert result.graph.nodes[0].kwargs == {"padding": (1, 1)}
    assert result.fused == 1


@pytest.mark.parametrize("output", [False, True])
def test_a_norm_gives_the_others_what_it_reads(pushed: Check, output: bool) -> None:
    """As after a U-Net's first convolution, which the first residual sum and a skip connection read too."""
    nodes = [
        conv("c"),
        node("early", "neg.default", Ref("c")),
        node("norm", GROUP_NORM, Ref("c"), *NORM),
        node("out", "add.Tensor", Ref("norm"), Ref("early")),
    ]
    result = pushed(graph(*nodes, outputs=("out", "c") if output else ("out",)))
    assert ops(result.graph) == [
        *("aten.conv2d.default", ADD_GROUP_NORM, "python.getitem", "python.getitem"),
        *("aten.neg.default", "aten.add.Tensor"),
    ]
    assert result.graph.nodes[1].args == (Ref("c.bare"), None, None, *NORM, Ref("first"))
    assert [item.name for item in result.graph.nodes[2:4]] == ["c", "norm"]
    assert (result.found, result.fused) == (1, 1)


def test_two_norms_of_one_convolution(pushed: Check) -> None:
    """The first gives the other what it reads."""
    norms = [node(name, GROUP_NORM, Ref("c"), *NORM[:4], name == "norm") for name in ("norm", "other")]
    result = pushed(graph(conv("c"), *norms, outputs=("norm", "other")))
    assert ops(result.graph)[1:] == [ADD_GROUP_NORM, "python.getitem", "python.getitem", GROUP_NORM]
    assert made(result.graph, "other").args[0] == Ref("c")
    assert (result.found, result.fused) == (1, 1)


def test_both_addends(pushed: Check) -> None:
    """A residual block's last convolution, and its shortcut: one sum of two biases."""
    joined = (ROWS, 8, 3, 5)
    wide = (Ref("wide bias"), Ref("wide bias"), *NORM[2:])
    nodes = pair("norm", ADD_GROUP_NORM, Ref("c"), Ref("d"), Ref("y"), *wide, shape=joined)
    result = pushed(graph(conv("c"), conv("d", "y", "second"), *nodes, outputs=("norm", "norm.total")))
    assert ops(result.graph)[2:4] == ["aten.add.Tensor", ADD_GROUP_NORM]
    total, norm = result.graph.nodes[2:4]
    assert total.args == (Ref("first"), Ref("second"))
    assert total.shape == (4,)
    assert norm.args == (Ref("c"), Ref("d"), Ref("y"), *wide, Ref(total.name))
    assert (result.found, result.fused) == (2, 2)


@pytest.mark.parametrize("swapped", [False, True])
def test_one_addend(pushed: Check, swapped: bool) -> None:
    args = (Ref("y"), Ref("c")) if swapped else (Ref("c"), Ref("y"))
    result = pushed(graph(conv("c"), *pair("norm", ADD_GROUP_NORM, *args, None, *NORM)))
    assert result.graph.nodes[1].args == (*args, None, *NORM, Ref("first"))
    assert result.fused == 1


def test_what_is_joined_behind_keeps_its_bias(kept: Callable[..., None]) -> None:
    """The operator adds a bias to what stands before the joint."""
    wide = (Ref("wide bias"), Ref("wide bias"), *NORM[2:])
    nodes = pair("norm", ADD_GROUP_NORM, Ref("x"), None, Ref("c"), *wide, shape=(ROWS, 8, 3, 5))
    kept(graph(conv("c"), *nodes, outputs=("norm", "norm.total")), found=0)


def test_before_an_upsampling(pushed: Check) -> None:
    large = (ROWS, 4, 6, 10)
    up = node("up", ADD_UPSAMPLE, Ref("x"), Ref("c"), None, 2, shape=large)
    result = pushed(graph(conv("c"), up))
    assert result.graph.nodes[1].args == (Ref("x"), Ref("c"), Ref("first"), 2)


def test_a_sum_that_no_norm_reads(pushed: Check) -> None:
    part = graph(conv("c"), node("sum", "add.Tensor", Ref("c"), Ref("y")), node("out", "neg.default", Ref("sum")))
    result = pushed(part)
    assert ops(result.graph) == ["aten.conv2d.default", ADD_UPSAMPLE, "aten.neg.default"]
    assert result.graph.nodes[1].args == (Ref("c"), Ref("y"), Ref("first"), 1)
    assert (result.found, result.fused) == (1, 1)


def test_a_layer_that_two_sums_read_keeps_its_bias(kept: Callable[..., None]) -> None:
    sums = [node(f"sum {name}", "add.Tensor", Ref("c"), Ref(name)) for name in "xy"]
    kept(graph(conv("c"), *sums, outputs=("sum x", "sum y")), found=0)


@pytest.mark.parametrize(
    "total",
    [
        node("sum", "add.Tensor", Ref("c"), Ref("y"), alpha=2),
        node("sum", "add.Tensor", Ref("c"), 1.5),
        node("sum", "add.Tensor", Ref("c"), Ref("mean")),
        node("sum", "add.Tensor", Ref("c"), Ref("c")),
        node("sum", "sub.Tensor", Ref("c"), Ref("y")),
    ],
    ids=["scaled", "a number", "broadcast", "with itself", "a difference"],
)
def test_other_sums_stay(kept: Callable[..., None], total: Node) -> None:
    mean = node("mean", "mean.dim", Ref("y"), (2, 3), True, shape=(ROWS, 4, 1, 1))
    kept(graph(*([mean] if Ref("mean") in total.args else []), conv("c"), total), found=0)


@pytest.mark.parametrize("output", [False, True])
def test_who_else_reads_the_result_needs_the_bias(kept: Callable[..., None], output: bool) -> None:
    """With a shift, a norm does not give what it reads."""
    nodes = [
        conv("c"),
        node("norm", GROUP_NORM, Ref("c"), *NORM, Ref("t")),
        node("out", "sub.Tensor", Ref("norm"), Ref("y") if output else Ref("c")),
    ]
    kept(graph(*nodes, outputs=("out", "c") if output else ("out",)))


def test_a_layer_that_is_both_addends_keeps_its_bias(kept: Callable[..., None]) -> None:
    """It would have to be added twice."""
    nodes = pair("norm", ADD_GROUP_NORM, Ref("c"), Ref("c"), None, *NORM)
    kept(graph(conv("c"), *nodes, outputs=("norm", "norm.total")))


@pytest.mark.parametrize("op", ["layer_norm.default", ADD_LAYER_NORM, "ldmrt.geglu.default"])
def test_a_convolution_before_what_has_its_channels_last_stays(kept: Callable[..., None], op: str) -> None:
    """Its bias is one number a channel, and those stand elsewhere."""
    layer = node("c", "conv2d.default", Ref("s"), Ref("w"), Ref("first"), (1, 1), (1, 1), shape=(ROWS, 4, 3, 4))
    if op == ADD_LAYER_NORM:
        nodes = pair("out", op, Ref("c"), None, *LAYER_NORM[1:], shape=layer.shape)[::2]
    elif op == "layer_norm.default":
        nodes = [node("out", op, Ref("c"), *LAYER_NORM, shape=layer.shape)]
    else:
        nodes = [node("out", op, Ref("c"), shape=(ROWS, 4, 3, 2))]
    part = graph(layer, *nodes)
    kept(part.replace(inputs=(TensorSpec("s", ("rows", 4, 3, 4), F64),)), found=0)


def test_beside_a_bias_that_it_adds_already(pushed: Check) -> None:
    nodes = pair("norm", ADD_GROUP_NORM, Ref("y"), Ref("c"), None, *NORM, Ref("second"))
    result = pushed(graph(conv("c"), *nodes))
    assert made(result.graph, "norm.both.x_bias").args == (Ref("second"), Ref("first"))
    assert made(result.graph, "norm.both").args[8] == Ref("norm.both.x_bias")
    assert result.fused == 1


def test_a_bias_that_is_computed_stays(kept: Callable[..., None]) -> None:
    bias = node("late", "neg.default", Ref("first"), shape=(4,))
    kept(graph(bias, conv("c", bias="late"), node("norm", GROUP_NORM, Ref("c"), *NORM)), found=0)


def test_a_layer_without_a_bias(kept: Callable[..., None]) -> None:
    kept(graph(conv("c", bias=None), node("norm", GROUP_NORM, Ref("c"), *NORM)), found=0)


def test_a_picture_without_rows_stays(kept: Callable[..., None]) -> None:
    """Its second dimension is its height, not its channels."""
    layer = node("c", "conv2d.default", Ref("one"), Ref("w"), Ref("first"), (1, 1), (1, 1), shape=(4, 3, 5))
    weights = (Ref("bias3"), Ref("bias3"), 3, 1e-3, True)
    kept(graph(layer, node("norm", GROUP_NORM, Ref("c"), *weights, shape=(4, 3, 5))), found=0)


@pytest.mark.parametrize("position", [1, 2])
def test_a_norm_whose_weights_come_later_than_the_layer_stays(kept: Callable[..., None], position: int) -> None:
    """It cannot stand where the layer stands."""
    args = (Ref("c"), *NORM)
    late = node("late", "neg.default", Ref("g"), shape=(4,))
    norm = node("norm", GROUP_NORM, *args[:position], Ref("late"), *args[position + 1 :])
    kept(graph(conv("c"), node("early", "neg.default", Ref("c")), late, norm, outputs=("norm", "early")))


# ---------------------------------------------------------------------------------------------------- linear layers


def test_a_gate(pushed: Check) -> None:
    layer = node("l", "linear.default", Ref("p"), Ref("wide"), Ref("wide bias"), shape=(ROWS, 15, 8))
    result = pushed(graph(layer, node("out", "ldmrt.geglu.default", Ref("l"), shape=LINES)))
    assert [item.args for item in result.graph.nodes] == [(Ref("p"), Ref("wide")), (Ref("l"), Ref("wide bias"))]


@pytest.mark.parametrize("count", [1, 2])
def test_a_residual_sum_and_its_layer_norm(pushed: Check, count: int) -> None:
    layers = [linear("l"), linear("k", "q", "second")][:count]
    args = (Ref("l"), Ref("k") if count == 2 else Ref("q"), *LAYER_NORM[1:])
    result = pushed(graph(*layers, *pair("norm", ADD_LAYER_NORM, *args, shape=LINES), outputs=("norm", "norm.total")))
    assert "aten.add.Tensor" not in ops(result.graph) or count == 2
    assert made(result.graph, "norm.both").args[:5] == args
    assert made(result.graph, "norm.both").args[5] == (Ref("first") if count == 1 else Ref("norm.both.x_bias"))
    assert (result.found, result.fused) == (count, count)


@pytest.mark.parametrize("outputs", [("norm",), ("norm", "l"), ("norm", "other")])
def test_a_layer_norm_of_a_layer(pushed: Check, outputs: tuple[str, ...]) -> None:
    """As at the beginning of a transformer, whose first residual sum reads the layer's result too."""
    nodes = [
        linear("l"),
        node("norm", "layer_norm.default", Ref("l"), *LAYER_NORM, shape=LINES),
        node("other", "neg.default", Ref("l"), shape=LINES),
    ]
    result = pushed(graph(*nodes, outputs=outputs))
    assert ops(result.graph)[:2] == ["aten.linear.default", ADD_LAYER_NORM]
    assert result.graph.nodes[0].args == (Ref("p"), Ref("m"))
    assert result.graph.nodes[1].args == (Ref("l.bare"), None, Ref("g"), Ref("b"), 1e-3, Ref("first"))
    assert "aten.layer_norm.default" not in ops(result.graph)
    assert (result.found, result.fused) == (1, 1)


def test_a_layer_norm_without_weights(pushed: Check) -> None:
    result = pushed(graph(linear("l"), node("norm", "layer_norm.default", Ref("l"), (4,), shape=LINES)))
    assert result.graph.nodes[1].args == (Ref("l.bare"), None, None, None, 1e-5, Ref("first"))


def test_a_layer_norm_over_two_dimensions_stays(kept: Callable[..., None]) -> None:
    kept(graph(linear("l"), node("norm", "layer_norm.default", Ref("l"), (15, 4), shape=LINES)))


@pytest.mark.parametrize("by_name", [False, True])
def test_a_layer_norm_whose_weights_come_later_than_the_layer_stays(kept: Callable[..., None], by_name: bool) -> None:
    args = (Ref("l"), (4,)) if by_name else (Ref("l"), (4,), Ref("late"))
    late = node("late", "neg.default", Ref("g"), shape=(4,))
    norm = node("norm", "layer_norm.default", *args, shape=LINES, **({"weight": Ref("late")} if by_name else {}))
    kept(graph(linear("l"), node("early", "neg.default", Ref("l"), shape=LINES), late, norm, outputs=("early", "norm")))


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("count", [1, 2])
def test_a_picture_that_a_linear_layer_has_made(pushed: Check, copy: bool, count: int) -> None:
    """As at a transformer's end, with a copy in between as diffusers has it, and as a shortcut beside a convolution."""
    nodes = [linear("l"), *picture("made", "l", copy=copy), *([conv("c", bias="second")] if count == 2 else [])]
    args = (Ref("made"), Ref("c") if count == 2 else Ref("y"), None, *NORM)
    result = pushed(graph(*nodes, *pair("norm", ADD_GROUP_NORM, *args), outputs=("norm", "norm.total")))
    assert made(result.graph, "l").args == (Ref("p"), Ref("m"))
    assert made(result.graph, "norm.both").args[8] == (Ref("first") if count == 1 else Ref("norm.both.x_bias"))
    assert (result.found, result.fused) == (count, count)


def test_a_sum_of_such_a_picture(pushed: Check) -> None:
    part = graph(linear("l"), *picture("made", "l", copy=True), node("sum", "add.Tensor", Ref("made"), Ref("y")))
    result = pushed(part)
    assert result.graph.nodes[-1].args == (Ref("made"), Ref("y"), Ref("first"), 1)
    assert result.graph.nodes[-1].op == ADD_UPSAMPLE


@pytest.mark.parametrize("read", ["made", "made.turned", "made.lines", "l"])
@pytest.mark.parametrize("output", [False, True])
def test_who_else_reads_it_on_the_way_needs_the_bias(kept: Callable[..., None], read: str, output: bool) -> None:
    nodes = [linear("l"), *picture("made", "l", copy=True), node("norm", GROUP_NORM, Ref("made"), *NORM)]
    shape = {"l": LINES, "made.lines": PIXELS}.get(read, PICTURE)
    other = [] if output else [node("other", "neg.default", Ref(read), shape=shape)]
    kept(graph(*nodes, *other, outputs=("norm", read if output else "other")))


def test_channels_that_are_no_longer_those_of_the_layer(kept: Callable[..., None]) -> None:
    """Another order of dimensions, another shape, and a linear layer where a norm has its channels elsewhere."""
    square = (ROWS, 4, 4, 4)
    weights = {"four": (16, 4), "b16": (16,)}
    nodes = [
        node("l", "linear.default", Ref("s"), Ref("four"), Ref("b16"), shape=(ROWS, 4, 16)),
        node("lines", "reshape.default", Ref("l"), square, shape=square),
        node("turned", "permute.default", Ref("lines"), TO_PICTURE, shape=square),
        node("first norm", GROUP_NORM, Ref("turned"), *NORM, shape=square),
        node("k", "linear.default", Ref("s"), Ref("m"), Ref("first"), shape=(ROWS, 4, 4)),
        node("second norm", GROUP_NORM, Ref("k"), *NORM, shape=(ROWS, 4, 4)),
        node("j", "linear.default", Ref("u"), Ref("m"), Ref("second"), shape=(ROWS, 16, 4)),
        node("j lines", "reshape.default", Ref("j"), square, shape=square),
        node("other", "permute.default", Ref("j lines"), (0, 2, 3, 1), shape=square),
        node("third norm", GROUP_NORM, Ref("other"), *NORM, shape=square),
    ]
    part = graph(*nodes, outputs=("first norm", "second norm", "third norm"))
    inputs = (TensorSpec("s", ("rows", 4, 4), F64), TensorSpec("u", ("rows", 16, 4), F64))
    specs = {name: TensorSpec(name, shape, F64) for name, shape in weights.items()}
    kept(part.replace(inputs=inputs, weights={**part.weights, **specs}), found=0)


def test_a_name_that_is_taken(pushed: Check) -> None:
    taken = [node(name, "neg.default", Ref("y")) for name in ("c.bare", "norm.both")]
    nodes = [*taken, conv("c"), node("norm", GROUP_NORM, Ref("c"), *NORM)]
    result = pushed(graph(*nodes, outputs=("norm", "c", "c.bare", "norm.both")))
    names = [item.name for item in result.graph.nodes]
    assert len(set(names)) == len(names)
    assert result.fused == 1
