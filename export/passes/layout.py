"""Channels last: convolutions read and write (rows, channels, height, width) with the channels of a pixel side by side.

Tensor cores want it so, and attention between the pixels of a picture then reads (rows, height * width, channels) without a copy.
Shapes stay as they are; only the order in memory is another.
"""

from __future__ import annotations

import torch

from ldmrt.export.passes.clean import rewrite
from ldmrt.export.passes.pattern import Index
from ldmrt.graph import Argument, Graph, Node, Ref

_CONVOLUTIONS = ("aten.conv2d.default", "ldmrt.conv2d.default")
_CONTIGUOUS = "aten.contiguous.default"
_COPIES = (_CONTIGUOUS, "aten.clone.default")
_TO_PICTURE = (0, 3, 1, 2)
_ADD_NORM, _ADD_UPSAMPLE = "ldmrt.add_group_norm_silu.default", "ldmrt.add_upsample.default"

# Operators whose result lies in memory as the pictures they read do.
_KEEPS = frozenset(
    {
        *(f"aten.{name}.Tensor" for name in ("add", "sub", "mul", "div")),
        *(f"aten.{name}.Scalar" for name in ("add", "sub", "mul", "div")),
        *(f"aten.{name}.default" for name in ("silu", "gelu", "relu", "sigmoid", "tanh", "neg", "clamp")),
        *(f"aten.{name}.default" for name in ("cat", "pad", "constant_pad_nd", "avg_pool2d", "upsample_nearest2d")),
        *(f"aten.{name}.vec" for name in ("upsample_nearest2d", "upsample_bilinear2d")),
        "aten.to.dtype",
        "aten.group_norm.default",
        "ldmrt.group_norm_silu.default",
    }
)


def layout(graph: Graph) -> Graph:
    """The same function with every convolution channels last; a graph without pictures as it is.

    A picture is put in order where it comes in, before the first convolution, and everything after keeps that order; weights
    are put in order by nodes that read weights alone, which an engine runs once, when it is loaded. Elsewhere the nodes added
    here find what they read in order and do nothing: they stand where that is not certain from the graph alone.
    """
    if not any(node.op in (*_CONVOLUTIONS, _ADD_UPSAMPLE) or _is_turned(node) for node in graph.nodes):
        return graph
    return _Layout(_without_turns(graph)).graph()


class _Layout:
    def __init__(self, graph: Graph) -> None:
        self.source = graph
        self.index = Index(graph)
        self.nodes: list[Node] = []
        self.ordered: dict[str, str] = {}  # value -> the same value, known to be channels last

    def graph(self) -> Graph:
        """Walk the nodes in order."""
        for node in self.source.nodes:
            self.nodes.append(self.convolution(node) if node.op in _CONVOLUTIONS else self.other(node))
        return self.source.replace(nodes=tuple(self.nodes))

    def convolution(self, node: Node) -> Node:
        """A convolution, with its input and its weight in order."""
        self.ordered[node.name] = node.name
        picture, weight, *rest = node.args
        shape = self.index.shape(weight)
        # The weights of a single pixel are in both orders at once.
        pixel = shape is not None and shape[2:] == (1, 1)
        return node.replace(args=(self.order(picture), weight if pixel else self.order(weight), *rest))

    def other(self, node: Node) -> Node:
        """Any other node; what reads a picture in order gives one in order, where the operator can."""
        if node.op == "aten.view.default":
            # A view asks for an order in memory, and the order is what changes here. A reshape copies if it must.
            return node.replace(op="aten.reshape.default")
        if node.op in (_ADD_NORM, _ADD_UPSAMPLE):
            return self.sum(node)
        if len(node.shape) != 4:
            return node
        if node.op == "python.getitem" and node.args[0].name in self.ordered:
            self.ordered[node.name] = node.name
        if node.op in _COPIES and self.is_picture(node.args[0]):
            self.ordered[node.name] = node.name
            return node.replace(op=_CONTIGUOUS, kwargs={"memory_format": torch.channels_last})
        pictures = self.pictures(node)
        if node.op not in _KEEPS or not any(name in self.ordered for name in pictures):
            return node
        self.ordered[node.name] = node.name
        return node.replace(args=tuple(self.ordered_argument(argument, pictures) for argument in node.args))

    def sum(self, node: Node) -> Node:
        """What puts pictures together: all of them in order if one is, and all results. Upsampling knows no other order."""
        count = 3 if node.op == _ADD_NORM else 2
        parts = [value for value in node.args[:count] if len(self.index.shape(value) or ()) == 4]
        if node.op == _ADD_NORM and not any(self.is_picture(value) for value in parts):
            return node
        self.ordered[node.name] = node.name
        args = tuple(self.order(value) if value in parts else value for value in node.args[:count])
        return node.replace(args=(*args, *node.args[count:]))

    def pictures(self, node: Node) -> list[str]:
        """The pictures that a node reads: of several, those that are not broadcast."""
        shapes = {name: self.index.shape(Ref(name)) or () for name in node.refs()}
        found = [name for name, shape in shapes.items() if len(shape) == 4]
        return found if len(found) == 1 else [name for name in found if shapes[name][2:] == node.shape[2:]]

    def ordered_argument(self, argument: Argument, pictures: list[str]) -> Argument:
        """An argument with the pictures in it in order."""
        if isinstance(argument, tuple):
            return tuple(self.ordered_argument(item, pictures) for item in argument)
        return self.order(argument) if isinstance(argument, Ref) and argument.name in pictures else argument

    def is_picture(self, value: Argument) -> bool:
        """Whether a value is in order, or was made of pixels with their channels side by side."""
        turned = self.index.maker(value)
        by_permute = turned is not None and _is_turned(turned)
        return by_permute or (isinstance(value, Ref) and value.name in self.ordered)

    def order(self, value: Ref) -> Ref:
        """The value, channels last: itself, or a new node."""
        if value.name not in self.ordered:
            name = self.index.fresh(f"{value.name}.channels_last")
            shape, dtype = self.index.shape(value) or (), self.index.dtype(value)
            self.nodes.append(Node(name, _CONTIGUOUS, (value,), {"memory_format": torch.channels_last}, shape, dtype))
            self.ordered[value.name] = self.ordered[name] = name
        return Ref(self.ordered[value.name])


def _is_turned(node: Node) -> bool:
    """Whether a node makes a picture of pixels."""
    return node.op == "aten.permute.default" and tuple(node.args[1]) == _TO_PICTURE


def _without_turns(graph: Graph) -> Graph:
    """Without transposes that undo each other, as attention in diffusers' VAE has them."""
    made: dict[str, Node] = {}

    def axes(node: Node) -> set[int]:
        return {axis % len(node.shape) for axis in node.args[1:3]}

    def undone(node: Node) -> Argument | None:
        made[node.name] = node
        first = made.get(node.args[0].name) if node.op == "aten.transpose.int" else None
        return first.args[0] if first is not None and first.op == node.op and axes(first) == axes(node) else None

    return rewrite(graph, undone)
