"""Nearest-neighbour upsampling, and the residual sum before it: one operator."""

from __future__ import annotations

from ldmrt.export.passes.pattern import Index, Pass, argument, replaced, residual_sum
from ldmrt.graph import Graph, Node, Ref
from ldmrt.kernels.upsample import MAX_FACTOR

OPERATOR = "ldmrt.add_upsample.default"

_VEC = "aten.upsample_nearest2d.vec"
_UPSAMPLE = (_VEC, "aten.upsample_nearest2d.default")


def fuse_upsample(graph: Graph) -> Pass:
    """With every upsampling by a whole number, the same in both directions, as `ldmrt.add_upsample`.

    The sum before it is taken in if nothing else reads it and its addends have one shape and dtype.
    Found: nearest-neighbour upsamplings.
    """
    index = Index(graph)
    changes: dict[str, tuple[Node, ...]] = {}
    found = [node for node in graph.nodes if node.op in _UPSAMPLE]
    for node in found:
        source: Ref = node.args[0]
        factor = _factor(index, node)
        if factor is None:
            continue
        total = index.maker(source, "aten.add.Tensor")
        pair = residual_sum(index, total) if total is not None and index.sole_reader(total) is node else None
        x, residual = pair or (source, None)
        changes[node.name] = (node.replace(op=OPERATOR, args=(x, residual, None, factor), kwargs={}),)
    return Pass(replaced(graph, changes), found=len(found), fused=len(changes))


def _factor(index: Index, node: Node) -> int | None:
    """By how much both sides grow, if they do by the same whole number."""
    # A free size drops out here, and then nothing fits.
    sizes = [size for size in (index.shape(node.args[0]) or ())[2:] if isinstance(size, int)]
    # A scale that was given is what pixels are found by, whatever the sizes are: 3.1 makes 9 of 3 as well.
    if node.op == _VEC:
        scales = argument(node, 2, "scale_factors") or ()
    else:
        scales = argument(node, 2, "scales_h"), argument(node, 3, "scales_w")
    for factor in range(1, MAX_FACTOR + 1):
        grown = tuple(factor * size for size in sizes)
        if grown == node.shape[2:] and all(scale in (None, factor) for scale in scales):
            return factor
    return None
