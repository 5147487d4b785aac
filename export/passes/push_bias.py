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
from ldmrt.export.passes.pattern import Index, Pass, addends, argument, replaced
from ldmrt.graph import Argument, Graph, Node, Ref

_CONVOLUTION, _LINEAR = "aten.conv2d.default", "aten.linear.default"
_LAYER_NORM = "aten.layer_norm.default"
_TO_PICTURE = (0, 3, 1, 2)

# Where an operator takes x_bias, and how many of its first arguments it adds up with it.
_TAKES = {GROUP_NORM: (7, 1), ADD_GROUP_NORM: (8, 2), ADD_LAYER_NORM: (5, 2), GEGLU: (1, 1), ADD_UPSAMPLE: (2, 2)}
_PICTURES = (GROUP_NORM, ADD_GROUP_NORM, ADD_UPSAMPLE)


def push_bias(graph: Graph) -> Pass:
    """With no bias in a layer whose result goes to a fused operator, which adds it.

    Nothing else may read the result; but where a norm reads it, the norm's operator gives it to the others, bias and all. A sum
    that no norm reads becomes `ldmrt.add_upsample` by 1.
    Found: layers with a bias whose result goes to a fused operator, a norm or a sum. Fused: those that are left without.
    """
    graph = _sums(graph)
    graph, kept = _norms(graph)
    index = Index(graph)
    changes: dict[str, tuple[Node, ...]] = {}
    pushed = 0
    for node in graph.nodes:
        place, count = _TAKES.get(node.op, (0, 0))
        layers = [layer for value in node.args[:count] if (layer := _layer(index, value, node.op)) is not None]
        if not layers:
            continue
        pushed += len(layers)
        made: list[Node] = []
        biases = [_bias(layer) for layer in layers]
        before = argument(node, place, "x_bias")
        total: Argument = before if before is not None else biases.pop(0)
        for bias in biases:
            both = index.fresh(f"{node.name}.x_bias")
            made.append(Node(both, "aten.add.Tensor", (total, bias), {}, index.shape(bias) or (), index.dtype(bias)))
            total = Ref(both)
        changes |= {layer.name: (_without_bias(layer),) for layer in layers}
        args = (*node.args, *[None] * (place + 1 - len(node.args)))
        changes[node.name] = (*made, node.replace(args=(*args[:place], total, *args[place + 1 :])))
    return Pass(replaced(graph, changes), found=kept + pushed, fused=kept + pushed)


def _sums(graph: Graph) -> Graph:
    """With `add_upsample` by 1 for every sum of two pictures of which one is fresh from a layer with a bias."""
    index = Index(graph)
    changes: dict[str, tuple[Node, ...]] = {}
    for node in graph.nodes:
        pair = addends(node)
        if pair is None or len(node.shape) != 4:
            continue
        alike = all(index.shape(value) == node.shape and index.dtype(value) == node.dtype for value in pair)
        if alike and any(_layer(index, value, ADD_UPSAMPLE) is not None for value in pair):
            changes[node.name] = (node.replace(op=ADD_UPSAMPLE, args=(*pair, None, 1), kwargs={}),)
    return replaced(graph, changes)


def _norms(graph: Graph) -> tuple[Graph, int]:
    """With norms that give what they read to its other readers, where that is a layer's result; and how many there are."""
    index = Index(graph)
    changes: dict[str, tuple[Node, ...]] = {}
    count = 0
    for norm in graph.nodes:
        layer = index.maker(norm.args[0], _CONVOLUTION, _LINEAR) if norm.op in (GROUP_NORM, _LAYER_NORM) else None
        if layer is None or layer.name in changes or not _has_bias(index, layer):
            continue
        bare, both = index.fresh(f"{layer.name}.bare"), index.fresh(f"{norm.name}.both")
        if norm.op == GROUP_NORM:
            # With a shift of its own it takes x_bias beside it, if it is the only reader.
            if len(norm.args) > 6 or index.sole_reader(layer) is not None or layer.op != _CONVOLUTION:
                continue
            op, args = ADD_GROUP_NORM, (Ref(bare), None, None, *norm.args[1:], _bias(layer))
        else:
            weight, bias = argument(norm, 2, "weight"), argument(norm, 3, "bias")
            if tuple(norm.args[1]) != layer.shape[-1:] or layer.op != _LINEAR:
                continue
            op, args = ADD_LAYER_NORM, (Ref(bare), None, weight, bias, argument(norm, 4, "eps", 1e-5), _bias(layer))
        count += 1
        changes[layer.name] = (
            _without_bias(layer).replace(name=bare),
            Node(both, op, args, {}, (), layer.dtype),
            Node(layer.name, "python.getitem", (Ref(both), 0), {}, layer.shape, layer.dtype),
            norm.replace(op="python.getitem", args=(Ref(both), 1), kwargs={}),
        )
        changes[norm.name] = ()
    return replaced(graph, changes), count


def _layer(index: Index, value: Argument, op: str) -> Node | None:
    """The layer whose result an operator reads, alone, with the channels where the operator has them, if it has a bias."""
    node = index.maker(value)
    if node is None or index.sole_reader(node) is None:
        return None
    if op in _PICTURES and node.op == "aten.permute.default":
        # The picture that a linear layer has made of pixels.
        lines = index.maker(node.args[0], "aten.reshape.default", "aten.view.default")
        if tuple(node.args[1]) != _TO_PICTURE or lines is None or index.sole_reader(lines) is None:
            return None
        node = index.maker(lines.args[0], _LINEAR)
        fits = node is not None and node.shape[-1] == lines.shape[-1] and index.sole_reader(node) is not None
    else:
        fits = node.op == (_CONVOLUTION if op in _PICTURES else _LINEAR)
    return node if fits and node is not None and _has_bias(index, node) else None


def _has_bias(index: Index, layer: Node) -> bool:
    bias = argument(layer, 2, "bias")
    return bias is not None and bias.name in index.graph.weights


def _bias(layer: Node) -> Ref:
    bias: Ref = argument(layer, 2, "bias")
    return bias


def _without_bias(layer: Node) -> Node:
    kwargs = {name: value for name, value in layer.kwargs.items() if name != "bias"}
    if layer.op == _LINEAR:
        return layer.replace(args=layer.args[:2], kwargs=kwargs)
    return layer.replace(args=(*layer.args[:2], None, *layer.args[3:]), kwargs=kwargs)
