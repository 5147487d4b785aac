"""Which candidates are the fastest for a model's operators. What is found counts for the stages that follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch

from gpu_suite.ahead import graphs_of
from gpu_suite.results import Figures
from gpu_suite.session import Session
from ldmrt import choices
from ldmrt.choices import Machine, encoded, machine_with
from ldmrt.kernels import launch, tuning
from ldmrt.kernels.tuning import Call
from ldmrt.tune import Measured, Stopwatch, measure

CHOICES = "choices"  # a folder beside the results


def tune_model(session: Session, unit: str, name: str) -> None:
    """Time the candidates of every problem of a model's step and decoder, and let the fastest count."""
    graphs = graphs_of(session.only_model(name))
    with session.results.part(unit, "problems") as figures:
        if not session.cuda:
            figures["skipped"] = f"nothing to tune: {launch.describe(session.device)}"
            return
        machine = machine_with(session.device)
        timer = _Kept(Stopwatch(session.device))
        found = measure(graphs, machine, timer)
        for each in found.measurements:
            tuning.override(each.operator, machine.capability, each.problem, each.choice)
        # For the workers that come after this one.
        entries = [
            choices.entry(each.operator, each.problem, each.choice, each.default_seconds, each.seconds)
            for each in found.measurements
        ]
        choices.keep(session.results.folder / CHOICES, machine, entries)
        figures.update(describe(found, timer.seconds, machine))


class _Kept:
    """A stopwatch that keeps what it found, for every candidate."""

    def __init__(self, timer: Stopwatch) -> None:
        self._timer = timer
        self.seconds: dict[tuple[str, Any], list[Mapping[Any, float]]] = {}

    def __call__(self, call: Call, candidates: Sequence[Any]) -> Mapping[Any, float]:
        found = self._timer(call, candidates)
        self.seconds.setdefault((call.operator, call.problem), []).append(found)
        torch.cuda.empty_cache()
        return found


def describe(
    found: Measured, seconds: Mapping[tuple[str, Any], Sequence[Mapping[Any, float]]], machine: Machine
) -> Figures:
    """What was found, as JSON: microseconds of every candidate of every problem, and what the choices save in a run of a graph."""
    problems = []
    for each in found.measurements:
        timed = seconds[each.operator, each.problem]
        left = [choice for choice in timed[0] if all(choice in times for times in timed)]
        means = {choice: 1e6 * fmean(times[choice] for times in timed) for choice in left}
        problems.append(
            {
                "operator": each.operator,
                "problem": encoded(each.problem),
                "calls": each.calls,
                "default": encoded(each.default),
                "choice": encoded(each.choice),
                "microseconds": [[encoded(choice), round(mean, 2)] for choice, mean in means.items()],
            }
        )
    return {
        "machine": machine.model_dump(mode="json"),
        "problems": problems,
        "skipped": found.skipped,
        "graph_seconds": {name: {"default": a, "choice": b} for name, (a, b) in found.seconds.items()},
    }
