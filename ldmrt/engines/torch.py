"""The torch engine: runs a graph, operator by operator, on whatever device its weights are on.

The graph is turned once into a flat list of instructions over numbered registers; every buffer is freed at its last use. On a
GPU the list runs once, under CUDA graph capture; on a CPU it runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch

from ldmrt.engines.protocol import TensorSpec
from ldmrt.errors import BundleError, EngineMismatch
from ldmrt.graph import Argument, Dim, Graph, Ref, dtype_name
from ldmrt.operators import resolve

_Getter = Callable[[list[Any]], tuple[Any, ...]]


class _Instruction(NamedTuple):
    """One call: registers[register] = function(*arguments(registers), **keywords); then the dying registers are freed."""

    function: Callable[..., Any]
    arguments: _Getter
    names: tuple[str, ...]
    keywords: _Getter | None
    register: int
    dying: tuple[int, ...] = ()


class TorchEngine:
    """Interprets a `Graph` (see `ldmrt.engines.protocol.Engine`).

    Args:
        graph: the component.
        weights: every tensor that the graph names, on one device, in the graph's dtypes.
        device: where to run; constants are moved there.

    Raises:
        BundleError: an operator is not allowed.
        EngineMismatch: a weight is missing, or has another shape or dtype than the graph says.
    """

    def __init__(self, graph: Graph, weights: Mapping[str, torch.Tensor], device: torch.device) -> None:
        self.graph = graph
        self.device = device
        self._inputs = {spec.name: spec for spec in graph.inputs}
        self._outputs = graph.output_specs()
        self._bound_inputs: list[torch.Tensor] = []
        self._bound_outputs: list[torch.Tensor] = []
        for name, spec in graph.weights.items():
            _match(graph.name, "weight", spec, weights.get(name))
        self._assemble(weights)

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
            _match(self.graph.name, "buffer", spec, buffers.get(spec.name))
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
            _match(self.graph.name, "input", spec, inputs.get(spec.name), sizes)
        with torch.inference_mode():
            results = self._execute([inputs[name] for name in self._inputs])
        for spec, result in zip(self._outputs.values(), results, strict=True):
            if not isinstance(result, torch.Tensor) or result.dim() != len(spec.shape):
                raise self._wrong_output(result, spec.shape)
        return dict(zip(self._outputs, results, strict=True))

    # ------------------------------------------------------------------------------------------------ assembly

    def _assemble(self, weights: Mapping[str, torch.Tensor]) -> None:
        graph = self.graph
        registers: list[Any] = []
        index: dict[str, int] = {}

        def new(value: Any = None) -> int:
            registers.append(value)
            return len(registers) - 1

        for name in self._inputs:
            index[name] = new()
        dims: dict[Dim, int] = {}
        instructions: list[_Instruction] = []

        def place(argument: Argument) -> int:
            """The register that holds an argument when its instruction runs."""
            if isinstance(argument, Ref):
                return index[argument.name]
            if isinstance(argument, Dim):
                if argument not in dims:
                    dims[argument] = new()
                return dims[argument]
            if isinstance(argument, tuple) and _is_dynamic(argument):
                register = new()
                items = _getter([place(item) for item in argument])
                instructions.append(_Instruction(_make_list, items, (), None, register))
                return register
            return new(list(argument) if isinstance(argument, tuple) else argument)

        for name in graph.weights:
            index[name] = new(weights[name])
        for name, tensor in graph.constants.items():
            index[name] = new(tensor.to(self.device))
        for node in graph.nodes:
            arguments = _getter([place(argument) for argument in node.args])
            keywords = _getter([place(argument) for argument in node.kwargs.values()]) if node.kwargs else None
            index[node.name] = new()
            function = resolve(node.op)
            instructions.append(_Instruction(function, arguments, tuple(node.kwargs), keywords, index[node.name]))

        results = [index[value] for value in graph.outputs.values()]
        self._template = registers
        self._result = _getter(results)
        self._dims = [(register, self._locate(dim), dim.factor) for dim, register in dims.items()]
        self._instructions = self._with_frees(instructions, results)

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
        """What to raise when an operator fails, which it does in a damaged graph, or for want of memory."""
        reason = " ".join(str(error).split())[:200]
        if "can't allocate memory" in reason:
            return EngineMismatch(
                f"{self.graph.name}: there is not enough memory; use a smaller size or batch ({reason})"
            )
        return BundleError(
            f"{self.graph.name}: operator {function} failed ({reason}): the bundle is damaged, "
            "build it again with `ldmrt build-engines`"
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
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise self._explain(function, error) from error
        return self._result(registers)


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


def _match(
    where: str, what: str, spec: TensorSpec, tensor: torch.Tensor | None, sizes: dict[str, int] | None = None
) -> None:
    """Refuse a tensor that is not what the graph was made for."""
    if tensor is None:
        raise EngineMismatch(f"{where}: {what} {spec.name!r} is missing")
    fits = tensor.dtype == spec.dtype and tensor.dim() == len(spec.shape)
    if fits:
        for size, asked in zip(tensor.shape, spec.shape, strict=True):
            expected = asked if isinstance(asked, int) else size if sizes is None else sizes.setdefault(asked, size)
            fits = fits and size == expected
    if not fits:
        raise EngineMismatch(
            f"{where}: {what} {spec.name!r} is {tuple(tensor.shape)} {dtype_name(tensor.dtype)}, "
            f"expected {tuple(spec.shape)} {dtype_name(spec.dtype)}"
        )
