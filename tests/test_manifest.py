"""What the manifest says, and how it is written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from pydantic import ValidationError

from ldmrt.bundle import Bundle
from ldmrt.manifest import MANIFEST, FileRecord, ModelRecord, engine_key, write_manifest
from ldmrt.schedule import NoiseSchedule


@pytest.fixture
def folder(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def test_the_manifest_round_trip(folder: Path) -> None:
    manifest = Bundle.open(folder).manifest
    before = (folder / MANIFEST).read_bytes()
    write_manifest(folder, manifest)
    assert (folder / MANIFEST).read_bytes() == before
    assert Bundle.open(folder).manifest == manifest
    NoiseSchedule.from_dict(manifest.model.schedule)


def test_labels(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    assert bundle.find("step")[-1].label == "step (torch, float32, 64x64, 4 rows)"
    assert bundle.find("context")[0].label == "context (torch, float32)"


@pytest.mark.parametrize("digest", ["", "a" * 63, "A" * 64, "g" * 64])
def test_a_hash_is_one(digest: str) -> None:
    assert FileRecord(file="a", sha256="a" * 64).sha256
    with pytest.raises(ValidationError):
        FileRecord(file="a", sha256=digest)


def test_a_width_is_one_that_memory_holds(tiny_bundle: Path) -> None:
    model = Bundle.open(tiny_bundle).manifest.model.model_dump()
    assert ModelRecord.model_validate(model | {"guidance_embedding": 256}).guidance_embedding == 256
    with pytest.raises(ValidationError):
        ModelRecord.model_validate(model | {"guidance_embedding": 1 << 60})
    with pytest.raises(ValidationError):
        ModelRecord.model_validate(model | {"defaults": model["defaults"] | {"guidance_scale": 1e39}})


def test_keys_depend_on_what_is_said_and_not_on_the_order() -> None:
    assert engine_key({"a": 1, "b": [2]}) == engine_key({"b": [2], "a": 1})
    assert engine_key({"a": 1}) != engine_key({"a": "1"}) != engine_key({"b": 1})
