"""Loop-invariant code motion over the sampling loop.

A denoising network is called once per step, but much of it depends only on the prompt (the keys and values of every
cross-attention) or only on the timestep (the time embedding and its projection in every residual block). This pass sorts the
nodes by what they depend on and cuts the graph in three:

* `context`: depends on the request alone (text). Runs once per request.
* `schedule`: depends on the timestep, perhaps on the request, not on the latents. Runs once per request for all steps at once,
  one row a step.
* `step`: depends on the latents. Runs at every step; the values of the other two are inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from typing import Literal

from ldmrt.engines.protocol import TensorSpec
from ldmrt.errors import BuildError
from ldmrt.export.passes.promote import CAST
from ldmrt.graph import Dim, Graph, Node, prune, rename_values
from ldmrt.operators import VIEWS

Kind = Literal["const", "request", "schedule", "step"]
_ORDER: tuple[Kind, ...] = ("const", "request", "schedule", "step")


@dataclass(frozen=True)
class Hoisted:
    """What `hoist` makes: three graphs, and how many nodes of each class there were."""

    context: Graph
    schedule: Graph
    step: Graph
    counts: Mapping[Kind, int]


def hoist(graph: Graph, kinds: Mapping[str, Kind]) -> Hoisted:
    """Cut a denoising network's graph in three.

    Args:
        graph: the cleaned graph. Values that cross a cut have the rows as their first dimension.
        kinds: the class of each input.

    Returns:
        `context` and `schedule` with their own free row count, and `step`, whose further inputs are their outputs, of the
        same names: the name of the layer that makes the value, such as `down_blocks.0.attentions.0...attn2.to_k`, or for
        merged layers what they are called wherever they stand: `attn2.to_k+to_v`.

    Raises:
        BuildError: an input has no class.
    """
    missing = [spec.name for spec in graph.inputs if spec.name not in kinds]
    if missing:
        raise BuildError(f"{graph.name}: no class is known for the inputs {', '.join(missing)}")
    nodes = {node.name: node for node in graph.nodes}
    classes = classify(graph, kinds)
    inputs = {spec.name: spec for spec in graph.inputs}

    # Start from the nodes that need the latents, and follow what they read back to the cut. Views are free, so the cut goes
    # below them, and below casts: what crosses is then a dense tensor as a layer made it, whatever reads it. What is not one
    # row per row stays in the step.
    step = {name for name, kind in classes.items() if kind == "step" and name in nodes}
    crossing: dict[str, Kind] = {}
    pending = [name for node in graph.nodes if node.name in step for name in node.refs()]
    pending += graph.outputs.values()
    while pending:
        name = pending.pop()
        if name not in nodes or name in step or name in crossing:
            continue
        node, kind = nodes[name], classes[name]
        if kind == "const" or node.op in VIEWS or node.op == CAST or not node.shape or node.shape[0] != Dim("rows"):
            step.add(name)
            pending += node.refs()
        else:
            crossing[name] = kind

    order = [node.name for node in graph.nodes if node.name in crossing]
    taken = {*nodes, *inputs, *graph.weights, *graph.constants} - set(order)
    names: dict[str, str] = {}
    for value in order:
        names[value] = _unused(_layer(nodes[value], nodes, classes), taken)
        taken.add(names[value])
    specs = {
        value: TensorSpec(
            names[value], tuple(d.name if isinstance(d, Dim) else d for d in nodes[value].shape), nodes[value].dtype
        )
        for value in order
    }

    def part(name: str, kind: Kind) -> Graph:
        outputs = {names[value]: value for value in order if crossing[value] == kind}
        return _with_used_inputs(prune(graph.replace(name=name, outputs=outputs)))

    step_graph = graph.replace(
        name="step",
        inputs=(*graph.inputs, *(specs[value] for value in order)),
        nodes=tuple(node for node in graph.nodes if node.name in step),
    )
    step_graph = rename_values(step_graph, names)
    counts: dict[Kind, int] = {kind: sum(classes[node.name] == kind for node in graph.nodes) for kind in _ORDER}
    keep = {name for name, kind in kinds.items() if kind == "step" and name in inputs}
    return Hoisted(
        context=part("context", "request"),
        schedule=part("schedule", "schedule"),
        step=_with_used_inputs(prune(step_graph), keep),
        counts=counts,
    )


def classify(graph: Graph, kinds: Mapping[str, Kind]) -> dict[str, Kind]:
    """The class of every input and node: the latest of what it reads."""
    classes: dict[str, Kind] = dict(kinds)
    for node in graph.nodes:
        rank = max((_ORDER.index(classes.get(name, "const")) for name in node.refs()), default=0)
        classes[node.name] = _ORDER[rank]
    return classes


def _layer(value: Node, nodes: Mapping[str, Node], classes: Mapping[str, Kind]) -> str:
    """A readable name for a crossing value: the layer whose weight made it.

    Where one weight has been made of many (`export.passes.merge_linears`), what their layers are called, without where they
    stand: `attn2.to_k+to_v` for the keys and values of all cross-attentions.
    """
    layers: list[list[str]] = []
    pending = list(value.refs())
    while pending:
        name = pending.pop(0)
        if name.endswith(".weight"):
            layers.append(name.split(".")[:-1])
        elif name in nodes and classes[name] == "const":
            pending += nodes[name].refs()
    if not layers:
        return f"hoisted.{value.name}"
    if len(layers) > 1:
        layers = [_without_place(layer) for layer in layers]
    owners, names = (
        list(dict.fromkeys(part)) for part in zip(*((".".join(x[:-1]), x[-1]) for x in layers), strict=True)
    )
    return ".".join("+".join(part) for part in (owners, names) if any(part))


def _without_place(layer: list[str]) -> list[str]:
    """A layer's name from behind the last number in it: `attn2.to_k`. A number at its end is part of its name: `to_out.0`."""
    numbers = [place for place, part in enumerate(layer[:-1]) if part.isdigit()]
    return layer[numbers[-1] + 1 :] if numbers else layer


def _unused(name: str, taken: set[str]) -> str:
    """The name, numbered if it is taken: a layer may be used twice."""
    candidates = (name if number == 1 else f"{name}.{number}" for number in count(1))
    return next(candidate for candidate in candidates if candidate not in taken)


def _with_used_inputs(graph: Graph, keep: set[str] | frozenset[str] = frozenset()) -> Graph:
    used = {name for node in graph.nodes for name in node.refs()} | set(graph.outputs.values()) | set(keep)
    return graph.replace(inputs=tuple(spec for spec in graph.inputs if spec.name in used))
