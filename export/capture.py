"""Trace a module into a `Graph`: torch.export on the meta device, then our own intermediate form.

Nothing is computed and no weight is read. One export serves every row count and every prompt length: those dimensions stay free
in the graph, and `ldmrt.graph.specialize` fixes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch

from ldmrt.engines.protocol import TensorSpec
from ldmrt.errors import BuildError
from ldmrt.graph import Argument, Dim, Graph, Node, Ref, Size

# Some modules take another path for more rows: diffusers copies before it upsamples 64 rows, or 2^31 elements, or more. The copy
# changes no value, so what is traced below the bound holds above it too.
_ROWS = (63, 27, 11, 4)
_TOKENS = 4096
# Two names of one operator.
_SAME = {"aten.concat.default": "aten.cat.default", "aten.concatenate.default": "aten.cat.default"}
_EXAMPLE = {"rows": 3, "tokens": 77}
_SILENT = (
    "aten._assert_tensor_metadata.default",
    "aten._assert_scalar.default",
    "aten.sym_constrain_range_for_size.default",
)


def capture(name: str, module: torch.nn.Module, inputs: Sequence[TensorSpec], outputs: Sequence[str]) -> Graph:
    """Trace `module(*inputs)`.

    Args:
        name: the component's name.
        module: a module on the meta device, in the dtype to compile for, in eval mode. It returns a tensor or a tuple.
        inputs: the inputs; string dimensions stay free.
        outputs: names for what it returns.

    Returns:
        The graph, as traced: run `export.passes.clean` next.

    Raises:
        BuildError: the module cannot be traced, or has a size that is no multiple of one free dimension.
    """
    examples = tuple(
        torch.empty(
            [_EXAMPLE[size] if isinstance(size, str) else size for size in spec.shape], dtype=spec.dtype, device="meta"
        )
        for spec in inputs
    )
    # Without free rows there is nothing to bound.
    limits = list(_ROWS) if any("rows" in spec.shape for spec in inputs) else [0]
    program = None
    while program is None:
        most = limits.pop(0)
        try:
            program = _export(module, examples, inputs, most)
        except Exception as error:  # torch.export raises what the module raises, and its own kinds besides
            if not limits or "rows" not in str(error):
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise BuildError(f"{name}: the model cannot be traced ({reason})") from error
    return _Reader(name, program, inputs, outputs).graph()


def _export(
    module: torch.nn.Module, examples: tuple[torch.Tensor, ...], inputs: Sequence[TensorSpec], most: int
) -> torch.export.ExportedProgram:
    """Trace, with up to `most` rows."""
    largest = {"rows": most, "tokens": _TOKENS}
    free = {size for spec in inputs for size in spec.shape if isinstance(size, str)}
    dims = {size: torch.export.Dim(size, min=2, max=largest[size]) for size in sorted(free)}
    dynamic = tuple(
        {axis: dims[size] for axis, size in enumerate(spec.shape) if isinstance(size, str)} for spec in inputs
    )
    with torch.no_grad():
        return torch.export.export(module, examples, dynamic_shapes=(dynamic,) if _is_variadic(module) else dynamic)


def _is_variadic(module: torch.nn.Module) -> bool:
    return bool(module.forward.__code__.co_flags & 0x04)


class _Reader:
    """Turns one ExportedProgram into a `Graph`."""

    def __init__(
        self, name: str, program: torch.export.ExportedProgram, inputs: Sequence[TensorSpec], outputs: Sequence[str]
    ) -> None:
        self.name = name
        self.program = program
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self.values: dict[str, Argument] = {}
        self.symbols: dict[sympy.Symbol, str] = {}

    def graph(self) -> Graph:
        """Read the whole program."""
        signature = self.program.graph_signature
        state = {**self.program.state_dict, **self.program.constants}
        targets: Mapping[str, str] = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        weights: dict[str, TensorSpec] = {}
        constants: dict[str, torch.Tensor] = {}
        nodes: list[Node] = []
        results: tuple[Any, ...] = ()
        arguments = iter(self.inputs)
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                if node.name in targets:
                    key = targets[node.name]
                    self.values[node.name] = Ref(key)
                    tensor = state[key]
                    if tensor.device.type == "meta":
                        weights[key] = TensorSpec(key, tuple(tensor.shape), tensor.dtype)
                    else:
                        constants[key] = tensor.detach().clone()
                else:
                    spec = next(arguments)
                    self.values[node.name] = Ref(spec.name)
                    for size, label in zip(node.meta["val"].shape, spec.shape, strict=True):
                        if isinstance(label, str):
                            self.symbols[size.node.expr] = label
            elif node.op == "output":
                results = node.args[0]
            elif str(node.target) in _SILENT:
                continue
            elif isinstance(node.meta.get("val"), (int, torch.SymInt)):
                self.values[node.name] = self.size(node.meta["val"])
            else:
                nodes.append(self.read(node))
        return Graph(
            name=self.name,
            inputs=self.inputs,
            weights=weights,
            constants=constants,
            nodes=tuple(nodes),
            outputs={name: self.values[result.name].name for name, result in zip(self.outputs, results, strict=True)},
        )

    def read(self, node: torch.fx.Node) -> Node:
        """One call."""
        target = str(node.target)
        op = "python.getitem" if target == "<built-in function getitem>" else target
        self.values[node.name] = Ref(node.name)
        value = node.meta["val"]
        tensor = value[0] if isinstance(value, (list, tuple)) else value
        shape = () if isinstance(value, (list, tuple)) else tuple(self.size(size) for size in tensor.shape)
        args = node.args
        op = _SAME.get(op, op)
        if op == "aten.to.device":  # (tensor, device, dtype, ...): only the dtype says something
            op, args = "aten.to.dtype", (args[0], args[2])
        # The engine runs where its weights are, and everything is strided: these say nothing.
        kwargs = {k: v for k, v in node.kwargs.items() if k not in ("device", "layout", "pin_memory")}
        return Node(
            name=node.name,
            op=op,
            args=tuple(self.argument(item) for item in args),
            kwargs={key: self.argument(item) for key, item in kwargs.items()},
            shape=shape,
            dtype=tensor.dtype,
        )

    def argument(self, item: Any) -> Argument:
        """One argument in our form."""
        if isinstance(item, torch.fx.Node):
            return self.values[item.name]
        if isinstance(item, (list, tuple)):
            return tuple(self.argument(part) for part in item)
        if isinstance(item, torch.SymInt):
            return self.size(item)
        if isinstance(item, torch.device):
            return None
        return item

    def size(self, size: int | torch.SymInt) -> Size:
        """A dimension: a number, or a multiple of one free dimension."""
        if isinstance(size, int):
            return size
        expression = size.node.expr
        if expression.is_Integer:
            return int(expression)
        factor, symbol = expression.as_coeff_Mul()
        if factor.is_Integer and symbol in self.symbols:
            return Dim(self.symbols[symbol], int(factor))
        raise BuildError(f"{self.name}: the size {expression} is not a multiple of one free dimension")
