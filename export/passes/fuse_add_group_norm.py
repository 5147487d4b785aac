"""What is put together before a group norm: a residual sum, a skip connection joined behind it. One operator, which gives both.

In a U-Net's way down: `sum = block + residual; norm(sum)`; on its way up: `joined = cat(sum, skip); norm(joined)`.
"""

from __future__ import annotations

from ldmrt.export.passes.fuse_norm import OPERATOR as NORM
from ldmrt.export.passes.pattern import Index, Pass, replaced, residual_sum
from ldmrt.graph import Argument, Graph, Node, Ref

OPERATOR = "ldmrt.add_group_norm_silu.default"

_CAT = "aten.cat.default"


def fuse_add_group_norm(graph: Graph) -> Pass:
    """With every group norm of a sum, or of two pictures joined by their channels, as `ldmrt.add_group_norm_silu`.

    The addends must have one shape and dtype. A sum that nothing but the joint picture reads is taken in, too. A norm to which
    something has been added already (`ldmrt.export.passes.fuse_norm`) stays as it is, and so does one whose weight or bias a
    node makes, since they are read where the total stands. Where several norms read one total, the first of them is taken in.
    Found: group norms that read a sum or a joint picture.
    """
    index = Index(graph)
    changes: dict[str, tuple[Node, ...]] = {}
    found = 0
    for norm in graph.nodes:
        if norm.op != NORM or len(norm.args) > 6:
            continue
        total = index.maker(norm.args[0], "aten.add.Tensor", _CAT)
        if total is None:
            continue
        found += 1
        parts = _parts(index, total)
        if parts is None or total.name in changes or not all(map(index.is_given, norm.args[1:])):
            continue
        both = Ref(index.fresh(f"{norm.name}.both"))
        changes[total.name] = (
            Node(both.name, OPERATOR, (*parts, *norm.args[1:]), {}, (), total.dtype),
            total.replace(op="python.getitem", args=(both, 0), kwargs={}),
            norm.replace(op="python.getitem", args=(both, 1), kwargs={}),
        )
        changes[norm.name] = ()
    return Pass(replaced(graph, changes), found=found, fused=sum(bool(nodes) for nodes in changes.values()))


def _parts(index: Index, total: Node) -> tuple[Ref, Ref | None, Ref | None] | None:
    """x, residual and joined, of which a total is made; None if it is made of anything else."""
    if total.op == _CAT:
        values = total.args[0]
        # What differs in its channels alone has been joined by them.
        if len(values) != 2 or not all(_like(index, value, total) for value in values):
            return None
        first, joined = values
        inner = index.maker(first, "aten.add.Tensor")
        if inner is not None and index.sole_reader(inner) is total:
            pair = residual_sum(index, inner)
            if pair is not None:
                return (*pair, joined)
        return first, None, joined
    pair = residual_sum(index, total)
    return None if pair is None else (*pair, None)


def _like(index: Index, value: Argument, total: Node) -> bool:
    """Whether a value differs from the total in nothing but its channels."""
    shape = index.shape(value)
    if shape is None or not isinstance(value, Ref) or index.dtype(value) != total.dtype:
        return False
    return (shape[0], *shape[2:]) == (total.shape[0], *total.shape[2:])
