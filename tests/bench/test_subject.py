"""What is measured: bundles as they are, models and architectures built first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ldmrt.bench.pictures import control_picture, work_of
from ldmrt.bench.subject import Wish, subject
from ldmrt.export import random_checkpoint
from ldmrt.opening import builtin_bundle
from ldmrt.pipeline import Pipeline


def test_a_bundle_is_taken_as_it_is(tiny_bundle: Path, tmp_path: Path) -> None:
    found = subject(tiny_bundle, None, tmp_path, Wish(batches=[77]))
    assert (found.bundle, found.model, found.build) == (tiny_bundle, None, None)


@pytest.mark.parametrize("arch", [None, "shapes"])
@pytest.mark.parametrize("wish", [Wish(), Wish(batches=[1, 4], sizes=[(128, 128)], dtype="float32", engine="torch")])
def test_the_built_in_model_is_both(arch: str | None, wish: Wish) -> None:
    found = subject(None, arch, Path("nowhere"), wish)
    assert found.bundle == found.model == builtin_bundle()
    assert found.build is None


def test_a_model_is_built_and_so_is_the_built_in_one_for_what_it_has_not(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Path, Wish]] = []

    def built(model: Path, cache: Path, wish: Wish, on_progress: object) -> str:
        asked.append((model, wish))
        return "built"

    monkeypatch.setattr("ldmrt.bench.subject._built", built)
    for wish in (
        Wish(batches=[1, 3]),
        Wish(sizes=[(128, 128), (64, 64)]),
        Wish(dtype="bfloat16"),
        Wish(engine="onnxruntime"),
    ):
        assert subject(None, None, tmp_path, wish) == "built"  # type: ignore[comparison-overlap]
        assert asked[-1] == (builtin_bundle(), wish)
    assert subject(tiny_model, None, tmp_path, Wish()) == "built"  # type: ignore[comparison-overlap]
    assert asked[-1] == (tiny_model, Wish())


@pytest.mark.slow
def test_an_architecture_gets_weights_and_a_bundle_once(
    tiny_architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wish = Wish(dtype="float32")
    seen: list[str] = []
    found = subject(None, tiny_architecture, tmp_path, wish, lambda what, done, total: seen.append(what))
    assert found.model == tmp_path / "bench" / tiny_architecture
    assert found.bundle.is_relative_to(tmp_path)
    assert found.build is not None
    assert found.build.seconds > 0
    assert found.build.peak_resident_bytes is not None
    assert found.build.peak_resident_bytes > 50e6  # of a process with torch in it
    assert (found.build.engines > 5, found.build.reused) == (True, 0)
    assert seen[0] == f"random weights of {tiny_architecture}"
    assert len(set(seen)) > 3  # the build tells, too
    manifest = (found.bundle / "ldmrt.json").read_bytes()

    def never(*_: object, **__: object) -> None:
        raise AssertionError("written again")

    monkeypatch.setattr(random_checkpoint, "write_checkpoint", never)
    again = subject(None, tiny_architecture, tmp_path, wish)
    assert again.bundle == found.bundle
    assert again.build is not None
    assert (again.build.engines, again.build.reused) == (0, found.build.engines)
    assert (found.bundle / "ldmrt.json").read_bytes() == manifest


@pytest.mark.slow
def test_an_architecture_may_come_with_a_controlnet(tiny_architecture: str, tmp_path: Path) -> None:
    found = subject(None, f"{tiny_architecture}-controlnet", tmp_path, Wish(dtype="float32"))
    assert found.model == tmp_path / "bench" / tiny_architecture
    assert found.controlnet == tmp_path / "bench" / f"{tiny_architecture}-controlnet"
    pipe = Pipeline.from_bundle(found.bundle, "cpu")
    assert [each.name for each in pipe.bundle.manifest.controlnets] == [found.controlnet.name]
    free, controlled = (
        pipe("a red circle", seed=1, num_inference_steps=1, output_type="np", control_image=control).images
        for control in (None, control_picture(64, 64))
    )
    assert abs(free - controlled).max() > 1e-3  # it has a say
    works = [work_of(pipe, (64, 64), 1, 2, 5, controlled=each) for each in (False, True)]
    assert works[0] is not None
    assert works[1] is not None
    assert 1.2 < works[1].step_flops / works[0].step_flops < 1.8  # a ControlNet is the U-Net's first half
    assert works[1].picture_flops - works[0].picture_flops > 5 * (works[1].step_flops - works[0].step_flops)


@pytest.fixture
def tiny_architecture(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An architecture that is known here alone, of the small model's sizes."""
    known = tmp_path / "known"
    known.mkdir()
    configs = {
        folder: json.loads((tiny_model / folder / "config.json").read_text())
        for folder in ("text_encoder", "unet", "vae")
    }
    # The tokenizer of a random checkpoint is the built-in model's.
    tokenizer = json.loads((builtin_bundle() / "tokenizer" / "vocab.json").read_text())
    configs["text_encoder"] |= {"vocab_size": len(tokenizer)}
    scheduler = json.loads((tiny_model / "scheduler" / "scheduler_config.json").read_text())
    document = {"pipeline": "StableDiffusionPipeline", "scheduler": scheduler, **configs}
    (known / "small.json").write_text(json.dumps(document))
    monkeypatch.setattr(random_checkpoint, "ARCHITECTURES", known)
    return "small"
