"""Clean a captured graph: drop what does nothing, compute what is constant, merge what is computed twice."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ldmrt.engines.torch import call, has_dim
from ldmrt.errors import BuildError
from ldmrt.graph import Argument, Dim, Graph, Node, Ref, prune, substitute
from ldmrt.operators import ALLOWED

# A folded constant is stored in the bundle; beyond this many bytes computing it again is the better bargain.
_LARGEST_CONSTANT = 1 << 20

_IDENTITIES = ("aten.dropout.default", "aten.detach.default", "aten.clone.default", "aten.alias.default")
_SHAPERS = ("aten.view.default", "aten.reshape.default", "aten.expand.default")


def clean(graph: Graph) -> Graph:
    """The same function in fewer nodes.

    Raises:
        BuildError: an operator is left that the runtime does not run.
    """
    graph = merge_duplicates(fold_constants(drop_identities(graph)))
    unknown = sorted({node.op for node in graph.nodes} - ALLOWED)
    if unknown:
        raise BuildError(f"{graph.name}: the model uses operators that the runtime does not run: {', '.join(unknown)}")
    return graph


def drop_identities(graph: Graph) -> Graph:
    """Without dropout (inference), casts to the dtype a value has, reshapes to its own shape, `x * 1` and `x / 1`."""
    made = {node.name: node for node in graph.nodes}
    specs = {spec.name: spec for spec in (*graph.inputs, *graph.weights.values())}

    def does_nothing(node: Node) -> bool:
        if not node.args or not isinstance(node.args[0], Ref):
            return False
        if node.op == "aten.dropout.default" and node.args[2] is True:
            raise BuildError(f"{graph.name}: the model was captured in training mode")
        if node.op in _IDENTITIES:
            # A copy may be there to make the elements lie as a later view needs them.
            return node.kwargs.get("memory_format") in (None, torch.preserve_format)
        source = node.args[0].name
        if source in made:
            shape, dtype = made[source].shape, made[source].dtype
        elif source in specs:
            spec = specs[source]
            shape = tuple(Dim(size) if isinstance(size, str) else size for size in spec.shape)
            dtype = spec.dtype
        else:
            return False
        same = node.dtype == dtype and node.shape == shape
        if node.op in ("aten.div.Tensor", "aten.mul.Tensor"):
            return same and isinstance(node.args[1], (int, float)) and node.args[1] == 1
        return same and (node.op == "aten.to.dtype" or node.op in _SHAPERS)

    return rewrite(graph, lambda node: node.args[0] if does_nothing(node) else None)


def fold_constants(graph: Graph) -> Graph:
    """With every small value that depends on no input and no weight computed now, on the CPU."""
    constants = dict(graph.constants)

    def fold(node: Node) -> Argument | None:
        if (
            node.op not in ALLOWED
            or has_dim((node.args, tuple(node.kwargs.values())))
            or any(name not in constants for name in node.refs())
        ):
            return None

        with torch.inference_mode():
            value = call(node, constants)
        if not isinstance(value, torch.Tensor) or value.nbytes > _LARGEST_CONSTANT:
            return None
        constants[node.name] = value.clone().contiguous()
        return Ref(node.name)

    folded = rewrite(graph, fold)
    return prune(folded.replace(constants=constants))


def merge_duplicates(graph: Graph) -> Graph:
    """With one node for equal calls on equal arguments. Every operator in a graph is pure, so this is safe."""
    seen: dict[object, str] = {}

    def merge(node: Node) -> Argument | None:
        # repr tells 1 from 1.0 from True, which compare equal
        key = (node.op, repr(node.args), repr(sorted(node.kwargs.items(), key=lambda item: item[0])))
        first = seen.setdefault(key, node.name)
        return None if first == node.name else Ref(first)

    return rewrite(graph, merge)


def rewrite(graph: Graph, replacement: Callable[[Node], Argument | None]) -> Graph:
    """Walk the nodes in order; where `replacement(node)` gives a `Ref`, users read that instead and the node goes."""
    renamed: dict[str, Ref] = {}

    def rename(argument: Ref | Dim) -> Argument:
        return renamed.get(argument.name, argument) if isinstance(argument, Ref) else argument

    nodes: list[Node] = []
    for original in graph.nodes:
        node = original.replace(
            args=substitute(original.args, rename),
            kwargs={key: substitute(value, rename) for key, value in original.kwargs.items()},
        )
        other = replacement(node)
        if isinstance(other, Ref):
            renamed[node.name] = other
        else:
            nodes.append(node)
    outputs = {name: renamed.get(value, Ref(value)).name for name, value in graph.outputs.items()}
    return prune(graph.replace(nodes=tuple(nodes), outputs=outputs))
