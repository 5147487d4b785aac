"""The example of embedding, run as a user would."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from PIL import Image

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "embed_batch.py"


def test_every_request_gets_its_pictures(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pictures"
    monkeypatch.setattr("sys.argv", [str(SCRIPT), str(out), "--engines", str(tiny_bundle), "--device", "cpu"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    names = {path.name for path in out.iterdir()}
    wanted = {"thread": 4, "coroutine": 5, "preview": 2}
    assert names == {f"{kind}-{number}.png" for kind, count in wanted.items() for number in range(count)}
    for path in out.iterdir():
        with Image.open(path) as picture:
            assert picture.size == (64, 64)
    # The same prompt and seed by another sampler is another picture.
    assert (out / "coroutine-0.png").read_bytes() != (out / "coroutine-1.png").read_bytes()
    assert "received=10, served=9, failed=0, rejected=0, cancelled=1" in capsys.readouterr().out
