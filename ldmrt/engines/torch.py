"""The torch engine: runs a graph, operator by operator, on whatever device its weights are on.

The graph is turned once into a flat list of instructions over numbered registers; every buffer is freed at its last use. What
depends on weights alone is computed then, too, and shared with the other engines of the same weights. On a GPU the list runs
once, under CUDA graph capture; on a CPU it runs as it is.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch

from ldmrt.engines.protocol import TensorSpec
from ldmrt.errors import BundleError, EngineMismatch, LdmrtError
from ldmrt.graph import Argument, Dim, Graph, Node, Ref, substitute
from ldmrt.kernels.convolution import arranged_weight
from ldmrt.kernels.linear import arranged_gated, arranged_linear
from ldmrt.kernels.winograd import tile
from ldmrt.operators import CREATING, resolve
from ldmrt.parameters import Parameters, fitting

_Getter = Callable[[list[Any]], tuple[Any, ...]]


class _Instruction(NamedTuple):
    """One call: registers[register] = function(*arguments(registers), **keywords); then the dying registers are freed."""

    function: Callable[..., Any]
    arguments: _Getter
    names: tuple[str, ...]
    keywords: _Getter | None
    register: int
    dying: tuple[int, ...] = ()


class _Recipe(NamedTuple):
    """How a tensor is made of weights: what says so, the weights, the function, and the last operator in it."""

    key: str
    reads: Sequence[TensorSpec]
    make: Callable[[Mapping[str, torch.Tensor]], torch.Tensor]
    last: Callable[..., Any] | None

    def then(self, function: Callable[..., torch.Tensor], arguments: tuple[Any, ...]) -> _Recipe:
        """This, and then a function of it."""

        def make(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
            return function(self.make(tensors), *arguments)

        return _Recipe(f"{function.__qualname__}{arguments} of {self.key}", self.reads, make, function)


class _Arrangement(NamedTuple):
    """For an operator whose second argument, weights, is best read in an order that only the device's library knows.

    `make` makes that order of the weights and of what `arguments` gives for a node and its weights' shape; `op` is the operator that reads it.
    """

    make: Callable[..., torch.Tensor]
    arguments: Callable[[Node, tuple[Any, ...]], tuple[Any, ...]]
    op: str


def _no_arguments(_node: Node, _weight: tuple[Any, ...]) -> tuple[Any, ...]:
    return ()


def _of_convolution(node: Node, weight: tuple[Any, ...]) -> tuple[Any, ...]:
    """Stride, padding, and the tile of minimal filtering."""
    stride, padding = node.args[2:]
    sizes = [size for size in (*weight, *node.shape[2:]) if isinstance(size, int)]
    if node.dtype != torch.float32 or (stride, padding) != (1, 1) or len(sizes) != len(weight) + 2:
        return stride, padding, None
    return stride, padding, tile(sizes[:-2], *sizes[-2:])


_ARRANGEMENTS: Mapping[str, _Arrangement] = {
    "aten.linear.default": _Arrangement(arranged_linear, _no_arguments, "ldmrt.linear.default"),
    "ldmrt.conv2d.default": _Arrangement(arranged_weight, _of_convolution, "ldmrt.conv2d.default"),
    "ldmrt.linear_geglu.default": _Arrangement(arranged_gated, _no_arguments, "ldmrt.linear_geglu.default"),
}


class TorchEngine:
    """Interprets a `Graph` (see `ldmrt.engines.protocol.Engine`).

    Args:
        graph: the component.
        weights: every tensor that the graph names, on one device, in the graph's dtypes; or a `Parameters` that has them.
        device: where to run; constants are moved there.

    Raises:
        BundleError: an operator is not allowed.
        EngineMismatch: a weight is missing, or has another shape or dtype than the graph says.
    """

    def __init__(self, graph: Graph, weights: Parameters | Mapping[str, torch.Tensor], device: torch.device) -> None:
        self.graph = graph
        self.device = device
        self.parameters = weights if isinstance(weights, Parameters) else Parameters.of(weights, device)
        self._inputs = {spec.name: spec for spec in graph.inputs}
        self._outputs = graph.output_specs()
        self._bound_inputs: list[torch.Tensor] = []
        self._bound_outputs: list[torch.Tensor] = []
        try:
            self._assemble()
        except (LdmrtError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise self._explain(None, error) from error

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """Inputs by name."""
        return self._inputs

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """Outputs by name."""
        return self._outputs

    def bind(self, buffers: Mapping[str, torch.Tensor]) -> None:
        """Bind one tensor to every input and output."""
        for spec in (*self._inputs.values(), *self._outputs.values()):
            fitting("buffer", spec, buffers.get(spec.name), where=self.graph.name)
        self._bound_inputs = [buffers[name] for name in self._inputs]
        self._bound_outputs = [buffers[name] for name in self._outputs]

    def enqueue(self) -> None:
        """Run on the bound buffers."""
        if not self._bound_outputs:
            raise EngineMismatch(f"{self.graph.name}: enqueue before bind")
        for target, result in zip(self._bound_outputs, self._execute(self._bound_inputs), strict=True):
            if not isinstance(result, torch.Tensor) or result.shape != target.shape:
                raise self._wrong_output(result, target.shape)
            target.copy_(result)

    def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run on `inputs`, return new tensors."""
        sizes: dict[str, int] = {}
        for spec in self._inputs.values():
            fitting("input", spec, inputs.get(spec.name), sizes, where=self.graph.name)
        with torch.inference_mode():
            results = self._execute([inputs[name] for name in self._inputs])
        for spec, result in zip(self._outputs.values(), results, strict=True):
            if not isinstance(result, torch.Tensor) or result.dim() != len(spec.shape):
                raise self._wrong_output(result, spec.shape)
        return dict(zip(self._outputs, results, strict=True))

    # ------------------------------------------------------------------------------------------------ assembly

    def _assemble(self) -> None:
        graph = self.graph
        packed = _packed(graph)
        static = {*graph.weights, *packed}
        nodes, arranged, makers = self._arranged([node for node in graph.nodes if node.name not in packed], static)
        read = {name for node in nodes for name in node.refs()} | set(graph.outputs.values())
        only_packed = ({name for node in packed.values() for name in node.refs()} | set(arranged.values())) - read
        self.parameters.declare(graph.weights)

        assembly = _Assembly(self.device)
        for name in self._inputs:
            assembly.define(name)
        for name, spec in graph.weights.items():
            if name not in only_packed:
                assembly.define(name, self.parameters.tensor(spec))
        for name in packed:
            if name in read:
                assembly.define(name, self._derived(self._recipe(packed, name)))
        for node in nodes:
            if node.name in arranged:
                recipe = self._recipe(packed, arranged[node.name]).then(*makers[node.name])
                assembly.define(node.args[1].name, self._derived(recipe))
        for name, tensor in graph.constants.items():
            assembly.define(name, tensor.to(self.device))
        for node in nodes:
            assembly.add(node)

        results = [assembly.index[value] for value in graph.outputs.values()]
        self._template = assembly.registers
        self._result = _getter(results)
        self._dims = [(register, self._locate(dim), dim.factor) for dim, register in assembly.dims.items()]
        self._instructions = self._with_frees(assembly.instructions, results)

    def _arranged(
        self, nodes: list[Node], static: set[str]
    ) -> tuple[list[Node], dict[str, str], dict[str, tuple[Callable[..., torch.Tensor], tuple[Any, ...]]]]:
        """The nodes, reading weights in the order in memory that is best on this device where there is one; by the names of those
        nodes what they read so; and what arranges it, with its further arguments.
        """
        if self.device.type != "cpu":
            return nodes, {}, {}
        changed, found, makers = [], {}, {}
        shapes: dict[str, tuple[Any, ...]] = {name: spec.shape for name, spec in self.graph.weights.items()}
        shapes |= {node.name: node.shape for node in self.graph.nodes}
        for node in nodes:
            arrangement = _ARRANGEMENTS.get(node.op)
            weight = node.args[1] if arrangement else None
            if arrangement is None or not isinstance(weight, Ref) or weight.name not in static:
                changed.append(node)
                continue
            rest = node.args[2:]
            found[node.name] = weight.name
            makers[node.name] = arrangement.make, arrangement.arguments(node, shapes[weight.name])
            changed.append(node.replace(op=arrangement.op, args=(node.args[0], Ref(f"{node.name} arranged"), *rest)))
        return changed, found, makers

    def _recipe(self, packed: Mapping[str, Node], name: str) -> _Recipe:
        """How a value that depends on weights alone is made: a weight, or what packed nodes make."""
        needed: dict[str, Node] = {}
        pending = [name]
        while pending:
            value = pending.pop()
            if value in packed and value not in needed:
                needed[value] = packed[value]
                pending += packed[value].refs()
        nodes = [node for node in packed.values() if node.name in needed]
        weights = self.graph.weights
        named = [name] if name in weights else [ref for node in nodes for ref in node.refs()]
        reads = [weights[key] for key in dict.fromkeys(named) if key in weights]

        def make(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
            values: dict[str, Any] = dict(tensors)
            for node in nodes:
                values[node.name] = call(node, values)
            return values[name]  # type: ignore[no-any-return]

        # Nodes are named anew, so that two graphs that pack alike agree on the key.
        numbers = {node.name: Ref(str(number)) for number, node in enumerate(nodes)}

        def renamed(argument: Ref | Dim) -> Argument:
            return numbers.get(argument.name, argument)

        steps = [
            (n.op, substitute(n.args, renamed), sorted(substitute(tuple(n.kwargs.items()), renamed))) for n in nodes
        ]
        key = repr((steps, [(spec.name, spec.dtype) for spec in reads]))
        return _Recipe(key, reads, make, resolve(packed[name].op) if name in packed else None)

    def _derived(self, recipe: _Recipe) -> torch.Tensor:
        """What a recipe makes, now or when another engine of these weights asked for it."""
        key = hashlib.sha256(recipe.key.encode()).hexdigest()
        try:
            return self.parameters.derived(key, recipe.reads, recipe.make)
        except (LdmrtError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise self._explain(recipe.last, error) from error

    def _with_frees(self, instructions: list[_Instruction], results: list[int]) -> list[_Instruction]:
        """Add to every instruction the registers whose last use it is."""
        made = {instruction.register for instruction in instructions} | set(range(len(self._inputs)))
        alive = set(results)
        numbers = list(range(len(self._template)))
        out = []
        for instruction in reversed(instructions):
            read = set(instruction.arguments(numbers))
            if instruction.keywords is not None:
                read |= set(instruction.keywords(numbers))
            dying = tuple(sorted((read & made) - alive))
            if instruction.register not in alive | read:
                dying = (*dying, instruction.register)
            alive |= read
            out.append(instruction._replace(dying=dying))
        return out[::-1]

    def _locate(self, dim: Dim) -> tuple[int, int]:
        """Which input has this free dimension, and at which position."""
        for number, spec in enumerate(self.graph.inputs):
            if dim.name in spec.shape:
                return number, spec.shape.index(dim.name)
        raise EngineMismatch(f"{self.graph.name}: no input has the dimension {dim.name!r}")

    def _explain(self, function: Callable[..., Any] | None, error: Exception) -> Exception:
        """What to raise when an operator fails, which it does in a damaged graph, or for want of memory. What an operator raises of
        arguments that make no sense may be any error.
        """
        reason = " ".join(str(error).split())[:200]
        if isinstance(error, MemoryError) or "allocate memory" in reason:
            return EngineMismatch(
                f"{self.graph.name}: there is not enough memory; use a smaller size or batch ({reason})"
            )
        what = "it cannot be laid out" if function is None else f"operator {function} failed"
        return BundleError(
            f"{self.graph.name}: {what} ({reason}): the bundle is damaged, build it again with `ldmrt build-engines`"
        )

    def _wrong_output(self, result: Any, expected: Sequence[int | str]) -> BundleError:
        found = tuple(result.shape) if isinstance(result, torch.Tensor) else type(result).__name__
        return BundleError(
            f"{self.graph.name}: an output is {found}, expected {tuple(expected)}: the bundle is damaged, "
            "build it again with `ldmrt build-engines`"
        )

    def _execute(self, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        registers = self._template.copy()
        registers[: len(inputs)] = inputs
        for register, (number, axis), factor in self._dims:
            registers[register] = factor * inputs[number].shape[axis]
        function: Callable[..., Any] | None = None
        try:
            for function, arguments, names, keywords, register, dying in self._instructions:
                if keywords is None:
                    registers[register] = function(*arguments(registers))
                else:
                    registers[register] = function(
                        *arguments(registers), **dict(zip(names, keywords(registers), strict=True))
                    )
                for number in dying:
                    registers[number] = None
        except (LdmrtError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise self._explain(function, error) from error
        return self._result(registers)


class _Assembly:
    """The registers and instructions of a graph, as they are laid out.

    Attributes:
        registers: what each holds before anything runs.
        index: the register of each value.
        dims: the registers of free dimensions, to be filled in when the engine runs.
        instructions: the calls.

    Args:
        device: where new tensors are made.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.registers: list[Any] = []
        self.index: dict[str, int] = {}
        self.dims: dict[Dim, int] = {}
        self.instructions: list[_Instruction] = []

    def define(self, name: str, value: Any = None) -> None:
        """Give a value a register."""
        self.index[name] = self._new(value)

    def add(self, node: Node) -> None:
        """Append the instructions of a node."""
        kwargs = {**node.kwargs, "device": self.device} if node.op in CREATING else node.kwargs
        arguments = _getter([self._place(argument) for argument in node.args])
        keywords = _getter([self._place(argument) for argument in kwargs.values()]) if kwargs else None
        self.define(node.name)
        names = tuple(kwargs)
        self.instructions.append(_Instruction(resolve(node.op), arguments, names, keywords, self.index[node.name]))

    def _new(self, value: Any = None) -> int:
        self.registers.append(value)
        return len(self.registers) - 1

    def _place(self, argument: Argument) -> int:
        """The register that holds an argument when its instruction runs."""
        if isinstance(argument, Ref):
            return self.index[argument.name]
        if isinstance(argument, Dim):
            if argument not in self.dims:
                self.dims[argument] = self._new()
            return self.dims[argument]
        if isinstance(argument, tuple) and _is_dynamic(argument):
            register = self._new()
            items = _getter([self._place(item) for item in argument])
            self.instructions.append(_Instruction(_make_list, items, (), None, register))
            return register
        return self._new(list(argument) if isinstance(argument, tuple) else argument)


def _make_list(*items: Any) -> list[Any]:
    return list(items)


def _is_dynamic(argument: Argument) -> bool:
    if isinstance(argument, tuple):
        return any(_is_dynamic(item) for item in argument)
    return isinstance(argument, (Ref, Dim))


def _getter(numbers: list[int]) -> _Getter:
    if not numbers:
        return _nothing
    if len(numbers) == 1:
        number = numbers[0]
        return lambda registers: (registers[number],)
    return itemgetter(*numbers)


def _nothing(_registers: list[Any]) -> tuple[Any, ...]:
    return ()


def call(node: Node, values: Mapping[str, Any]) -> Any:
    """What a node makes of the values it reads; it has no free dimensions."""

    def load(argument: Ref | Dim) -> Argument:
        return values[argument.name]

    def listed(argument: Argument) -> Argument:
        return list(argument) if isinstance(argument, tuple) else argument

    args = [listed(substitute(argument, load)) for argument in node.args]
    kwargs = {key: listed(substitute(argument, load)) for key, argument in node.kwargs.items()}
    return resolve(node.op)(*args, **kwargs)


def _packed(graph: Graph) -> dict[str, Node]:
    """The nodes that depend on weights alone, in order."""
    static = set(graph.weights)
    packed: dict[str, Node] = {}
    for node in graph.nodes:
        refs = set(node.refs())
        if refs and refs <= static and not has_dim((node.args, tuple(node.kwargs.values()))):
            packed[node.name] = node
            static.add(node.name)
    return packed


def packing(graph: Graph) -> int:
    """Bytes that a graph's weights take on a CPU beyond their own size: those of convolutions in float32 are kept at the points of minimal
    filtering (`ldmrt.kernels.winograd`); what else is packed stays as large as it is.
    """
    shapes: dict[str, tuple[Any, ...]] = {name: spec.shape for name, spec in graph.weights.items()}
    shapes |= {node.name: node.shape for node in graph.nodes}
    more: dict[tuple[str, int], int] = {}
    for node in graph.nodes:
        if node.op == "ldmrt.conv2d.default" and isinstance(node.args[1], Ref):
            weight = node.args[1].name
            side = _of_convolution(node, shapes[weight])[2]
            if side is not None:
                one_point = math.prod(shapes[weight][:2]) * node.dtype.itemsize
                more[weight, side] = one_point * ((side + 2) ** 2 - 9)
    return sum(more.values())


def has_dim(argument: Argument) -> bool:
    """Whether an argument has a free dimension in it, however deep."""
    return isinstance(argument, Dim) or (isinstance(argument, tuple) and any(map(has_dim, argument)))
