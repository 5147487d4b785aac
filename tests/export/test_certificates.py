"""Which engines are run for a certificate, where, against what, and what is kept for a GPU that is not there.

That engines of real builds agree with their originals is in tests/export/test_build.py and test_tensorrt.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import onnxruntime
import pytest
import torch
import transformers

from ldmrt.bundle import Bundle
from ldmrt.errors import BuildError
from ldmrt.export import architectures, certificates
from ldmrt.export.certificates import certified
from ldmrt.export.component import Component
from ldmrt.export.folder import BundleFolder
from ldmrt.export.source import Checkpoint, Source
from ldmrt.manifest import EngineRecord
from ldmrt.verify import Tensors, Trial, read_trials


@pytest.fixture(scope="module")
def source(tiny_model: Path) -> Source:
    return Source.open(tiny_model)


def component(source: Source, name: str) -> Component:
    return next(c for _, c, _ in architectures.components(source, [(64, 64)], None) if c.name == name)


def records(bundle: Bundle, *names: str) -> list[EngineRecord]:
    """The engines of a component of one row, and what they need."""
    kind = "onnxruntime" if any(r.kind == "onnxruntime" for r in bundle.manifest.engines) else "torch"
    found = [r for r in bundle.manifest.engines if r.component in names and r.rows in (None, 1) and r.kind == kind]
    assert len(found) == len(names)
    return found


def trials(name: str) -> list[Trial]:
    draw = torch.Generator().manual_seed(3)
    inputs = {"latents": torch.randn(1, 4, 8, 8, generator=draw)}
    if name == "text_encoder":
        inputs = {"input_ids": torch.arange(77)[None] % 40}
    if name == "unet":
        inputs |= {"timesteps": torch.tensor([7.0]), "encoder_hidden_states": torch.randn(1, 77, 32, generator=draw)}
    return [Trial("random", inputs), Trial("real", {key: value.flip(-1) for key, value in inputs.items()})]


def originals(source: Source, made: Component, tried: Sequence[Trial]) -> list[dict[str, torch.Tensor]]:
    module = architectures.reference(made, Checkpoint(source, made.folder, made.original))
    with torch.inference_mode():
        outputs = [module(*(trial.inputs[spec.name] for spec in made.inputs)) for trial in tried]
    return [dict(zip(made.outputs, each, strict=True)) for each in outputs]


def certify(
    source: Source, path: Path, made: Component, engines: list[EngineRecord], expected: list[Any] | None = None
) -> list[EngineRecord]:
    tried = trials(made.name)
    expected = originals(source, made, tried) if expected is None else expected
    checkpoint = Checkpoint(source, made.folder, made.original)
    folder, bundle = BundleFolder(path), Bundle.open(path)
    with folder.open():
        return certified(folder, bundle, made, checkpoint, engines, tried, expected)


@pytest.fixture
def path(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("text_encoder", f"transformers {transformers.__version__} CLIPTextModel, float32"),
        ("decoder", f"diffusers {diffusers.__version__} AutoencoderKL, float32"),
    ],
)
def test_what_a_certificate_says(name: str, reference: str, source: Source, path: Path) -> None:
    made = component(source, name)
    (record,) = certify(source, path, made, records(Bundle.open(path), name))
    assert record.certificate.status == "verified"
    assert record.certificate.reference == reference
    assert record.certificate.relative_error.keys() == {"random", "real"}
    # Above nothing, since sums are taken in another order, and far below what is allowed.
    assert max(record.certificate.relative_error.values()) < 1e-5 < record.certificate.tolerance
    assert record.trials is None


def test_the_parts_of_a_network_have_the_certificate_of_the_whole(source: Source, path: Path) -> None:
    engines = records(Bundle.open(path), "context", "schedule", "step")
    found = certify(source, path, component(source, "unet"), engines)
    assert [record.key for record in found] == [record.key for record in engines]
    assert len({record.certificate.model_dump_json() for record in found}) == 1
    assert found[0].certificate.reference == f"diffusers {diffusers.__version__} UNet2DConditionModel, float32"


def test_fused_loras_are_named(source: Source, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoint, "fused", True, raising=False)
    (record,) = certify(source, path, component(source, "decoder"), records(Bundle.open(path), "decoder"))
    assert record.certificate.reference.endswith("AutoencoderKL, float32, LoRAs fused")


def test_an_engine_that_makes_something_else(source: Source, path: Path) -> None:
    """One value of the last trial is off by a thousandth of all: the limit is a tenth of that."""
    made = component(source, "decoder")
    expected = originals(source, made, trials("decoder"))
    image = expected[1]["image"].clone()
    image[0, 0, 0, 0] += 1e-3 * image.norm()
    expected[1] = {"image": image}
    with pytest.raises(
        BuildError, match=r"^decoder .*does not agree with the original model: .* on real inputs, at most 1e-04"
    ):
        certify(source, path, made, records(Bundle.open(path), "decoder"), expected)


# ---------------------------------------------------------------------------------------------------- a GPU that is not there


@pytest.fixture
def plans(tiny_bundle_onnx: Path, tmp_path: Path) -> Path:
    """Engines of ONNX Runtime, which are taken for plans: as with those, the second file is the ONNX."""
    return Path(shutil.copytree(tiny_bundle_onnx, tmp_path / "bundle"))


def as_plan(record: EngineRecord) -> EngineRecord:
    changes = {"kind": "tensorrt-rtx", "targets": ("sm_89",), "files": (record.files[0], *record.files)}
    return record.model_copy(update=changes)


def test_its_onnx_stands_in(source: Source, plans: Path) -> None:
    made = component(source, "decoder")
    tried = trials("decoder")
    expected = originals(source, made, tried)
    (record,) = certify(source, plans, made, [as_plan(records(Bundle.open(plans), "decoder")[0])], expected)
    certificate = record.certificate
    assert certificate.status == (
        f"unverified: target absent (its ONNX agrees, on ONNX Runtime {onnxruntime.__version__})"
    )
    assert certificate.relative_error.keys() == {"random", "real"}
    assert all(0 < error < certificate.tolerance for error in certificate.relative_error.values())
    # What the GPU is to be compared with is kept, all of it.
    assert record.trials is not None
    kept, theirs = read_trials(plans / record.trials.file)
    assert [trial.kind for trial in kept] == ["random", "real"]
    for found, given in zip(kept, tried, strict=True):
        assert torch.equal(found.inputs["latents"], given.inputs["latents"])
    for one, other in zip(theirs, expected, strict=True):
        assert torch.equal(one["image"], other["image"])


def test_an_onnx_that_does_not_agree_ends_the_build(source: Source, plans: Path) -> None:
    made = component(source, "decoder")
    expected: list[Tensors] = [{"image": 1.01 * one["image"]} for one in originals(source, made, trials("decoder"))]
    with pytest.raises(
        BuildError, match=r"does not agree with the original model: relative error 9\.9\de-03 on random"
    ):
        certify(source, plans, made, [as_plan(records(Bundle.open(plans), "decoder")[0])], expected)
    assert not (plans / "trials").exists()


@pytest.mark.parametrize(
    ("kind", "dtype", "here", "device"),
    [
        ("torch", "float32", "sm_89", "cpu"),  # without TF32, as the original
        ("torch", "float16", "sm_89", "cuda"),
        ("torch", "float16", None, "cpu"),
        ("tensorrt-rtx", "float16", "sm_89", "cuda"),
        ("tensorrt-rtx", "float16", "sm_86", "cpu"),
        ("tensorrt-rtx", "float16", None, "cpu"),
        ("onnxruntime", "float32", "sm_89", "cpu"),
    ],
)
def test_where_an_engine_is_tried(
    kind: str, dtype: str, here: str | None, device: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certificates, "gpu_at_hand", lambda: here)
    targets = ("sm_89",) if kind == "tensorrt-rtx" else ()
    record = records(Bundle.open(path), "decoder")[0].model_copy(
        update={"kind": kind, "dtype": dtype, "targets": targets}
    )
    assert certificates._device_for([record]) == torch.device(device)
