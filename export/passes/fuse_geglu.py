"""The gate of a feed-forward layer: the first half of a projection times the GELU of the second (Shazeer 2020, arXiv
2002.05202), one operator.
"""

from __future__ import annotations

from ldmrt.export.passes.pattern import Index, Pass, argument, replaced
from ldmrt.graph import Argument, Graph, Node, Ref

OPERATOR = "ldmrt.geglu.default"


def fuse_geglu(graph: Graph) -> Pass:
    """With every `x[..., :n] * gelu(x[..., n:])` as `ldmrt.geglu(x)`.

    The GELU must be the exact one, and the halves those of one tensor's last dimension.
    Found: products of two tensors of which one is a GELU of a part of a tensor.
    """
    index = Index(graph)
    changes: dict[str, tuple[Node, ...]] = {}
    found = 0
    for node in graph.nodes:
        if node.op != "aten.mul.Tensor":
            continue
        for value, gate in (node.args, node.args[::-1]):
            gelu = index.maker(gate, "aten.gelu.default")
            if gelu is None or index.maker(gelu.args[0], "python.getitem", "aten.slice.Tensor") is None:
                continue
            found += 1
            first, second = _half(index, value), _half(index, gelu.args[0])
            exact = gelu.kwargs.get("approximate", "none") == "none"
            if exact and first is not None and (first[1], second) == (0, (first[0], 1)):
                changes[node.name] = (node.replace(op=OPERATOR, args=(first[0],), kwargs={}),)
            break
    return Pass(replaced(graph, changes), found=found, fused=len(changes))


def _half(index: Index, value: Argument) -> tuple[Ref, int] | None:
    """The tensor that a value is half of, by its last dimension, and which half: 0 or 1."""
    part = index.maker(value, "python.getitem", "aten.slice.Tensor")
    if part is None:
        return None
    cut = index.maker(part.args[0], "aten.chunk.default") if part.op == "python.getitem" else part
    shape = index.shape(cut.args[0]) if cut is not None else None
    if cut is None or shape is None:
        return None
    size, last = part.shape[-1], len(shape) - 1
    if not isinstance(size, int) or shape[-1] != 2 * size or part.shape[:-1] != shape[:-1]:
        return None
    if cut is not part:
        parts, dim = cut.args[1], argument(cut, 2, "dim", 0)
        return (cut.args[0], part.args[1]) if parts == 2 and dim in (-1, last) else None
    dim, start, step = argument(cut, 1, "dim", 0), argument(cut, 2, "start") or 0, argument(cut, 4, "step", 1)
    return (cut.args[0], start // size) if dim in (-1, last) and step == 1 and start in (0, size) else None
