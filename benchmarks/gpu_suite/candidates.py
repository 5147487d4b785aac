"""Every candidate that tuning may choose, at every problem of a model, against the references in float32: whatever wins is right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gpu_suite.ahead import graphs_of
from gpu_suite.results import Figures
from gpu_suite.session import Session
from ldmrt import choices, tune
from ldmrt.kernels import launch, ops, tuning
from ldmrt.kernels.tuning import Call

# The L2 norm of the difference over that of the reference: a rounding to the dtype or two.
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 1e-4}


def check_candidates(session: Session, unit: str, name: str) -> None:
    """The candidates of a model's step and decoder, on random tensors of the forms that the graphs have."""
    graphs = graphs_of(session.only_model(name))
    if not session.cuda:
        with session.results.part(unit, "candidates") as figures:
            figures["skipped"] = f"no kernel can be launched: {launch.describe(session.device)}"
        return
    arch = launch.architecture(session.device)
    calls = {call for counter in tune.collect(graphs, arch).values() for call in counter}
    for operator in sorted({call.operator for call in calls}):
        with session.results.part(unit, operator) as figures:
            _check([call for call in calls if call.operator == operator], arch, session, figures)


def _check(calls: Sequence[Call], arch: int, session: Session, figures: Figures) -> None:
    figures.update({"right": False, "tolerance": TOLERANCE[session.dtype], "relative_error": 0.0, "candidates": 0})
    wrong: list[str] = []
    for call in calls:
        with torch.inference_mode():
            arguments = tune.arguments_of(call, session.device)
            wide = [value.float() if isinstance(value, Tensor) else value for value in arguments]
            expected = _results(ops.REFERENCES[call.operator](*wide))
            for choice in choices.OPERATORS[call.operator].candidates(arch, call.problem):
                with tuning.trying(call.operator, arch, call.problem, choice):
                    found = _results(ops.OPERATORS[f"ldmrt.{call.operator}.default"](*arguments))
                error = max(
                    float((one.float() - other).norm() / other.norm())
                    for one, other in zip(found, expected, strict=True)
                )
                figures["candidates"] += 1
                figures["relative_error"] = max(figures["relative_error"], error)
                # Written so that NaN is wrong.
                if not error <= figures["tolerance"]:
                    wrong.append(f"{call.problem} {choice}: {error:.2e}")
    figures.update({"wrong": wrong, "right": not wrong})


def _results(made: Any) -> tuple[Tensor, ...]:
    return made if isinstance(made, tuple) else (made,)
