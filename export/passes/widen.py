"""What float16 does not hold, in float32.

Float32 and not bfloat16, whose range is the same: it keeps the error that float16 is held to, a few nodes of many cost little in
it, and group norms bring most values back soon.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch

from ldmrt.errors import BuildError
from ldmrt.export.passes.clean import drop_identities
from ldmrt.export.passes.pattern import Index
from ldmrt.export.passes.promote import CAST, cast
from ldmrt.graph import Argument, Dim, Graph, Node, Ref, prune, substitute

_HALF, _FLOAT = torch.float16, torch.float32


def widen(graph: Graph, names: Collection[str]) -> Graph:
    """The same function with some float16 values kept in float32.

    The nodes that make them and those that read them compute in float32. What these read is cast to float32, weights too, by
    nodes that read weights alone; what they make is cast back to float16, if it is not among `names`, where another node reads it.

    Args:
        graph: a graph whose nodes read floating-point tensors of one dtype (`export.passes.promote`), before `hoist` and `layout`.
        names: the values that float16 does not hold.

    Raises:
        BuildError: an output is among them: what a component gives has its precision.
    """
    lost = [output for output, value in graph.outputs.items() if value in names]
    if lost:
        raise BuildError(
            f"{graph.name}: float16 does not hold its output {', '.join(lost)}: build with --dtype bfloat16 or float32"
        )
    return _Widening(graph, names).graph() if names else graph


def in_float32(node: Node) -> Node:
    """The node, computing in float32 where it computed in float16; what it reads must be in float32, too."""

    def wider(argument: Argument) -> Argument:
        return _FLOAT if argument is _HALF else argument

    return node.replace(
        args=tuple(map(wider, node.args)),
        kwargs={key: wider(value) for key, value in node.kwargs.items()},
        dtype=wider(node.dtype),
    )


class _Widening:
    def __init__(self, graph: Graph, names: Collection[str]) -> None:
        self.source = graph
        self.index = Index(graph)
        self.nodes: list[Node] = []
        self.wide: dict[str, str] = {}  # float16 value -> the same value in float32
        # The values that there are in float32 alone: for good, which goes for lists of them too, or until a node asks for less.
        self.kept, self.uncast = set(names), set[str]()

    def graph(self) -> Graph:
        """Walk the nodes in order."""
        for node in self.source.nodes:
            self.add(node)
        for value in self.source.outputs.values():
            self.narrowed(Ref(value))
        return drop_identities(prune(self.source.replace(nodes=tuple(self.nodes))))

    def add(self, node: Node) -> None:
        """A node, in float32 if it makes or reads what float16 does not hold."""
        parts = [part.name for part in self.index.readers(node) if part.op == "python.getitem"]
        if self.kept.isdisjoint((node.name, *node.refs(), *parts)):
            # What is cast to float32 and is there in float32 already need not be cast.
            change = self.widened if node.op == CAST and node.dtype == _FLOAT else self.narrowed
            self.nodes.append(_reading(node, change))
            return
        made = _reading(in_float32(node), self.widened)
        if node.dtype == _HALF:
            self.wide[node.name] = self.index.fresh(f"{node.name}.float32")
            made = made.replace(name=self.wide[node.name])
            (self.kept if parts else self.uncast).add(node.name)
        self.nodes.append(made)

    def widened(self, value: Ref) -> Ref:
        """A value in float32."""
        if self.index.dtype(value) != _HALF:
            return value
        if value.name not in self.wide:
            made = self.index.maker(value, CAST)
            if made is not None and self.index.dtype(made.args[0]) == _FLOAT:
                source: Ref = made.args[0]
                return source
            self.wide[value.name] = self.index.fresh(f"{value.name}.float32")
            self.nodes.append(cast(self.wide[value.name], value, _FLOAT, self.index.shape(value) or ()))
        return Ref(self.wide[value.name])

    def narrowed(self, value: Ref) -> Ref:
        """A value in its own dtype."""
        if value.name in self.uncast:
            self.uncast.remove(value.name)
            shape = self.index.shape(value) or ()
            self.nodes.append(cast(value.name, Ref(self.wide[value.name]), _HALF, shape))
        return value


def _reading(node: Node, change: Callable[[Ref], Ref]) -> Node:
    """The node, reading other values."""

    def changed(argument: Ref | Dim) -> Argument:
        return change(argument) if isinstance(argument, Ref) else argument

    return node.replace(
        args=substitute(node.args, changed),
        kwargs={key: substitute(value, changed) for key, value in node.kwargs.items()},
    )
