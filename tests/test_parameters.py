"""Weights that change in place, and what was made of them."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from ldmrt.engines.protocol import TensorSpec
from ldmrt.engines.torch import TorchEngine
from ldmrt.errors import EngineMismatch
from ldmrt.graph import Graph, Node, Ref
from ldmrt.parameters import Parameters

CPU = torch.device("cpu")
F32 = torch.float32
SPECS = {name: TensorSpec(name, (4, 4), F32) for name in ("a", "b", "c")}


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(4, 4, generator=generator) for name in SPECS}


def packing() -> Graph:
    """The function of x (x a^T) * (x b^T) c: a and b are read packed only, c as it is."""

    def node(name: str, op: str, *args: object, shape: tuple[int, ...]) -> Node:
        return Node(name, op, args, {}, shape, F32)

    return Graph(
        name="part",
        inputs=(TensorSpec("x", (2, 4), F32),),
        weights=SPECS,
        constants={},
        nodes=(
            node("ab", "aten.cat.default", (Ref("a"), Ref("b")), 0, shape=(8, 4)),
            node("both", "aten.linear.default", Ref("x"), Ref("ab"), shape=(2, 8)),
            node("first", "aten.slice.Tensor", Ref("both"), 1, 0, 4, shape=(2, 4)),
            node("second", "aten.slice.Tensor", Ref("both"), 1, 4, 8, shape=(2, 4)),
            node("sum", "aten.mul.Tensor", Ref("first"), Ref("second"), shape=(2, 4)),
            node("y", "aten.mm.default", Ref("sum"), Ref("c"), shape=(2, 4)),
        ),
        outputs={"y": "y"},
    )


def directly(x: torch.Tensor, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return (x @ weights["a"].T) * (x @ weights["b"].T) @ weights["c"]


X = torch.linspace(-1, 1, 8).view(2, 4)


def test_what_is_packed_is_packed_once_for_all_engines() -> None:
    calls: list[str] = []
    given = tensors()

    def load(spec: TensorSpec) -> torch.Tensor:
        calls.append(spec.name)
        return given[spec.name]

    parameters = Parameters(load, CPU)
    engines = [TorchEngine(packing(), parameters, CPU) for _ in range(3)]
    assert sorted(calls) == ["a", "b", "c"]
    for engine in engines:
        torch.testing.assert_close(engine.run({"x": X})["y"], directly(X, given), rtol=1e-6, atol=1e-6)


def test_graphs_that_pack_differently_do_not_share() -> None:
    swapped = packing()
    swapped = swapped.replace(nodes=(swapped.nodes[0].replace(args=((Ref("b"), Ref("a")), 0)), *swapped.nodes[1:]))
    given = tensors()
    given["b"][0] = 0.0  # the order of the two matters for the packed matrix, not for the product
    parameters = Parameters.of(given, CPU)
    one, other = TorchEngine(packing(), parameters, CPU), TorchEngine(swapped, parameters, CPU)
    graph = packing()
    halves = graph.replace(outputs={"y": "first"})
    assert torch.equal(TorchEngine(halves, parameters, CPU).run({"x": X})["y"], X @ given["a"].T)
    assert torch.equal(
        TorchEngine(swapped.replace(outputs={"y": "first"}), parameters, CPU).run({"x": X})["y"], X @ given["b"].T
    )
    torch.testing.assert_close(one.run({"x": X})["y"], other.run({"x": X})["y"])


@pytest.mark.parametrize("names", [("a",), ("c",), ("a", "b", "c")])
def test_an_update_reaches_engines_that_are_loaded(names: tuple[str, ...]) -> None:
    parameters = Parameters.of(tensors(), CPU)
    engine = TorchEngine(packing(), parameters, CPU)
    addresses = [value.data_ptr() for value in held(parameters)]
    other = tensors(seed=1)
    parameters.update({name: other[name] for name in names})
    expected = directly(X, {**tensors(), **{name: other[name] for name in names}})
    torch.testing.assert_close(engine.run({"x": X})["y"], expected, rtol=1e-6, atol=1e-6)
    assert [value.data_ptr() for value in held(parameters)] == addresses
    assert parameters.generation == 1


def test_an_engine_loaded_after_an_update_reads_the_new_values() -> None:
    parameters = Parameters.of(tensors(), CPU)
    TorchEngine(packing(), parameters, CPU)
    other = tensors(seed=1)
    parameters.update(other)
    sum_only = packing().replace(outputs={"y": "first"})
    assert torch.equal(TorchEngine(sum_only, parameters, CPU).run({"x": X})["y"], X @ other["a"].T)


def test_restore_gives_the_bits_back_after_many_changes() -> None:
    parameters = Parameters.of(tensors(), CPU)
    engine = TorchEngine(packing(), parameters, CPU)
    before = engine.run({"x": X})["y"].clone()
    for seed in range(1, 4):
        parameters.update({"a": tensors(seed)["a"].bfloat16(), "c": tensors(seed)["c"].double()})
    assert not torch.equal(engine.run({"x": X})["y"], before)
    parameters.restore()
    assert torch.equal(engine.run({"x": X})["y"], before)
    assert parameters.generation == 4
    parameters.restore()  # nothing is left to restore
    assert parameters.generation == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a": torch.ones(4, 4), "d": torch.zeros(4, 4)}, "no weight 'd'"),
        ({"a": torch.ones(4, 4), "b": torch.zeros(4)}, r"weight 'b' is \(4,\), expected \(4, 4\)"),
    ],
)
def test_a_change_that_does_not_fit_changes_nothing(changes: dict[str, torch.Tensor], message: str) -> None:
    parameters = Parameters.of(tensors(), CPU)
    engine = TorchEngine(packing(), parameters, CPU)
    before = engine.run({"x": X})["y"].clone()
    with pytest.raises(EngineMismatch, match=message):
        parameters.update(changes)
    assert torch.equal(engine.run({"x": X})["y"], before)
    assert parameters.generation == 0


def held(parameters: Parameters) -> list[torch.Tensor]:
    """What engines read: the weights as they are, and what was made of them."""
    derived = [item.value for item in parameters._derived.values()]
    return [*parameters._held.values(), *derived]


def test_memory_of_weights_that_only_packed_forms_need_is_given_back() -> None:
    held, released = tensors(), []
    parameters = Parameters(lambda spec: held[spec.name], CPU, lambda spec: released.append(spec.name))
    TorchEngine(packing(), parameters, CPU)
    # a and b are packed into one matrix; c is read as it is.
    assert sorted(released) == ["a", "b"]


def test_memory_that_is_still_in_use_is_not_given_back() -> None:
    """A form that is the weight itself, and weights that have been changed, in place, since."""
    held, released = tensors(), []
    parameters = Parameters(lambda spec: held[spec.name], CPU, lambda spec: released.append(spec.name))
    parameters.declare(SPECS)
    parameters.derived("itself", [SPECS["a"]], lambda values: values["a"].t())
    assert not released
    parameters.update({"a": torch.ones(4, 4)})
    parameters.derived("another", [SPECS["a"]], lambda values: values["a"] + 1)
    assert not released
    parameters.restore()
    parameters.derived("a third", [SPECS["a"]], lambda values: values["a"] + 2)
    assert released == ["a"]
