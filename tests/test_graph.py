"""Graphs: their JSON, what is refused, and the small rewrites every pass is made of."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from ldmrt.engines.protocol import TensorSpec
from ldmrt.errors import BundleError
from ldmrt.graph import (
    Dim,
    Graph,
    Node,
    Ref,
    dtype_of,
    from_json,
    prune,
    rename_values,
    specialize,
    to_json,
)

F32 = torch.float32
ROWS = Dim("rows")


def node(name: str, op: str, *args: Any, shape: tuple[Any, ...] = (), dtype: torch.dtype = F32, **kwargs: Any) -> Node:
    return Node(name, op, args, kwargs, shape, dtype)


def sample() -> Graph:
    """Every kind of argument there is, though it would not run."""
    return Graph(
        name="sample",
        inputs=(TensorSpec("x", ("rows", 4), F32), TensorSpec("unused", ("tokens",), torch.int64)),
        weights={
            "w": TensorSpec("w", (4, 4), torch.bfloat16),
            "spare": TensorSpec("spare", (), F32),
        },
        constants={"c": torch.arange(3), "old": torch.zeros(0, 2)},
        nodes=(
            node("cast", "aten.to.dtype", Ref("w"), F32, shape=(4, 4)),
            node("mm", "aten.mm.default", Ref("x"), Ref("cast"), shape=(ROWS, 4)),
            node("dead", "aten.full.default", (2, 3), -math.inf, shape=(2, 3)),
            node("cat", "aten.cat.default", (Ref("mm"), Ref("x")), 1, shape=(ROWS, 8)),
            node("view", "aten.view.default", Ref("cat"), (Dim("rows", 2), -1), shape=(Dim("rows", 2), 4)),
            node("same", "aten.contiguous.default", Ref("view"), memory_format=torch.channels_last, shape=(ROWS,)),
            node("odd", "aten.pad.default", Ref("same"), (0, 1), "constant", None, flag=True, shape=(1,)),
        ),
        outputs={"result": "odd", "early": "mm"},
    )


def test_json_round_trip() -> None:
    graph = sample()
    text = to_json(graph)
    back = from_json(text, graph.constants)
    assert back == graph
    assert to_json(back) == text
    assert text.isascii()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not strict JSON"))


def test_infinities_and_nan_survive() -> None:
    graph = sample().replace(
        nodes=(node("n", "aten.full.default", (1,), (math.inf, -math.inf, math.nan)),), outputs={"n": "n"}
    )
    positive, negative, nan = from_json(to_json(graph), graph.constants).nodes[0].args[1]
    assert positive == math.inf
    assert negative == -math.inf
    assert math.isnan(nan)


def test_true_one_and_one_point_zero_stay_apart() -> None:
    graph = sample().replace(nodes=(node("n", "aten.full.default", True, 1, 1.0),), outputs={"n": "n"})
    args = from_json(to_json(graph), graph.constants).nodes[0].args
    assert [type(argument) for argument in args] == [bool, int, float]


def test_a_tensor_has_no_place_among_the_arguments() -> None:
    graph = sample().replace(nodes=(node("n", "aten.neg.default", torch.ones(1)),), outputs={"n": "n"})
    with pytest.raises(TypeError, match="Tensor has no place"):
        to_json(graph)


def changed(**changes: Any) -> str:
    data = json.loads(to_json(sample()))
    data.update(changes)
    return json.dumps(data)


def with_node(*fields: Any) -> str:
    return changed(nodes=[list(fields)], outputs=[])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a valid graph"),
        ("[]", "not an object"),
        ("{}", "missing 'format'"),
        (changed(format=99), "graph format 99"),
        (changed(nodes=None), "not a valid graph"),
        (changed(inputs=[["x", ["rows"]]]), "not a valid graph"),
        (changed(inputs=[["x", [1.5], "float32"]]), "bad tensor description"),
        (changed(inputs=[["x", [4], "float99"]]), "'float99' is not a dtype"),
        (changed(inputs=[["x", [4], "nn"]]), "'nn' is not a dtype"),
        (changed(constants=[["gone", [1], "float32"]]), "missing 'gone'"),
        (changed(outputs=[["result", "nowhere"]]), "output 'result' is 'nowhere'"),
        (with_node("x", "aten.neg.default", [{"ref": "x"}], {}, [], "float32"), "'x' is defined twice"),
        (with_node("n", "aten.neg.default", [{"ref": "n"}], {}, [], "float32"), "not defined before it"),
        (with_node("n", "aten.neg.default", [{"refs": "x"}], {}, [], "float32"), "unknown argument"),
        (with_node("n", "aten.neg.default", [{"float": "1e999"}], {}, [], "float32"), "unknown argument"),
        (with_node("n", "aten.neg.default", [{"memory_format": "x"}], {}, [], "float32"), "not a valid graph"),
        (with_node("n", "aten.neg.default", [], [], [], "float32"), "not a valid graph"),
        (with_node(None, "aten.neg.default", [], {}, [], "float32"), "not a valid graph"),
        (with_node("n", ["aten.neg.default"], [], {}, [], "float32"), "not a valid graph"),
        (with_node("n", "aten.neg.default", "x", {}, [], "float32"), "not a valid graph"),
        (with_node("n", "aten.neg.default", [], {}, None, "float32"), "not a valid graph"),
        (with_node("n", "aten.neg.default", [], {}, ["x"], "float32"), "not a valid graph"),
        ('{"format": 1, "nodes": ' + "[" * 100_000, "not a valid graph"),
    ],
)
def test_damaged_json_is_refused(text: str, message: str) -> None:
    with pytest.raises(BundleError, match=message) as caught:
        from_json(text, sample().constants, where="graphs/step.json")
    assert "graphs/step.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_specialize_fixes_only_what_it_is_given() -> None:
    graph = specialize(sample(), {"rows": 3})
    assert [spec.shape for spec in graph.inputs] == [(3, 4), ("tokens",)]
    view = next(node for node in graph.nodes if node.name == "view")
    assert view.args[1] == (6, -1)
    assert view.shape == (6, 4)
    assert all(not isinstance(size, Dim) for node in graph.nodes for size in node.shape)


def test_prune_drops_what_no_output_needs() -> None:
    graph = prune(sample())
    assert [node.name for node in graph.nodes] == ["cast", "mm", "cat", "view", "same", "odd"]
    assert list(graph.weights) == ["w"]
    assert not graph.constants
    assert [spec.name for spec in graph.inputs] == ["x", "unused"]


def test_rename_reaches_every_mention() -> None:
    graph = rename_values(sample(), {"x": "latents", "w": "conv.weight", "c": "table", "mm": "product"})
    text = to_json(graph)
    assert not any(f'"{old}"' in text for old in ("x", "w", "c", "mm"))
    assert graph.weights["conv.weight"].name == "conv.weight"
    assert graph.outputs == {"result": "odd", "early": "product"}
    assert from_json(text, graph.constants) == graph


def test_output_specs() -> None:
    graph = sample().replace(outputs={"a": "x", "b": "c", "d": "view", "e": "w"})
    assert graph.output_specs() == {
        "a": TensorSpec("a", ("rows", 4), F32),
        "b": TensorSpec("b", (3,), torch.int64),
        "d": TensorSpec("d", ("2*rows", 4), F32),
        "e": TensorSpec("e", (4, 4), torch.bfloat16),
    }


@pytest.mark.parametrize("name", ["Tensor", "float32 ", "", "nn", "manual_seed"])
def test_a_dtype_is_not_any_attribute_of_torch(name: str) -> None:
    with pytest.raises(ValueError, match="is not a dtype"):
        dtype_of(name)
