"""Type promotion made explicit.

Where torch is given a half and a float, it widens the half on the way. A compiler of strictly typed graphs refuses the two, and
`torch.onnx` writes some of them down as they are: the joined embeddings of Stable Diffusion XL, for one.
"""

from __future__ import annotations

from functools import reduce
from typing import Final

import torch

from ldmrt.export.passes.pattern import Index, replaced
from ldmrt.graph import Argument, Dim, Graph, Node, Ref, Size, substitute

CAST: Final = "aten.to.dtype"

_PROMOTES = frozenset(
    {
        *(f"aten.{name}.Tensor" for name in ("add", "sub", "mul", "div", "eq", "ge", "gt", "le", "lt")),
        *(f"aten.{name}.default" for name in ("cat", "stack", "maximum", "minimum")),
        "aten.where.self",
    }
)


def promote(graph: Graph) -> Graph:
    """The same function, with a cast before every operator that reads floating-point tensors of several dtypes.

    They are cast to the dtype that torch computes in: the result's, or for a comparison the widest.
    """
    index = Index(graph)
    changes: dict[str, tuple[Node, ...]] = {}
    for node in graph.nodes:
        dtypes = {name: index.dtype(Ref(name)) for name in node.refs()} if node.op in _PROMOTES else {}
        floats = {name: dtype for name, dtype in dtypes.items() if dtype.is_floating_point}
        if len(set(floats.values())) < 2:
            continue
        common = node.dtype if node.dtype.is_floating_point else reduce(torch.promote_types, floats.values())
        casts = {
            name: cast(index.fresh(f"{node.name}.{name}"), Ref(name), common, index.shape(Ref(name)) or ())
            for name, dtype in floats.items()
            if dtype != common
        }

        def promoted(argument: Ref | Dim, casts: dict[str, Node] = casts) -> Argument:
            return Ref(casts[argument.name].name) if argument.name in casts else argument

        changes[node.name] = (*casts.values(), node.replace(args=substitute(node.args, promoted)))
    return replaced(graph, changes)


def cast(name: str, value: Ref, dtype: torch.dtype, shape: tuple[Size, ...]) -> Node:
    """A node that gives a value of that shape in another dtype."""
    return Node(name, CAST, (value, dtype), {}, shape, dtype)
