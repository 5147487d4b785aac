"""Which engines are used where a bundle has several."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ldmrt.bundle import Bundle
from ldmrt.capture import Recorder
from ldmrt.engines.captured import CapturedEngine
from ldmrt.errors import EngineMismatch
from ldmrt.loader import EngineLoader
from ldmrt.manifest import EngineRecord

CPU = torch.device("cpu")


@pytest.fixture
def bundle(tiny_bundle: Path) -> Bundle:
    """The tiny bundle, its manifest saying that every engine is there in bfloat16 and on ONNX Runtime too."""
    opened = Bundle.open(tiny_bundle)
    engines = list(opened.manifest.engines)
    engines += [engine.model_copy(update={"dtype": "bfloat16", "key": f"b{engine.key[1:]}"}) for engine in engines]
    engines += [
        engine.model_copy(update={"kind": "onnxruntime", "key": f"o{engine.key[1:]}"})
        for engine in opened.manifest.engines
        if engine.component not in ("context", "schedule")
    ]
    return Bundle(opened.path, opened.manifest.model_copy(update={"engines": tuple(engines)}))


def only(records: list[EngineRecord]) -> tuple[str, str]:
    (found,) = {(record.kind, record.dtype) for record in records}
    return found


@pytest.mark.parametrize(("native", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_the_best_precision_of_the_device(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, native: bool, dtype: str
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    assert only(EngineLoader(bundle, CPU, None, None).records("step")) == ("torch", dtype)


def test_what_cannot_be_captured_is_not(bundle: Bundle) -> None:
    recorder = Recorder(torch.device("cuda"))
    assert EngineLoader(bundle, CPU, "onnxruntime", None, recorder).recorder is None
    assert EngineLoader(bundle, CPU, "torch", None, recorder).recorder is recorder


@pytest.mark.parametrize("how", ["refit", "weight_streaming"])
def test_plans_that_a_graph_cannot_hold_are_not_captured(bundle: Bundle, how: str) -> None:
    plans = [
        engine.model_copy(update={"kind": "tensorrt", "targets": ("sm_89",), how: True})
        for engine in bundle.manifest.engines
        if engine.kind == "onnxruntime"
    ]
    opened = Bundle(bundle.path, bundle.manifest.model_copy(update={"engines": (*bundle.manifest.engines, *plans)}))
    assert EngineLoader(opened, CPU, "tensorrt", None, Recorder(torch.device("cuda"))).recorder is None


def test_a_gpu_takes_the_narrow_one(bundle: Bundle) -> None:
    loader = EngineLoader(bundle, torch.device("cuda"), None, None)
    assert only(loader.records("step")) == ("torch", "bfloat16")


def test_what_was_asked_for_is_taken(bundle: Bundle) -> None:
    assert only(EngineLoader(bundle, CPU, "torch", "float32").records("step")) == ("torch", "float32")
    loader = EngineLoader(bundle, CPU, "onnxruntime", None)
    assert only(loader.records("decoder")) == ("onnxruntime", "float32")
    assert only(EngineLoader(bundle, CPU, "onnxruntime", "float32").records("context")) == ("torch", "float32")


def test_records_come_by_row_count_and_size(bundle: Bundle) -> None:
    loader = EngineLoader(bundle, CPU, "torch", "float32")
    (size,) = {record.size for record in loader.records("step")}
    rows = [record.rows for record in loader.records("step", size)]
    assert rows == sorted(rows, key=lambda count: count or 0)
    assert len(rows) == len(set(rows))
    with pytest.raises(EngineMismatch):
        loader.records("step", (8, 8))


def test_an_engine_is_loaded_once(bundle: Bundle) -> None:
    loader = EngineLoader(bundle, CPU, "torch", "float32")
    assert loader.only("context") is loader.only("context")


def test_what_is_missing_is_named(bundle: Bundle) -> None:
    torch_only = bundle.manifest.model_copy(
        update={"engines": tuple(e for e in bundle.manifest.engines if e.kind == "torch")}
    )
    with pytest.raises(EngineMismatch, match=r"has no onnxruntime engine, it has torch; build one with `ldmrt build"):
        EngineLoader(Bundle(bundle.path, torch_only), CPU, "onnxruntime", None)
    with pytest.raises(EngineMismatch, match="float16"):
        EngineLoader(bundle, CPU, "torch", "float16").records("step")


def test_a_component_set_apart_has_graphs_of_its_own(bundle: Bundle) -> None:
    """Else what runs beside it would write over its tensors."""
    shared = Recorder(torch.device("cuda"))
    loader = EngineLoader(bundle, CPU, "torch", "float32", shared)
    (first, *others) = loader.records("decoder")
    before = loader.load(first)
    loader.set_apart("decoder")
    loader.set_apart("decoder")
    recorders = {recorder_of(loader.load(record)) for record in (first, *others)}
    assert loader.load(first) is before
    assert len(recorders) == 1
    assert shared not in recorders
    assert recorder_of(loader.only("context")) is shared


def recorder_of(engine: object) -> object:
    assert isinstance(engine, CapturedEngine)
    return engine._recorder


def test_engines_that_share_their_memory_are_not_set_apart(bundle: Bundle) -> None:
    loader = EngineLoader(bundle, CPU, "onnxruntime", None)
    with pytest.raises(EngineMismatch, match=r"onnxruntime engines share the memory .* use the torch engine"):
        loader.set_apart("decoder")
