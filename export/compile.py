"""From a component to the graphs that engines are made of: capture, then the passes in their order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ldmrt.engines.protocol import TensorSpec
from ldmrt.export.capture import capture
from ldmrt.export.component import Component
from ldmrt.export.passes.clean import clean
from ldmrt.export.passes.fuse import fuse
from ldmrt.export.passes.hoist import hoist
from ldmrt.export.passes.layout import layout
from ldmrt.export.passes.merge_linears import merge_linears
from ldmrt.export.passes.promote import promote
from ldmrt.export.plugins import PASSES as PLUGIN_PASSES
from ldmrt.graph import Graph

# Inputs that are no activations keep their precision.
_EXACT = ("timesteps", "time_ids")


@dataclass(frozen=True)
class Compiled:
    """A component's graphs, their rows still free.

    Attributes:
        graphs: one, named after the component; or for a denoising network three, which `Component.parts` names.
        passes: what each pass did: nodes after `captured` and `clean`, `PASS.found` and `PASS.fused` of the fusing passes, nodes of
            each class of `hoist`.
    """

    graphs: tuple[Graph, ...]
    passes: Mapping[str, int]


def compile_component(
    component: Component,
    dtype: torch.dtype,
    *,
    fused: bool,
    prepare: Callable[[Graph], Graph] = lambda graph: graph,
    fit: Callable[[Graph], Graph] = lambda graph: graph,
    plugins: bool = False,
) -> Compiled:
    """Capture a component and run the passes over it.

    Args:
        component: the component, its module on the meta device.
        dtype: the precision to compile for.
        fused: for the torch engine: with the fused operators, channels last. ONNX Runtime fuses in its own way.
        prepare: a change to the captured graph before the passes.
        fit: a change to the fused graph before it is cut in three: what the precision does not hold, in another.
        plugins: not for the torch engine, but with those fused operators that become layers of a TensorRT plan.

    Raises:
        BuildError: the module cannot be captured, or uses an operator that the runtime does not run.
    """
    captured = capture(component.name, component.module.to(dtype), _cast(component.inputs, dtype), component.outputs)
    graph = clean(promote(prepare(captured)))
    passes = {"captured": len(captured.nodes), "clean": len(graph.nodes)}
    if fused or plugins:
        result = fuse(graph) if fused else fuse(graph, PLUGIN_PASSES)
        graph = result.graph
        for name in result.found:
            passes |= {f"{name}.found": result.found[name], f"{name}.fused": result.fused[name]}
    if component.kinds and not fused:
        # Merged for every engine, so that all of a bundle's engines take the same values from `context` and `schedule`.
        graph = merge_linears(graph).graph
    graph = fit(graph)
    if not component.kinds:
        return Compiled((layout(graph) if fused else graph,), passes)
    hoisted = hoist(graph, component.kinds)
    passes |= {kind: count for kind, count in hoisted.counts.items() if count}
    step = layout(hoisted.step) if fused else hoisted.step
    graphs = (hoisted.context, hoisted.schedule, step)
    return Compiled(tuple(g.replace(name=n) for g, n in zip(graphs, component.parts, strict=True)), passes)


def _cast(inputs: tuple[TensorSpec, ...], dtype: torch.dtype) -> list[TensorSpec]:
    """A network's inputs in the engine's precision; ids, and numbers that are not activations, keep theirs."""
    return [
        TensorSpec(s.name, s.shape, dtype if s.dtype.is_floating_point and s.name not in _EXACT else s.dtype)
        for s in inputs
    ]
