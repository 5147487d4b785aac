"""`ldmrt inspect`: what it shows, and the damage that it finds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from ldmrt.manifest import MANIFEST

from .conftest import Run


def test_inspect_shows_what_was_fused(run: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(tiny_bundle, tmp_path / "fused"))
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["loras"] = [{"file": "a.safetensors", "sha256": "ab" * 32, "scale": 0.8}]
    (path / MANIFEST).write_text(json.dumps(manifest))
    assert "fused: a.safetensors, scale 0.8 (SHA-256 abababababab...)" in run("inspect", path).out
    assert json.loads(run("inspect", path, "--json").out)["loras"] == manifest["loras"]
    assert "fused:" not in run("inspect", tiny_bundle).out


def test_inspect(run: Run, tiny_bundle: Path) -> None:
    ended = run("inspect", tiny_bundle, "--check")
    assert (ended.code, ended.err) == (0, "")
    for word in ("text_encoder", "unet.float32", "64x64", "runs here", "files checked", "captured", "request"):
        assert word in ended.out
    document = json.loads(run("inspect", tiny_bundle, "--check", "--json").out)
    manifest = json.loads((tiny_bundle / MANIFEST).read_text(encoding="utf-8"))
    assert document["model"] == manifest["model"]
    assert document["passes"] == manifest["passes"]
    assert document["check"]["problems"] == []
    for found, engine in zip(document["engines"], manifest["engines"], strict=True):
        assert found["runs_here"] is True
        assert engine["certificate"] == found["certificate"]
        for file in found["files"]:
            assert file["bytes"] == (tiny_bundle / file["file"]).stat().st_size


def test_inspect_finds_damage(run: Run, tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    next(bundle.glob("weights/unet*")).unlink()
    next(bundle.glob("graphs/*.json")).write_text("{}")
    assert run("inspect", bundle).code == 0
    ended = run("inspect", bundle, "--check", "--json")
    assert ended.code == 1
    assert len(json.loads(ended.out)["check"]["problems"]) == 2
    assert "(and 1 more)" in ended.err
    assert ended.err.count("\n") == 1
