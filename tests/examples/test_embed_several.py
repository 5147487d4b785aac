"""The example of several models on one device, run as a user would."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from PIL import Image

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "embed_several.py"


def run(out: Path, *models: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        given = [argument for model in models for argument in ("--model", model)]
        patch.setattr("sys.argv", [str(SCRIPT), str(out), *given, "--device", "cpu"])
        runpy.run_path(str(SCRIPT), run_name="__main__")


def test_several_models_draw_side_by_side_within_their_parts(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    roomy = tmp_path / "alone"
    run(roomy, f"{tiny_bundle}=1GB")
    out = tmp_path / "together"
    with pytest.raises(Exception, match=r"needs (\d+\.\d) MB") as least:
        run(out, f"{tiny_bundle}=1kB")
    tight = float(str(least.value).partition("needs ")[2].split()[0]) + 0.2
    capsys.readouterr()
    run(out, f"{tiny_bundle}=1GB", f"{tiny_bundle}={tight:.1f}MB")
    said = capsys.readouterr().out
    assert "all stays in memory" in said
    assert "in memory only while they work" in said
    assert f"2 models within {1000 + tight:.0f} MB" in said
    pictures = {path.name: path.read_bytes() for path in out.iterdir()}
    assert len(pictures) == 4
    alone = {path.name: path.read_bytes() for path in roomy.iterdir()}
    for number in range(2):
        for seed in range(2):
            # A budget changes no picture.
            found = f"{number}-{tiny_bundle.name}-{seed}.png"
            assert pictures[found] == alone[f"0-{tiny_bundle.name}-{seed}.png"]
            with Image.open(out / found) as picture:
                assert picture.size == (64, 64)
