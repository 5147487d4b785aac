"""The operators alone: compiled side by side before they are needed, compared with float64, and timed against torch's own."""

from __future__ import annotations

import multiprocessing
import os
import time
import warnings
from concurrent.futures import Future, ProcessPoolExecutor, wait
from typing import Any

import torch

from gpu_suite.models import TOKENS, Model
from gpu_suite.operators import OPERATORS, Operator
from gpu_suite.results import Figures
from gpu_suite.session import Session
from gpu_suite.timing import kernel_times
from ldmrt.engines.torch import TorchEngine
from ldmrt.graph import Graph, dtype_name, specialize
from ldmrt.kernels import aot, launch
from ldmrt.kernels.variant import Variant
from ldmrt.parameters import Parameters

META = torch.device("meta")


def dtypes(session: Session) -> tuple[torch.dtype, ...]:
    """What kernels are checked in."""
    return (torch.float32, torch.float16, torch.bfloat16) if session.tiny else (torch.float16, torch.bfloat16)


# ---------------------------------------------------------------------------------------------------- compile


def compile_ahead(session: Session, unit: str) -> None:
    """Compile what the stages will launch in all processor cores at once; Triton's cache on disk then has it.

    Without this nothing is wrong: a kernel is compiled when it is first launched.
    """
    if not session.cuda or not launch.ready(session.device):
        with session.results.part(unit, "kernels") as figures:
            figures["skipped"] = f"nothing to compile: {launch.describe(session.device)}"
        return
    arch = launch.architecture(session.device)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(32, os.cpu_count() or 1), mp_context=context) as pool:
        pending: dict[Variant, Future[Figures]] = {}
        with session.results.part(unit, "operators"):
            _submit(pool, pending, _variants_of_operators(session, arch), arch)
        for name in ("sd15", "sdxl"):
            with session.results.part(unit, name) as figures:
                start = time.time()
                found = _variants_of_model(session.model(name), arch)
                figures.update({"capture_seconds": round(time.time() - start, 1), "variants": len(found)})
                _submit(pool, pending, found, arch)
        with session.results.part(unit, "kernels") as figures:
            wait(pending.values(), timeout=min(180.0, max(10.0, session.left() - 240)))
            done = [future.result() for future in pending.values() if future.done()]
            for future in pending.values():
                future.cancel()
            figures.update({"variants": len(pending), "compiled": len(done), "architecture": arch})
            figures["errors"] = [found for found in done if "error" in found]
            figures["with_stack"] = [found for found in done if found.get("stack")]


def _submit(
    pool: ProcessPoolExecutor, pending: dict[Variant, Future[Figures]], found: list[Variant], arch: int
) -> None:
    for variant in found:
        if variant not in pending:
            pending[variant] = pool.submit(compile_one, variant, arch)


def compile_one(variant: Variant, arch: int) -> Figures:
    """Compile a variant, in a process of the pool: what it needs of the machine, or why it does not compile."""
    start = time.time()
    facts: Figures = {"kernel": variant.kernel, "types": list(variant.types), "constants": dict(variant.constants)}
    try:
        cubin = aot.compile_variant(variant, arch)
    except Exception as error:  # noqa: BLE001  (the launch will raise it again, where it counts)
        return facts | {"error": f"{type(error).__name__}: {str(error)[:500]}"}
    return facts | {
        "registers": cubin.registers,
        "stack": cubin.stack,
        "shared": cubin.shared,
        "seconds": round(time.time() - start, 2),
    }


def _variants_of_operators(session: Session, arch: int) -> list[Variant]:
    with launch.recording(arch) as variants:
        for operator in OPERATORS.values():
            for size in operator.sizes.values():
                for dtype in dtypes(session):
                    arguments = operator.arguments(size, dtype, META)
                    for body in (operator.body, *operator.also.values()):
                        body(*arguments)
    return list(variants)


def _variants_of_model(model: Model, arch: int) -> list[Variant]:
    graphs = [
        specialize(model.unet["step"], {"rows": 2, "tokens": TOKENS}),
        specialize(model.decoder_graph, {"rows": 1}),
    ]
    with launch.recording(arch) as variants:
        for graph in graphs:
            _run_on_meta(graph)
    return list(variants)


def _run_on_meta(graph: Graph) -> None:
    def empty(shape: tuple[int | str, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty([int(size) for size in shape], dtype=dtype, device=META)

    engine = TorchEngine(graph, Parameters(lambda spec: empty(spec.shape, spec.dtype), META), META)
    engine.run({spec.name: empty(spec.shape, spec.dtype) for spec in engine.inputs.values()})


# ---------------------------------------------------------------------------------------------------- correctness


def check_operator(session: Session, unit: str, name: str) -> None:
    """An operator at every size against float64, in every dtype."""
    operator = OPERATORS[name]
    sizes = operator.tiny if session.tiny else operator.sizes
    for dtype in dtypes(session):
        for label, size in sizes.items():
            with session.results.part(unit, f"{label}, {dtype_name(dtype)}") as figures:
                _check(session, operator, operator.arguments(size, dtype, session.device), figures)


def _check(session: Session, operator: Operator, arguments: list[Any], figures: Figures) -> None:
    also = operator.also if launch.ready(session.device) else {}
    figures["right"] = False
    verdicts = {}
    for name, body in {"operator": operator.body, **also}.items():
        # What the allocator hands out next is full of NaN, so that an element that nobody writes shows.
        poison = torch.full_like(arguments[0], torch.nan)
        del poison
        verdicts[name] = operator.check(body, arguments)
        figures[name] = {
            "of_bound": float(f"{verdicts[name].of_bound:.3g}"),
            "relative_error": float(f"{verdicts[name].relative_error:.3g}"),
        }
    figures["right"] = all(verdict.right for verdict in verdicts.values())


# ---------------------------------------------------------------------------------------------------- times


def time_operator(session: Session, unit: str, name: str) -> None:
    """An operator at its usual sizes: seconds, the share of the device's rate, and torch's own seconds."""
    operator, rates = OPERATORS[name], session.rates
    labels = operator.tiny if session.tiny else {label: operator.sizes[label] for label in operator.timed}
    for label, size in labels.items():
        with session.results.part(unit, label) as figures:
            arguments = operator.arguments(size, session.dtype, session.device)
            flops, nbytes = operator.work(arguments)
            least = flops / rates.gemm if flops else nbytes / rates.copy
            figures.update(
                {"flops": flops, "bytes": nbytes, "roof": "gemm" if flops else "copy", "floor_seconds": least}
            )
            bodies = {
                "ldmrt": operator.body,
                **(operator.also if launch.ready(session.device) else {}),
                **operator.rivals,
            }
            for body_name, body in bodies.items():
                figures[body_name] = _times(session, body, arguments)
            ours = figures["ldmrt"]
            for kind in ("cold", "warm"):
                figures[f"share_of_roof_{kind}"] = round(least / ours[f"{kind}_seconds"]["p50"], 3)


def _times(session: Session, body: Any, arguments: list[Any]) -> Figures:
    """A body's times, or why there are none: not every backend of torch takes every head size."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            body(*arguments)
            session.synchronize()
            return kernel_times(session, lambda: body(*arguments), runs=30)
    except RuntimeError as error:
        session.synchronize()  # raises again, if it was not only a refusal
        return {"refused": str(error).splitlines()[0][:200]}
