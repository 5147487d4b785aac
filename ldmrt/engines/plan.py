"""The TensorRT engine: runs a plan of TensorRT or of TensorRT for RTX. Not yet run on a GPU.

A plan holds its weights, and its shapes are fixed. Its inputs and outputs are the runtime's own static buffers, its activations lie in memory
that all engines of a bundle share, and it launches on torch's current stream, so that a CUDA graph can hold the call.
"""

from __future__ import annotations

import mmap
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ldmrt.engines.activation import ActivationMemory
from ldmrt.engines.protocol import TensorSpec
from ldmrt.engines.runtime_cache import RuntimeCache, cache_file
from ldmrt.engines.tensorrt import DTYPES, NAMES, Library, log, runtime
from ldmrt.errors import BundleError, EngineMismatch
from ldmrt.parameters import Parameters, fitting

Tensors = Mapping[str, torch.Tensor]


class TensorRtEngine:
    """Runs a plan (see `ldmrt.engines.protocol.Engine`).

    Args:
        plan: the file, whose hash has been checked: a plan is code.
        library: what made it, in the same version (`ldmrt.engines.tensorrt.check`).
        memory: activation memory on the GPU that is to run it.
        label: how to call it in a message.
        cache: the folder of what the library compiles at run time; None to compile in every process.
        weight_budget: the most memory in bytes that weights may take on the GPU, the rest stays in the host's; None for what the library
            proposes for this GPU. Without meaning for a plan that does not stream its weights.

    Raises:
        BundleError: the file is no plan, or one of free shapes.
        EngineMismatch: the library is not there, or does not run the plan on this machine.
    """

    def __init__(
        self,
        plan: Path,
        library: Library,
        memory: ActivationMemory,
        *,
        label: str,
        cache: Path | None = None,
        weight_budget: int | None = None,
    ) -> None:
        self._library, self._memory, self._gpu, self._label = library, memory, memory.gpu, label
        self._block: torch.Tensor | None = None
        self._bound: Tensors = {}
        self._addressed: Tensors | None = None
        self._cache: RuntimeCache | None = None
        self._runtime = runtime(library)
        with self._gpu.active():
            self._engine = self._deserialize(plan)
            self._inputs, self._outputs = _specs(self._engine, plan)
            self._stream_weights(weight_budget)
            self._context = self._make_context(plan, cache)
        memory.reserve(self._engine.device_memory_size_v2)
        self._unsaved = self._cache

    def __del__(self) -> None:
        # A context uses its cache and its engine to the end, and the library keeps neither for it.
        for name in ("_context", "_config", "_unsaved", "_cache", "_engine", "_runtime"):
            self.__dict__.pop(name, None)

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """Inputs by name."""
        return self._inputs

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """Outputs by name."""
        return self._outputs

    def bind(self, buffers: Tensors) -> None:
        """Bind one tensor to every input and output: contiguous, on the engine's GPU.

        Raises:
            EngineMismatch: one is missing, or is of another shape or dtype, or elsewhere.
        """
        specs = (*self._inputs.values(), *self._outputs.values())
        self._bound = {spec.name: self._placed("buffer", spec, buffers.get(spec.name)) for spec in specs}
        self._address(self._bound)

    def enqueue(self) -> None:
        """Run on the bound buffers, on the current stream; outside of capture at the first time.

        Raises:
            EngineMismatch: nothing is bound, the plan cannot be captured, or the library fails.
        """
        if not self._bound:
            raise EngineMismatch(f"{self._label}: enqueue before bind")
        self._address(self._bound)
        self._execute()

    def run(self, inputs: Tensors) -> dict[str, torch.Tensor]:
        """Run on `inputs`, return new tensors, which the current stream fills.

        Raises:
            EngineMismatch: an input does not fit, or the library fails.
        """
        specs = self._inputs.values()
        given = {spec.name: self._placed("input", spec, inputs.get(spec.name), copy=True) for spec in specs}
        made = {
            name: torch.empty([int(size) for size in spec.shape], dtype=spec.dtype, device=self._gpu.device)
            for name, spec in self._outputs.items()
        }
        self._address({**given, **made})
        self._execute()
        self._addressed = None  # what was given and made is not the engine's to keep
        return made

    def follow(self, parameters: Parameters, specs: Mapping[str, TensorSpec]) -> None:
        """Keep the plan's weights what `parameters` says they are, from now on.

        Args:
            parameters: the weights, on the engine's GPU.
            specs: those of the plan's weight file, by name; which of them the plan holds, the library knows.

        Raises:
            EngineMismatch: the plan was not built so, or the library fails.
        """
        if not self._engine.refittable:
            raise EngineMismatch(f"{self._label} does not take other weights; {self._library.rebuild[:-1]} --refit`")
        held = {name: specs[name] for name in self._refitter().get_all_weights() if name in specs}
        parameters.declare(held)
        parameters.follow(partial(self._refit, held))

    def _refit(self, held: Mapping[str, TensorSpec], parameters: Parameters, changed: Collection[str]) -> None:
        needed = [name for name in changed if name in held]
        if not needed:
            return
        trt, values = self._library.load(), {}
        with self._gpu.active():
            refitter = self._refitter()
            while needed:  # what the library has joined with others is changed together with them
                for name in needed:
                    if name in values or name not in held:
                        raise self._failure(f"does not take the weight {name!r}")
                    value = values[name] = parameters.present(held[name]).contiguous()
                    weights = trt.Weights(getattr(trt.DataType, NAMES[value.dtype]), value.data_ptr(), value.numel())
                    if not refitter.set_named_weights(name, weights, trt.TensorLocation.DEVICE):
                        raise self._failure(f"does not take the weight {name!r}")
                needed = refitter.get_missing_weights()
            self._gpu.synchronize()  # nothing may use the plan meanwhile
            if not refitter.refit_cuda_engine():
                raise self._failure("does not take other weights")

    def _refitter(self) -> Any:
        return self._library.load().Refitter(self._engine, log(self._library))

    # ------------------------------------------------------------------------------------------------ loading

    def _deserialize(self, plan: Path) -> Any:
        log(self._library).first_error()  # what was not told belongs to another call
        try:
            with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                engine = self._runtime.deserialize_cuda_engine(data)
                if engine is None:
                    raise self._refusal(plan, data)
                return engine
        except (OSError, ValueError) as error:  # ValueError: there is nothing in the file
            raise BundleError(f"{plan} cannot be read ({error}); {self._library.rebuild}") from error

    def _refusal(self, plan: Path, data: mmap.mmap) -> Exception:
        """Why the library does not load a plan."""
        trt, reason = self._library.load(), self._reason()
        if self._library.compiles_at_run_time:
            _, flags = self._runtime.get_engine_validity(data)
            known = trt.EngineInvalidityDiagnostics.__members__.items()
            reason = ", ".join(name for name, flag in known if flags & int(flag)) or reason
        kind = BundleError if "MALFORMED_ENGINE" in reason else EngineMismatch
        return kind(
            f"{self._label}: {self._library.kind} {trt.__version__} does not load {plan} ({reason}); "
            f"see `ldmrt doctor`, or {self._library.rebuild}"
        )

    def _stream_weights(self, budget: int | None) -> None:
        """Set how much of the weights lies on the GPU, on which the activation memory depends."""
        if self._engine.streamable_weights_size:
            most = self._engine.get_weight_streaming_automatic_budget() if budget is None else budget
            self._engine.weight_streaming_budget_v2 = min(most, self._engine.streamable_weights_size)

    def _make_context(self, plan: Path, cache: Path | None) -> Any:
        trt = self._library.load()
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._library.compiles_at_run_time:
            self._config = self._engine.create_runtime_config()
            self._config.set_execution_context_allocation_strategy(strategy)
            self._config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED  # we capture more than one engine
            if cache is not None:
                file = cache_file(cache, self._gpu.name, trt.__version__, plan)
                self._cache = RuntimeCache(self._config.create_runtime_cache(), file)
                self._config.set_runtime_cache(self._cache.native)
            context = self._engine.create_execution_context(self._config)
        else:
            context = self._engine.create_execution_context(strategy)
        if context is None:
            raise self._failure("cannot be made ready")
        return context

    # ------------------------------------------------------------------------------------------------ running

    def _placed(self, what: str, spec: TensorSpec, tensor: torch.Tensor | None, *, copy: bool = False) -> torch.Tensor:
        """The tensor, if the library can use it where it lies; with `copy` a strided one is copied."""
        tensor = fitting(what, spec, tensor, where=self._label)
        if tensor.device != self._gpu.device:
            raise EngineMismatch(
                f"{self._label}: {what} {spec.name!r} is on {tensor.device}, expected {self._gpu.device}"
            )
        if not (copy or tensor.is_contiguous()):
            raise EngineMismatch(
                f"{self._label}: {what} {spec.name!r} has the strides {tensor.stride()}, expected it contiguous"
            )
        return tensor.contiguous()

    def _address(self, tensors: Tensors) -> None:
        """Make the next run use these tensors."""
        if tensors is self._addressed:
            return
        if self._block is None:
            self._block = self._memory.block()
            self._context.set_device_memory(self._block.data_ptr(), len(self._block))
        self._addressed = None  # some are, if one is refused
        for name, tensor in tensors.items():
            if not self._context.set_tensor_address(name, tensor.data_ptr()):
                raise self._failure(f"does not take the address of {name!r}")
        self._addressed = tensors

    def _execute(self) -> None:
        with self._gpu.active():
            stream = self._gpu.stream()
            if self._library.compiles_at_run_time and self._gpu.capturing():
                self._check_capturable(stream)
            if not self._context.execute_async_v3(stream):
                raise self._failure("fails")
        if self._unsaved is not None:  # all that the plan needs has been compiled now
            self._unsaved.save()
            self._unsaved = None

    def _check_capturable(self, stream: int) -> None:
        if not self._context.is_stream_capturable(stream):
            raise EngineMismatch(
                f"{self._label} cannot be captured in a CUDA graph: use capture='off', or {self._library.rebuild}"
            )

    def _failure(self, what: str) -> EngineMismatch:
        return EngineMismatch(f"{self._label} {what} ({self._reason()}); see `ldmrt doctor`, or use --engine torch")

    def _reason(self) -> str:
        return log(self._library).first_error() or "no reason given"


def _specs(engine: Any, plan: Path) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
    """A plan's inputs and outputs."""
    inputs: dict[str, TensorSpec] = {}
    outputs: dict[str, TensorSpec] = {}
    for number in range(engine.num_io_tensors):
        name = engine.get_tensor_name(number)
        shape, dtype = tuple(engine.get_tensor_shape(name)), engine.get_tensor_dtype(name).name
        if -1 in shape or dtype not in DTYPES:
            raise BundleError(
                f"{plan} has {name!r} of {shape} {dtype}, expected fixed sizes and one of {', '.join(DTYPES)}; "
                "build it again with `ldmrt build-engines`"
            )
        specs = inputs if engine.get_tensor_mode(name).name == "INPUT" else outputs
        specs[name] = TensorSpec(name, shape, DTYPES[dtype])
    return inputs, outputs
