"""All fusing passes, in order, and what they found."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from ldmrt.export.passes.convolution import convolution
from ldmrt.export.passes.fuse_add_group_norm import fuse_add_group_norm
from ldmrt.export.passes.fuse_add_norm import fuse_add_norm
from ldmrt.export.passes.fuse_attention import fuse_attention
from ldmrt.export.passes.fuse_geglu import fuse_geglu
from ldmrt.export.passes.fuse_linear_geglu import fuse_linear_geglu
from ldmrt.export.passes.fuse_norm import fuse_norm
from ldmrt.export.passes.fuse_upsample import fuse_upsample
from ldmrt.export.passes.merge_linears import merge_linears
from ldmrt.export.passes.pattern import Pass
from ldmrt.export.passes.pointwise import pointwise
from ldmrt.export.passes.push_bias import push_bias
from ldmrt.graph import Graph

PASSES: Mapping[str, Callable[[Graph], Pass]] = {
    "pointwise": pointwise,
    "group_norm": fuse_norm,
    "add_group_norm": fuse_add_group_norm,
    "geglu": fuse_geglu,
    "add_layer_norm": fuse_add_norm,
    "attention": fuse_attention,
    "upsample": fuse_upsample,
    "bias": push_bias,
    "linear_geglu": fuse_linear_geglu,
    "convolution": convolution,
    "linear": merge_linears,
}


@dataclass(frozen=True)
class Fused:
    """What `fuse` makes.

    Attributes:
        graph: the graph, rewritten.
        found: by pass, the places where the operator that its pattern is built around stands (the pass says which).
        fused: by pass, those of them that were rewritten.
    """

    graph: Graph
    found: Mapping[str, int]
    fused: Mapping[str, int]


def fuse(graph: Graph, passes: Collection[str] = tuple(PASSES)) -> Fused:
    """The same function with the operators of `ldmrt.kernels`, and fewer matrix products.

    Args:
        graph: a cleaned graph, before it is cut by `hoist`. Its dimensions may be free.
        passes: which; all of them by default.
    """
    found, fused = {}, {}
    for name in (name for name in PASSES if name in passes):
        result = PASSES[name](graph)
        graph, found[name], fused[name] = result.graph, result.found, result.fused
    return Fused(graph, found, fused)
