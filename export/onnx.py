"""Write a graph as ONNX whose weights stay where they are: in the bundle's safetensors file, by offset."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import torch

from ldmrt.errors import BuildError
from ldmrt.export.plugins import NAMESPACE, Layer
from ldmrt.files import write_atomically
from ldmrt.graph import Argument, Dim, Graph, Ref, substitute
from ldmrt.operators import resolve
from ldmrt.weights import WeightFile

OPSET = 21  # the first with a whole GroupNormalization; 18 and 20 take it apart

_TYPES = {
    torch.float32: onnx_ir.DataType.FLOAT,
    torch.float16: onnx_ir.DataType.FLOAT16,
    torch.bfloat16: onnx_ir.DataType.BFLOAT16,
}


def write_onnx(
    graph: Graph, weights: Mapping[str, WeightFile], path: Path, layers: Mapping[str, Sequence[Layer]] | None = None
) -> str:
    """Write `graph` to `path` and check it with onnx.checker.

    Args:
        graph: every dimension fixed, or free where ONNX Runtime may choose it (`rows`, `tokens`).
        weights: per weight of the graph the file that holds it; it must lie in `path`'s folder or below, in the graph's dtypes.
        path: the .onnx file, in the bundle's root (a location with `..` would be refused).
        layers: what stands in the file for some nodes (`export.plugins.layers`).

    Returns:
        The file's SHA-256.

    Raises:
        BuildError: the graph cannot be translated.
    """
    replay = _Replay(graph, layers or {})
    dims = {size: torch.export.Dim(size, min=2, max=63 if size == "rows" else 4096) for size in _free(graph)}
    examples = tuple(
        torch.empty([3 if isinstance(size, str) else size for size in spec.shape], dtype=spec.dtype, device="meta")
        for spec in graph.inputs
    )
    dynamic = tuple(
        {i: dims[size] for i, size in enumerate(spec.shape) if isinstance(size, str)} for spec in graph.inputs
    )
    with _quiet():
        try:
            exported = torch.export.export(replay, examples, dynamic_shapes=(dynamic,) if dims else None)
            program = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=OPSET,
                optimize=False,
                verbose=False,
                input_names=[spec.name for spec in graph.inputs],
                output_names=list(graph.outputs),
            )
        except Exception as error:  # the exporter raises its own kinds, derived from Exception alone
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise BuildError(f"{graph.name}: cannot be written as ONNX ({reason[:200]}); use --engine torch") from error
    if program is None:
        raise BuildError(f"{graph.name}: the ONNX exporter made nothing; use --engine torch")
    model = program.model
    _name_dimensions(model, graph)
    _place_weights(model, replay, graph, weights, path)
    with _quiet():
        _simplify(model)
    names = {name: known for name, known in replay.names.items() if known in graph.weights}
    digest = write_atomically(path, _with_names(onnx_ir.to_proto(model), names).SerializeToString())
    try:
        onnx.checker.check_model(str(path), full_check=False)
    except onnx.checker.ValidationError as error:
        path.unlink()
        raise BuildError(
            f"{graph.name}: onnx.checker refuses the graph ({str(error).splitlines()[0][:200]})"
        ) from error
    return digest


def _simplify(model: onnx_ir.Model) -> None:
    """Compute what depends on nothing, and drop what is unused. Weights that happen to be equal stay apart: they may not stay equal.

    onnxscript's rewriting rules are left out: they take half of the whole time, and both engines fuse by themselves.
    """
    from onnx_ir.passes import common
    from onnxscript import optimizer

    # What is made of a weight alone would be a second copy of it, inside the .onnx file.
    optimizer.fold_constants(
        model, onnx_shape_inference=True, should_fold=lambda node: False if _reads_weights(node) else None
    )
    for simplify in (
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedOpsetsPass(),
    ):
        simplify(model)


def _free(graph: Graph) -> list[str]:
    return list(dict.fromkeys(size for spec in graph.inputs for size in spec.shape if isinstance(size, str)))


def _reads_weights(node: onnx_ir.Node) -> bool:
    return any(value is not None and isinstance(value.const_value, onnx_ir.ExternalTensor) for value in node.inputs)


def _name_dimensions(model: onnx_ir.Model, graph: Graph) -> None:
    """Give free dimensions the graph's names for them; the exporter numbers them."""
    names: dict[str | None, str] = {}
    for spec, value in zip(graph.inputs, model.graph.inputs, strict=True):
        for size, dim in zip(spec.shape, value.shape or (), strict=True):
            if isinstance(size, str) and isinstance(dim, onnx_ir.SymbolicDim):
                names[dim.value] = size
    values = [*model.graph.inputs, *(output for node in model.graph for output in node.outputs)]
    for shape in [value.shape for value in values if value.shape is not None]:
        for axis, dim in enumerate(shape):
            if isinstance(dim, onnx_ir.SymbolicDim) and dim.value in names:
                shape[axis] = names[dim.value]


class _Replay(torch.nn.Module):
    """A graph as a module on the meta device, for torch.onnx to read."""

    def __init__(self, graph: Graph, layers: Mapping[str, Sequence[Layer]]) -> None:
        super().__init__()
        self.graph, self.layers = graph, layers
        self.names: dict[str, str] = {}  # our parameter -> value of the graph
        for name, spec in graph.weights.items():
            self._add(name, torch.empty([int(n) for n in spec.shape], dtype=spec.dtype, device="meta"))
        for name, tensor in graph.constants.items():
            self._add(name, tensor.to("meta"))

    def _add(self, name: str, tensor: torch.Tensor) -> None:
        parameter = f"tensor_{len(self.names)}"
        self.names[parameter] = name
        self.register_buffer(parameter, tensor)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the graph."""
        values: dict[str, Any] = {spec.name: tensor for spec, tensor in zip(self.graph.inputs, inputs, strict=True)}
        values |= {name: getattr(self, parameter) for parameter, name in self.names.items()}
        sizes = {
            size: values[spec.name].shape[axis]
            for spec in self.graph.inputs
            for axis, size in enumerate(spec.shape)
            if isinstance(size, str)
        }

        def load(argument: Ref | Dim) -> Argument:
            return values[argument.name] if isinstance(argument, Ref) else sizes[argument.name] * argument.factor

        def listed(argument: Argument) -> Argument:
            return [listed(item) for item in argument] if isinstance(argument, tuple) else argument

        for node in self.graph.nodes:
            if node.name in self.layers:
                for layer in self.layers[node.name]:
                    values |= zip(layer.outputs, _made(layer, [values[name] for name in layer.inputs]), strict=True)
                continue
            args = [listed(substitute(argument, load)) for argument in node.args]
            kwargs = {key: listed(substitute(argument, load)) for key, argument in node.kwargs.items()}
            values[node.name] = resolve(node.op)(*args, **kwargs)
        return tuple(values[name] for name in self.graph.outputs.values())


def _made(layer: Layer, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """A layer's outputs. TensorRT's parser looks for a plugin of the node's name, and is told to take what was made ahead of time."""
    shapes, dtypes = zip(*layer.plugin.outputs, strict=True)
    attributes: dict[str, Any] = {"plugin_namespace": NAMESPACE, "plugin_version": "1", "aot": 1}
    name = f"{NAMESPACE}::{layer.plugin.name}"
    made = torch.onnx.ops.symbolic_multi_out(name, inputs, attributes, dtypes=dtypes, shapes=shapes, version=1)
    return [tensor.to("meta") for tensor in made]  # they are made on the CPU


def _place_weights(
    model: onnx_ir.Model, replay: _Replay, graph: Graph, weights: Mapping[str, WeightFile], path: Path
) -> None:
    for parameter, initializer in model.graph.initializers.items():
        name = replay.names.get(parameter)
        if name is None:
            continue  # a literal that the exporter made
        if name in graph.constants:
            initializer.const_value = onnx_ir.tensor(graph.constants[name].numpy(), name=parameter)
            continue
        file = weights[name]
        entry = file.entries[name]
        initializer.const_value = onnx_ir.ExternalTensor(
            location=file.path.relative_to(path.parent).as_posix(),
            offset=entry.offset,
            length=entry.nbytes,
            dtype=_TYPES[entry.dtype],
            shape=onnx_ir.Shape(entry.shape),
            name=parameter,
            base_dir=path.parent,
        )


def _with_names(model: onnx.ModelProto, names: Mapping[str, str]) -> onnx.ModelProto:
    """With the graph's names for weights, under which a plan's can be changed. They have dots in them, which no value of a graph has."""
    for tensor in model.graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of packages that we do not use, and of its own deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
