"""A linear layer and the GEGLU that alone reads it: one operator, so that the product need never be in memory."""

from __future__ import annotations

from ldmrt.export.passes.fuse_geglu import OPERATOR as GEGLU
from ldmrt.export.passes.pattern import Index, Pass, argument, replaced
from ldmrt.graph import Graph, Node

OPERATOR = "ldmrt.linear_geglu.default"


def fuse_linear_geglu(graph: Graph) -> Pass:
    """With every `geglu(linear(x))` as `ldmrt.linear_geglu(x)`. After `ldmrt.export.passes.push_bias`, so that the layer has no bias.

    Found: GEGLUs.
    """
    index = Index(graph)
    changes: dict[str, tuple[Node, ...]] = {}
    found = [node for node in graph.nodes if node.op == GEGLU]
    for node in found:
        linear = index.maker(node.args[0], "aten.linear.default")
        if linear is None or index.sole_reader(linear) is not node or argument(linear, 2, "bias") is not None:
            continue
        bias = argument(node, 1, "x_bias")
        args = linear.args[:2] if bias is None else (*linear.args[:2], bias)
        changes[node.name] = (node.replace(op=OPERATOR, args=args, kwargs={}),)
    return Pass(replaced(graph, changes), found=len(found), fused=len(changes))
