"""The intermediate form: a component as a flat list of operator calls, and its JSON on disk.

A `Graph` is what the exporters make, the passes rewrite and the torch engine runs. It is data: `graph.json` holds names,
operator overloads and plain arguments, never code. Weights are named, not held; small constants lie in a safetensors file
beside the JSON.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ldmrt.engines.protocol import TensorSpec
from ldmrt.errors import BundleError

FORMAT = 1

# No tensor of a model comes near: 256 GB in float32.
MAX_ELEMENTS = 1 << 36
# Arguments are lists of lists at most.
_MAX_DEPTH = 8


@dataclass(frozen=True, slots=True)
class Ref:
    """An argument that is another value of the graph: an input, a weight, a constant or an earlier node."""

    name: str


@dataclass(frozen=True, slots=True)
class Dim:
    """A free dimension, `factor` times the size named `name` (`rows`, `tokens`), known when the engine runs."""

    name: str
    factor: int = 1


Size = int | Dim
Argument = Any  # Ref | Dim | int | float | bool | None | str | torch.dtype | torch.memory_format | tuple of those


@dataclass(frozen=True, slots=True)
class Node:
    """One operator call.

    Attributes:
        name: the name of the value it makes, unique in the graph.
        op: the operator overload, such as `aten.linear.default`.
        args: positional arguments.
        kwargs: keyword arguments.
        shape: shape of the value; empty for operators that return a list of tensors.
        dtype: element type of the value.
    """

    name: str
    op: str
    args: tuple[Argument, ...]
    kwargs: Mapping[str, Argument]
    shape: tuple[Size, ...]
    dtype: torch.dtype

    def refs(self) -> Iterator[str]:
        """Names of the values this node reads, with repetitions."""
        yield from references((self.args, tuple(self.kwargs.values())))

    def replace(self, **changes: Any) -> Node:
        """A copy of the node with some fields changed."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class Graph:
    """A component, or a part of one.

    Attributes:
        name: the component's name.
        inputs: the inputs, in order.
        weights: the weights it reads; the name is the tensor's key in the weight file.
        constants: small tensors made at build time, on the CPU.
        nodes: the operator calls, each after what it reads.
        outputs: output name -> name of the value.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    weights: Mapping[str, TensorSpec]
    constants: Mapping[str, torch.Tensor]
    nodes: tuple[Node, ...]
    outputs: Mapping[str, str]

    def replace(self, **changes: Any) -> Graph:
        """A copy of the graph with some fields changed."""
        return dataclasses.replace(self, **changes)

    def output_specs(self) -> dict[str, TensorSpec]:
        """Shapes and dtypes of the outputs."""
        made = {node.name: TensorSpec(node.name, tuple(map(_label, node.shape)), node.dtype) for node in self.nodes}
        made |= {spec.name: spec for spec in self.inputs}
        made |= dict(self.weights)
        made |= {name: TensorSpec(name, tuple(t.shape), t.dtype) for name, t in self.constants.items()}
        return {name: dataclasses.replace(made[value], name=name) for name, value in self.outputs.items()}


def references(argument: Argument) -> Iterator[str]:
    """Names of all values in an argument, however deep."""
    if isinstance(argument, Ref):
        yield argument.name
    elif isinstance(argument, tuple):
        for item in argument:
            yield from references(item)


def substitute(argument: Argument, change: Callable[[Ref | Dim], Argument]) -> Argument:
    """The argument with every `Ref` and `Dim` in it replaced by what `change` returns."""
    if isinstance(argument, (Ref, Dim)):
        return change(argument)
    if isinstance(argument, tuple):
        return tuple(substitute(item, change) for item in argument)
    return argument


def specialize(graph: Graph, sizes: Mapping[str, int]) -> Graph:
    """The graph with free dimensions fixed: `specialize(step, {"rows": 2})`."""

    def fix(argument: Ref | Dim) -> Argument:
        if isinstance(argument, Dim) and argument.name in sizes:
            return argument.factor * sizes[argument.name]
        return argument

    def fix_spec(spec: TensorSpec) -> TensorSpec:
        shape = tuple(sizes.get(size, size) if isinstance(size, str) else size for size in spec.shape)
        return dataclasses.replace(spec, shape=shape)

    return graph.replace(
        inputs=tuple(fix_spec(spec) for spec in graph.inputs),
        nodes=tuple(
            node.replace(
                args=substitute(node.args, fix),
                kwargs={key: substitute(value, fix) for key, value in node.kwargs.items()},
                shape=substitute(node.shape, fix),
            )
            for node in graph.nodes
        ),
    )


def rename_values(graph: Graph, names: Mapping[str, str]) -> Graph:
    """The graph with some values under other names, wherever they are defined or read."""

    def name(old: str) -> str:
        return names.get(old, old)

    def change(argument: Ref | Dim) -> Argument:
        return Ref(name(argument.name)) if isinstance(argument, Ref) else argument

    def renamed(spec: TensorSpec) -> TensorSpec:
        return dataclasses.replace(spec, name=name(spec.name))

    return Graph(
        name=graph.name,
        inputs=tuple(renamed(spec) for spec in graph.inputs),
        weights={name(key): renamed(spec) for key, spec in graph.weights.items()},
        constants={name(key): tensor for key, tensor in graph.constants.items()},
        nodes=tuple(
            node.replace(
                name=name(node.name),
                args=substitute(node.args, change),
                kwargs={key: substitute(value, change) for key, value in node.kwargs.items()},
            )
            for node in graph.nodes
        ),
        outputs={key: name(value) for key, value in graph.outputs.items()},
    )


def prune(graph: Graph) -> Graph:
    """The graph without nodes, weights and constants that no output needs. Inputs stay."""
    needed = set(graph.outputs.values())
    kept: list[Node] = []
    for node in reversed(graph.nodes):
        if node.name in needed:
            kept.append(node)
            needed.update(node.refs())
    return graph.replace(
        nodes=tuple(reversed(kept)),
        weights={name: spec for name, spec in graph.weights.items() if name in needed},
        constants={name: tensor for name, tensor in graph.constants.items() if name in needed},
    )


# ---------------------------------------------------------------------------------------------------- JSON


def to_json(graph: Graph) -> str:
    """The graph as JSON text, one node a line, the same bytes for the same graph."""

    def lines(items: list[Any]) -> str:
        return "[\n" + ",\n".join("  " + _dump(item) for item in items) + "\n ]"

    def spec(value: TensorSpec) -> list[Any]:
        return [value.name, list(value.shape), dtype_name(value.dtype)]

    parts = {
        "format": _dump(FORMAT),
        "name": _dump(graph.name),
        "inputs": lines([spec(value) for value in graph.inputs]),
        "outputs": lines([[name, value] for name, value in graph.outputs.items()]),
        "weights": lines([spec(value) for value in graph.weights.values()]),
        "constants": lines([[name, list(t.shape), dtype_name(t.dtype)] for name, t in graph.constants.items()]),
        "nodes": lines(
            [
                [n.name, n.op, _encode(n.args), _encode_all(n.kwargs), _encode(n.shape), dtype_name(n.dtype)]
                for n in graph.nodes
            ]
        ),
    }
    return "{\n" + ",\n".join(f" {_dump(key)}: {value}" for key, value in parts.items()) + "\n}\n"


def from_json(text: str, constants: Mapping[str, torch.Tensor], *, where: str = "graph.json") -> Graph:
    """Read a graph back. Checks the form and that every value is defined before its use; operators are checked on load.

    Args:
        text: what `to_json` wrote.
        constants: the tensors from the file beside it.
        where: how to call the file in an error.

    Raises:
        BundleError: the text is not such a graph.
    """
    try:
        data = json.loads(text)
        if not isinstance(data, dict):
            raise TypeError("not an object")
        if data["format"] != FORMAT:
            raise BundleError(
                f"{where} has graph format {data['format']!r}, this version reads {FORMAT}: "
                "rebuild it with `ldmrt build-engines`, or update ldmrt"
            )
        names = [name for name, _, _ in data["constants"]]
        graph = Graph(
            name=str(data["name"]),
            inputs=tuple(_read_spec(item) for item in data["inputs"]),
            weights={item[0]: _read_spec(item) for item in data["weights"]},
            constants={name: constants[name] for name in names},
            nodes=tuple(_read_node(item) for item in data["nodes"]),
            outputs=dict(data["outputs"]),
        )
        _check(graph)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = f"missing {error}" if isinstance(error, KeyError) else str(error)
        raise BundleError(f"{where} is not a valid graph ({reason}): rebuild it with `ldmrt build-engines`") from error
    return graph


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """`torch.float32` for `float32`. Raises ValueError for a name that is no dtype."""
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is not a dtype")
    return dtype


def _label(size: Size) -> int | str:
    if isinstance(size, Dim):
        return size.name if size.factor == 1 else f"{size.factor}*{size.name}"
    return size


def _dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


_FORMATS = {"contiguous_format": torch.contiguous_format, "channels_last": torch.channels_last}


def _encode(argument: Argument) -> Any:
    match argument:
        case Ref(name):
            return {"ref": name}
        case Dim(name, factor):
            return {"dim": name, "factor": factor}
        case tuple():
            return [_encode(item) for item in argument]
        case torch.dtype():
            return {"dtype": dtype_name(argument)}
        case torch.memory_format():
            return {"memory_format": str(argument).removeprefix("torch.")}
        case float() if not math.isfinite(argument):
            return {"float": repr(argument)}
        case None | bool() | int() | float() | str():
            return argument
    raise TypeError(f"an argument of type {type(argument).__name__} has no place in a graph")


def _encode_all(arguments: Mapping[str, Argument]) -> dict[str, Any]:
    return {key: _encode(value) for key, value in arguments.items()}


def _decode(value: Any, depth: int = 0) -> Argument:
    match value:
        case list() if depth < _MAX_DEPTH:
            return tuple(_decode(item, depth + 1) for item in value)
        case {"ref": str(name)}:
            return Ref(name)
        case {"dim": str(name), "factor": int(factor)}:
            return Dim(name, factor)
        case {"dtype": name}:
            return dtype_of(name)
        case {"memory_format": name}:
            return _FORMATS[name]
        case {"float": ("inf" | "-inf" | "nan") as number}:
            return float(number)
        case None | bool() | int() | float() | str():
            return value
    raise ValueError(f"unknown argument {str(value)[:60]}")


def _read_spec(item: Any) -> TensorSpec:
    name, shape, dtype = item
    if not isinstance(name, str) or not all(isinstance(size, (int, str)) for size in shape):
        raise ValueError(f"bad tensor description {str(item)[:60]}")
    return TensorSpec(name, tuple(shape), dtype_of(dtype))


def _read_node(item: Any) -> Node:
    name, op, args, kwargs, shape, dtype = item
    if not (isinstance(op, str) and isinstance(args, list) and isinstance(kwargs, dict) and isinstance(shape, list)):
        raise ValueError(f"bad node {str(item)[:60]}")
    sizes = _decode(shape)
    if not all(isinstance(size, (int, Dim)) for size in sizes):
        raise ValueError(f"node {str(name)[:60]!r} has the shape {str(shape)[:60]}")
    return Node(
        name=name,
        op=op,
        args=_decode(args),
        kwargs={key: _decode(value) for key, value in kwargs.items()},
        shape=sizes,
        dtype=dtype_of(dtype),
    )


def _check_shape(name: str, shape: tuple[Size | str, ...]) -> None:
    sizes = [size for size in shape if isinstance(size, int)]
    if any(size < 0 for size in sizes) or math.prod(sizes) > MAX_ELEMENTS:
        raise ValueError(f"value {name[:60]!r} has the shape {str(sizes)[:60]}")


def _check(graph: Graph) -> None:
    known: set[str] = set()

    def define(name: str) -> None:
        if not isinstance(name, str) or name in known:
            raise ValueError(f"value {str(name)[:60]!r} is defined twice")
        known.add(name)

    for spec in (*graph.inputs, *graph.weights.values()):
        _check_shape(spec.name, spec.shape)
    for spec in graph.inputs:
        define(spec.name)
    for name in (*graph.weights, *graph.constants):
        define(name)
    for node in graph.nodes:
        for name in node.refs():
            if name not in known:
                raise ValueError(f"node {node.name!r} reads {name!r}, which is not defined before it")
        define(node.name)
        _check_shape(node.name, node.shape)
    if graph.nodes and not graph.outputs:
        raise ValueError("it has no outputs")
    for name, value in graph.outputs.items():
        if value not in known:
            raise ValueError(f"output {name!r} is {value!r}, which is not defined")
