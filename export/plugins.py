"""Kernels of ours as layers of TensorRT plans, by way of its ahead-of-time plugins. Not yet run on a GPU.

A launch of a kernel becomes a plugin of its own: the shapes of a plan are fixed, so that the grid and all numbers are constants,
and what is left are pointers, inputs before outputs, as TensorRT launches them. The plan holds the kernel's assembly (PTX), which
Triton makes without a GPU; where it runs neither this file nor Triton is needed.

TensorRT gives a plugin tensors that lie in the order of their dimensions, so that the kernels are planned for such.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import GenericAlias
from typing import Any

import torch

from ldmrt.engines.tensorrt import NAMES, Library
from ldmrt.errors import BuildError
from ldmrt.graph import Dim, Graph, Node, Ref, substitute
from ldmrt.kernels import launch
from ldmrt.kernels.aot import Ptx, compile_to_ptx
from ldmrt.kernels.variant import Variant, function
from ldmrt.operators import resolve

NAMESPACE = "ldmrt"

# The fused operators that become layers, and the passes that make them.
OPERATORS = ("ldmrt.attention.default", "ldmrt.group_norm_silu.default")
PASSES = ("group_norm", "attention")

_META = torch.device("meta")


@dataclass(frozen=True)
class Plugin:
    """A launch of a kernel as TensorRT makes it.

    Attributes:
        variant: the kernel, with all numbers among its constants; its parameters are the inputs and then the outputs.
        arch: the architecture that it was planned for, such as 89.
        grid: programs along one to three axes.
        inputs: how many tensors it reads.
        outputs: shape and dtype of each tensor that it writes.
    """

    variant: Variant
    arch: int
    grid: tuple[int, ...]
    inputs: int
    outputs: tuple[tuple[tuple[int, ...], torch.dtype], ...]

    @property
    def name(self) -> str:
        """What TensorRT and the ONNX file call it: the kernel, and a hash of all that makes it this one."""
        parts = repr((self.variant.key(), self.arch, self.grid, self.inputs, self.outputs))
        return f"{self.variant.kernel.replace('.', '_')}_{hashlib.sha256(parts.encode()).hexdigest()[:16]}"

    def compile(self) -> Ptx:
        """The kernel's assembly.

        Raises:
            BuildError: Triton is not installed, or cannot compile it.
        """
        try:
            return compile_to_ptx(self.variant, self.arch)
        except (RuntimeError, ValueError) as error:
            raise BuildError(
                f"kernel {self.variant.kernel} cannot be compiled for sm_{self.arch}: {error}; leave --plugins out"
            ) from error


@dataclass(frozen=True)
class Layer:
    """A plugin in its place: the values of a graph that it reads and makes, by name."""

    plugin: Plugin
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def layers(graph: Graph, arch: int) -> dict[str, tuple[Layer, ...]]:
    """The layers that stand for a graph's fused operators, by node, in the order in which they run.

    An operator that leaves its problem to the library on this architecture has none.

    Args:
        graph: every dimension fixed.
        arch: the architecture, such as 89.
    """
    values: dict[str, tuple[tuple[Any, ...], torch.dtype]]
    values = {spec.name: (spec.shape, spec.dtype) for spec in (*graph.inputs, *graph.weights.values())}
    values |= {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in graph.constants.items()}
    values |= {node.name: (node.shape, node.dtype) for node in graph.nodes}
    found = {node.name: _layers(node, values, arch) for node in graph.nodes if node.op in OPERATORS}
    return {name: made for name, made in found.items() if made}


def plugins_of(found: Mapping[str, Iterable[Layer]]) -> list[Plugin]:
    """The plugins of layers, each once, by name."""
    return sorted({layer.plugin for made in found.values() for layer in made}, key=lambda plugin: plugin.name)


def _layers(node: Node, values: Mapping[str, tuple[Any, torch.dtype]], arch: int) -> tuple[Layer, ...]:
    given = {
        name: torch.empty(values[name][0], dtype=values[name][1], device=_META) for name in dict.fromkeys(node.refs())
    }

    def load(argument: Ref | Dim) -> torch.Tensor:
        return given[argument.name]

    with torch.inference_mode(), launch.tracing(arch) as launches:
        args, kwargs = (substitute(part, load) for part in (node.args, tuple(node.kwargs.values())))
        result = resolve(node.op)(*args, **dict(zip(node.kwargs, kwargs, strict=True)))
    known = {_storage(tensor): name for name, tensor in given.items()}
    made = []
    for number, each in enumerate(launches):
        tensors = [argument for argument in each.arguments if isinstance(argument, torch.Tensor)]
        # Nobody reads what nobody has written: what is seen for the first time is an output.
        inputs = [tensor for tensor in tensors if _storage(tensor) in known]
        outputs = [tensor for tensor in tensors if _storage(tensor) not in known]
        for place, tensor in enumerate(outputs):
            last = _storage(tensor) == _storage(result)
            known[_storage(tensor)] = node.name if last else f"{node.name}.{number}.{place}"
        shapes = tuple((tuple(tensor.shape), tensor.dtype) for tensor in outputs)
        plugin = Plugin(_without_numbers(each), arch, each.grid, len(inputs), shapes)
        names = [[known[_storage(tensor)] for tensor in part] for part in (inputs, outputs)]
        made.append(Layer(plugin, tuple(names[0]), tuple(names[1])))
    return tuple(made)


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _without_numbers(found: launch.Launch) -> Variant:
    """The variant of a launch whose only parameters are pointers. It starts when what it reads has been written."""
    variant, arguments = found.variant, found.arguments
    names = function(variant.kernel).arg_names
    numbers = {name: a for name, a in zip(names, arguments, strict=False) if not isinstance(a, torch.Tensor)}
    pointers = [place for place, argument in enumerate(arguments) if isinstance(argument, torch.Tensor)]
    return replace(
        variant,
        types=tuple(variant.types[place] for place in pointers),
        aligned=tuple(variant.aligned[place] for place in pointers),
        constants=tuple(sorted({**dict(variant.constants), **numbers, "DEPENDENT": False}.items())),
    )


def register(library: Library, plugins: Iterable[Plugin]) -> None:
    """Compile plugins and make them known to a library, which takes each once in a process.

    Raises:
        BuildError: a kernel cannot be compiled.
        EngineMismatch: the library takes none, or is not there.
    """
    module, trt = library.load_plugins(), library.load()
    for plugin in plugins:
        if not hasattr(getattr(module.op, NAMESPACE, None), plugin.name):
            _register(module, trt, plugin, plugin.compile())


def _register(module: Any, trt: Any, plugin: Plugin, ptx: Ptx) -> None:
    def describe(*_inputs: Any) -> Any:
        return tuple(
            module.from_shape_expr(shape, getattr(trt.DataType, NAMES[dtype])) for shape, dtype in plugin.outputs
        )

    def kernel(*_given: Any) -> Any:
        axes = dict(zip(("grid_x", "grid_y", "grid_z"), plugin.grid, strict=False))
        how = module.KernelLaunchParams(**axes, block_x=ptx.threads, shared_mem=ptx.shared)
        return ptx.symbol, ptx.text, how, module.SymIntExprs(0)

    # The library reads from the signature how many tensors there are.
    inputs = [_parameter(f"x{place}", module.TensorDesc) for place in range(plugin.inputs)]
    outputs = GenericAlias(tuple, (module.TensorDesc,) * len(plugin.outputs))
    describe.__signature__ = inspect.Signature(inputs, return_annotation=outputs)  # type: ignore[attr-defined]
    rest = [_parameter("outputs", outputs), _parameter("tactic", int)]
    result = GenericAlias(tuple, (str, str, module.KernelLaunchParams, module.SymExprs))
    kernel.__signature__ = inspect.Signature([*inputs, *rest], return_annotation=result)  # type: ignore[attr-defined]
    name = f"{NAMESPACE}::{plugin.name}"
    module.register(name)(describe)
    module.aot_impl(name)(kernel)


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation)
