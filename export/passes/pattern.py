"""What the fusing passes share: questions about a graph, and putting nodes in the place of others.

A pass looks for its pattern in the graph as it was, and says which nodes stand where the pattern's last node stood. They make
values of the same names, so nothing that reads them changes, and what is read no longer is pruned.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import count

import torch

from ldmrt.engines.protocol import TensorSpec
from ldmrt.graph import Argument, Dim, Graph, Node, Ref, Size, prune

# The same elements in the same order under another shape.
RESHAPES = ("aten.view.default", "aten.reshape.default", "aten._unsafe_view.default", "aten.unsqueeze.default")


@dataclass(frozen=True)
class Pass:
    """What one pass made.

    Attributes:
        graph: the graph, rewritten.
        found: places where the operator that the pattern is built around stands.
        fused: those of them that were rewritten.
    """

    graph: Graph
    found: int
    fused: int


class Index:
    """Who makes and who reads the values of a graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes = {node.name: node for node in graph.nodes}
        self._specs: dict[str, TensorSpec] = {spec.name: spec for spec in graph.inputs} | dict(graph.weights)
        self._taken = {*self.nodes, *self._specs, *graph.constants}
        self._readers: dict[str, list[Node]] = {}
        for node in graph.nodes:
            for name in node.refs():
                self._readers.setdefault(name, []).append(node)
        self._outputs = set(graph.outputs.values())

    def maker(self, argument: Argument, *ops: str) -> Node | None:
        """The node that makes an argument, if it is one of these operators (of any, if none is named)."""
        node = self.nodes.get(argument.name) if isinstance(argument, Ref) else None
        return node if node is not None and (not ops or node.op in ops) else None

    def readers(self, node: Node) -> list[Node]:
        """The nodes that read a node's value, once for every time they do."""
        return self._readers.get(node.name, [])

    def sole_reader(self, node: Node, *ops: str) -> Node | None:
        """The node that alone reads a value, once, if it is one of these operators; None if the value is an output."""
        readers = self.readers(node)
        if node.name in self._outputs or len(readers) != 1 or (ops and readers[0].op not in ops):
            return None
        return readers[0]

    def is_given(self, argument: Argument) -> bool:
        """Whether an argument is there before any node has run: an input, a weight, a constant, or no value of the graph."""
        return self.maker(argument) is None

    def shape(self, argument: Argument) -> tuple[Size, ...] | None:
        """The shape of an argument; None if it is no tensor."""
        if not isinstance(argument, Ref):
            return None
        if argument.name in self.nodes:
            return self.nodes[argument.name].shape
        if argument.name in self._specs:
            return tuple(Dim(size) if isinstance(size, str) else size for size in self._specs[argument.name].shape)
        return tuple(self.graph.constants[argument.name].shape)

    def dtype(self, argument: Ref) -> torch.dtype:
        """The element type of a value."""
        if argument.name in self.nodes:
            return self.nodes[argument.name].dtype
        if argument.name in self._specs:
            return self._specs[argument.name].dtype
        return self.graph.constants[argument.name].dtype

    def fresh(self, name: str) -> str:
        """A name that no value has: this one, or this one with a number."""
        candidates = (name if number == 1 else f"{name}.{number}" for number in count(1))
        found = next(candidate for candidate in candidates if candidate not in self._taken)
        self._taken.add(found)
        return found


def replaced(graph: Graph, changes: Mapping[str, Iterable[Node]]) -> Graph:
    """The graph with other nodes (or none) in the place of those named, without what is read no longer.

    The values that are read after a replaced node must be made, under their names, by then.
    """
    nodes = [new for node in graph.nodes for new in changes.get(node.name, (node,))]
    return prune(graph.replace(nodes=tuple(nodes)))


def argument(node: Node, position: int, name: str, default: Argument = None) -> Argument:
    """An argument that may have been given by position or by name, or left out."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def addends(node: Node) -> tuple[Ref, Ref] | None:
    """The two tensors that a node adds, neither of them scaled."""
    if node.op != "aten.add.Tensor" or node.kwargs.get("alpha", 1) != 1:
        return None
    first, second = node.args[:2]
    return (first, second) if isinstance(first, Ref) and isinstance(second, Ref) else None


def residual_sum(index: Index, node: Node) -> tuple[Ref, Ref] | None:
    """The addends of a node that adds two tensors of one shape and dtype."""
    pair = addends(node)
    if pair is None or any((index.shape(x), index.dtype(x)) != (node.shape, node.dtype) for x in pair):
        return None
    return pair
