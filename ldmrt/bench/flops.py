"""What a graph must do at least: floating-point operations and bytes, per node, from its shapes alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ldmrt.errors import BadRequest
from ldmrt.graph import Graph, Node, Ref
from ldmrt.operators import VIEWS

Shape = tuple[int, ...]

# Operators that give several views of one tensor.
_CUTS = frozenset(
    f"aten.{name}" for name in ("chunk.default", "split.Tensor", "split_with_sizes.default", "unbind.int")
)
# Operators that move nothing; the last two of them where elements lie in order already: in a graph that has been laid out,
# everywhere but where its inputs come in.
_FREE = VIEWS | {"aten.reshape.default", "aten.contiguous.default"}


@dataclass(frozen=True)
class Cost:
    """What one node costs.

    Attributes:
        op: the operator, such as `aten.linear.default`.
        flops: multiplications and additions, each counted as one; 0 for what has neither matrix product nor convolution.
        nbytes: bytes read and written if every operand passes once between memory and processor.
    """

    op: str
    flops: int
    nbytes: int


def costs(graph: Graph) -> list[Cost]:
    """The cost of every node of a graph whose dimensions are all fixed (`ldmrt.graph.specialize`).

    What depends on weights alone costs nothing: an engine computes it once, when it is loaded. Nor does what may find its
    elements in order. A result of several tensors is counted with the nodes that take them.

    Raises:
        BadRequest: a dimension is free.
    """
    sizes: dict[str, tuple[Shape, int]] = {}
    for spec in (*graph.inputs, *graph.weights.values()):
        sizes[spec.name] = _fixed(graph, spec.name, spec.shape), spec.dtype.itemsize
    for name, tensor in graph.constants.items():
        sizes[name] = tuple(tensor.shape), tensor.dtype.itemsize
    static, cuts = set(graph.weights), set()
    found = []
    for node in graph.nodes:
        refs = list(dict.fromkeys(node.refs()))
        shape = _fixed(graph, node.name, node.shape)
        sizes[node.name] = shape, node.dtype.itemsize
        if refs and static.issuperset(refs):
            static.add(node.name)
        if node.op in _CUTS:
            cuts.add(node.name)
        if node.name in static or node.name in cuts or node.op in _FREE:
            found.append(Cost(node.op, 0, 0))
            continue
        taken = node.op == "python.getitem"
        read = [] if taken else refs
        written = [node.name] if shape and not (taken and refs[0] in cuts) else []
        nbytes = sum(math.prod(dims) * itemsize for dims, itemsize in (sizes[name] for name in (*read, *written)))
        found.append(Cost(node.op, _flops(node, shape, sizes), nbytes))
    return found


def by_class(items: Iterable[Cost]) -> dict[str, Cost]:
    """Costs added up by what kind of work it is: attention, convolution, gemm, normalization, other."""
    total: dict[str, Cost] = {}
    for item in items:
        name = operator_class(item.op)
        before = total.get(name, Cost(name, 0, 0))
        total[name] = Cost(name, before.flops + item.flops, before.nbytes + item.nbytes)
    return total


def operator_class(op: str) -> str:
    """The kind of work an operator is."""
    name = op.split(".")[1]
    if "attention" in name:
        return "attention"
    if "conv" in name:
        return "convolution"
    if name in ("linear", "linear_geglu", "matmul", "mm", "bmm", "addmm", "baddbmm"):
        return "gemm"
    return "normalization" if "norm" in name else "other"


def _flops(node: Node, shape: Shape, sizes: Mapping[str, tuple[Shape, int]]) -> int:
    def operand(index: int) -> Shape:
        argument = node.args[index]
        return sizes[argument.name][0] if isinstance(argument, Ref) else ()

    outputs = math.prod(shape)
    match node.op.split(".")[1]:
        case "linear":
            return 2 * outputs * operand(1)[-1]
        case "linear_geglu":  # of twice as many, which are halved
            return 4 * outputs * operand(1)[-1]
        case "matmul" | "mm" | "bmm":
            return 2 * outputs * operand(0)[-1]
        case "addmm" | "baddbmm":
            return 2 * outputs * operand(1)[-1]
        case "conv2d" | "conv1d":
            return 2 * outputs * math.prod(operand(1)[1:])
        case "scaled_dot_product_attention":
            query, key = operand(0), operand(1)
            return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + shape[-1])
        case "attention":  # (rows, tokens, heads * head size)
            return 4 * outputs * operand(1)[1]
    return 0


def _fixed(graph: Graph, name: str, shape: Iterable[object]) -> Shape:
    sizes = tuple(shape)
    if not all(isinstance(size, int) for size in sizes):
        raise BadRequest(f"{graph.name}: {name} has the free shape {sizes}; fix it with ldmrt.graph.specialize")
    return sizes  # type: ignore[return-value]
