"""The biases of convolutions and linear layers, left to the fused operator that reads their result.

torch adds the bias of a convolution on a GPU in a pass of its own over the result, and that of a linear layer at the price of a
slower matrix product; the operator that comes next has every element in a register anyway.
"""

from __future__ import annotations

from ldmrt.export.passes.fuse_add_group_norm import OPERATOR as ADD_GROUP_NORM
from ldmrt.export.passes.fuse_add_norm import OPERATOR as ADD_LAYER_NORM
from ldmrt.export.passes.fuse_geglu import OPERATOR as GEGLU
from ldmrt.export.passes.fuse_norm import OPERATOR as GROUP_NORM
from ldmrt.export.passes.fuse_upsample import OPERATOR as ADD_UPSAMPLE
from ldmrt.export.passes.pattern import Index, Pass, argument, replaced, residual_sum
from ldmrt.graph import Argument, Graph, Node, Ref

_CONVOLUTION, _LINEAR = "aten.conv2d.default", "aten.linear.default"
_LAYER_NORM = "aten.layer_norm.default"
_COPIES = ("aten.contiguous.default", "aten.clone.default")
_TO_PICTURE = (0, 3, 1, 2)

# Where an operator takes x_bias, and how many of its first arguments it adds up with it.
_TAKES = {GROUP_NORM: (7, 1), ADD_GROUP_NORM: (8, 2), ADD_LAYER_NORM: (5, 2), GEGLU: (1, 1), ADD_UPSAMPLE: (2, 2)}
_PICTURES = (GROUP_NORM, ADD_GROUP_NORM, ADD_UPSAMPLE)


def push_bias(graph: Graph) -> Pass:
    """With no bias in a layer whose result goes to a fused operator, which adds it.

    Nothing else may read the result; but where a norm reads it, the norm's operator gives it to the others, bias and all. A sum
    that no norm reads becomes `ldmrt.add_upsample` by 1. Biases must be weights of the graph.
    Found: layers with a bias whose result a fused operator adds up, or a layer norm reads. Fused: those that are left without.
    """
    graph = _sums(graph)
    found, before = _found(Index(graph)), _count(graph)
    graph = _norms(graph)
    index = Index(graph)
    changes: dict[str, tuple[Node, ...]] = {}
    for node in graph.nodes:
        place, count = _TAKES.get(node.op, (0, 0))
        layers = [layer for value in node.args[:count] if (layer := _layer(index, value, node.op)) is not None]
        if not layers:
            continue
        made: list[Node] = []
        biases = [_bias(layer) for layer in layers]
        given = argument(node, place, "x_bias")
        total: Argument = given if given is not None else biases.pop(0)
        for bias in biases:
            both = index.fresh(f"{node.name}.x_bias")
            made.append(Node(both, "aten.add.Tensor", (total, bias), {}, index.shape(bias) or (), index.dtype(bias)))
            total = Ref(both)
        changes |= {layer.name: (_without_bias(layer),) for layer in layers}
        args = (*node.args, *[None] * (place + 1 - len(node.args)))
        changes[node.name] = (*made, node.replace(args=(*args[:place], total, *args[place + 1 :])))
    graph = replaced(graph, changes)
    return Pass(graph, found=found, fused=before - _count(graph))


def _sums(graph: Graph) -> Graph:
    """With `add_upsample` by 1 for every sum of two pictures of which one is fresh from a layer with a bias."""
    index = Index(graph)
    changes: dict[str, tuple[Node, ...]] = {}
    for node in graph.nodes:
        pair = residual_sum(index, node)
        if pair is not None and any(_layer(index, value, ADD_UPSAMPLE) is not None for value in pair):
            changes[node.name] = (node.replace(op=ADD_UPSAMPLE, args=(*pair, None, 1), kwargs={}),)
    return replaced(graph, changes)


def _norms(graph: Graph) -> Graph:
    """With norms that give what they read to its other readers, where that is the result of a layer with a bias.

    They then stand where the layer stands, so no node may make their weights.
    """
    index = Index(graph)
    changes: dict[str, tuple[Node, ...]] = {}
    for norm in graph.nodes:
        chain = _chain(index, norm.args[0], norm.op) if norm.op in (GROUP_NORM, _LAYER_NORM) else []
        # Of a linear layer that has made a picture, the norm's operator would have to stand behind it.
        if len(chain) != 1 or chain[0].name in changes:
            continue
        if not all(map(index.is_given, (*norm.args[1:], *norm.kwargs.values()))):
            continue
        (layer,) = chain
        bare, both = index.fresh(f"{layer.name}.bare"), index.fresh(f"{norm.name}.both")
        if norm.op == GROUP_NORM:
            # With a shift of its own it takes x_bias beside it, if it is the only reader.
            if len(norm.args) > 6 or index.sole_reader(layer) is not None:
                continue
            op, args = ADD_GROUP_NORM, (Ref(bare), None, None, *norm.args[1:], _bias(layer))
        else:
            weight, bias = argument(norm, 2, "weight"), argument(norm, 3, "bias")
            if tuple(norm.args[1]) != layer.shape[-1:]:
                continue
            op, args = ADD_LAYER_NORM, (Ref(bare), None, weight, bias, argument(norm, 4, "eps", 1e-5), _bias(layer))
        changes[layer.name] = (
            _without_bias(layer).replace(name=bare),
            Node(both, op, args, {}, (), layer.dtype),
            Node(layer.name, "python.getitem", (Ref(both), 0), {}, layer.shape, layer.dtype),
            norm.replace(op="python.getitem", args=(Ref(both), 1), kwargs={}),
        )
        changes[norm.name] = ()
    return replaced(graph, changes)


def _found(index: Index) -> int:
    """How many layers with a bias there are whose result, whoever else reads it, one of these operators reads."""
    layers = set()
    for node in index.graph.nodes:
        count = 1 if node.op == _LAYER_NORM else _TAKES.get(node.op, (0, 0))[1]
        chains = [_chain(index, value, node.op) for value in node.args[:count]]
        layers |= {chain[-1].name for chain in chains if chain}
    return len(layers)


def _layer(index: Index, value: Argument, op: str) -> Node | None:
    """The layer with a bias whose result an operator reads, and nothing else."""
    chain = _chain(index, value, op)
    alone = all(index.sole_reader(node) is not None for node in chain)
    return chain[-1] if chain and alone else None


def _chain(index: Index, value: Argument, op: str) -> list[Node]:
    """The nodes from a value back to the layer with a bias that made it; none if no layer did, its channels where `op` has them."""
    node = index.maker(value)
    if node is None:
        return []
    if op not in _PICTURES:
        return [node] if node.op == _LINEAR and _has_bias(index, node) else []
    if node.op == _CONVOLUTION:
        return [node] if len(node.shape) == 4 and _has_bias(index, node) else []
    # The picture that a linear layer has made of pixels.
    chain = []
    if node.op in _COPIES:
        chain, node = [node], index.maker(node.args[0])
    if node is None or node.op != "aten.permute.default" or tuple(node.args[1]) != _TO_PICTURE:
        return []
    lines = index.maker(node.args[0], "aten.reshape.default", "aten.view.default")
    layer = index.maker(lines.args[0], _LINEAR) if lines is not None else None
    if lines is None or layer is None or layer.shape[-1] != lines.shape[-1] or not _has_bias(index, layer):
        return []
    return [*chain, node, lines, layer]


def _has_bias(index: Index, layer: Node) -> bool:
    bias = argument(layer, 2, "bias")
    return bias is not None and bias.name in index.graph.weights


def _count(graph: Graph) -> int:
    """How many layers have a bias."""
    index = Index(graph)
    return sum(node.op in (_CONVOLUTION, _LINEAR) and _has_bias(index, node) for node in graph.nodes)


def _bias(layer: Node) -> Ref:
    bias: Ref = argument(layer, 2, "bias")
    return bias


def _without_bias(layer: Node) -> Node:
    kwargs = {name: value for name, value in layer.kwargs.items() if name != "bias"}
    if layer.op == _LINEAR:
        return layer.replace(args=layer.args[:2], kwargs=kwargs)
    return layer.replace(args=(*layer.args[:2], None, *layer.args[3:]), kwargs=kwargs)
