"""Convolutions of single pixels as linear layers over the channels, which is what they are.

A picture with its channels side by side is a matrix of pixels already. A library's matrix product then adds the bias as it goes,
and a transformer's projections need no convolution between two transposes.
"""

from __future__ import annotations

from ldmrt.export.passes.clean import rewrite
from ldmrt.export.passes.pattern import RESHAPES, Index, Pass, argument, replaced
from ldmrt.graph import Argument, Graph, Node, Ref, Size

_TO_PIXELS, _TO_PICTURE = (0, 2, 3, 1), (0, 3, 1, 2)
# Rows of a matrix that are no multiple of 16 bytes long keep tensor cores from it.
_MULTIPLE = 8


def pointwise(graph: Graph) -> Pass:
    """With every such convolution as a linear layer.

    Its stride and dilation must be 1, it must not be padded or grouped, and its channels, on both sides, must be a multiple of 8.
    Found: convolutions of single pixels. Fused: those of them that were rewritten.
    """
    index = Index(graph)
    changes: dict[str, tuple[Node, ...]] = {}
    found = 0
    for node in graph.nodes:
        if node.op != "aten.conv2d.default" or (index.shape(node.args[1]) or ())[2:] != (1, 1):
            continue
        found += 1
        nodes = _linear(index, node)
        if nodes is not None:
            changes[node.name] = nodes
    return Pass(_without_turns(replaced(graph, changes)), found=found, fused=len(changes))


def _linear(index: Index, node: Node) -> tuple[Node, ...] | None:
    """The nodes that make the convolution's value by a linear layer; None if it is not one."""
    picture, weight, bias = node.args[0], node.args[1], argument(node, 2, "bias")
    shape, matrix = index.shape(picture), index.shape(weight)
    plain = (
        _all(argument(node, 3, "stride", 1), 1)
        and _all(argument(node, 4, "padding", 0), 0)
        and _all(argument(node, 5, "dilation", 1), 1)
        and argument(node, 6, "groups", 1) == 1
    )
    if not plain or shape is None or matrix is None or len(shape) != 4:
        return None
    rows, channels, height, width = shape
    out = matrix[0]
    if not (isinstance(channels, int) and isinstance(out, int) and isinstance(height, int) and isinstance(width, int)):
        return None
    if channels % _MULTIPLE or out % _MULTIPLE:
        return None
    pixels: tuple[Size, ...] = (rows, height * width, channels)

    def made(name: str, op: str, value: Ref, what: Argument, shape: tuple[Size, ...]) -> Node:
        return Node(index.fresh(f"{node.name}.{name}"), f"aten.{op}.default", (value, what), {}, shape, node.dtype)

    turned = made("turned", "permute", picture, _TO_PIXELS, (rows, height, width, channels))
    flat = made("pixels", "reshape", Ref(turned.name), pixels, pixels)
    square = made("matrix", "reshape", weight, (out, channels), (out, channels))
    args = (Ref(flat.name), Ref(square.name), *([] if bias is None else [bias]))
    linear = Node(index.fresh(f"{node.name}.linear"), "aten.linear.default", args, {}, (*pixels[:2], out), node.dtype)
    lines = made("lines", "reshape", Ref(linear.name), (rows, height, width, out), (rows, height, width, out))
    result = node.replace(op="aten.permute.default", args=(Ref(lines.name), _TO_PICTURE), kwargs={})
    return turned, flat, square, linear, lines, result


def _all(value: Argument, expected: int) -> bool:
    return all(item == expected for item in value) if isinstance(value, tuple) else value == expected


def _without_turns(graph: Graph) -> Graph:
    """Without turning pixels into a picture and back, and without giving them another shape on the way."""
    made: dict[str, Node] = {}

    def maker(value: Argument, *ops: str) -> Node | None:
        node = made.get(value.name) if isinstance(value, Ref) else None
        return node if node is not None and (not ops or node.op in ops) else None

    def undone(node: Node) -> Argument | None:
        made[node.name] = node
        if node.op == "aten.permute.default" and tuple(node.args[1]) == _TO_PIXELS:
            turned = maker(node.args[0], "aten.permute.default", "aten.contiguous.default")
            # A copy that only changed the order in memory is not needed by what reads pixels.
            if turned is not None and turned.op == "aten.contiguous.default":
                turned = maker(turned.args[0], "aten.permute.default")
            if turned is not None and tuple(turned.args[1]) == _TO_PICTURE:
                source: Argument = turned.args[0]
                return source
        if node.op in RESHAPES[:3]:
            before = maker(node.args[0], *RESHAPES[:3])
            if before is not None and _shape(made, before.args[0]) == node.shape:
                first: Argument = before.args[0]
                return first
        return None

    return rewrite(graph, undone)


def _shape(made: dict[str, Node], value: Argument) -> tuple[Size, ...] | None:
    """The shape of what is read; None for an input or a weight."""
    node = made.get(value.name) if isinstance(value, Ref) else None
    return None if node is None else node.shape
