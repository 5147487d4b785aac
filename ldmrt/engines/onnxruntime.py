"""The ONNX Runtime engine, on the CPU in float32 (its CPU provider has no bfloat16 convolution or product)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ldmrt.engines.protocol import TensorSpec
from ldmrt.errors import BundleError, EngineMismatch
from ldmrt.graph import dtype_name

_TYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(int64)": torch.int64,
    "tensor(bool)": torch.bool,
}


class OnnxRuntimeEngine:
    """Runs an ONNX file whose weights lie beside it (see `ldmrt.engines.protocol.Engine`).

    Args:
        path: the .onnx file.
        threads: threads for one operator.
        arena: whether memory is kept from run to run, which is faster, and takes several times as much for some graphs.

    Raises:
        EngineMismatch: onnxruntime is not installed.
        BundleError: onnxruntime refuses the file.
    """

    def __init__(self, path: Path, *, threads: int, arena: bool = True) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise EngineMismatch(
                "this engine needs ONNX Runtime: `pip install 'ldmrt[onnxruntime]'`, or build with --engine torch"
            ) from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.enable_cpu_mem_arena = arena
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises its own kinds, all derived from Exception alone
            raise BundleError(f"ONNX Runtime cannot open {path}: {str(error).splitlines()[0][:200]}") from error
        self._inputs = {item.name: _spec(item) for item in self._session.get_inputs()}
        self._outputs = {item.name: _spec(item) for item in self._session.get_outputs()}
        self._bound: Mapping[str, torch.Tensor] = {}

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
        self._check(buffers, (*self._inputs.values(), *self._outputs.values()))
        self._bound = dict(buffers)
        self._binding = self._session.io_binding()
        for name, spec in self._inputs.items():
            tensor = buffers[name]
            self._binding.bind_input(name, "cpu", 0, _numpy_type(spec.dtype), tuple(tensor.shape), tensor.data_ptr())
        for name, spec in self._outputs.items():
            tensor = buffers[name]
            self._binding.bind_output(name, "cpu", 0, _numpy_type(spec.dtype), tuple(tensor.shape), tensor.data_ptr())

    def enqueue(self) -> None:
        """Run on the bound buffers; on the CPU this returns when the outputs are there."""
        if not self._bound:
            raise EngineMismatch("onnxruntime: enqueue before bind")
        self._session.run_with_iobinding(self._binding)

    def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run on `inputs`, return new tensors."""
        self._check(inputs, tuple(self._inputs.values()))
        feed = {name: inputs[name].detach().contiguous().numpy() for name in self._inputs}
        results = self._session.run(list(self._outputs), feed)
        return {name: torch.from_numpy(result) for name, result in zip(self._outputs, results, strict=True)}

    def _check(self, tensors: Mapping[str, torch.Tensor], specs: tuple[TensorSpec, ...]) -> None:
        for spec in specs:
            tensor = tensors.get(spec.name)
            if tensor is None:
                raise EngineMismatch(f"onnxruntime: {spec.name!r} is missing")
            fits = (
                tensor.device.type == "cpu"
                and tensor.is_contiguous()
                and tensor.dtype == spec.dtype
                and len(tensor.shape) == len(spec.shape)
                and all(isinstance(e, str) or s == e for s, e in zip(tensor.shape, spec.shape, strict=True))
            )
            if not fits:
                raise EngineMismatch(
                    f"onnxruntime: {spec.name!r} is {tuple(tensor.shape)} {dtype_name(tensor.dtype)} on {tensor.device}, "
                    f"expected a contiguous {spec.shape} {dtype_name(spec.dtype)} on the CPU"
                )


def _spec(item: object) -> TensorSpec:
    name, shape, kind = item.name, item.shape, item.type  # type: ignore[attr-defined]
    if kind not in _TYPES:
        raise BundleError(f"ONNX input or output {name!r} has type {kind}, which is not used by ldmrt")
    return TensorSpec(name, tuple(shape), _TYPES[kind])


def _numpy_type(dtype: torch.dtype) -> object:
    return torch.empty(0, dtype=dtype).numpy().dtype.type
