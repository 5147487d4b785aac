"""Types of tensors."""

from __future__ import annotations

from enum import Enum

import onnx


class DataType(Enum):
    FLOAT = 0
    HALF = 1
    INT32 = 3
    BOOL = 4
    BF16 = 7
    INT64 = 8


_NAMES = {
    onnx.TensorProto.FLOAT: DataType.FLOAT,
    onnx.TensorProto.FLOAT16: DataType.HALF,
    onnx.TensorProto.BFLOAT16: DataType.BF16,
    onnx.TensorProto.INT64: DataType.INT64,
    onnx.TensorProto.INT32: DataType.INT32,
    onnx.TensorProto.BOOL: DataType.BOOL,
}

Type = tuple[tuple[int, ...], DataType]


class Types(dict[str, Type]):
    """The shape and dtype of every value of a model, of which all must be known."""

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = model.graph
        for value in (*graph.input, *graph.value_info, *graph.output):
            tensor = value.type.tensor_type
            self[value.name] = tuple(d.dim_value for d in tensor.shape.dim), _NAMES[tensor.elem_type]
        for weight in graph.initializer:
            self[weight.name] = tuple(weight.dims), _NAMES[weight.data_type]
