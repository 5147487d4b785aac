"""The built-in model: the bundle that ships is the one that a fresh build makes, and its pictures are right."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ldmrt.bundle import Bundle
from ldmrt.export.build import build_engines
from ldmrt.graph import to_json
from ldmrt.manifest import MANIFEST, EngineRecord
from ldmrt.opening import builtin_bundle
from ldmrt.pipeline import Pipeline

MOST_BYTES = 24_000_000


@pytest.fixture(scope="module")
def shipped() -> Bundle:
    return Bundle.open(builtin_bundle())


def slot(record: EngineRecord) -> tuple[object, ...]:
    return record.component, record.kind, record.dtype, record.size, record.rows


def test_it_is_small(shipped: Bundle) -> None:
    weights = [path for path in shipped.path.rglob("*.safetensors") if path.parent.name != "graphs"]
    assert sum(path.stat().st_size for path in weights) <= MOST_BYTES
    assert {path.parent.name for path in weights} == {"text_encoder", "unet", "vae"}  # once each


def test_every_file_is_as_the_manifest_says(shipped: Bundle) -> None:
    for record in shipped.records():
        shipped.checked(record)
    named = {record.file for record in shipped.records()}
    graphs = {path.relative_to(shipped.path).as_posix() for path in (shipped.path / "graphs").iterdir()}
    assert graphs <= named


def test_every_engine_is_verified(shipped: Bundle) -> None:
    for record in shipped.manifest.engines:
        assert record.certificate.status == "verified"
        assert max(record.certificate.relative_error.values()) <= record.certificate.tolerance


def test_nothing_tells_where_it_was_made(shipped: Bundle) -> None:
    for path in shipped.path.rglob("*.json"):
        if path.name == "vocab.json":  # a slash is a token
            continue
        text = path.read_text()
        assert "_name_or_path" not in text
        assert '"/' not in text  # no absolute path


def test_it_equals_a_fresh_build(shipped: Bundle, tmp_path: Path) -> None:
    model = tmp_path / "shapes"
    shutil.copytree(shipped.path, model, ignore=shutil.ignore_patterns(MANIFEST, "graphs"))
    batches = [record.rows or 1 for record in shipped.find("decoder")]
    fresh = build_engines(model, model, dtype="float32", batch_sizes=batches)
    ours = {slot(record): record for record in shipped.manifest.engines}
    theirs = {slot(record): record for record in fresh.manifest.engines}
    assert ours.keys() == theirs.keys()
    for field in ("model", "source", "tokenizer_files", "weights", "passes"):
        assert getattr(shipped.manifest, field) == getattr(fresh.manifest, field), field
    same_versions = all(ours[key].versions == theirs[key].versions for key in ours)
    for key, record in ours.items():
        if same_versions:  # other versions may name nodes otherwise
            assert to_json(shipped.graph(record)) == to_json(fresh.graph(theirs[key]))
        if record.component == "decoder":
            latents = torch.randn(record.rows or 1, 4, 16, 16, generator=torch.Generator("cpu").manual_seed(0))
            cpu = torch.device("cpu")
            first, second = (
                b.load(r, cpu).run({"latents": latents}) for b, r in ((shipped, record), (fresh, theirs[key]))
            )
            torch.testing.assert_close(first, second)


def test_defaults_are_the_models_own(shipped: Bundle) -> None:
    given = json.loads((shipped.path / "ldmrt-defaults.json").read_text())
    defaults = shipped.manifest.model.defaults
    assert given == {"num_inference_steps": defaults.num_inference_steps, "guidance_scale": defaults.guidance_scale}
    assert (defaults.width, defaults.height) == (128, 128)


def test_a_red_circle_is_a_red_circle() -> None:
    """By three pixels' worth of judgement; examples/shapes/evaluate.py judges 400 captions."""
    pipe = Pipeline.from_bundle(device="cpu")
    picture = pipe("a large red circle on a white background", seed=1, output_type="np").images[0]
    red = (picture[..., 0] > 0.7) & (picture[..., 1] < 0.35) & (picture[..., 2] < 0.35)
    white = (picture > 0.85).all(-1)
    assert 0.1 < red.mean() < 0.3  # a circle of 60 pixels covers 17 % of 128 x 128
    assert white.mean() > 0.6
    rows, columns = np.nonzero(red)
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert abs(height - width) <= 6
    assert abs(red.sum() / (height * width) - np.pi / 4) < 0.06  # the share of its box that a circle fills
