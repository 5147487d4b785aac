"""Cleaning, on graphs of a few nodes: what goes, what must stay, and the same bits out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ldmrt.engines.protocol import TensorSpec
from ldmrt.engines.torch import TorchEngine
from ldmrt.errors import BuildError
from ldmrt.export.passes.clean import clean, drop_identities, fold_constants, merge_duplicates
from ldmrt.graph import Dim, Graph, Node, Ref

F32 = torch.float32
ROWS = Dim("rows")
SHAPE = (ROWS, 4)


def node(name: str, op: str, *args: Any, shape: tuple[Any, ...] = SHAPE, dtype: torch.dtype = F32, **kw: Any) -> Node:
    return Node(name, f"aten.{op}", args, kw, shape, dtype)


def graph(
    *nodes: Node, outputs: dict[str, str] | None = None, constants: dict[str, torch.Tensor] | None = None
) -> Graph:
    return Graph(
        name="part",
        inputs=(TensorSpec("x", ("rows", 4), F32),),
        weights={"w": TensorSpec("w", (4,), F32)},
        constants=constants or {},
        nodes=nodes,
        outputs=outputs or {"result": nodes[-1].name},
    )


def run(part: Graph) -> dict[str, torch.Tensor]:
    weights = {name: torch.tensor([1.0, -2.0, 3.0, 0.5]) for name in part.weights}
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    return TorchEngine(part, weights, torch.device("cpu")).run({"x": x})


def ops(part: Graph) -> list[str]:
    return [item.op.removeprefix("aten.") for item in part.nodes]


def assert_same(before: Graph, after: Graph) -> None:
    found, expected = run(after), run(before)
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_chain_of_nothing() -> None:
    part = graph(
        node("cast", "to.dtype", Ref("x"), F32),
        node("drop", "dropout.default", Ref("cast"), 0.5, False),
        node("clone", "clone.default", Ref("drop")),
        node("view", "view.default", Ref("clone"), (-1, 4)),
        node("reshape", "reshape.default", Ref("view"), (-1, 4)),
        node("times", "mul.Tensor", Ref("reshape"), 1),
        node("over", "div.Tensor", Ref("times"), 1.0),
        node("neg", "neg.default", Ref("over")),
    )
    cleaned = clean(part)
    assert ops(cleaned) == ["neg.default"]
    assert cleaned.nodes[0].args == (Ref("x"),)


def test_what_does_something_stays() -> None:
    part = graph(
        node("cast", "to.dtype", Ref("x"), torch.float64, dtype=torch.float64),
        node("back", "to.dtype", Ref("cast"), F32),
        node("view", "view.default", Ref("back"), (-1, 2, 2), shape=(ROWS, 2, 2)),
        node("whole", "view.default", Ref("view"), (-1, 4)),
        node("half", "mul.Tensor", Ref("whole"), 0.5),
        node("weighted", "mul.Tensor", Ref("half"), Ref("w")),
        node("wide", "div.Tensor", Ref("weighted"), 1, shape=SHAPE),
    )
    cleaned = clean(part)
    # Only x / 1 goes: casts there and back lose bits, and a view of a view is not looked through.
    assert ops(cleaned) == [item.op.removeprefix("aten.") for item in part.nodes[:-1]]
    assert_same(part, cleaned)


def test_division_that_changes_the_dtype_stays() -> None:
    part = graph(
        node("whole", "to.dtype", Ref("x"), torch.int64, dtype=torch.int64),
        node("real", "div.Tensor", Ref("whole"), 1),
    )
    assert ops(drop_identities(part)) == ["to.dtype", "div.Tensor"]


def test_a_copy_that_makes_a_tensor_contiguous_stays() -> None:
    part = graph(
        node("turn", "permute.default", Ref("x"), (1, 0), shape=(4, ROWS)),
        node("dense", "clone.default", Ref("turn"), shape=(4, ROWS), memory_format=torch.contiguous_format),
        node("flat", "view.default", Ref("dense"), (-1,), shape=(Dim("rows", 4),)),
    )
    assert_same(part, clean(part))


def test_training_mode_is_refused() -> None:
    with pytest.raises(BuildError, match="training mode"):
        clean(graph(node("drop", "dropout.default", Ref("x"), 0.5, True)))


def test_constants_are_folded_with_their_values() -> None:
    part = graph(
        node("range", "arange.start_step", 0, 8, 2, shape=(4,), dtype=torch.int64),
        node("real", "to.dtype", Ref("range"), F32, shape=(4,)),
        node("table", "mul.Tensor", Ref("real"), Ref("c"), shape=(4,)),
        node("sum", "add.Tensor", Ref("x"), Ref("table")),
        constants={"c": torch.tensor(0.25)},
    )
    folded = fold_constants(part)
    assert ops(folded) == ["add.Tensor"]
    assert list(folded.constants) == ["table"]
    assert torch.equal(folded.constants["table"], torch.tensor([0.0, 0.5, 1.0, 1.5]))
    assert_same(part, folded)


def test_a_constant_may_be_an_output() -> None:
    part = graph(node("ones", "ones.default", (2,), shape=(2,)))
    folded = fold_constants(part)
    assert not folded.nodes
    assert_same(part, folded)


def test_large_constants_and_those_of_unknown_size_are_left_to_the_runtime() -> None:
    part = graph(
        node("large", "zeros.default", (1 << 19,), shape=(1 << 19,)),
        node("free", "ones.default", (ROWS, 4)),
        node("first", "slice.Tensor", Ref("large"), 0, 0, 4, shape=(4,)),
        node("both", "add.Tensor", Ref("free"), Ref("first")),
        node("sum", "add.Tensor", Ref("both"), Ref("x")),
    )
    folded = fold_constants(part)
    assert ops(folded) == ops(part)
    assert not folded.constants
    assert_same(part, folded)


def test_weights_are_not_constants() -> None:
    part = graph(node("neg", "neg.default", Ref("w"), shape=(4,)))
    assert ops(fold_constants(part)) == ["neg.default"]


def test_equal_calls_are_made_once() -> None:
    part = graph(
        node("a", "add.Tensor", Ref("x"), 1, alpha=2),
        node("b", "add.Tensor", Ref("x"), 1, alpha=2),
        node("cos a", "cos.default", Ref("a")),
        node("cos b", "cos.default", Ref("b")),
        node("sum", "add.Tensor", Ref("cos a"), Ref("cos b")),
        outputs={"sum": "sum", "b": "b"},
    )
    merged = merge_duplicates(part)
    assert [item.name for item in merged.nodes] == ["a", "cos a", "sum"]
    assert merged.outputs == {"sum": "sum", "b": "a"}
    assert_same(part, merged)


def test_calls_that_only_look_equal_stay_apart() -> None:
    nodes = (
        node("a", "mul.Tensor", Ref("x"), 2),
        node("b", "mul.Tensor", Ref("x"), 2.0),
        node("c", "mul.Tensor", Ref("x"), True),
        node("d", "add.Tensor", Ref("x"), 2),
        node("e", "add.Tensor", Ref("x"), 2, alpha=1),
        node("f", "mul.Tensor", Ref("a"), 2),
    )
    assert len(merge_duplicates(graph(*nodes, outputs={item.name: item.name for item in nodes})).nodes) == len(nodes)


def test_an_operator_that_the_runtime_does_not_run_is_named() -> None:
    with pytest.raises(
        BuildError, match=r"part: the model uses operators .*: aten\.erf\.default, aten\.randn_like\.default"
    ):
        clean(graph(node("r", "randn_like.default", Ref("x")), node("e", "erf.default", Ref("r"))))
