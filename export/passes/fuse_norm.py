"""Group norm, the time embedding added before it and the SiLU after it: one operator.

In a residual block of Stable Diffusion: `conv -> + time[:, :, None, None] -> group_norm -> silu -> conv`.
"""

from __future__ import annotations

from ldmrt.export.passes.pattern import RESHAPES, Index, Pass, addends, argument, replaced
from ldmrt.graph import Graph, Node, Ref

OPERATOR = "ldmrt.group_norm_silu.default"


def fuse_norm(graph: Graph) -> Pass:
    """With every group norm as `ldmrt.group_norm_silu`.

    The SiLU is taken in if nothing else reads the norm, and the sum before it if nothing else reads the sum and one addend is
    one number for each row and channel. What stands between them (a scale and shift by time, a cast) keeps them apart.
    Found: group norms.
    """
    index = Index(graph)
    changes: dict[str, tuple[Node, ...]] = {}
    norms = [node for node in graph.nodes if node.op == "aten.group_norm.default"]
    for norm in norms:
        silu = index.sole_reader(norm, "aten.silu.default")
        last = silu or norm
        source, shift = _shifted(index, norm)
        args = (
            source,
            argument(norm, 2, "weight"),
            argument(norm, 3, "bias"),
            norm.args[1],
            argument(norm, 4, "eps", 1e-5),
            silu is not None,
        )
        fused = last.replace(op=OPERATOR, args=args if shift is None else (*args, shift), kwargs={})
        changes[last.name] = (fused,)
    return Pass(replaced(graph, changes), found=len(norms), fused=len(changes))


def _shifted(index: Index, norm: Node) -> tuple[Ref, Ref | None]:
    """What a norm reads, and what has been added to it, as (rows, channels)."""
    source: Ref = norm.args[0]
    total = index.maker(source, "aten.add.Tensor")
    pair = addends(total) if total is not None and index.sole_reader(total) is norm else None
    if pair is None:
        return source, None
    for x, other in (pair, pair[::-1]):
        shift = _per_channel(index, other)
        if index.shape(x) == norm.shape and index.dtype(x) == norm.dtype and shift is not None:
            shape = index.shape(shift)
            if shape == norm.shape[:2] and index.dtype(shift) == norm.dtype:
                return x, shift
    return source, None


def _per_channel(index: Index, value: Ref) -> Ref | None:
    """The (rows, channels) tensor of which `value`, (rows, channels, 1, ...), is another view."""
    shape = index.shape(value)
    if shape is None or len(shape) < 3 or any(size != 1 for size in shape[2:]):
        return None
    while index.shape(value) != shape[:2]:
        view = index.maker(value, *RESHAPES)
        if view is None:
            return None
        value = view.args[0]
    return value
