"""What ldmrt uses of `tensorrt_rtx_bindings`, on the CPU and strict: it refuses what the library would crash on.

A plan is JSON. Running it reads its inputs and writes its outputs at the addresses that were set, by way of its activation memory, with
torch's operators, so that a recorder of those can capture it. Like the library, nothing here keeps anything alive for anybody; who dies too
early is noted in `violations`.
"""

from __future__ import annotations

import ctypes
import json
import math
import weakref
from collections.abc import Mapping
from enum import Enum, IntEnum
from typing import Any

import torch

__version__ = "1.7.1.116"

ALIGNMENT = 256

violations: list[str] = []
calls: list[str] = []


class Cuda:
    """The state of the GPU that is not there."""

    architecture = "sm_89"
    name = "NVIDIA GeForce RTX 4090"
    driver = 580
    stream = 7
    active = False
    capturing = False
    idle = True
    free = 1 << 10


class ILogger:
    class Severity(Enum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2
        INFO = 3
        VERBOSE = 4

    def __init__(self) -> None:
        self.ready = True

    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError


class DataType(Enum):
    FLOAT = 0
    HALF = 1
    INT8 = 2
    INT32 = 3
    BOOL = 4
    INT64 = 8
    BF16 = 7


class TensorIOMode(Enum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class ExecutionContextAllocationStrategy(Enum):
    STATIC = 0
    ON_PROFILE_CHANGE = 1
    USER_MANAGED = 2


class CudaGraphStrategy(Enum):
    DISABLED = 0
    WHOLE_GRAPH_CAPTURE = 1


class EngineValidity(Enum):
    VALID = 0
    SUBOPTIMAL = 1
    INVALID = 2


class EngineInvalidityDiagnostics(IntEnum):
    VERSION_MISMATCH = 1
    UNSUPPORTED_CC = 2
    OLD_CUDA_DRIVER = 4
    MALFORMED_ENGINE = 32


_DTYPES = {"FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16, "INT64": torch.int64}


def write_plan(
    inputs: Mapping[str, tuple[int, ...]],
    outputs: Mapping[str, tuple[int, ...]],
    *,
    scale: float = 1.0,
    dtype: str = "FLOAT",
    memory: int = 1024,
    **more: Any,
) -> bytes:
    """A plan that computes scale * (the sum of its inputs), in float32, flattened, repeated or cut to the size of each output."""
    return json.dumps(
        {
            "version": __version__,
            "targets": ["sm_86", "sm_89"],
            "inputs": inputs,
            "outputs": outputs,
            "scale": scale,
            "dtype": dtype,
            "memory": memory,
            **more,
        }
    ).encode()


def _tensor(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    count = math.prod(shape)
    memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(shape)


class TensorLocation(Enum):
    DEVICE = 0
    HOST = 1


class Weights:
    """Whatever is said of them later, they are read when the engine is refitted."""

    def __init__(self, type: DataType, ptr: int, count: int) -> None:  # noqa: A002 - the library's name for it
        self._values = _tensor(ptr, (count,), _DTYPES[type.name])


class Refitter:
    """A plan's scale is the product of its weights, each a single number; those of a `joined` pair are changed together."""

    def __init__(self, engine: ICudaEngine, logger: ILogger) -> None:
        if not engine.refittable:
            raise AssertionError("the library crashes on an engine that was not built so")
        self._engine, self._logger = weakref.ref(engine), logger
        self._given: dict[str, Weights] = {}

    def get_all_weights(self) -> list[str]:
        return list(self._plan()["weights"])

    def set_named_weights(self, name: str, weights: Weights, location: TensorLocation = TensorLocation.HOST) -> bool:
        held = self._plan()["weights"]
        fits = name in held and weights._values.numel() == 1 and location is TensorLocation.DEVICE
        if fits and weights._values.dtype != _DTYPES[self._plan()["dtype"]]:
            self._logger.log(ILogger.Severity.ERROR, "another type was expected")
            return False
        if fits:
            self._given[name] = weights
        return fits

    def get_missing_weights(self) -> list[str]:
        joined = self._plan().get("joined", [])
        return [name for name in joined if name not in self._given] if self._given.keys() & set(joined) else []

    def refit_cuda_engine(self) -> bool:
        if not Cuda.active or not Cuda.idle:
            raise AssertionError("the engine may be in use")
        if self.get_missing_weights() or self._plan().get("stubborn"):
            return False
        self._plan()["weights"] |= {name: float(weights._values) for name, weights in self._given.items()}
        return True

    def _plan(self) -> dict[str, Any]:
        engine = self._engine()
        if engine is None:
            raise AssertionError("the engine is destroyed")
        return engine._plan


class Runtime:
    count = 0

    def __init__(self, logger: ILogger) -> None:
        if not logger.ready:
            raise TypeError("the logger's __init__ was not called")
        self._logger = logger
        type(self).count += 1

    def get_engine_validity(self, buffer: Any) -> tuple[EngineValidity, int]:
        try:
            plan = json.loads(bytes(buffer))
        except ValueError:
            return EngineValidity.INVALID, int(EngineInvalidityDiagnostics.MALFORMED_ENGINE)
        flags = 0
        if plan["version"] != __version__:
            flags |= EngineInvalidityDiagnostics.VERSION_MISMATCH
        if Cuda.architecture not in plan["targets"]:
            flags |= EngineInvalidityDiagnostics.UNSUPPORTED_CC
        return (EngineValidity.INVALID if flags else EngineValidity.VALID), int(flags)

    def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
        if not Cuda.active:
            raise AssertionError("the engine would be loaded onto whatever GPU is the current one")
        validity, _ = self.get_engine_validity(serialized_engine)
        if validity is EngineValidity.INVALID:
            self._logger.log(ILogger.Severity.ERROR, "Serialization assertion\nfailed.")
            self._logger.log(ILogger.Severity.ERROR, "what follows from it")
            return None
        self._logger.log(ILogger.Severity.INFO, "Loaded engine")
        return ICudaEngine(self, json.loads(bytes(serialized_engine)))


class ICudaEngine:
    def __init__(self, runtime: Runtime, plan: dict[str, Any]) -> None:
        self._runtime = weakref.ref(runtime)
        self._plan = plan
        self._shapes: dict[str, tuple[int, ...]] = {**plan["inputs"], **plan["outputs"]}
        self._budget, self._contexts = self.streamable_weights_size, 0

    def __del__(self) -> None:
        calls.append("engine destroyed")
        if self._runtime() is None:
            violations.append("the runtime died before its engine")

    @property
    def device_memory_size_v2(self) -> int:
        """What streams needs memory to stream to."""
        return int(self._plan["memory"]) + self.streamable_weights_size - self._budget

    @property
    def refittable(self) -> bool:
        return bool(self._plan.get("refit"))

    @property
    def streamable_weights_size(self) -> int:
        return int(self._plan.get("streamable", 0))

    def get_weight_streaming_automatic_budget(self) -> int:
        return Cuda.free

    @property
    def weight_streaming_budget_v2(self) -> int:
        return self._budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, budget: int) -> None:
        if not 0 <= budget <= self.streamable_weights_size or self._contexts:
            raise AssertionError("the budget is no part of the weights, or a context has been made for another")
        self._budget = budget

    @property
    def num_io_tensors(self) -> int:
        return len(self._shapes)

    def get_tensor_name(self, index: int) -> str:
        return list(self._shapes)[index]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._shapes[name])

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType["INT64"] if name in self._plan.get("integers", ()) else DataType[self._plan["dtype"]]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self._plan["inputs"] else TensorIOMode.OUTPUT

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def create_execution_context(
        self, how: IRuntimeConfig | ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy.STATIC
    ) -> IExecutionContext | None:
        if not Cuda.active:
            raise AssertionError("the context would be made on whatever GPU is the current one")
        strategy = how.get_execution_context_allocation_strategy() if isinstance(how, IRuntimeConfig) else how
        if strategy is not ExecutionContextAllocationStrategy.USER_MANAGED:
            raise AssertionError("the library would allocate activation memory by itself")
        if isinstance(how, IRuntimeConfig) and how.cuda_graph_strategy is not CudaGraphStrategy.DISABLED:
            raise AssertionError("the library would capture by itself")
        self._contexts += 1
        return None if self._plan.get("unfit") else IExecutionContext(self, how)


class IRuntimeCache:
    def __init__(self) -> None:
        self.kernels: list[str] = []

    def __del__(self) -> None:
        calls.append("cache destroyed")

    def serialize(self) -> bytes:
        state = {"gpu": Cuda.name, "driver": Cuda.driver, "version": __version__, "kernels": self.kernels}
        return json.dumps(state).encode()

    def deserialize(self, blob: bytes) -> bool:
        try:
            state = json.loads(blob)
        except ValueError:
            return False
        fits = (state["gpu"], state["driver"], state["version"]) == (Cuda.name, Cuda.driver, __version__)
        if fits:
            self.kernels = state["kernels"]
        return fits


class IRuntimeConfig:
    cuda_graph_strategy = CudaGraphStrategy.WHOLE_GRAPH_CAPTURE  # stricter than the library, whose default is DISABLED

    def __init__(self) -> None:
        self._strategy = ExecutionContextAllocationStrategy.STATIC
        self._cache: weakref.ref[IRuntimeCache] | None = None

    def __del__(self) -> None:
        if self._cache is not None and self._cache() is None:
            violations.append("the cache died before its config")

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy) -> None:
        self._strategy = strategy

    def get_execution_context_allocation_strategy(self) -> ExecutionContextAllocationStrategy:
        return self._strategy

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache()

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        self._cache = weakref.ref(cache)
        return True

    def get_runtime_cache(self) -> IRuntimeCache | None:
        return None if self._cache is None else self._cache()


class IExecutionContext:
    def __init__(self, engine: ICudaEngine, how: IRuntimeConfig | ExecutionContextAllocationStrategy) -> None:
        self._engine, self._plan = weakref.ref(engine), engine._plan
        cache = how.get_runtime_cache() if isinstance(how, IRuntimeConfig) else None
        self._cache = None if cache is None else weakref.ref(cache)
        self._addresses: dict[str, int] = {}
        self._memory = (0, 0)
        compiled = f"scale by {self._plan['scale']}"
        if cache is not None and compiled not in cache.kernels:
            calls.append("compiled")
            cache.kernels.append(compiled)

    def __del__(self) -> None:
        calls.append("context destroyed")
        if self._engine() is None:
            violations.append("the engine died before its context")
        if self._cache is not None and self._cache() is None:
            violations.append("the cache died before its context")

    def set_device_memory(self, memory: int, size: int) -> None:
        if memory == 0 or memory % ALIGNMENT or size < self._needed():
            raise AssertionError(f"{size} bytes at {memory:#x} are not the {self._needed()} aligned ones needed")
        calls.append("set_device_memory")
        self._memory = (memory, size)

    def _needed(self) -> int:
        engine = self._engine()
        if engine is None:
            raise AssertionError("the engine is destroyed")
        return engine.device_memory_size_v2

    def set_tensor_address(self, name: str, memory: int) -> bool:
        engine = self._engine()
        if engine is None:
            raise AssertionError("the engine is destroyed")
        if name not in engine._shapes or memory == 0:
            return False
        calls.append(f"set_tensor_address {name}")
        self._addresses[name] = memory
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        self._check_stream(stream)
        return bool(self._plan.get("capturable", True))

    def execute_async_v3(self, stream_handle: int) -> bool:
        engine = self._engine()
        if engine is None:
            raise AssertionError("the engine is destroyed")
        self._check_stream(stream_handle)
        if self._memory == (0, 0) or self._addresses.keys() != engine._shapes.keys():
            raise AssertionError("there is no activation memory, or a tensor without an address")
        if self._plan.get("fails"):
            engine._runtime()._logger.log(ILogger.Severity.ERROR, self._plan["fails"])  # type: ignore[union-attr]
            return False
        calls.append("execute_async_v3")
        Cuda.idle = False
        self._compute(engine)
        return True

    def _check_stream(self, stream: int) -> None:
        if stream != Cuda.stream or not Cuda.active:
            raise AssertionError("that is not the current stream of the engine's GPU")

    def _compute(self, engine: ICudaEngine) -> None:
        tensors = {
            name: _tensor(
                self._addresses[name], engine.get_tensor_shape(name), _DTYPES[engine.get_tensor_dtype(name).name]
            )
            for name in engine._shapes
        }
        # All of the memory is written, then the result passes through it.
        scratch = _tensor(self._memory[0], (self._plan["memory"] // 4,), torch.float32)
        scratch.fill_(math.nan)
        for name in self._plan["outputs"]:
            target = tensors[name].view(-1)
            total = scratch[: len(target)]
            total.zero_()
            for given in self._plan["inputs"]:
                values = tensors[given].view(-1)
                times = -(-len(target) // len(values))
                total.add_(values.repeat(times)[: len(target)])
            total.mul_(self._plan["scale"] * math.prod(self._plan.get("weights", {}).values()))
            target.copy_(total)
