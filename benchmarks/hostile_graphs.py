"""Hostile graphs: an engine's own, of which some nodes do not fit, and small ones of one fused operator, whose arguments fit almost."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

from damage import changed
from ldmrt.operators import ALLOWED

_FUSED = sorted(name for name in ALLOWED if name.startswith("ldmrt."))


def damage(draw: random.Random, graph: dict[str, Any]) -> None:
    """Change some nodes of a graph, as JSON has it."""
    for _ in range(draw.choice((1, 1, 2, 3))):
        draw.choice((_node, _node, _argument, _argument, _fused))(draw, graph)


def _node(draw: random.Random, graph: dict[str, Any]) -> None:
    """Another operator, shape, dtype or name of a node."""
    node = draw.choice(graph["nodes"] or [[0] * 6])
    way = draw.randrange(5)
    if way == 0:
        node[1] = draw.choice(sorted(ALLOWED))
    elif way == 1:
        node[4] = changed(draw, [node[4]])
    elif way == 2:
        node[5] = draw.choice(
            ("float32", "bfloat16", "float16", "int64", "bool", "float64", "complex64", "quint8", "x")
        )
    elif way == 3:
        node[0] = draw.choice(graph["nodes"])[0]
    else:
        graph["nodes"].remove(node)


def _argument(draw: random.Random, graph: dict[str, Any]) -> None:
    """An argument of a node is another number, another value of the graph, or not there."""
    node = draw.choice(graph["nodes"])
    names = [one[0] for one in (*graph["inputs"], *graph["weights"], *graph["constants"], *graph["nodes"])]
    references = list(_references(node[2]))
    if references and draw.random() < 0.5:
        draw.choice(references)["ref"] = draw.choice(names)
    else:
        node[2] = changed(draw, node[2], times=1) if node[2] else [draw.choice((0, -1, 2**40))]


def _references(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict) and "ref" in value:
        yield value
    for item in value if isinstance(value, list) else ():
        yield from _references(item)


def _fused(draw: random.Random, graph: dict[str, Any]) -> None:
    """A fused operator more, of values that are there, in the place of an output."""
    names = [one[0] for one in (*graph["inputs"], *graph["weights"], *graph["constants"], *graph["nodes"])]
    node = [
        f"fused{len(names)}",
        draw.choice(_FUSED),
        _operands(draw, lambda: {"ref": draw.choice(names)}),
        {},
        [1],
        "float32",
    ]
    graph["nodes"].append(node)
    graph["outputs"][0][1] = node[0]


def _operands(draw: random.Random, value: Callable[[], Any]) -> list[Any]:
    """Arguments for some fused operator: values and small numbers, some of them absurd."""

    def argument() -> Any:
        numbers = (
            0,
            1,
            1,
            2,
            3,
            4,
            8,
            32,
            -1,
            0.5,
            1e-5,
            True,
            False,
            None,
            2**31,
            2**40,
            -(2**63),
            1e308,
            [1, 1],
            "x",
        )
        return value() if draw.random() < 0.6 else draw.choice(numbers)

    return [value(), *[argument() for _ in range(draw.randrange(1, 9))]]


# Arguments that fit: shapes of tensors, and numbers. A tensor may be left out but for the first.
_FITTING: dict[str, tuple[Any, ...]] = {
    "add_group_norm_silu": ([1, 32, 8, 8], [1, 32, 8, 8], [1, 32, 8, 8], [64], [64], 8, 1e-5, True, [32]),
    "add_layer_norm": ([2, 9, 64], [2, 9, 64], [64], [64], 1e-5, [64]),
    "add_upsample": ([1, 32, 8, 8], [1, 32, 8, 8], [32], 2),
    "attention": ([1, 300, 64], [1, 300, 64], [1, 300, 64], 2, 0.5),
    "conv2d": ([1, 32, 20, 20], [64, 32, 3, 3], 1, 1),
    "geglu": ([4, 64], [64]),
    "group_norm_silu": ([1, 32, 8, 8], [32], [32], 8, 1e-5, True, [1, 32], [32]),
    "linear": ([4, 32], [64, 32], [64]),
    "linear_geglu": ([4, 32], [64, 32], [64]),
}
# Weights as the runtime packs them, which is what a native body reads without a further look.
_PACKED: dict[str, tuple[list[int], ...]] = {
    "conv2d": ([2, 9, 2, 16, 16, 2], [6, 6, 4, 32, 16], [4, 4, 4, 32, 16], [2, 1, 2, 16, 16, 2]),
    "linear": ([2, 1, 2, 16, 16, 2],),
    "linear_geglu": ([2, 1, 2, 16, 16, 2],),
}
_NUMBERS: tuple[Any, ...] = (
    0, 1, 2, 3, 4, 8, 32, -1, -(2**63), 2**31, 2**40, 2**63, 2**64, 2**64 + 1, 10**400, 0.5, 1.5, 1e-5, 1e308, float("nan"), True, False, None, "x", [1, 1],
)  # fmt: skip


def drawn(draw: random.Random) -> dict[str, Any]:
    """A graph of one fused operator over tensors that it makes, or views of them, of which little does not fit."""
    nodes: list[list[Any]] = []
    of = draw.choice(("float32", "float32", "bfloat16", "bfloat16", "float16"))

    def add(op: str, arguments: list[Any], shape: list[int], **keywords: Any) -> dict[str, str]:
        nodes.append([f"n{len(nodes)}", op, arguments, keywords, shape, of])
        return {"ref": nodes[-1][0]}

    def make(sides: list[int]) -> dict[str, str]:
        odd = draw.random() < 0.12
        shape = [draw.choice((side, side, 0, 1, side + 1, 2 * side, side // 2)) for side in sides] if odd else sides
        shape = shape[: draw.choice((9, 9, 9, len(shape) - 1))] if odd else shape
        kind = (
            of
            if draw.random() < 0.95
            else draw.choice(("float32", "bfloat16", "float64", "int64", "bool", "complex64"))
        )
        value = draw.choice((1, 0.5, 0, -3.0, float("1e38")))
        made = add("aten.full.default", [shape, value], shape, dtype={"dtype": kind})
        if draw.random() < 0.03:
            return add("aten.new_ones.default", [made, shape], shape, device=draw.choice(("meta", "cuda", "cpu")))
        return _view(draw, add, made, shape) if draw.random() < 0.25 else made

    op = draw.choice(sorted(_FITTING))
    arguments: list[Any] = []
    for place, fitting in enumerate(_FITTING[op]):
        if isinstance(fitting, list):
            packed = place == 1 and op in _PACKED and draw.random() < 0.5
            without = place > 1 and draw.random() < 0.3
            arguments.append(None if without else make(draw.choice(_PACKED[op]) if packed else fitting))
        else:
            arguments.append(draw.choice(_NUMBERS) if draw.random() < 0.15 else fitting)
    if draw.random() < 0.05:
        arguments[draw.randrange(len(arguments))] = draw.choice(_NUMBERS)
    if draw.random() < 0.05:
        del arguments[draw.randrange(len(arguments)) :]
    shape = _FITTING[op][0]  # of an output the number of dimensions is looked at
    made = add(f"ldmrt.{op}.default", arguments, shape)
    if op.startswith("add_") and op != "add_upsample":
        made = add("python.getitem", [made, draw.randrange(2)], shape)
    return {
        "format": 1,
        "name": "drawn",
        "inputs": [],
        "outputs": [["out", made["ref"]]],
        "weights": [],
        "constants": [],
        "nodes": nodes,
    }


def _view(
    draw: random.Random, add: Callable[..., dict[str, str]], made: dict[str, str], shape: list[int]
) -> dict[str, str]:
    """A tensor of the same shape that lies in memory in another way, or one of another shape."""
    rank = len(shape)
    way = draw.randrange(5)
    if way == 0 and rank >= 2:  # as another order makes it
        axes = draw.sample(range(rank), rank)
        back = [axes.index(axis) for axis in range(rank)]
        laid = add("aten.contiguous.default", [add("aten.permute.default", [made, axes], shape)], shape)
        return add("aten.permute.default", [laid, back], shape)
    if way == 1 and rank:  # every other one of twice as many
        axis = draw.randrange(rank)
        twice = add("aten.cat.default", [[made, made], axis], shape)
        return add("aten.slice.Tensor", [twice, axis, 0, 2**62, 2], shape)
    if way == 2 and rank:  # one for all
        axis = draw.randrange(rank)
        one = add("aten.slice.Tensor", [made, axis, 0, 1, 1], shape)
        wide = [
            draw.choice((side, side, 2**20, 2**40)) if index == axis and draw.random() < 0.3 else side
            for index, side in enumerate(shape)
        ]
        return add("aten.expand.default", [one, wide], shape)
    if way == 3 and rank >= 2:
        return add("aten.transpose.int", [made, 0, rank - 1], shape)
    return add("aten.unsqueeze.default", [made, draw.randrange(-1, 2)], shape)
