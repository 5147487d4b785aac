"""The torch engine on graphs of a few nodes, each against the same calls made directly."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from ldmrt.engines.protocol import TensorSpec
from ldmrt.engines.torch import TorchEngine
from ldmrt.errors import BundleError, EngineMismatch
from ldmrt.graph import Dim, Graph, Node, Ref
from ldmrt.kernels import native
from ldmrt.operators import ALLOWED, CREATING, resolve
from ldmrt.parameters import Parameters
from ldmrt.verify import relative_error

CPU = torch.device("cpu")
F32 = torch.float32
ROWS = Dim("rows")


def node(name: str, op: str, *args: Any, shape: tuple[Any, ...] = (), dtype: torch.dtype = F32, **kwargs: Any) -> Node:
    return Node(name, op, args, kwargs, shape, dtype)


def spec(name: str, *shape: int | str, dtype: torch.dtype = F32) -> TensorSpec:
    return TensorSpec(name, shape, dtype)


def graph(nodes: list[Node], outputs: dict[str, str], *, rows: int | str = "rows", **parts: Any) -> Graph:
    return Graph(
        name="part",
        inputs=(spec("x", rows, 4), spec("y", rows, 4)),
        weights=parts.get("weights", {}),
        constants=parts.get("constants", {}),
        nodes=tuple(nodes),
        outputs=outputs,
    )


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"w": torch.randn(6, 4, generator=generator), "b": torch.randn(6, generator=generator)}


def inputs(rows: int, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(rows, 4, generator=generator) for name in ("x", "y")}


def mixed(rows: int | str = "rows") -> Graph:
    """Weights, a constant, keywords, lists of values, several results of one node, free dimensions in arguments."""
    size = ROWS if rows == "rows" else rows
    twice = Dim("rows", 2) if rows == "rows" else 2 * int(rows)
    return graph(
        [
            node("sum", "aten.add.Tensor", Ref("x"), Ref("y"), alpha=2, shape=(size, 4)),
            node("linear", "aten.linear.default", Ref("sum"), Ref("w"), Ref("b"), shape=(size, 6)),
            node("both", "aten.chunk.default", Ref("linear"), 2, 1),
            node("first", "python.getitem", Ref("both"), 0, shape=(size, 3)),
            node("second", "python.getitem", Ref("both"), 1, shape=(size, 3)),
            node("gelu", "aten.gelu.default", Ref("second"), approximate="tanh", shape=(size, 3)),
            node("cat", "aten.cat.default", (Ref("gelu"), Ref("first")), shape=(twice, 3)),
            node("view", "aten.view.default", Ref("cat"), (size, 6), shape=(size, 6)),
            node("scaled", "aten.mul.Tensor", Ref("view"), Ref("c"), shape=(size, 6)),
            node("flag", "aten.gt.Scalar", Ref("scaled"), 0, shape=(size, 6), dtype=torch.bool),
        ],
        {"result": "scaled", "positive": "flag"},
        rows=rows,
        weights={"w": spec("w", 6, 4), "b": spec("b", 6)},
        constants={"c": torch.arange(6.0)},
    )


def directly(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    w = weights()
    first, second = F.linear(x + 2 * y, w["w"], w["b"]).chunk(2, 1)
    result = torch.cat((F.gelu(second, approximate="tanh"), first)).view(len(x), 6) * torch.arange(6.0)
    return result, result > 0


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_the_same_calls_the_same_bits(rows: int) -> None:
    engine = TorchEngine(mixed(), weights(), CPU)
    found = engine.run(inputs(rows))
    result, positive = directly(**inputs(rows))
    assert list(found) == ["result", "positive"]
    assert torch.equal(found["result"], result)
    assert torch.equal(found["positive"], positive)


def test_names_shapes_and_dtypes() -> None:
    engine = TorchEngine(mixed(), weights(), CPU)
    assert dict(engine.inputs) == {"x": spec("x", "rows", 4), "y": spec("y", "rows", 4)}
    assert dict(engine.outputs) == {
        "result": spec("result", "rows", 6),
        "positive": spec("positive", "rows", 6, dtype=torch.bool),
    }


def test_bind_then_enqueue_writes_the_bound_buffers() -> None:
    engine = TorchEngine(mixed(3), weights(), CPU)
    buffers = {**inputs(3), "result": torch.full((3, 6), -1.0), "positive": torch.zeros(3, 6, dtype=torch.bool)}
    addresses = {name: buffer.data_ptr() for name, buffer in buffers.items()}
    engine.bind(buffers)
    for seed in (1, 2):
        for name, value in inputs(3, seed).items():
            buffers[name].copy_(value)
        engine.enqueue()
        result, positive = directly(**inputs(3, seed))
        assert torch.equal(buffers["result"], result)
        assert torch.equal(buffers["positive"], positive)
    assert addresses == {name: buffer.data_ptr() for name, buffer in buffers.items()}


def test_enqueue_before_bind() -> None:
    with pytest.raises(EngineMismatch, match="enqueue before bind"):
        TorchEngine(mixed(3), weights(), CPU).enqueue()


def test_runs_do_not_touch_each_other() -> None:
    engine = TorchEngine(mixed(), weights(), CPU)
    first = engine.run(inputs(2))
    kept = first["result"].clone()
    engine.run(inputs(2, seed=2))
    assert torch.equal(first["result"], kept)


def test_an_output_may_be_an_input_a_weight_or_given_twice() -> None:
    part = graph(
        [node("n", "aten.neg.default", Ref("x"), shape=(ROWS, 4))],
        {"a": "n", "b": "n", "x again": "x", "weight": "w"},
        weights={"w": spec("w", 6, 4)},
    )
    given = inputs(2)
    found = TorchEngine(part, weights(), CPU).run(given)
    assert torch.equal(found["a"], -given["x"])
    assert torch.equal(found["b"], -given["x"])
    assert torch.equal(found["x again"], given["x"])
    assert torch.equal(found["weight"], weights()["w"])


def peak(nodes: list[Node], outputs: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The most tensors made by a graph's calls that are alive at once."""
    made: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def watched(op: str) -> Callable[..., Any]:
        function = resolve(op)

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal most
            result = function(*args, **kwargs)
            if op != "python.getitem":
                made.extend(weakref.ref(value) for value in (result if isinstance(result, list) else [result]))
            most = max(most, sum(tensor() is not None for tensor in made))
            return result

        return call

    monkeypatch.setattr("ldmrt.engines.torch.resolve", watched)
    TorchEngine(graph(nodes, outputs), {}, CPU).run(inputs(2))
    assert made
    return most


def chain(length: int) -> Iterator[Node]:
    yield node("n0", "aten.neg.default", Ref("x"), shape=(ROWS, 4))
    for i in range(1, length):
        yield node(f"n{i}", "aten.cos.default", Ref(f"n{i - 1}"), shape=(ROWS, 4))


def test_buffers_are_freed_at_their_last_use(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = list(chain(20))
    # What a call reads and what it makes: no more than two at any time.
    assert peak(nodes, {"result": "n19"}, monkeypatch) == 2
    assert peak(nodes, {"result": "n19", "early": "n3"}, monkeypatch) == 3
    late = node("late", "aten.add.Tensor", Ref("n0"), Ref("n19"), shape=(ROWS, 4))
    assert peak([*nodes, late], {"result": "late"}, monkeypatch) == 3
    wasted = [node(f"dead{i}", "aten.sin.default", Ref("n0"), shape=(ROWS, 4)) for i in range(10)]
    assert peak([*nodes, *wasted], {"result": "n19"}, monkeypatch) == 3  # n0, n19, and the wasted value


def test_lists_of_values_are_freed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [
        node("both", "aten.chunk.default", Ref("x"), 2, 1),
        node("a", "python.getitem", Ref("both"), 0, shape=(ROWS, 2)),
        node("b", "python.getitem", Ref("both"), 1, shape=(ROWS, 2)),
        node("c", "aten.cat.default", (Ref("a"), Ref("b")), 1, shape=(ROWS, 4)),
        *(node(f"n{i}", "aten.neg.default", Ref("c" if i == 0 else f"n{i - 1}"), shape=(ROWS, 4)) for i in range(9)),
    ]
    assert peak(nodes, {"result": "n8"}, monkeypatch) == 3  # both halves, and what they are joined to


# ---------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": None}, "input 'y' is missing"),
        ({"x": torch.zeros(2, 5)}, r"input 'x' is \(2, 5\) float32, expected \('rows', 4\) float32"),
        ({"x": torch.zeros(2, 4, 1)}, "input 'x'"),
        ({"x": torch.zeros(2, 4, dtype=torch.float64)}, r"float64, expected .* float32"),
        ({"y": torch.zeros(3, 4)}, "input 'y' is"),  # x has 2 rows
    ],
)
def test_inputs_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    given = {name: value for name, value in {**inputs(2), **change}.items() if value is not None}
    with pytest.raises(EngineMismatch, match=message):
        TorchEngine(mixed(), weights(), CPU).run(given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"result": None}, "buffer 'result' is missing"),
        ({"x": torch.zeros(2, 4)}, "buffer 'x'"),
        ({"result": torch.zeros(3, 5)}, "buffer 'result'"),
        ({"positive": torch.zeros(3, 6)}, "buffer 'positive'"),
    ],
)
def test_buffers_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    buffers = {**inputs(3), "result": torch.zeros(3, 6), "positive": torch.zeros(3, 6, dtype=torch.bool), **change}
    with pytest.raises(EngineMismatch, match=message):
        TorchEngine(mixed(3), weights(), CPU).bind({k: v for k, v in buffers.items() if v is not None})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": None}, "weight 'w' is missing"),
        ({"w": torch.zeros(4, 6)}, "weight 'w' is"),
        ({"b": torch.zeros(6, dtype=torch.bfloat16)}, r"bfloat16, expected \(6,\) float32"),
    ],
)
def test_weights_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    given = {name: value for name, value in {**weights(), **change}.items() if value is not None}
    with pytest.raises(EngineMismatch, match=message):
        TorchEngine(mixed(), given, CPU)


def test_an_operator_that_is_not_allowed_is_refused_before_anything_runs() -> None:
    part = graph([node("n", "aten.from_file.default", "/etc/passwd", shape=(4,))], {"n": "n"})
    with pytest.raises(BundleError, match="not one that a graph may call"):
        TorchEngine(part, {}, CPU)


def test_a_free_dimension_that_no_input_has() -> None:
    part = graph([node("n", "aten.zeros.default", (Dim("tokens"),), shape=(Dim("tokens"),))], {"n": "n"})
    with pytest.raises(EngineMismatch, match="no input has the dimension 'tokens'"):
        TorchEngine(part, {}, CPU)


@pytest.mark.parametrize(
    ("op", "args"),
    [
        ("arange.default", (ROWS,)),
        ("arange.start", (1, 3)),
        ("arange.start_step", (0, ROWS, 2)),
        ("full.default", ((ROWS, 2), 1.0)),
        ("ones.default", ((2, ROWS),)),
        ("scalar_tensor.default", (1.0,)),
        ("zeros.default", ((2, 3),)),
    ],
)
def test_new_tensors_are_made_where_the_engine_runs(op: str, args: tuple[Any, ...]) -> None:
    """Elsewhere they would be copied at every use, which a capture refuses. The meta device stands for a GPU here."""
    assert f"aten.{op}" in CREATING
    meta = torch.device("meta")
    engine = TorchEngine(graph([node("made", f"aten.{op}", *args)], {"out": "made"}), {}, meta)
    given = {name: torch.empty(3, 4, device=meta) for name in ("x", "y")}
    with torch.inference_mode():
        (result,) = engine._execute(list(given.values()))
    assert result.device == meta


def test_every_operator_that_makes_tensors_of_nothing_is_known() -> None:
    """By their schemas: those of the list that take a device and no tensor."""
    found = set()
    for op in ALLOWED:
        if op.startswith("aten."):
            _, name, overload = op.split(".")
            arguments = getattr(getattr(torch.ops.aten, name), overload)._schema.arguments
            kinds = [str(argument.type) for argument in arguments]
            if "Optional[Device]" in kinds and not any("Tensor" in kind for kind in kinds):
                found.add(op)
    assert found
    assert found == CREATING


@pytest.mark.parametrize("ordered", [False, True])
def test_convolutions_read_weights_as_the_library_has_them(ordered: bool) -> None:
    """The arranged weights are made once for two engines, and follow a change of the weights in place."""
    weight = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(2))
    name = "w in order" if ordered else "w"
    first = node(
        "w in order", "aten.contiguous.default", Ref("w"), shape=(6, 4, 3, 3), memory_format=torch.channels_last
    )
    made = Node("made", "ldmrt.conv2d.default", (Ref("x"), Ref(name), 2, 1), {}, (ROWS, 6, 3, 3), F32)
    part = Graph(
        name="part",
        inputs=(spec("x", "rows", 4, 5, 6),),
        weights={"w": spec("w", 6, 4, 3, 3)},
        constants={},
        nodes=(first, made) if ordered else (made,),
        outputs={"out": "made"},
    )
    held = weight.clone()
    parameters = Parameters.of({"w": held}, CPU)
    engines = [TorchEngine(part, parameters, CPU) for _ in range(2)]
    assert len(parameters._derived) == 1
    x = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(3))

    def agree(expected: torch.Tensor) -> None:
        for engine in engines:
            torch.testing.assert_close(engine.run({"x": x})["out"], F.conv2d(x, expected, None, 2, 1))

    agree(weight)
    before = engines[0].run({"x": x})["out"]
    parameters.update({"w": 2 * weight.flip(0)})
    agree(2 * weight.flip(0))
    parameters.restore()
    assert torch.equal(engines[1].run({"x": x})["out"], before)


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
def test_convolutions_of_two_pictures_share_weights_where_one_order_suits_both(dtype: torch.dtype) -> None:
    """In float32 the order of many weights depends on the picture's size (kernels/winograd.py), in bfloat16 it does not."""
    weight = torch.randn(528, 512, 3, 3, generator=torch.Generator().manual_seed(2)).div(68).to(dtype)
    parameters = Parameters.of({"w": weight}, CPU)
    for side, arranged in ((3, 1), (4, 1), (32, 2)):
        made = Node("made", "ldmrt.conv2d.default", (Ref("x"), Ref("w"), 1, 1), {}, (ROWS, 528, side, side), dtype)
        part = Graph(
            name="part",
            inputs=(spec("x", "rows", 512, side, side, dtype=dtype),),
            weights={"w": spec("w", 528, 512, 3, 3, dtype=dtype)},
            constants={},
            nodes=(made,),
            outputs={"out": "made"},
        )
        x = torch.randn(1, 512, side, side, generator=torch.Generator().manual_seed(3)).to(dtype)
        found = TorchEngine(part, parameters, CPU).run({"x": x})["out"]
        expected = F.conv2d(x.double(), weight.double(), padding=1)
        assert relative_error(found, expected) < (1e-5 if dtype == F32 else 1e-2)
        assert len(parameters._derived) == (arranged if dtype == F32 and native.takes_winograd() else 1)


@pytest.mark.parametrize("op", ["aten.linear.default", "ldmrt.linear_geglu.default"])
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
def test_linear_layers_read_weights_as_the_native_body_has_them(op: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    weight, bias = (torch.randn(shape, generator=generator).to(dtype) / 8 for shape in ((64, 32), (64,)))
    out = 64 if op.startswith("aten") else 32
    part = Graph(
        name="part",
        inputs=(spec("x", "rows", 32, dtype=dtype),),
        weights={"w": spec("w", 64, 32, dtype=dtype), "b": spec("b", 64, dtype=dtype)},
        constants={},
        nodes=(Node("made", op, (Ref("x"), Ref("w"), Ref("b")), {}, (ROWS, out), dtype),),
        outputs={"out": "made"},
    )
    parameters = Parameters.of({"w": weight.clone(), "b": bias}, CPU)
    engines = [TorchEngine(part, parameters, CPU) for _ in range(2)]
    assert len(parameters._derived) == 1
    x = torch.randn(5, 32, generator=generator).to(dtype)

    def agree(expected: torch.Tensor) -> None:
        y = F.linear(x.double(), expected.double(), bias.double())
        if out == 32:
            y = y[:, :32] * F.gelu(y[:, 32:])
        tolerance = 1e-5 if dtype == F32 else 2e-2
        for engine in engines:
            torch.testing.assert_close(engine.run({"x": x})["out"].double(), y, rtol=tolerance, atol=tolerance)

    agree(weight)
    before = engines[0].run({"x": x})["out"]
    parameters.update({"w": 2 * weight.flip(0)})
    agree(2 * weight.flip(0))
    parameters.restore()
    assert torch.equal(engines[1].run({"x": x})["out"], before)
