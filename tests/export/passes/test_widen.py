"""Values that float16 does not hold, kept in float32: what is cast, what is not, and what comes out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch

from ldmrt.engines.protocol import TensorSpec
from ldmrt.engines.torch import TorchEngine
from ldmrt.errors import BuildError
from ldmrt.export.passes.hoist import Kind, hoist
from ldmrt.export.passes.promote import CAST
from ldmrt.export.passes.widen import widen
from ldmrt.graph import Argument, Dim, Graph, Node, Ref, rename_values

F16, F32 = torch.float16, torch.float32
ROWS = Dim("rows")
LARGE = 3000.0  # its square is beyond float16, its root is not

Interpret = Callable[..., dict[str, torch.Tensor]]


def node(name: str, op: str, *args: Argument, dtype: torch.dtype = F16, width: int = 4) -> Node:
    return Node(name, f"aten.{op}", args, {}, (ROWS, width), dtype)


def graph(*nodes: Node, outputs: tuple[str, ...] = ("out",)) -> Graph:
    return Graph(
        name="part",
        inputs=(TensorSpec("x", ("rows", 4), F16), TensorSpec("z", ("rows", 4), F16)),
        weights={"w": TensorSpec("w", (4, 4), F16)},
        constants={},
        nodes=nodes,
        outputs={name: name for name in outputs},
    )


X, Z, W = map(Ref, "xzw")
SQUARE, BACK = node("big", "mul.Tensor", X, X), node("out", "div.Tensor", Ref("big"), X)


def casts(found: Graph) -> Counter[tuple[str, torch.dtype]]:
    return Counter((node.args[0].name, node.dtype) for node in found.nodes if node.op == CAST)


def outputs(interpret: Interpret, found: Graph) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator) + 0.5

    inputs = {"x": LARGE * random(3, 4), "z": random(3, 4)}
    # The interpreter holds every node to the dtype that it declares.
    return interpret(found, {name: x.to(F16) for name, x in inputs.items()}, {"w": random(4, 4).to(F16)})


def test_a_large_value_stays_in_float32_until_it_fits(interpret: Interpret) -> None:
    before = graph(SQUARE, BACK)
    assert not outputs(interpret, before)["out"].isfinite().all()
    after = widen(before, {"big"})
    assert casts(after) == {("x", F32): 1, ("out.float32", F16): 1}, "x is cast once for both that read it"
    found = outputs(interpret, after)["out"]
    assert found.dtype == F16
    expected = outputs(interpret, graph(node("out", "mul.Tensor", X, 1.0)))["out"]
    torch.testing.assert_close(found, expected, rtol=2**-11, atol=0.0)


def test_nothing_named_nothing_changed() -> None:
    before = graph(SQUARE, BACK)
    assert widen(before, ()) is before


def test_what_reads_a_large_value_reads_all_in_float32_weights_too(interpret: Interpret) -> None:
    before = graph(
        SQUARE,
        node("layer", "linear.default", Ref("big"), W),
        node("out", "rsqrt.default", Ref("layer")),
    )
    after = widen(before, {"big", "layer"})
    assert casts(after) == {("x", F32): 1, ("w", F32): 1, ("out.float32", F16): 1}
    assert after.weights == before.weights, "in the bundle's file they stay what they are"
    assert outputs(interpret, after)["out"].gt(0).all()


def test_no_casts_stand_where_they_cancel_out(interpret: Interpret) -> None:
    # `fits` is made in float32, and read in both precisions; `low`, a cast to float32 in the model, reads it as it was made.
    before = graph(
        SQUARE,
        node("fits", "div.Tensor", Ref("big"), X),
        node("again", "mul.Tensor", Ref("fits"), Ref("big")),
        node("low", "to.dtype", Ref("fits"), F32, dtype=F32),
        node("half", "to.dtype", Ref("low"), F16),
        node("small", "add.Tensor", Ref("fits"), Z),
        node("out", "div.Tensor", Ref("again"), Ref("big")),
        outputs=("out", "half", "small"),
    )
    after = widen(before, {"big", "again"})
    made = {node.name: node for node in after.nodes}
    for made_by_cast in (node for node in after.nodes if node.op == CAST):
        source = made.get(made_by_cast.args[0].name)
        assert source is None or source.op != CAST, f"{made_by_cast.name} casts a cast"
    assert casts(after) == {("x", F32): 1, ("fits.float32", F16): 2, ("out.float32", F16): 1}
    for value in outputs(interpret, after).values():
        assert value.dtype == F16
        assert value.isfinite().all()


def test_casts_of_the_model_that_overflow_are_undone(interpret: Interpret) -> None:
    # Made in float32 by the model, cast to a half that does not hold it, and read.
    before = graph(
        node("wide", "to.dtype", X, F32, dtype=F32),
        node("square", "mul.Tensor", Ref("wide"), Ref("wide"), dtype=F32),
        node("big", "to.dtype", Ref("square"), F16),
        BACK,
    )
    after = widen(before, {"big"})
    assert Ref("square") in next(node for node in after.nodes if node.op == "aten.div.Tensor").args
    # x was in float32 already; nothing is cast back before the end.
    assert casts(after)[("out.float32", F16)] == 1
    assert outputs(interpret, after)["out"].isfinite().all()


def test_lists_of_tensors_are_wide_as_a_whole(interpret: Interpret) -> None:
    before = graph(
        node("doubled", "mul.Tensor", X, LARGE),
        Node("parts", "aten.chunk.default", (Ref("doubled"), 2, -1), {}, (), F16),
        Node("one", "python.getitem", (Ref("parts"), 0), {}, (ROWS, 2), F16),
        Node("two", "python.getitem", (Ref("parts"), 1), {}, (ROWS, 2), F16),
        node("small", "mul.Tensor", Ref("one"), 1e-4, width=2),
        node("out", "cat.default", (Ref("small"), Ref("two")), -1),
    )
    # Only the first part is named: the list is wide for its sake, the second part is cast back where it is read.
    after = widen(before, {"doubled", "one"})
    assert casts(after) == {("x", F32): 1, ("small.float32", F16): 1, ("two.float32", F16): 1}
    assert outputs(interpret, after)["out"].dtype == F16


def test_dtypes_among_the_arguments_are_widened(interpret: Interpret) -> None:
    before = graph(
        SQUARE,
        node("sums", "softmax.int", Ref("big"), -1, F16),
        node("ones", "full_like.default", Ref("big"), 1.0).replace(kwargs={"dtype": F16}),
        node("out", "add.Tensor", Ref("sums"), Ref("ones")),
    )
    assert outputs(interpret, widen(before, {"big"}))["out"].isfinite().all()


def test_questions_about_a_large_value_are_asked_in_float32(interpret: Interpret) -> None:
    before = graph(SQUARE, node("out", "gt.Tensor", Ref("big"), Z, dtype=torch.bool))
    after = widen(before, {"big"})
    assert casts(after) == {("x", F32): 1, ("z", F32): 1}
    assert outputs(interpret, after)["out"].all()


def test_an_output_that_does_not_fit_is_refused() -> None:
    with pytest.raises(
        BuildError, match=r"^part: float16 does not hold its output big: .* --dtype bfloat16 or float32$"
    ):
        widen(graph(SQUARE, BACK, outputs=("big", "out")), {"big"})


def test_the_engine_computes_widened_weights_once(interpret: Interpret) -> None:
    after = widen(graph(SQUARE, node("out", "linear.default", Ref("big"), W)), {"big"})
    weights = {"w": torch.full((4, 4), 1e-4, dtype=F16)}
    engine = TorchEngine(after, weights, torch.device("cpu"))
    x = torch.full((2, 4), LARGE, dtype=F16)
    found = engine.run({"x": x, "z": x})["out"]
    assert torch.allclose(found.float(), torch.full((2, 4), 4 * LARGE**2 * 1e-4), rtol=2e-3)
    # A cast of x, the two operators, and the cast back: that of the weight is no instruction.
    assert len(engine._instructions) == 4


def test_casts_do_not_cross_the_cuts_of_a_network() -> None:
    """What `context` gives is what its layer makes, whoever reads it and in what precision."""
    layer, view = node("layer", "linear.default", Z, W), node("seen", "view.default", Ref("layer"), (ROWS, 4))
    before = graph(layer, view, SQUARE, node("out", "div.Tensor", Ref("big"), Ref("seen")))
    before = rename_values(before, {"w": "to_k.weight"})
    kinds: dict[str, Kind] = {"x": "step", "z": "request"}
    plain, wide = (hoist(found, kinds) for found in (before, widen(before, {"big"})))
    assert plain.context.output_specs() == wide.context.output_specs()
    assert {spec.name for spec in plain.step.inputs} == {spec.name for spec in wide.step.inputs}
    # What does not fit crosses in float32, under the same name.
    large = hoist(widen(before, {"big", "layer", "seen"}), kinds)
    assert large.context.output_specs() == {"to_k": TensorSpec("to_k", ("rows", 4), F32)}
    assert list(plain.context.outputs) == ["to_k"]
