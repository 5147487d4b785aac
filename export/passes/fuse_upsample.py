"""Nearest-neighbour upsampling, and the residual sum before it: one operator."""

from __future__ import annotations

from ldmrt.export.passes.pattern import Index, Pass, addends, replaced
from ldmrt.graph import Graph, Node, Ref, Size
from ldmrt.kernels.upsample import MAX_FACTOR

OPERATOR = "ldmrt.add_upsample.default"

_UPSAMPLE = ("aten.upsample_nearest2d.vec", "aten.upsample_nearest2d.default")


def fuse_upsample(graph: Graph) -> Pass:
    """With every upsampling by a whole number, the same in both directions, as `ldmrt.add_upsample`.

    The sum before it is taken in if nothing else reads it.
    Found: nearest-neighbour upsamplings.
    """
    index = Index(graph)
    changes: dict[str, tuple[Node, ...]] = {}
    found = [node for node in graph.nodes if node.op in _UPSAMPLE]
    for node in found:
        source: Ref = node.args[0]
        factor = _factor(index.shape(source), node.shape)
        if factor is None:
            continue
        total = index.maker(source, "aten.add.Tensor")
        pair = addends(total) if total is not None and index.sole_reader(total) is node else None
        if pair is not None and any(index.shape(value) != index.shape(source) for value in pair):
            pair = None
        x, residual = pair or (source, None)
        changes[node.name] = (node.replace(op=OPERATOR, args=(x, residual, None, factor), kwargs={}),)
    return Pass(replaced(graph, changes), found=len(found), fused=len(changes))


def _factor(before: tuple[Size, ...] | None, after: tuple[Size, ...]) -> int | None:
    """By how much both sides have grown."""
    if before is None or len(before) != 4 or not all(isinstance(size, int) for size in (*before[2:], *after[2:])):
        return None
    factor: int = after[2] // before[2]  # type: ignore[operator]
    fits = tuple(factor * size for size in before[2:]) == after[2:]  # type: ignore[operator]
    return factor if fits and 1 <= factor <= MAX_FACTOR else None
