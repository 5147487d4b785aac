"""Linear layers of one input: one product, cut into the same values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ldmrt.engines.protocol import TensorSpec
from ldmrt.export.passes.hoist import Kind, hoist
from ldmrt.export.passes.merge_linears import merge_linears
from ldmrt.graph import Dim, Graph, Node, Ref

F64 = torch.float64
ROWS, TOKENS = Dim("rows"), Dim("tokens")
Same = Callable[[Graph, Graph], None]
WIDTHS = {"a": 2, "b": 3, "c": 5, "d": 4}


def node(name: str, op: str, *args: Any, shape: tuple[Any, ...], **kwargs: Any) -> Node:
    return Node(name, f"aten.{op}", args, kwargs, shape, F64)


def linear(layer: str, source: str = "x", *, bias: bool = False, name: str = "") -> Node:
    weights = (Ref(f"{layer}.weight"), Ref(f"{layer}.bias")) if bias else (Ref(f"{layer}.weight"),)
    return node(name or layer, "linear.default", Ref(source), *weights, shape=(ROWS, TOKENS, WIDTHS[layer]))


def graph(*nodes: Node) -> Graph:
    return Graph(
        name="part",
        inputs=tuple(TensorSpec(name, ("rows", "tokens", 6), F64) for name in "xy"),
        weights={
            **{f"{name}.weight": TensorSpec(f"{name}.weight", (width, 6), F64) for name, width in WIDTHS.items()},
            **{f"{name}.bias": TensorSpec(f"{name}.bias", (width,), F64) for name, width in WIDTHS.items()},
        },
        constants={},
        nodes=nodes,
        outputs={item.name: item.name for item in nodes},
    )


def ops(part: Graph) -> list[str]:
    return [item.op.removeprefix("aten.").partition(".")[0] for item in part.nodes]


def test_three_layers(assert_same: Same) -> None:
    part = graph(linear("a"), node("n", "neg.default", Ref("x"), shape=(ROWS, TOKENS, 6)), linear("b"), linear("c"))
    result = merge_linears(part)
    assert ops(result.graph) == ["cat", "linear", "slice", "slice", "slice", "neg"]
    weights, whole, *cuts = result.graph.nodes[:5]
    assert weights.args == ((Ref("a.weight"), Ref("b.weight"), Ref("c.weight")), 0)
    assert weights.shape == (10, 6)
    assert whole.shape == (ROWS, TOKENS, 10)
    assert [cut.args[1:] for cut in cuts] == [(2, 0, 2), (2, 2, 5), (2, 5, 10)]
    assert (result.found, result.fused) == (3, 3)
    assert_same(part, result.graph)


def test_biases(assert_same: Same) -> None:
    part = graph(linear("a", bias=True), linear("b", bias=True))
    result = merge_linears(part)
    assert ops(result.graph) == ["cat", "cat", "linear", "slice", "slice"]
    assert result.graph.nodes[1].shape == (5,)
    assert_same(part, result.graph)


def test_with_and_without_a_bias_stay_apart(assert_same: Same) -> None:
    part = graph(linear("a", bias=True), linear("b"), linear("c", bias=True), linear("d"))
    result = merge_linears(part)
    assert ops(result.graph).count("linear") == 2
    assert_same(part, result.graph)
    alone = merge_linears(graph(linear("a", bias=True), linear("b")))
    assert ops(alone.graph) == ["linear", "linear"]
    assert (alone.found, alone.fused) == (2, 0)


def test_layers_of_different_inputs_stay_apart() -> None:
    result = merge_linears(graph(linear("a"), linear("b", "y")))
    assert ops(result.graph) == ["linear", "linear"]
    assert (result.found, result.fused) == (0, 0)


def test_a_weight_that_is_computed_stays(assert_same: Same) -> None:
    turned = node("t", "neg.default", Ref("b.weight"), shape=(3, 6))
    layer = node("own", "linear.default", Ref("x"), Ref("t"), shape=(ROWS, TOKENS, 3))
    part = graph(linear("a"), turned, layer, linear("c"))
    result = merge_linears(part)
    assert ops(result.graph) == ["cat", "linear", "slice", "slice", "neg", "linear"]
    assert (result.found, result.fused) == (3, 2)
    assert_same(part, result.graph)


def test_one_layer_used_twice(assert_same: Same) -> None:
    part = graph(linear("a"), linear("b"), linear("a", name="again"))
    result = merge_linears(part)
    assert ops(result.graph).count("linear") == 1
    assert_same(part, result.graph)


def test_a_name_that_is_taken(assert_same: Same) -> None:
    part = graph(node("a.merged", "neg.default", Ref("x"), shape=(ROWS, TOKENS, 6)), linear("a"), linear("b"))
    result = merge_linears(part)
    names = [item.name for item in result.graph.nodes]
    assert len(set(names)) == len(names)
    assert_same(part, result.graph)


def test_what_is_merged_crosses_as_one_tensor() -> None:
    """Two layers of the text: one tensor out of `context`, cut in the step."""
    kinds: dict[str, Kind] = {"x": "request", "y": "step"}
    part = graph(linear("a"), linear("b"))
    part = part.replace(
        nodes=(
            *part.nodes,
            node("first", "slice.Tensor", Ref("y"), 2, 0, 2, shape=(ROWS, TOKENS, 2)),
            node("second", "slice.Tensor", Ref("y"), 2, 0, 3, shape=(ROWS, TOKENS, 3)),
            node("sum a", "add.Tensor", Ref("first"), Ref("a"), shape=(ROWS, TOKENS, 2)),
            node("sum b", "add.Tensor", Ref("second"), Ref("b"), shape=(ROWS, TOKENS, 3)),
        ),
        outputs={"sum a": "sum a", "sum b": "sum b"},
    )
    parts = hoist(merge_linears(part).graph, kinds)
    assert ops(parts.context) == ["cat", "linear"]
    assert list(parts.context.outputs) == ["a+b"]
    assert parts.context.output_specs()["a+b"].shape == ("rows", "tokens", 5)
    assert ops(parts.step) == ["slice"] * 4 + ["add"] * 2
    assert not parts.step.weights
