"""What several tests of the compiler share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def assert_strictly_typed() -> Callable[[Path], None]:
    """`assert_strictly_typed(path)`: in an ONNX file, what an operator declares to be of one type is of one type."""
    return strictly_typed


def strictly_typed(path: Path) -> None:
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    model = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    graph = model.graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    types |= {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info, *graph.output)}
    opset = next(item.version for item in model.opset_import if not item.domain)
    for node in graph.node:
        declared = onnx.defs.get_schema(node.op_type, opset).inputs
        found: dict[str, set[int]] = {}
        for place, name in enumerate(node.input):
            # The last input of some operators stands for any number of them.
            kind = declared[min(place, len(declared) - 1)].type_str
            if name:
                found.setdefault(kind, set()).add(types[name])
        for kind, several in found.items():
            names = sorted(map(onnx.TensorProto.DataType.Name, several))
            assert len(names) == 1, f"{node.op_type} {node.name}: its inputs of type {kind} are {names}"
