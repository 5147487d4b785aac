"""Convolutions as an operator that chooses who computes them: the library, or a kernel for pictures of few pixels."""

from __future__ import annotations

from ldmrt.export.passes.pattern import Index, Pass, argument, replaced
from ldmrt.graph import Argument, Graph, Node

OPERATOR = "ldmrt.conv2d.default"


def convolution(graph: Graph) -> Pass:
    """With `ldmrt.conv2d` for every convolution of rows of pictures without a bias, of a square filter, not dilated, in one group.

    After `ldmrt.export.passes.push_bias`, which takes biases away.
    Found: convolutions without a bias. Fused: those of them that were rewritten.
    """
    index = Index(graph)
    changes: dict[str, tuple[Node, ...]] = {}
    found = 0
    for node in graph.nodes:
        if node.op != "aten.conv2d.default" or argument(node, 2, "bias") is not None:
            continue
        found += 1
        shape = index.shape(node.args[1])
        stride, padding = _one(argument(node, 3, "stride", 1)), _one(argument(node, 4, "padding", 0))
        plain = (
            _one(argument(node, 5, "dilation", 1)) == 1 and argument(node, 6, "groups", 1) == 1 and len(node.shape) == 4
        )
        if shape is None or shape[2] != shape[3] or not plain or stride is None or padding is None:
            continue
        changes[node.name] = (node.replace(op=OPERATOR, args=(*node.args[:2], stride, padding), kwargs={}),)
    return Pass(replaced(graph, changes), found=found, fused=len(changes))


def _one(value: Argument) -> int | None:
    """A number that stands for both directions; None if they differ."""
    values = set(value) if isinstance(value, tuple) else {value}
    only = values.pop() if len(values) == 1 else None
    return only if isinstance(only, int) else None
