"""The ONNX Runtime engine, in float32 (its CPU provider has no bfloat16 convolution or product). Not yet run on a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ldmrt.engines.gpu import Gpu
from ldmrt.engines.protocol import TensorSpec
from ldmrt.errors import BundleError, EngineMismatch
from ldmrt.graph import dtype_name

_TYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(int64)": torch.int64,
    "tensor(bool)": torch.bool,
}
_CUDA = "CUDAExecutionProvider"
_CPU = torch.device("cpu")


class OnnxRuntimeEngine:
    """Runs an ONNX file whose weights lie beside it (see `ldmrt.engines.protocol.Engine`).

    Args:
        path: the .onnx file.
        threads: threads for one operator on the CPU.
        device: where to run: the CPU, or a CUDA device, where it cannot be captured.
        once: for a single run: as written, nothing is prepared for later runs, and no memory is kept for them.

    Raises:
        EngineMismatch: onnxruntime is not installed, or not for this device.
        BundleError: onnxruntime refuses the file.
    """

    def __init__(self, path: Path, *, threads: int, device: torch.device = _CPU, once: bool = False) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise EngineMismatch(
                "this engine needs ONNX Runtime: `pip install 'ldmrt[onnxruntime]'`, or build with --engine torch"
            ) from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        if once:
            options.enable_cpu_mem_arena = False
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._device, self._run_options = device, onnxruntime.RunOptions()
        self._stream: torch.cuda.Stream | None = None
        providers: list[Any] = ["CPUExecutionProvider"]
        if device.type == "cuda":
            if _CUDA not in onnxruntime.get_available_providers():
                raise EngineMismatch(
                    f"ONNX Runtime {onnxruntime.__version__} here is for the CPU alone, the device is {device}: "
                    "`pip install 'ldmrt[onnxruntime-gpu]'`, or use --device cpu"
                )
            self._device = Gpu(device).device
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            stream = {"device_id": str(self._device.index), "user_compute_stream": str(self._stream.cuda_stream)}
            providers.insert(0, (_CUDA, stream))
            self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # onnxruntime raises its own kinds, all derived from Exception alone
            raise BundleError(f"ONNX Runtime cannot open {path}: {str(error).splitlines()[0][:200]}") from error
        if self._stream is not None and _CUDA not in self._session.get_providers():
            raise EngineMismatch(
                f"ONNX Runtime {onnxruntime.__version__} fell back to the CPU, expected {self._device}: its CUDA and cuDNN are not "
                "those of this machine, see `ldmrt doctor`; or use --device cpu"
            )
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
        self._binding = self._bind(buffers)

    def enqueue(self) -> None:
        """Run on the bound buffers; on the CPU this returns when the outputs are there."""
        if not self._bound:
            raise EngineMismatch("onnxruntime: enqueue before bind")
        self._execute(self._binding)

    def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run on `inputs`, return new tensors."""
        self._check(inputs, tuple(self._inputs.values()))
        sizes = {
            asked: size
            for name, spec in self._inputs.items()
            for asked, size in zip(spec.shape, inputs[name].shape, strict=True)
        }
        made = {
            name: torch.empty([int(sizes.get(s, s)) for s in spec.shape], dtype=spec.dtype, device=self._device)
            for name, spec in self._outputs.items()
        }
        self._execute(self._bind({**inputs, **made}))
        return made

    def _bind(self, tensors: Mapping[str, torch.Tensor]) -> Any:
        binding = self._session.io_binding()
        for specs, bind in ((self._inputs, binding.bind_input), (self._outputs, binding.bind_output)):
            for name, spec in specs.items():
                where, tensor = (self._device.type, self._device.index or 0), tensors[name]
                bind(name, *where, _numpy_type(spec.dtype), tuple(tensor.shape), tensor.data_ptr())
        return binding

    def _execute(self, binding: Any) -> None:
        with self._in_turn():
            self._session.run_with_iobinding(binding, self._run_options)

    @contextmanager
    def _in_turn(self) -> Iterator[None]:
        """On a GPU it has one stream for life, never the default one, so the two streams wait for each other."""
        if self._stream is None:
            yield
            return
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        yield
        current.wait_stream(self._stream)

    def _check(self, tensors: Mapping[str, torch.Tensor], specs: tuple[TensorSpec, ...]) -> None:
        for spec in specs:
            tensor = tensors.get(spec.name)
            if tensor is None:
                raise EngineMismatch(f"onnxruntime: {spec.name!r} is missing")
            fits = (
                tensor.device == self._device
                and tensor.is_contiguous()
                and tensor.dtype == spec.dtype
                and len(tensor.shape) == len(spec.shape)
                and all(isinstance(e, str) or s == e for s, e in zip(tensor.shape, spec.shape, strict=True))
            )
            if not fits:
                raise EngineMismatch(
                    f"onnxruntime: {spec.name!r} is {tuple(tensor.shape)} {dtype_name(tensor.dtype)} on {tensor.device}, "
                    f"expected a contiguous {spec.shape} {dtype_name(spec.dtype)} on {self._device}"
                )


def _spec(item: object) -> TensorSpec:
    name, shape, kind = item.name, item.shape, item.type  # type: ignore[attr-defined]
    if kind not in _TYPES:
        raise BundleError(f"ONNX input or output {name!r} has type {kind}, which is not used by ldmrt")
    return TensorSpec(name, tuple(shape), _TYPES[kind])


def _numpy_type(dtype: torch.dtype) -> object:
    return torch.empty(0, dtype=dtype).numpy().dtype.type
