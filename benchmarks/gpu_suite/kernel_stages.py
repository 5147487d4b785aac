"""The operators alone: compared with float64, and timed against torch's own."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from gpu_suite.ahead import DTYPES
from gpu_suite.operator import Operator
from gpu_suite.operators import OPERATORS
from gpu_suite.results import Figures
from gpu_suite.session import Session
from gpu_suite.timing import kernel_times
from ldmrt.graph import dtype_name
from ldmrt.kernels import launch


def dtypes(session: Session) -> tuple[torch.dtype, ...]:
    """What kernels are checked in."""
    return (torch.float32, *DTYPES) if session.tiny else DTYPES


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
