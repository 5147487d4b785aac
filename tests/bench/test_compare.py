"""Two reports: what became faster, what slower, and what is noise."""

from __future__ import annotations

import pytest

from ldmrt.bench.compare import compare
from ldmrt.errors import BadRequest
from tests.bench.reports import case, machine, report


def test_comparing_says_what_became_faster() -> None:
    found = compare(report(), report(cases=(case(loop=1.5), case(images=8))))
    verdicts = {each.figure: each.verdict for each in found.differences}
    assert verdicts["torch 64x64, 2 images, guidance: loop"] == "faster"
    assert verdicts["torch 64x64, 2 images, guidance: picture"] == "faster"
    assert verdicts["torch 64x64, 2 images, guidance: decoder"] == "noise"
    assert verdicts["cold start"] == "noise"
    assert not any("8 images" in figure for figure in verdicts)
    loop = next(each for each in found.differences if each.figure.endswith("loop"))
    assert loop.ratio.value == 0.75
    assert found.notes == ()


def test_slower_is_the_other_way_round() -> None:
    found = compare(report(cases=(case(loop=1.5),)), report())
    assert {each.verdict for each in found.differences} == {"slower", "noise"}


def test_a_faster_machine_is_no_faster_program() -> None:
    found = compare(report(), report(cases=(case(loop=1.5, machine=machine(gemm=1.5e11)),)))
    assert {each.verdict for each in found.differences} == {"noise"}
    assert "150%" in found.notes[0]


def test_between_two_machines_the_verdict_is_about_both() -> None:
    faster = case(loop=1.5, machine=machine(gemm=1.5e11))
    found = compare(report(), report(cases=(faster,), provenance={"machine": {"cpu": "y"}}))
    assert "faster" in {each.verdict for each in found.differences}
    assert "machines differ" in found.notes[0]


def test_what_drew_it_is_told_where_it_differs() -> None:
    before = report()
    found = compare(before, report(place=before.place.model_copy(update={"threads": 4})))
    assert found.notes == ("threads differs: 2, then 4",)


@pytest.mark.parametrize(("name", "value"), [("model", "other"), ("steps", 20), ("guidance_scale", 1.0)])
def test_reports_of_other_pictures_are_not_compared(name: str, value: object) -> None:
    before = report()
    after = report(settings=before.settings.model_copy(update={name: value}))
    with pytest.raises(BadRequest, match=name):
        compare(before, after)


def test_reports_without_a_common_case_are_not_compared() -> None:
    with pytest.raises(BadRequest, match=r"64x64.*128x64"):
        compare(report(), report(cases=(case(width=128),)))
