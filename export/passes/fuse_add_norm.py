"""A residual sum and the layer norm that reads it: one operator, which gives both."""

from __future__ import annotations

from ldmrt.export.passes.pattern import Index, Pass, addends, argument, replaced, residual_sum
from ldmrt.graph import Graph, Node, Ref

OPERATOR = "ldmrt.add_layer_norm.default"


def fuse_add_norm(graph: Graph) -> Pass:
    """With every `layer_norm(x + residual)` as `ldmrt.add_layer_norm`, whose first result is the sum.

    The addends must have one shape and dtype, and the norm a weight and a bias over the last dimension, which no node makes
    (they are read where the sum stands). Where several norms read one sum, the first of them is taken in; the others read the
    first result.
    Found: sums that a layer norm reads, those of tensors of different shapes included.
    """
    index = Index(graph)
    changes: dict[str, tuple[Node, ...]] = {}
    found = 0
    for total in graph.nodes:
        norms = [node for node in index.readers(total) if node.op == "aten.layer_norm.default"]
        if addends(total) is None or not norms:
            continue
        found += 1
        norm, pair = norms[0], residual_sum(index, total)
        weight, bias = argument(norm, 2, "weight"), argument(norm, 3, "bias")
        given = all(value is not None and index.is_given(value) for value in (weight, bias))
        if pair is None or not given or tuple(norm.args[1]) != total.shape[-1:]:
            continue
        both = index.fresh(f"{norm.name}.both")
        args = (*pair, weight, bias, argument(norm, 4, "eps", 1e-5))
        changes[total.name] = (
            Node(both, OPERATOR, args, {}, (), total.dtype),
            total.replace(op="python.getitem", args=(Ref(both), 0), kwargs={}),
            norm.replace(op="python.getitem", args=(Ref(both), 1), kwargs={}),
        )
        changes[norm.name] = ()
    return Pass(replaced(graph, changes), found=found, fused=sum(bool(nodes) for nodes in changes.values()))
