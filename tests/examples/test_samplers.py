"""The sheet of all samplers."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from PIL import Image

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "samplers.py"


def test_the_sheet_has_a_picture_for_every_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "sheet.png"
    monkeypatch.setattr("sys.argv", [str(SCRIPT), str(out), "--steps", "1"])
    made = runpy.run_path(str(SCRIPT), run_name="__main__")
    with Image.open(out) as sheet:
        rows = -(-len(made["NAMES"]) // made["COLUMNS"])
        assert sheet.size == (made["COLUMNS"] * 136 + 8, rows * 154 + 8)
        assert len(sheet.convert("RGB").getcolors(1 << 24) or ()) > 1000
