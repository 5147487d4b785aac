"""The kernels of all stages, compiled before they are needed: side by side, here or on a machine without a GPU.

Without this nothing is wrong: a kernel is compiled when it is first launched.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed, wait
from pathlib import Path

import torch

from gpu_suite.models import Model
from gpu_suite.networks import BATCHES
from gpu_suite.operators import OPERATORS
from gpu_suite.results import Figures
from gpu_suite.session import Session
from ldmrt import choices, tune
from ldmrt.export.cubins import variants
from ldmrt.graph import Graph, specialize
from ldmrt.kernels import aot, launch, ops, tuning
from ldmrt.kernels.variant import Variant

META = torch.device("meta")
DTYPES = (torch.float16, torch.bfloat16)

Wanted = Iterator[tuple[str, list[Variant]]]


def wanted(model: Callable[[str], Model], arch: int) -> Wanted:
    """What the stages launch on an architecture, such as 90, by where it is needed.

    Args:
        model: gives a model by name.
        arch: the architecture.
    """
    yield "operators", _of_operators(arch)
    for name, batches in BATCHES.items():
        found = model(name)
        graphs = graphs_of(found)
        rows = [specialize(found.unet["step"], {"rows": 2 * batch}) for batch in batches]
        yield name, variants([*graphs.values(), *rows, *found.text_graphs.values()], arch)
        yield f"{name}, candidates", _candidates(graphs, arch)


def graphs_of(model: Model) -> dict[str, Graph]:
    """What is tuned of a model: a step for one image with guidance, and its decoder."""
    return {
        "step": specialize(model.unet["step"], {"rows": 2}),
        "decoder": specialize(model.decoder_graph, {"rows": 1}),
    }


def _of_operators(arch: int) -> list[Variant]:
    with launch.recording(arch) as found:
        for operator in OPERATORS.values():
            for size in operator.sizes.values():
                for dtype in DTYPES:
                    arguments = operator.arguments(size, dtype, META)
                    for body in (operator.body, *operator.also.values()):
                        body(*arguments)
    return list(found)


def _candidates(graphs: dict[str, Graph], arch: int) -> list[Variant]:
    """What tuning would launch."""
    calls = {call for counter in tune.collect(graphs, arch).values() for call in counter}
    with launch.recording(arch) as found:
        for call in calls:
            function = ops.OPERATORS[f"ldmrt.{call.operator}.default"]
            arguments = tune.arguments_of(call, META)
            for choice in choices.OPERATORS[call.operator].candidates(arch, call.problem):
                with tuning.trying(call.operator, arch, call.problem, choice):
                    function(*arguments)
    return list(found)


# ---------------------------------------------------------------------------------------------------- on the GPU's machine


def compile_ahead(session: Session, unit: str) -> None:
    """Compile what was not brought along, in all processor cores at once; Triton's cache on disk then has it."""
    if not session.cuda or not launch.ready(session.device):
        with session.results.part(unit, "kernels") as figures:
            figures["skipped"] = f"nothing to compile: {launch.describe(session.device)}"
        return
    arch = launch.architecture(session.device)
    there = {cubin.key for cubin in (aot.read(session.kernels) if session.kernels else ()) if cubin.arch == arch}
    with _pool() as pool:
        pending: dict[Variant, Future[Figures]] = {}
        start = time.time()
        for name, found in wanted(session.model, arch):
            with session.results.part(unit, name) as figures:
                missing = [variant for variant in found if variant not in pending and variant.key() not in there]
                figures.update(
                    {"variants": len(found), "missing": len(missing), "seconds": round(time.time() - start, 1)}
                )
                pending |= {variant: pool.submit(_facts, variant, arch) for variant in missing}
        with session.results.part(unit, "kernels") as figures:
            wait(pending.values(), timeout=min(180.0, max(10.0, session.left() - 240)))
            done = [future.result() for future in pending.values() if future.done()]
            for future in pending.values():
                future.cancel()
            figures.update({"brought": len(there), "compiled": len(done), "architecture": arch})
            figures["errors"] = [found for found in done if "error" in found]
            figures["with_stack"] = [found for found in done if found.get("stack")]


def _facts(variant: Variant, arch: int) -> Figures:
    """Compile a variant, in a process of the pool: what it needs of the machine, or why it does not compile."""
    facts: Figures = {"kernel": variant.kernel, "types": list(variant.types), "constants": dict(variant.constants)}
    try:
        cubin = aot.compile_variant(variant, arch)
    except Exception as error:  # noqa: BLE001  (the launch will raise it again, where it counts)
        return facts | {"error": f"{type(error).__name__}: {str(error)[:500]}"}
    return facts | {"registers": cubin.registers, "stack": cubin.stack, "shared": cubin.shared}


# ---------------------------------------------------------------------------------------------------- without a GPU


def compile_into(folder: Path, arch: int) -> tuple[int, list[str]]:
    """Compile what the stages launch on an architecture into a folder; what lies there is kept if it is still wanted.

    Returns:
        How many kernels the folder has, and what could not be compiled.
    """

    def model(name: str) -> Model:
        return Model(name, tiny=False, dtype=torch.float16, device=META)

    needed = {variant.key(): variant for _, found in wanted(model, arch) for variant in found}
    before = aot.read(folder) if (folder / aot.INDEX).is_file() else []
    cubins = [cubin for cubin in before if cubin.key in needed and cubin.arch == arch]
    there = {cubin.key for cubin in cubins}
    problems: list[str] = []
    with _pool() as pool:
        pending = {
            pool.submit(aot.compile_variant, each, arch): each for key, each in needed.items() if key not in there
        }
        for future in as_completed(pending):
            try:
                cubins.append(future.result())
            except Exception as error:  # noqa: BLE001  (a compiler may raise anything; the others are wanted all the same)
                problems.append(f"{pending[future].kernel} {dict(pending[future].constants)}: {str(error)[:200]}")
    for old in {cubin.file_name for cubin in before} - {cubin.file_name for cubin in cubins}:
        (folder / old).unlink(missing_ok=True)
    aot.write(folder, cubins)
    return len(cubins), problems


def _pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(min(32, os.cpu_count() or 1), mp_context=multiprocessing.get_context("spawn"))
