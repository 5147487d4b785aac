"""Linear layers that read one value: one matrix product, whose result is cut into theirs.

So the queries, keys and values of a self-attention are made at once, and the keys and values of all cross-attentions, and all
projections of the time embedding. The cuts are views. The merged weights depend on weights alone, so an engine makes them once,
when it is loaded.
"""

from __future__ import annotations

from collections import defaultdict

from ldmrt.export.passes.pattern import Index, Pass, argument, replaced
from ldmrt.graph import Graph, Node, Ref, Size

_LINEAR = "aten.linear.default"
_CAT = "aten.cat.default"


def merge_linears(graph: Graph) -> Pass:
    """With one linear layer in the place of those that read the same value, all with a bias or all without.

    Their weights and biases must be weights of the graph. The members read one value, so they are of one class in
    `export.passes.hoist`, and so is what takes their place.
    Found: linear layers that read what another one reads too. Fused: those of them that were merged.
    """
    index = Index(graph)
    readers: dict[Ref, list[Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.op == _LINEAR and isinstance(node.args[0], Ref):
            readers[node.args[0]].append(node)
    shared = [nodes for nodes in readers.values() if len(nodes) > 1]
    changes: dict[str, tuple[Node, ...]] = {}
    for nodes in shared:
        for with_bias in (False, True):
            group = [node for node in nodes if _is_plain(graph, node) and (_bias(node) is not None) == with_bias]
            if len(group) > 1:
                changes |= {node.name: () for node in group}
                changes[group[0].name] = _merged(index, group)
    return Pass(replaced(graph, changes), found=sum(map(len, shared)), fused=len(changes))


def _is_plain(graph: Graph, node: Node) -> bool:
    """Whether a layer's weight, and its bias if it has one, are weights of the graph, and its width is known."""
    weight, bias = node.args[1], _bias(node)
    held = [value for value in (weight, bias) if value is not None]
    return all(value.name in graph.weights for value in held) and isinstance(node.shape[-1], int)


def _bias(node: Node) -> Ref | None:
    bias: Ref | None = argument(node, 2, "bias")
    return bias


def _merged(index: Index, group: list[Node]) -> tuple[Node, ...]:
    """The nodes that make the values of all layers of a group."""
    first = group[0]
    widths: list[int] = [node.shape[-1] for node in group if isinstance(node.shape[-1], int)]

    def joined(name: str, parts: tuple[Ref, ...]) -> Node:
        rest: tuple[Size, ...] = (index.shape(parts[0]) or ())[1:]
        return Node(index.fresh(f"{first.name}.{name}"), _CAT, (parts, 0), {}, (sum(widths), *rest), first.dtype)

    made = [joined("weights", tuple(node.args[1] for node in group))]
    biases = tuple(bias for bias in map(_bias, group) if bias is not None)
    if biases:
        made.append(joined("biases", biases))
    whole = first.replace(
        name=index.fresh(f"{first.name}.merged"),
        args=(first.args[0], *(Ref(node.name) for node in made)),
        kwargs={},
        shape=(*first.shape[:-1], sum(widths)),
    )
    cuts = []
    start = 0
    for node, width in zip(group, widths, strict=True):
        args = (Ref(whole.name), len(whole.shape) - 1, start, start + width)
        cuts.append(node.replace(op="aten.slice.Tensor", args=args, kwargs={}))
        start += width
    return (*made, whole, *cuts)
