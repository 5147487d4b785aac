"""Reports: their arithmetic, and that they come back from a file as they went in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ldmrt.bench.report import Report
from ldmrt.errors import BadRequest
from tests.bench.reports import case, report, series


def test_rates_are_counts_over_medians() -> None:
    found = case(loop=2.0, images=2)
    assert found.steps_per_second == 5.0
    assert found.rows_per_second == 19 * 4 / 2.0
    assert found.images_per_second == 2 / 4.0
    assert found.gemm_share == pytest.approx(19 * 1e9 / 2.0 / 1e11)
    assert found.copy_share == pytest.approx(19 * 1e8 / 2.0 / 1e10)
    assert case(work=None).gemm_share is None


def test_the_best_case_draws_most_images_a_second() -> None:
    few, many, bare = case(loop=2.0, images=1), case(loop=6.0, images=4), case(loop=1.0, images=4, guidance=False)
    assert report(cases=(few, bare, many)).best == many


def test_series() -> None:
    found = series(1.0, 2.0, 3.0, 4.0, 10.0)
    assert found.median == 3.0
    assert found.spread == pytest.approx(2 / 3)  # quartiles 2 and 4
    assert found.summary == {"n": 5, "p50": 3.0, "p90": pytest.approx(7.6), "p99": pytest.approx(9.76), "min": 1.0}


def test_a_report_comes_back_from_its_file(tmp_path: Path) -> None:
    made = report()
    path = tmp_path / "report.json"
    made.write(path)
    assert Report.read(path) == made
    document = json.loads(path.read_text())
    assert document == made.document()
    assert document["format"] == 1
    assert document["cases"][0]["picture_seconds"]["summary"]["n"] == 5
    assert [each.name for each in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize(
    ("text", "word"), [("{}", "settings"), ("nothing", "JSON"), ('{"format": 2}', "format"), ("", "JSON")]
)
def test_what_is_no_report_is_refused(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(BadRequest, match=word) as caught:
        Report.read(path)
    assert "measure again" in str(caught.value)


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="No such file"):
        Report.read(tmp_path / "none.json")


def test_the_schema_in_the_docs_is_this_one() -> None:
    """Whoever changes the document changes the file that describes it; write it anew with the line in its message."""
    path = Path(__file__).resolve().parents[2] / "docs" / "bench-report.schema.json"
    expected = Report.model_json_schema(mode="serialization")
    assert json.loads(path.read_text()) == expected, "docs/bench-report.schema.json: json.dumps(expected, indent=1)"
