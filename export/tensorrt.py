"""From an ONNX file to a TensorRT plan."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from onnx import load_model

from ldmrt.engines.tensorrt import Library, log, runtime
from ldmrt.errors import BuildError
from ldmrt.files import replacing

OnPhase = Callable[[str, int, int], None]


def build_plan(
    library: Library,
    onnx: Path,
    plan: Path,
    *,
    targets: Sequence[str],
    optimization_level: int | None = None,
    workspace: int | None = None,
    refit: bool = False,
    weight_streaming: bool = False,
    on_phase: OnPhase = lambda _what, _done, _total: None,
) -> None:
    """Compile an ONNX file whose weights lie beside it. The plan holds a copy of them.

    Runs in this process; Ctrl-C stops it, and leaves nothing.

    Args:
        library: which of the two libraries.
        onnx: the graph, strictly typed, its shapes fixed.
        plan: the file to write, whole or not at all.
        targets: GPU architectures, such as `sm_89`, where the library builds for absent ones; else the one at hand.
        optimization_level: 0 to 5, how long to search for fast kernels; the library's own default if None.
        workspace: the most memory in bytes that a layer may use besides its tensors; no limit if None.
        refit: whether weights can be changed in the plan, under their names in the ONNX file.
        weight_streaming: whether weights may stay in the host's memory. The library then allocates while it runs, so that no CUDA graph can
            hold the plan.
        on_phase: called with (phase, steps done, steps in all), from any thread.

    Raises:
        BuildError: the library refuses the graph, or a target; says the first reason that it gave.
    """
    trt = library.load()
    messages = log(library)
    messages.first_error()  # what was not told belongs to another call
    builder = trt.Builder(messages)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, messages)
    if not parser.parse_from_file(str(onnx)):
        reasons = [parser.get_error(i).desc() for i in range(parser.num_errors)] or ["no reason given"]
        raise BuildError(f"{library.kind} cannot read {onnx.name}: {_one_line(reasons[0])}; use --engine torch")
    config = builder.create_builder_config()
    if library.targets is not None:
        config.num_compute_capabilities = len(targets)
        for number, target in enumerate(targets):
            capability = getattr(trt.ComputeCapability, target.replace("_", "").upper())
            if not config.set_compute_capability(capability, number):
                raise BuildError(
                    f"{library.kind} {trt.__version__} does not build for {target}: choose another --target"
                )
    if weight_streaming:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    elif hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):  # without it a plan could not run inside a CUDA graph
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if refit:
        config.set_flag(trt.BuilderFlag.REFIT)
    config.max_aux_streams = 0
    if optimization_level is not None:
        config.builder_optimization_level = optimization_level
    if workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    stop = threading.Event()
    config.progress_monitor = _make_monitor(trt, stop, on_phase)
    built = _in_a_thread(lambda: builder.build_serialized_network(network, config), stop)
    if built is None:
        where = f" for {', '.join(targets)}" if targets else ""
        raise BuildError(
            f"{library.kind} cannot build {onnx.name}{where}: {messages.first_error() or 'no reason given'}; use --engine torch"
        )
    if refit:
        _check_refittable(library, built, onnx)
    with replacing(plan) as file:
        file.write(memoryview(built))


def give_memory_back() -> None:
    """Have the C library return free memory to the system: after a builder that is gigabytes, which it would keep."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
    if trim is not None:
        trim(0)


def _check_refittable(library: Library, built: Any, onnx: Path) -> None:
    """Check that every weight of an ONNX file can be changed in its plan: one that has become a part of another would keep its value.

    Raises:
        BuildError: one cannot be.
    """
    engine = runtime(library).deserialize_cuda_engine(built)
    held = set() if engine is None else set(library.load().Refitter(engine, log(library)).get_all_weights())
    initializers = load_model(str(onnx), load_external_data=False).graph.initializer
    lost = [tensor.name for tensor in initializers if tensor.external_data and tensor.name not in held]
    if lost:
        raise BuildError(
            f"{library.kind} does not let {len(lost)} weights of {onnx.name} change, {lost[0]} among them"
            f" ({log(library).first_error() or 'no reason given'}); leave --refit out"
        )


def _in_a_thread(work: Callable[[], Any], stop: threading.Event) -> Any:
    """Run `work` beside the main thread, which alone hears Ctrl-C, and could not while it is inside the library."""
    with ThreadPoolExecutor(1, "ldmrt-tensorrt") as pool:
        try:
            return pool.submit(work).result()
        except BaseException:
            stop.set()
            raise


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]


def _make_monitor(trt: Any, stop: threading.Event, on_phase: OnPhase) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self._totals: dict[str, int] = {}

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self._totals[name] = steps
            if parent is None:
                on_phase(name, 0, steps)

        def step_complete(self, name: str, step: int) -> bool:
            on_phase(name, step + 1, self._totals.get(name, step + 1))
            return not stop.is_set()

        def phase_finish(self, name: str) -> None:
            self._totals.pop(name, None)

    return Monitor()
