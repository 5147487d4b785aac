"""`ldmrt bench` and `ldmrt bench-compare`: from the command line to the file and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ldmrt.bench import cold, run
from ldmrt.bench.report import STAGES, Report
from ldmrt.cli import app
from ldmrt.errors import LdmrtError

RUNNER = CliRunner()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates of small operands: they are not what is tested here."""
    monkeypatch.setattr(run, "gemm_rate", lambda *_, **__: 1e11)
    monkeypatch.setattr(run, "copy_rate", lambda *_, **__: 1e10)


@pytest.mark.usefixtures("small")
def test_measured_written_and_compared(tiny_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    options = ["--engines", str(tiny_bundle), "--steps", "2", "--runs", "1", "--device", "cpu", "--batch", "2"]
    options += ["--sampler", "DPM++ 2M Karras"]
    ended = RUNNER.invoke(app, ["bench", *options, "--json", "--output", str(path)])
    assert ended.exit_code == 0, ended.stderr
    document = json.loads(ended.stdout)
    assert document == json.loads(path.read_text())
    assert "1 run of a case says little" in ended.stderr
    report = Report.read(path)
    assert [(case.images, case.guidance) for case in report.cases] == [(2, True), (2, False)]
    assert list(report.cases[0].stage_seconds) == list(STAGES)
    assert (report.settings.steps, report.settings.sampler) == (2, "dpm++ 2m karras")
    assert report.build is None
    # A process with torch in it takes more than 50 MB, and its stages less than the whole of it.
    assert report.cold.peak_resident_bytes > 50e6
    assert report.cold.seconds.median > sum(series.median for series in report.cold.stage_seconds.values()) > 0

    ended = RUNNER.invoke(app, ["bench-compare", str(path), str(path)])
    assert ended.exit_code == 0
    assert "torch 64x64, 2 images, guidance: loop" in ended.stdout
    assert "noise" in ended.stdout
    assert "faster" not in ended.stdout
    ended = RUNNER.invoke(app, ["bench-compare", str(path), str(path), "--json"])
    assert {each["ratio"]["value"] for each in json.loads(ended.stdout)["differences"]} == {1.0}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--batch", "3"], "--batch is 3"),
        (["--size", "72x72"], "72"),
        (["--against", "other"], "expected diffusers, torch.compile, onnxruntime, openvino"),
        (["--against", "diffusers"], "built from"),
        (["--output", "none/a.json"], "no folder none"),
        (["--plot", "a.pdf"], ".png or .html"),
        (["--arch", "sd15"], "choose one"),
        (["--engine", "tensorrt"], "has no tensorrt engine"),
        (["--steps", "5000"], "--steps is 5000"),
        (["--mlperf", "--steps", "20"], "--steps and --mlperf were given"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(tiny_bundle: Path, options: list[str], words: str) -> None:
    ended = RUNNER.invoke(app, ["bench", "--engines", str(tiny_bundle), "--device", "cpu", *options])
    assert ended.exit_code == 1
    assert ended.stdout == ""
    assert ended.stderr.count("\n") == 1
    assert words in ended.stderr


def test_a_cold_start_that_fails_says_why(tiny_bundle: Path) -> None:
    with pytest.raises(LdmrtError, match=r"exit code 1: .*--steps"):
        cold.cold_starts(["a", "--engines", str(tiny_bundle), "--steps", "-1"], runs=1)
