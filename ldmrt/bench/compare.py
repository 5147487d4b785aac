"""Two reports of `ldmrt bench` beside each other."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel, ConfigDict

from ldmrt.bench.intervals import Ratio, Verdict, ratio_of_medians, verdict
from ldmrt.bench.report import Case, Report, Series
from ldmrt.errors import BadRequest

# From here on the machine's own rate is told to have changed.
_DRIFT = 0.02


class Difference(BaseModel):
    """A figure of both.

    Attributes:
        figure: its name.
        before: median seconds in the first report.
        after: in the second.
        ratio: after over before.
        verdict: of the second, beside the first.
    """

    model_config = ConfigDict(frozen=True)

    figure: str
    before: float
    after: float
    ratio: Ratio
    verdict: Verdict


class Comparison(BaseModel):
    """All of them, and what is to be known of them.

    Attributes:
        differences: figures that are in both reports.
        notes: what makes the two less alike.
    """

    model_config = ConfigDict(frozen=True)

    differences: tuple[Difference, ...]
    notes: tuple[str, ...]


def compare(before: Report, after: Report) -> Comparison:
    """Compare all figures that both reports have.

    On one machine a difference counts only if it is beyond what the machine's own rate of matrix products changed by.

    Raises:
        BadRequest: other things were drawn.
    """
    theirs = after.settings.model_dump()
    for name, value in before.settings.model_dump().items():
        if theirs[name] != value:
            raise BadRequest(
                f"the reports cannot be compared: {name} is {value} in the first and {theirs[name]} in the second; "
                "measure both alike"
            )
    others = {case.label: case for case in after.cases}
    pairs = [(case, others[case.label]) for case in before.cases if case.label in others]
    if not pairs:
        raise BadRequest(
            f"the reports cannot be compared: the first has {before.cases[0].label} and the second {after.cases[0].label}; "
            "measure both alike"
        )
    notes = [
        f"{name} differs: {one}, then {other}"
        for name, one in before.place.model_dump(exclude={"bundle"}).items()
        if (other := getattr(after.place, name)) != one
    ]
    same = before.provenance.get("machine") == after.provenance.get("machine") and before.place.gpu == after.place.gpu
    if not same:
        notes.append("the machines differ, so the verdicts are about them too")
    differences = []
    for number, (one, other) in enumerate(pairs):
        drift = other.machine.gemm / one.machine.gemm if same else 1.0
        if abs(drift - 1) > _DRIFT:
            notes.append(f"{one.label}: the machine's own matrix product ran at {drift:.0%} of the first report's rate")
        figures = [*_figures(one, other)]
        if number == 0:
            figures.insert(0, ("cold start", before.cold.seconds, after.cold.seconds))
        differences += [_difference(*figure, drift) for figure in figures]
    return Comparison(differences=tuple(differences), notes=tuple(notes))


def _difference(figure: str, before: Series, after: Series, drift: float) -> Difference:
    ratio = ratio_of_medians(after.samples, before.samples)
    runs = min(len(before.samples), len(after.samples))
    return Difference(
        figure=figure,
        before=before.median,
        after=after.median,
        ratio=ratio,
        verdict=verdict(ratio, runs, drift=drift),
    )


def _figures(before: Case, after: Case) -> Iterator[tuple[str, Series, Series]]:
    yield f"{before.label}: picture", before.picture_seconds, after.picture_seconds
    for stage, series in before.stage_seconds.items():
        if stage in after.stage_seconds:
            yield f"{before.label}: {stage}", series, after.stage_seconds[stage]
    yield f"{before.label}: step", before.step_seconds, after.step_seconds
